"""Speed and memory of TCA against the stock cache, measured alternately in one process.

For every KV type and depth three contexts stand side by side: the stock cache without and with flash attention ("fa=0",
"fa=1"; quantized V needs flash attention, so only fa=1 exists there) and the ragged store ("tca"). Each is filled with the
same `depth` random tokens once. Then each repeat measures, in turn and starting with another context each time, the
prefill of one micro-batch of 512 tokens at that depth and the decode of N single tokens at that depth. Between two
measurements a context is taken back to `depth`: by llama_memory_seq_rm where the cache can forget that much, else from a
copy of its state taken at `depth`, else by filling it again. The median of the repeats counts, and of the two dense
configurations the faster one, separately for each test.

Random tokens are what llama-bench uses too: how many tokens each head keeps depends on the budgets, not on the text.
Mode "whole" measures the prompt of `depth` tokens from an empty cache instead, in micro-batches of 512.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import logs
from .errors import TcaError
from .gguf_file import model_shape
from .loading import KV_TYPES, UBATCH, check_model, default_threads, dense_kv_bytes

SEED = 42
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...] = (4096, 16384)
    kv_types: tuple[str, ...] = ("f16",)
    repeat: int = 3
    n_gen: int = 32
    mode: str = "depth"  # or "whole"
    flash_attn: str = "both"  # of the dense runs: "both", "on" or "off"
    n_threads: int = 0  # 0: all CPUs of the process
    n_gpu_layers: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the result. Rates in tokens a second, medians; bytes as allocated for the same context."""

    test: str
    depth: int
    kv_type: str
    dense_tps: float
    dense_config: str
    tca_tps: float
    ratio: float
    dense_kv_bytes: int
    tca_kv_bytes: int
    kv_ratio: float


@dataclass
class Result:
    hardware: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # every single measurement

    def as_json(self) -> dict[str, Any]:
        return {
            "hardware": self.hardware,
            "rows": [asdict(row) for row in self.rows],
            "settings": self.settings,
            "samples": self.samples,
        }


class Runner:
    """One context of one configuration, filled with tokens and timed. close() frees it; the model is the caller's."""

    def __init__(self, lib: Any, model: Any, name: str, n_ctx: int, kv_type: str, fa: bool, n_threads: int) -> None:
        self.lib, self.name, self._state, self._n_vocab = lib, name, None, 0
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = UBATCH
        params.n_seq_max = params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if fa else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.ctx = lib.llama_init_from_model(model, params)
        if not self.ctx:
            self.ctx = None
            raise TcaError(f"{name}: no context of {n_ctx} tokens with {kv_type} KV")
        self.memory = lib.llama_get_memory(self.ctx)

    @property
    def address(self) -> int:
        return int(self.ctx)

    def decode(self, tokens: Sequence[int], step: int) -> float:
        """Appends tokens in batches of ``step``; returns seconds."""
        lib = self.lib
        started = time.perf_counter()
        for at in range(0, len(tokens), step):
            part = tokens[at : at + step]
            array = (lib.llama_token * len(part))(*part)
            status = lib.llama_decode(self.ctx, lib.llama_batch_get_one(array, len(part)))
            if status != 0:
                raise TcaError(f"{self.name}: llama_decode failed with status {status}")
            lib.llama_synchronize(self.ctx)
        return time.perf_counter() - started

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def fill(self, tokens: Sequence[int], report: Report) -> None:
        """Brings the cache to hold ``tokens``, and remembers how to come back to here."""
        self.clear()
        self._tokens = tokens
        for at in range(0, len(tokens), UBATCH):
            report(f"{self.name}: filling {at}/{len(tokens)}")
            self.decode(tokens[at : at + UBATCH], UBATCH)

    def save(self) -> None:
        """Copies the state of the filled cache, for caches that cannot forget a whole micro-batch."""
        size = self.lib.llama_state_seq_get_size(self.ctx, 0)
        buffer = (ctypes.c_uint8 * size)()
        if size and self.lib.llama_state_seq_get_data(self.ctx, buffer, size, 0):
            self._state = buffer

    def rewind(self, report: Report) -> None:
        """Takes the cache back to what fill() left."""
        lib, depth = self.lib, len(self._tokens)
        if lib.llama_memory_seq_rm(self.memory, 0, depth, -1):
            return
        if self._state is not None:
            self.clear()
            if lib.llama_state_seq_set_data(self.ctx, self._state, len(self._state), 0):
                return
        self.fill(self._tokens, report)

    def close(self) -> None:
        if self.ctx is not None:
            self.lib.llama_free(self.ctx)
            self.ctx, self._state = None, None


def hardware() -> dict[str, Any]:
    """The machine and the build, for a result that stands on its own."""
    from . import native

    cpu, memory = platform.processor() or platform.machine(), 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": default_threads(),
        "memory_bytes": memory,
        "os": platform.platform(),
        "python": platform.python_version(),
        "build": native.build_info(),
    }


