"""The measurement itself.

All contexts of a group are filled with the same random tokens, from the smallest depth to the largest, each once. At every
depth all of them get there before any is measured; then each repeat measures, in turn and starting with another context
each time, the prefill of one micro-batch of 512 tokens and the decode of N single tokens, and each context is taken back.
The time that filling took, from the empty cache on, is the time of the whole prompt of each of these lengths ("whole"), so
a table of lengths costs one prompt, not their sum. The two dense configurations cannot share a filling (flash attention
wants V the other way round, and llama.cpp refuses a saved state of the other kind), but both are prompts that had to be
measured anyway. The median of the repeats counts, and of the two dense configurations the faster one, for each test.

Attention is timed in one more pass a test (tca_profile): the first repeat shows which nodes the graph has, the extra pass
computes attention apart from the rest. The rates come from the repeats alone.

Random tokens are what llama-bench uses too: how many tokens each head keeps depends on the budgets, not on the text.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tca_gguf import kv, logs, native
from tca_gguf.budgets import SLIDING, Budgets
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape, model_shape
from tca_gguf.loading import UBATCH, context_size, default_threads

from .cases import TESTS, Case, Settings, default_depths, ggml_type, groups, resolve
from .machine import Limits, hardware
from .results import Attention, Result, Sample, attention_work, rows_of, stall
from .runner import Runner

if TYPE_CHECKING:
    from tca_gguf.calib.runtime import Model

SEED = 42
PROFILED = 8  # single tokens of the extra pass
AROUND = 16  # single tokens before the one that compacts, and after it
Report = Callable[[str], None]


def run(
    path: str | os.PathLike[str],
    settings: Settings,
    report: Report,
    on_depth: Callable[[Result], None] = lambda result: None,
    verbose: bool = False,
) -> Result:
    """Measures everything in ``settings``. Raises TcaError.

    report(text) is called with what is being done, on_depth(result) whenever rows were added. An interrupt (Ctrl-C) ends the
    run: what was found until then is returned, with ``interrupted`` set.
    """
    from tca_gguf import llama
    from tca_gguf.calib.runtime import Model

    path = Path(path)
    threads = settings.n_threads or default_threads()
    plan, budgets = groups(settings), resolve(path, settings.budgets)
    shape = model_shape(path)
    depths = settings.depths or default_depths(shape.n_ctx_train)
    settings = replace(settings, n_threads=threads, depths=tuple(sorted(depths)))
    if settings.depths[-1] + UBATCH > shape.n_ctx_train > 0:
        report(f"note: depth {settings.depths[-1]} is past the {shape.n_ctx_train} tokens that the model was trained with")
    log = logs.take_over(llama.load(), verbose)
    limits = Limits(threads)
    result = Result(hardware() | limits.measure(), {"model": path.name, **asdict(settings), "n_ubatch": UBATCH, "seed": SEED})
    try:
        with Model(path, n_gpu_layers=settings.n_gpu_layers) as model:
            for cases in plan:
                _Group(result, limits, model, shape, cases, budgets, settings, report, log).measure(on_depth)
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def kv_bytes(case: Case, budgets: Budgets, shape: ModelShape, depth: int) -> int:
    """Bytes of a cache with room for this depth and a micro-batch. budgets: any that fit the model, for the dense case."""
    size = kv.predicted(shape, budgets, depth + UBATCH, case.kv_type)
    return size.stock if case.budgets is None else size.allocated


def next_compaction(budgets: Budgets, depth: int) -> int | None:
    """Tokens at which the next group after ``depth`` is compacted; None if no head forgets anything."""
    if not (budgets.head_kept_fraction() < 1).any():  # dense, or the NaN of a sliding-window layer
        return None
    done = native.plan_groups(budgets, depth)
    return next(n for n in itertools.count(depth + 1) if native.plan_groups(budgets, n) > done)


class _Group:
    """Cases that are measured in alternation, and the contexts they have."""

    def __init__(
        self,
        result: Result,
        limits: Limits,
        model: Model,
        shape: ModelShape,
        cases: Sequence[Case],
        budgets: dict[str, Budgets],
        settings: Settings,
        report: Report,
        log: logs.LlamaLog,
    ) -> None:
        self.result, self.model, self.shape, self.cases, self.budgets = result, model, shape, cases, budgets
        self.settings, self.report, self.log, self.limits = settings, report, log, limits
        last = settings.depths[-1]
        rng = random.Random(SEED)
        self.ends = {name: next_compaction(b, last) for name, b in budgets.items()}
        longest = max([UBATCH, settings.n_gen + 1, *(end - last + AROUND for end in self.ends.values() if end)])
        self.tokens = [rng.randrange(model.n_vocab) for _ in range(last + longest)]
        self.n_ctx = context_size(len(self.tokens))
        self.samples: dict[tuple[str, int, Case], Sample] = {}

    @contextlib.contextmanager
    def _runners(self) -> Iterator[list[Runner]]:
        with contextlib.ExitStack() as stack:
            runners = []
            for case in self.cases:
                budgets = None if case.budgets is None else self.budgets[case.budgets]
                try:
                    runner = Runner(self.model, case, budgets, self.n_ctx, self.settings.n_threads)
                except TcaError as error:
                    raise TcaError(f"{error}: {self.log.reason() or 'not enough memory; use fewer or smaller --depths'}") from None
                stack.callback(runner.close)
                runners.append(runner)
            yield runners

    def _sample(self, test: str, depth: int, runner: Runner) -> Sample:
        case = runner.case
        key = (test, depth, case)
        if key not in self.samples:
            any_budgets = next(iter(self.budgets.values()))
            size = kv_bytes(case, runner.budgets or any_budgets, self.shape, depth)
            self.samples[key] = Sample(test, depth, case.kv_type, case.config, case.budgets, size, [])
        return self.samples[key]

    def _ordered(self, last: int) -> list[Sample]:
        """The samples up to a depth by depth, test and case. Of larger ones only earlier passes may have been measured yet."""
        places = itertools.product((d for d in self.settings.depths if d <= last), TESTS, self.cases)
        return [self.samples[test, depth, case] for depth, test, case in places if (test, depth, case) in self.samples]

    def measure(self, on_depth: Callable[[Result], None]) -> None:
        done, found = len(self.result.rows), len(self.result.samples)
        with self._runners() as runners:
            self.turn = itertools.count()
            for runner in runners:
                self.report(f"{runner.case.label}: warming up")
                runner.warm_up(self.tokens)
            for i in range(self.settings.passes):
                for depth in self.settings.depths:
                    for runner in self._in_turn(runners):
                        self.report(f"{runner.case.label}: filling up to {depth}" + (f", pass {i + 1}" if i else ""))
                        runner.extend(self.tokens[:depth])
                        if "whole" in self.settings.tests:
                            self._sample("whole", depth, runner).tps.append(depth / runner.seconds)
                    if i + 1 == self.settings.passes:
                        self._at_depth(depth, runners)
                        samples = self._ordered(depth)
                        self.result.samples[found:], self.result.rows[done:] = samples, rows_of(samples)
                        on_depth(self.result)
                if i + 1 < self.settings.passes:
                    for runner in runners:
                        runner.restart()
            if "decode" in self.settings.tests:
                for runner in runners:
                    self._compaction(runner)

    def _in_turn(self, runners: list[Runner]) -> list[Runner]:
        first = next(self.turn) % len(runners)
        return runners[first:] + runners[:first]

    def _at_depth(self, depth: int, runners: list[Runner]) -> None:
        tests: dict[str, Callable[[Runner, Sample, bool], None]] = {"prefill": self._prefill, "decode": self._decode}
        if not any(test in self.settings.tests for test in tests):
            return
        self.result.hardware |= self.limits.measure()
        for runner in runners:
            runner.keep()
        for test, measure in tests.items():
            if test not in self.settings.tests:
                continue
            for i in range(self.settings.repeat):
                for runner in self._in_turn(runners):
                    self.report(f"{runner.case.label} @ {depth}: {test}, repeat {i + 1} of {self.settings.repeat}")
                    measure(runner, self._sample(test, depth, runner), i == 0)
                    runner.rewind()
            for runner in runners:
                self.report(f"{runner.case.label} @ {depth}: {test}, attention")
                sample = self._sample(test, depth, runner)
                sample.attention = self._attention(runner, UBATCH if test == "prefill" else 1)
                runner.rewind()

    def _next(self, runner: Runner, n: int) -> list[int]:
        return self.tokens[runner.depth : runner.depth + n]

    def _prefill(self, runner: Runner, sample: Sample, first: bool) -> None:
        if first:
            runner.profile.learn()
        sample.tps.append(UBATCH / runner.feed(self._next(runner, UBATCH), UBATCH)[0])
        runner.profile.off()

    def _decode(self, runner: Runner, sample: Sample, first: bool) -> None:
        """One token sets up the graph, then n_gen are timed."""
        if first:
            runner.profile.learn()
        tokens = self._next(runner, 1 + self.settings.n_gen)
        runner.feed(tokens[:1], 1)
        runner.profile.off()
        seconds = runner.feed(tokens[1:], 1)
        sample.tps.append(len(seconds) / sum(seconds))
        sample.token_ms += [1e3 * s for s in seconds]

    def _attention(self, runner: Runner, step: int) -> Attention | None:
        """One more pass with attention timed apart.

        None if a group is compacted where the learned graph has none, or if some layers have sliding-window attention: what the
        stock cache reads there is not known here.
        """
        if any((budgets.head_config == SLIDING).any() for budgets in self.budgets.values()):
            return None
        tokens = self._next(runner, UBATCH if step > 1 else 1 + PROFILED)
        if step == 1:
            runner.feed(tokens[:1], 1)
            tokens = tokens[1:]
        visible = runner.visible()
        runner.profile.start()
        runner.feed(tokens, step)
        try:
            seconds = runner.profile.read()
        except TcaError:
            return None
        finally:
            runner.profile.off()
        shape, kind = self.shape, ggml_type(runner.case.kv_type)
        row = native.row_bytes(kind, shape.head_dim_k) + native.row_bytes(kind, shape.head_dim_v)
        n_bytes, flops = attention_work(visible, len(tokens), shape.n_head, shape.n_head_kv, (shape.head_dim_k, shape.head_dim_v), row)
        whole = seconds.attention + seconds.append + seconds.select + seconds.other
        return Attention(1e3 * seconds.attention / len(tokens), n_bytes, flops, seconds.select / whole)

    def _compaction(self, runner: Runner) -> None:
        """Single tokens around the next compaction: is there a stall that a reader would see?"""
        end = self.ends.get(runner.case.budgets or "")
        if end is None:
            return
        self.report(f"{runner.case.label}: single tokens around the compaction at {end}")
        start = max(end - AROUND, runner.depth)
        if start > runner.depth:
            runner.feed(self.tokens[runner.depth : start], UBATCH)
        runner.feed(self.tokens[start : start + 1], 1)
        token_ms = [1e3 * s for s in runner.feed(self.tokens[start + 1 : end + AROUND], 1)]
        case = {"kv_type": runner.case.kv_type, "budgets": runner.case.budgets, "tokens": end}
        self.result.stalls.append(case | stall(token_ms) | {"token_ms": [round(x, 3) for x in token_ms]})
