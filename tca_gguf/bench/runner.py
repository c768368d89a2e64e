"""One context that is filled with tokens, timed, and taken back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tca_gguf import kv, native
from tca_gguf.budgets import Budgets
from tca_gguf.errors import TcaError
from tca_gguf.loading import UBATCH

from .cases import Case, ggml_type

if TYPE_CHECKING:
    from tca_gguf.calib.runtime import Model


class Runner:
    """A `Session` of one case with a `native.Profile` in it. close() frees the context; the model is the caller's."""

    def __init__(self, model: Model, case: Case, budgets: Budgets | None, n_ctx: int, n_threads: int) -> None:
        from tca_gguf.calib.runtime import Session

        self.case, self.budgets = case, budgets
        self.profile = native.Profile()
        model.set_budgets(budgets)
        self.session = Session(model, n_ctx, n_ubatch=UBATCH, n_threads=n_threads, capture=self.profile, flash=case.flash,
                               type_k=ggml_type(case.kv_type), type_v=ggml_type(case.kv_type))  # fmt: skip
        self.seconds = 0.0  # of the prompt so far, from the empty cache on
        self._tokens: list[int] = []  # what the cache holds when nothing is being measured
        self._state: bytes | None = None
        size = kv.of_context(self.session.address)
        if size.ragged != (budgets is not None):
            self.close()
            raise TcaError(f"{case.label}: the ragged cache is {'' if size.ragged else 'not '}in use")
        self.kv_bytes = size.allocated

    @property
    def depth(self) -> int:
        return len(self._tokens)

    def feed(self, tokens: Sequence[int], step: int) -> list[float]:
        """Appends tokens in batches of ``step``; seconds of each batch."""
        seconds = []
        for at in range(0, len(tokens), step):
            started = time.perf_counter()
            self.session.decode(tokens[at : at + step])
            self.session.wait()
            seconds.append(time.perf_counter() - started)
        return seconds

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Pages in the weights and the cache's beginning, and starts over."""
        self.feed(tokens[:UBATCH], UBATCH)
        self.feed(tokens[:1], 1)
        self.restart()

    def restart(self) -> None:
        self.session.clear()
        self.seconds, self._tokens, self._state = 0.0, [], None

    def extend(self, tokens: Sequence[int]) -> None:
        """Reads on in a prompt, in micro-batches, up to and with the last of ``tokens``; its beginning is in the cache already."""
        self.seconds += sum(self.feed(tokens[self.depth :], UBATCH))
        self._tokens, self._state = list(tokens), None

    def rewind(self) -> None:
        """Takes the cache back to what extend() left, bit by bit.

        The stock cache forgets a tail. The ragged one does too, but a group that was compacted meanwhile stays so: it comes back
        from a copy of its state, which must have been taken with keep().
        """
        if self.budgets is None or self._groups() == self._groups_at_depth:
            if self.session.remove_tail(self.depth):
                return
        if self._state is None:
            raise TcaError(f"{self.case.label}: the cache cannot go back to {self.depth} tokens")
        self.session.clear()
        self.session.restore(self._state)

    def keep(self) -> None:
        """Prepares rewind()."""
        if self.budgets is not None:
            self._groups_at_depth = self._groups()
            self._state = self.session.save()

    def _groups(self) -> int:
        return native.context_sequence(self.session.address)[1]

    def visible(self) -> list[int]:
        """Slots in use, one figure for each (layer, KV head)."""
        session = self.session
        heads = [(layer, head) for layer in range(session.n_layer) for head in range(session.n_head_kv)]
        if self.budgets is None:
            return [session.length()] * len(heads)
        return [native.region_length(session.address, layer, 0, head) for layer, head in heads]

    def close(self) -> None:
        self.session.close()
        self._state = None