@contextlib.contextmanager
def _model(lib: Any, path: Path, dense: bool, n_gpu_layers: int, log: logs.LlamaLog) -> Iterator[Any]:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    overrides = (lib.llama_model_kv_override * 2)()  # an empty key ends the array
    if dense:
        overrides[0].key = b"tca.enabled"
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
        overrides[0].value.val_bool = False
    params.kv_overrides = overrides
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise TcaError(f"{path}: {log.reason() or 'llama.cpp cannot load this model; --verbose shows its log'}")
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def dense_configs(kv_type: str, flash_attn: str) -> list[tuple[str, bool]]:
    """(name, flash attention) of the dense runs. A quantized V cache needs flash attention."""
    configs = [("fa=0", False)] if kv_type == "f16" and flash_attn != "on" else []
    if flash_attn != "off":
        configs.append(("fa=1", True))
    if not configs:
        raise TcaError(f"--fa off: the stock cache holds {kv_type} only with flash attention; use --fa on or --kv-type f16")
    return configs


def run(path: str | os.PathLike[str], settings: Settings, report: Report, verbose: bool = False) -> Result:
    """Measures everything in ``settings``; report(text) is called with what is being done. Raises TcaError."""
    from .llama import load

    path = Path(path)
    if not check_model(path):
        raise TcaError(f"{path} carries no enabled budgets to measure; run embed-budgets first")
    shape = model_shape(path)
    for kv_type in settings.kv_types:
        dense_configs(kv_type, settings.flash_attn)
    for depth in settings.depths:
        if depth + max(UBATCH, settings.n_gen) > shape.n_ctx_train > 0:
            report(f"note: depth {depth} is past the {shape.n_ctx_train} tokens that the model was trained with")
    lib = load().llama_cpp
    log = logs.take_over(load(), verbose)
    lib.llama_backend_init()
    result = Result(hardware(), {"model": path.name, **asdict(settings), "n_ubatch": UBATCH, "seed": SEED})
    result.hardware["threads"] = result.settings["n_threads"] = settings.n_threads or default_threads()
    with _model(lib, path, True, settings.n_gpu_layers, log) as dense, _model(lib, path, False, settings.n_gpu_layers, log) as tca:
        n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(tca))
        for kv_type in settings.kv_types:
            for depth in settings.depths:
                _measure(result, lib, dense, tca, path, n_vocab, kv_type, depth, settings, report, log)
    return result


def _measure(
    result: Result,
    lib: Any,
    dense: Any,
    tca: Any,
    path: Path,
    n_vocab: int,
    kv_type: str,
    depth: int,
    settings: Settings,
    report: Report,
    log: logs.LlamaLog,
) -> None:
    from . import native

    whole = settings.mode == "whole"
    rng = random.Random(SEED)
    tokens = [rng.randrange(n_vocab) for _ in range(depth)]
    batch = [rng.randrange(n_vocab) for _ in range(UBATCH)]
    n_ctx = -(-(depth + (0 if whole else max(UBATCH, settings.n_gen))) // 256) * 256
    threads = settings.n_threads or default_threads()
    with contextlib.ExitStack() as stack:
        runners = []
        for name, fa in [*dense_configs(kv_type, settings.flash_attn), ("tca", True)]:
            try:
                runner = Runner(lib, tca if name == "tca" else dense, name, n_ctx, kv_type, fa, threads)
            except TcaError as error:
                raise TcaError(f"{error}: {log.reason() or 'not enough memory; use fewer or smaller --depths'}") from None
            stack.callback(runner.close)
            runners.append(runner)
        info = native.context_info(runners[-1].address)
        if not info.active:
            raise TcaError(f"{path}: the ragged cache is not in use: {log.reason() or 'see --verbose'}")
        bytes_dense = info.kv_bytes_dense or dense_kv_bytes(path, n_ctx, kv_type)

        tests: dict[str, Callable[[Runner], float]] = {}
        if whole:
            for runner in runners:  # page in the cache and the weights
                runner.decode(tokens[:UBATCH], UBATCH)
            tests["whole"] = lambda runner: runner.clear() or depth / runner.decode(tokens, UBATCH)
        else:
            for runner in runners:
                runner.fill(tokens, lambda text: report(f"{kv_type} @ {depth}: {text}"))
                if runner.name == "tca":
                    runner.save()
                runner.decode(batch[:1], 1)  # the first single token sets up the graph for decoding
                runner.rewind(report)
            tests["prefill"] = lambda runner: UBATCH / runner.decode(batch, UBATCH)
            tests["decode"] = lambda runner: settings.n_gen / runner.decode(batch[: settings.n_gen], 1)

        rates: dict[tuple[str, str], list[float]] = {(test, r.name): [] for test in tests for r in runners}
        for i in range(settings.repeat):
            turn = runners[i % len(runners) :] + runners[: i % len(runners)]
            for test, measure in tests.items():
                for runner in turn:
                    report(f"{kv_type} @ {depth}: {test} {runner.name}, repeat {i + 1} of {settings.repeat}")
                    rates[test, runner.name].append(measure(runner))
                    if not whole:
                        runner.rewind(report)
    for test in tests:
        medians = {r.name: statistics.median(rates[test, r.name]) for r in runners}
        ours = medians.pop("tca")
        best = max(medians, key=lambda name: medians[name])
        result.rows.append(
            Row(
                test,
                depth,
                kv_type,
                round(medians[best], 3),
                best,
                round(ours, 3),
                round(ours / medians[best], 4),
                bytes_dense,
                info.kv_bytes,
                round(info.kv_bytes / bytes_dense, 4),
            )
        )
        for (name, config), values in rates.items():
            if name == test:
                sample = {"test": test, "depth": depth, "kv_type": kv_type, "config": config}
                result.samples.append(sample | {"tps": [round(v, 3) for v in values]})
