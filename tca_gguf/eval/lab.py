"""What every suite works with: the model, contexts of any policy, fed and rewound, and how far the run has come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tca_gguf import kv, native
from tca_gguf.calib.runtime import Model, Session
from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape
from tca_gguf.loading import KV_TYPES, context_size
from tca_gguf.logs import LlamaLog

from .policies import DENSE, Policy
from .questions import Question, is_complete, score

GENERATED_COST = 6  # a generated token takes about as long as so many tokens of a text; for the time left only
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure. samples None: as many as each suite thinks fit. text: see `texts.read_text`."""

    suites: tuple[str, ...] = ("needle", "kld")
    lengths: tuple[int, ...] = (4096,)
    policies: tuple[str, ...] = ()  # none: the file's own budgets, or with `uniform` the key-difference metric
    keeps: tuple[float, ...] = ()  # calibrate at these fractions in place of the file's own budgets
    uniform: float | None = None  # kept fraction of uniform budgets
    samples: int | None = None
    seed: int = 0
    text: str = "reference"
    kv_type: str = "f16"  # of the policies that evict
    n_threads: int = 0  # 0: all CPUs of the process
    n_gpu_layers: int = 0


@dataclass
class Lab:
    """One run. ``answers`` collects everything that was generated, for the raw part of the result; ``errors``: see `attempt`."""

    model: Model
    shape: ModelShape
    layout: Layout
    full: Sequence[int]  # layers with full attention: only these are in the ragged store
    policies: Sequence[Policy]
    settings: Settings
    source: Sequence[str]
    report: Progress
    log: LlamaLog
    total: int = 0
    done: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """What fails inside is noted in ``errors``, and the run goes on: hours of other rows must not be lost with it."""
        self.log.clear()  # an earlier failure's reason is not this one's
        try:
            yield
        except TcaError as error:
            self.errors.append(f"{label}: {self.log.explain(error)}")

    def rng(self, *names: object) -> random.Random:
        """A generator for the part of the run with these names, always the same for the same seed."""
        return random.Random("/".join(map(str, (*names, self.settings.seed))))

    def advance(self, cost: int, label: str) -> None:
        self.done = min(self.done + cost, self.total)
        self.report(self.done, self.total, label)

    @contextmanager
    def session(self, policy: Policy, n_ctx: int, n_outputs: int = 1) -> Iterator[Session]:
        """A context of ``n_ctx`` tokens under a policy."""
        kv_type = KV_TYPES[policy.kv_type]
        # as in `open_llama`: without flash attention the stock cache is faster on the CPU, where its type allows that
        flash = policy.budgets is not None or policy.kv_type != "f16" or self.settings.n_gpu_layers != 0
        self.model.set_budgets(policy.budgets)
        with Session(self.model, context_size(n_ctx), n_threads=self.settings.n_threads or None, n_outputs=n_outputs,
                     type_k=kv_type, type_v=kv_type, flash=flash) as session:  # fmt: skip
            if native.context_info(session.address).active != (policy.budgets is not None):
                raise TcaError(f"{self.model.path}: policy {policy.name} did not get the cache it asked for")
            yield session

    def feed(self, session: Session, tokens: Sequence[int], label: str) -> None:
        for at in range(0, len(tokens), session.n_batch):
            part = tokens[at : at + session.n_batch]
            session.decode(part)
            self.advance(len(part), label)

    def generate(self, session: Session, n_tokens: int, stop: Callable[[str], bool], label: str) -> tuple[str, list[int]]:
        """Greedy continuation of what the cache holds, of at most ``n_tokens`` tokens, until ``stop(text)``: (text, tokens).

        The last token is not in the cache.
        """
        tokens: list[int] = []
        raw, text = b"", ""
        while len(tokens) < n_tokens and not stop(text):
            if tokens:
                session.decode(tokens[-1:])
            token = int(session.logits().argmax())
            if self.model.is_end(token):
                break
            tokens.append(token)
            raw += self.model.piece(token)
            text = raw.decode("utf-8", errors="replace")
            self.advance(GENERATED_COST, label)
        self.advance(GENERATED_COST * (n_tokens - len(tokens)), label)
        return text, tokens

    def ask(self, session: Session, question: Question, label: str) -> tuple[str, list[bool]]:
        """Asks on top of what the cache holds: (what was generated, score of each expected answer)."""
        session.decode(session.tokenize(question.prompt))
        text, _ = self.generate(session, question.n_tokens, lambda said: is_complete(said, question), label)
        return text, score(text, question)

    def record(self, suite: str, length: int, policy: Policy, **answer: Any) -> None:
        self.answers.append({"suite": suite, "length": length, "policy": policy.name, "keep": round(policy.keep, 4), **answer})

    def cache(self, session: Session, policy: Policy, *, evicts: bool = True) -> dict[str, Any]:
        """Figures of a cache: bytes, tokens in it, and how many of them are gone from a head, on average.

        Raises TcaError if something should have been evicted and was not.
        """
        kv_bytes, dense_bytes = self.kv_bytes(session, policy)
        tokens = session.length()
        held = float(tokens) if policy.budgets is None else kv.mean_kept(session.address, self.full)
        if evicts and policy.keep < 1 and held >= tokens:
            raise TcaError(f"policy {policy.name} evicted nothing in {tokens} tokens; use a greater length")
        return {
            "kv_bytes": kv_bytes,
            "kv_bytes_dense": dense_bytes,
            "cache_tokens": tokens,
            "evicted_tokens": round(tokens - held, 1),
        }

    def kv_bytes(self, session: Session, policy: Policy) -> tuple[int, int]:
        """Bytes allocated for the whole cache, and what a stock f16 cache takes."""
        dense = kv.stock(self.shape, self.full, session.n_ctx, DENSE.kv_type, session.n_batch)
        return kv.of_context(session.address).allocated, dense


def check_lengths(path: Path, shape: ModelShape, lengths: Sequence[int]) -> None:
    for length in lengths:
        if length > shape.n_ctx_train > 0:
            raise TcaError(f"{path}: length {length} is past the {shape.n_ctx_train} tokens that the model was trained with")
