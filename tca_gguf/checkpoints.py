"""Going back in a conversation without reading all of it again: partial states of a sequence, kept in host memory.

An evicting cache can take back only its newest tokens. To go further back it needs the rows that compactions dropped since then;
a *checkpoint* has them: a partial state (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) holds the counters and the recent part of every
region, while the core rows of groups compacted earlier are still in the cache. It is small (the window and a group of every head,
whatever the context) and counts only as long as the sequence descends from it; the cache itself refuses one that does not.

`Checkpoints` keeps them within a bound in bytes. `Prefix` uses them: it brings the cache of a Llama to hold exactly the tokens of
a prompt, from the longest part that can be had, and makes new checkpoints where a client is likely to return: where a message of
the user starts, before the end of a prompt, and every SPACING tokens. It is the one place that does so: `tca_gguf.Llama` and the
chat both go through it. With a cache that takes back any number of tokens no checkpoints are made.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import TcaError

if TYPE_CHECKING:
    from llama_cpp import Llama

SPACING = 1024  # tokens between checkpoints inside a long prompt; one costs far less than a hundredth of evaluating so many
CLOSE = 64  # a checkpoint so many tokens behind another is not worth its bytes, unless a prompt ends there
NEWEST = 3  # so many are never dropped for older ones
MOST = 64  # kept at a time, however small they are
DEFAULT_BYTES = 512 << 20
ENVIRONMENT = "TCA_CHECKPOINT_MIB"  # the bound where no argument gives it

Source = Literal["", "cache", "checkpoint"]


def default_limit() -> int:
    """Bytes that checkpoints may take: TCA_CHECKPOINT_MIB, else 512 MiB. Raises TcaError."""
    text = os.environ.get(ENVIRONMENT)
    if text is None:
        return DEFAULT_BYTES
    if not text.strip().isdecimal():
        raise TcaError(f"{ENVIRONMENT} is {text!r}; give the MiB that checkpoints may take as a whole number, 0 for none")
    return int(text) << 20


@dataclass(frozen=True)
class Checkpoint:
    """The partial state of a sequence that held exactly so many tokens. prefix: these, as the bytes of an intc array."""

    prefix: bytes
    state: bytes

    def __len__(self) -> int:
        return len(self.prefix) // np.dtype(np.intc).itemsize

    @property
    def tokens(self) -> NDArray[np.intc]:
        return np.frombuffer(self.prefix, np.intc)

    @property
    def n_bytes(self) -> int:
        return len(self.state) + len(self.prefix)


def as_bytes(tokens: ArrayLike) -> bytes:
    return np.asarray(tokens, np.intc).tobytes()


def common_prefix(a: ArrayLike, b: ArrayLike) -> int:
    """Number of leading tokens that two sequences share."""
    a, b = np.asarray(a), np.asarray(b)
    n = min(len(a), len(b))
    other = np.flatnonzero(a[:n] != b[:n])
    return int(other[0]) if len(other) else n


class Checkpoints:
    """Checkpoints of one sequence, oldest first, of at most ``limit_bytes`` together (0: none are kept)."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise TcaError(f"checkpoint_bytes is {limit_bytes}; give the bytes that checkpoints may take, 0 for none")
        self.limit_bytes = default_limit() if limit_bytes is None else int(limit_bytes)
        self._kept: list[Checkpoint] = []

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self._kept)

    @property
    def n_bytes(self) -> int:
        return sum(checkpoint.n_bytes for checkpoint in self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def replace(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._kept = list(checkpoints)
        self._fit()

    def drop(self, checkpoint: Checkpoint) -> None:
        self._kept = [other for other in self._kept if other is not checkpoint]

    def add(self, checkpoint: Checkpoint) -> None:
        """Keeps one; an older one of the same tokens goes, then as many as the bound wants."""
        self._kept = [other for other in self._kept if other.prefix != checkpoint.prefix]
        self._kept.append(checkpoint)
        self._fit()

    def of(self, tokens: ArrayLike, longer_than: int, at_most: int) -> list[Checkpoint]:
        """Those whose tokens start ``tokens``, longest first, with more than longer_than and at most at_most tokens."""
        written = as_bytes(tokens)
        fit = [c for c in self._kept if longer_than < len(c) <= at_most and written.startswith(c.prefix)]
        return sorted(fit, key=len, reverse=True)

    def behind(self, tokens: ArrayLike, n: int) -> int:
        """Tokens from the nearest checkpoint of these tokens at or before the n-th to it; n if there is none."""
        found = self.of(tokens, 0, n)
        return n - len(found[0]) if found else n

    def _fit(self) -> None:
        """Drops until the bound holds: of other branches than the newest one's the oldest, then what leaves the smallest gap.

        The newest go last, oldest of them first.
        """
        n_bytes = self.n_bytes
        while self._kept and (n_bytes > self.limit_bytes or len(self._kept) > MOST):
            present, old = self._kept[-1].prefix, self._kept[:-NEWEST]
            others = [c for c in old if not (present.startswith(c.prefix) or c.prefix.startswith(present))]
            goes = others[0] if others else min(old, key=self._gap) if old else self._kept[0]
            self.drop(goes)
            n_bytes -= goes.n_bytes

    def _gap(self, checkpoint: Checkpoint) -> int:
        """How many tokens would be evaluated again at worst for want of it: from the one before it to the one after it."""
        n = len(checkpoint)
        before = max((len(c) for c in self._kept if len(c) < n and checkpoint.prefix.startswith(c.prefix)), default=0)
        after = min((len(c) for c in self._kept if len(c) > n and c.prefix.startswith(checkpoint.prefix)), default=n)
        return after - before


@dataclass
class Fill:
    """What it took to have a prompt in the cache."""

    prompt_tokens: int = 0
    kept_tokens: int = 0  # were in the cache, or came back with a checkpoint
    evaluated_tokens: int = 0
    source: Source = ""  # of the kept ones: "checkpoint" if one was restored
    seconds: float = 0.0
    finished: bool = True  # False: stop() said so before the end

    def __str__(self) -> str:
        how = " from a checkpoint" if self.source == "checkpoint" else ""
        return f"prompt of {self.prompt_tokens} tokens: {self.kept_tokens} kept{how}, {self.evaluated_tokens} evaluated"


@dataclass
class Totals:
    """Of all fills: prompt tokens that were kept and that were evaluated, checkpoints made and restored."""

    kept_tokens: int = 0
    evaluated_tokens: int = 0
    made: int = 0
    restored: int = 0


class Prefix:
    """The tokens that the cache of a Llama holds, and how to get from them to those of a prompt.

    llm: a Llama of llama-cpp-python (or what looks like one); its sequence 0, input_ids and n_tokens are used and kept true.
    """

    def __init__(self, llm: Llama, checkpoints: Checkpoints | None = None) -> None:
        from .llama import load

        self.llm, self._lib = llm, load()
        self.checkpoints = Checkpoints() if checkpoints is None else checkpoints
        self.totals = Totals()
        self.last = Fill()
        self._marker: list[int] | None = None  # tokens that start a message of the user

    # ---- the cache ---------------------------------------------------------------------------------------------------

    @property
    def bounded(self) -> bool:
        """Whether the cache takes back only so many tokens, so that checkpoints are of use."""
        llm, lib = self.llm, self._lib
        return bool(lib.llama_n_rs_seq(llm.ctx) > 0 or self._sliding() or getattr(llm, "_is_recurrent", False)
                    or getattr(llm, "_is_hybrid", False))  # fmt: skip

    def _sliding(self) -> int:
        """The model's sliding window if the cache of these layers holds no more than it, else 0."""
        params = getattr(self.llm, "context_params", None)
        return 0 if params is None or params.swa_full else int(self._lib.llama_model_n_swa(self.llm.model))

    def _held(self) -> NDArray[np.intc]:
        return self.llm.input_ids[: self.llm.n_tokens]

    def _cut(self, n: int) -> bool:
        """Makes the sequence end after n tokens. False, and nothing changed: it cannot."""
        lib, llm = self._lib, self.llm
        memory = lib.llama_get_memory(llm.ctx)
        window = self._sliding()
        # a sliding window takes anything back, and has then lost what the next token must see
        if window and 0 < n < llm.n_tokens and lib.llama_memory_seq_pos_min(memory, 0) > max(0, n - window):
            return False
        if not lib.llama_memory_seq_rm(memory, 0, n, -1):
            return False
        if n < llm.n_tokens:
            llm._requires_eval = True
        llm.n_tokens = n
        return True

    def _save(self) -> None:
        """A checkpoint of what the cache holds now. Nothing if the bound has no room for even one."""
        lib, ctx = self._lib, self.llm.ctx
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = lib.llama_state_seq_get_size_ext(ctx, 0, flags)
        if size == 0 or size > self.checkpoints.limit_bytes:
            return
        data = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data_ext(ctx, data, size, 0, flags) == size:
            self.checkpoints.add(Checkpoint(as_bytes(self._held()), bytes(data)))
            self.totals.made += 1

    def _restore(self, checkpoint: Checkpoint) -> bool:
        """Brings a checkpoint back. False, and the cache as it was, if it no longer belongs to the sequence: it is then dropped."""
        lib, llm = self._lib, self.llm
        size = len(checkpoint.state)
        data = (ctypes.c_uint8 * size).from_buffer_copy(checkpoint.state)
        if lib.llama_state_seq_set_data_ext(llm.ctx, data, size, 0, lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) != size:
            self.checkpoints.drop(checkpoint)
            return False
        n = len(checkpoint)
        llm.input_ids[:n] = checkpoint.tokens
        llm.n_tokens, llm._requires_eval = n, True
        self.totals.restored += 1
        return True

    # ---- going back --------------------------------------------------------------------------------------------------

    def go_back(self, tokens: Sequence[int] | NDArray[np.intc], at_most: int) -> tuple[int, Source]:
        """Leaves the longest start of ``tokens`` in the cache that can be had, of at most so many: (its length, from where)."""
        llm = self.llm
        keep = min(common_prefix(self._held(), tokens), at_most)
        if llm.n_tokens == 0 and keep == 0:
            self._cut(0)  # what an earlier reset() left in the memory
            return 0, ""
        # a checkpoint of another branch may be longer than what the tokens share with the present one
        for checkpoint in self.checkpoints.of(tokens, keep, at_most):
            if self._restore(checkpoint):
                return llm.n_tokens, "checkpoint"
        if keep > 0 and self._cut(keep):
            return keep, "cache"
        for checkpoint in self.checkpoints.of(tokens, 0, keep):
            if self._restore(checkpoint):
                return llm.n_tokens, "checkpoint"
        if not self._cut(0):
            raise TcaError("the cache cannot be emptied (llama_memory_seq_rm refused to remove a whole sequence)")
        return 0, ""

    def catch_up(self) -> None:
        """Makes the memory end where n_tokens says, after a caller lowered that: a cache may refuse to take so much back."""
        lib, llm = self._lib, self.llm
        memory = lib.llama_get_memory(llm.ctx)
        if memory is None or lib.llama_memory_seq_pos_max(memory, 0) < llm.n_tokens:
            return
        tokens = self._held().tolist()
        at, _ = self.go_back(tokens, len(tokens))
        if at < len(tokens):
            llm.eval(tokens[at:])

    # ---- going on ----------------------------------------------------------------------------------------------------

    def _user_marker(self) -> list[int]:
        """The tokens with which the file's chat template starts a message of the user; [] if it has none that can be told."""
        if self._marker is None:
            self._marker = user_marker(self.llm)
        return self._marker

    def _marks(self, tokens: NDArray[np.intc], start: int) -> list[int]:
        """Where checkpoints are made while tokens[start:] are evaluated, in order: so many tokens stand before each."""
        end = len(tokens)
        marker = self._user_marker()
        turns = []
        if marker:
            width = len(marker)
            windows = np.lib.stride_tricks.sliding_window_view(tokens, width) if end >= width else np.empty((0, width))
            turns = [int(at) for at in np.flatnonzero((windows == marker).all(axis=1)) if at > 0]
        last = max(turns, default=-1)
        marks: list[int] = []
        # the newest question and the end of the prompt are where a client returns to; further back by distance
        for at in sorted({start, *turns, *range(start + SPACING, end, SPACING), end - 1}):
            if not max(start, 1) <= at < end:
                continue
            near = at - marks[-1] if marks else self.checkpoints.behind(tokens, at)
            if at == end - 1 or (at in (last, start) and near >= 1) or near >= (CLOSE if at in turns else SPACING):
                marks.append(at)
        return marks

    def fill(
        self,
        tokens: Sequence[int],
        stop: Callable[[], bool] | None = None,
        progress: Callable[[Fill], None] | None = None,
    ) -> Fill:
        """Brings the cache to hold exactly ``tokens``, and the logits of the last one to be at hand.

        What the cache holds, or gets back from a checkpoint, is not evaluated again. ``stop`` is asked before every micro-batch:
        True ends it, and the cache holds what was evaluated so far. ``progress`` hears of every one. Raises TcaError.
        """
        llm = self.llm
        prompt = np.asarray(tokens, np.intc)
        n_ctx = int(llm.n_ctx())
        if len(prompt) == 0:
            raise TcaError("the prompt is empty")
        if len(prompt) > n_ctx:
            raise TcaError(f"the prompt has {len(prompt)} tokens, the context holds {n_ctx}; use a larger n_ctx")
        started = time.perf_counter()
        self.last = fill = Fill(prompt_tokens=len(prompt))
        if len(prompt) == llm.n_tokens and common_prefix(self._held(), prompt) == len(prompt) and not getattr(llm, "_requires_eval", True):
            fill.kept_tokens, fill.source = len(prompt), "cache"  # the last token's logits are those of the last evaluation
        else:
            # the last token is evaluated again for its logits
            fill.kept_tokens, fill.source = self.go_back(prompt, len(prompt) - 1)
        at = fill.kept_tokens
        marks = self._marks(prompt, at) if at < len(prompt) and self.bounded and self.checkpoints.limit_bytes else []
        for end in [*marks, len(prompt)]:
            while at < end:
                if stop is not None and stop():
                    fill.finished = False
                    break
                part = prompt[at : min(end, at + llm.n_batch)]
                llm.eval(part.tolist())
                at += len(part)
                fill.evaluated_tokens += len(part)
                fill.seconds = time.perf_counter() - started
                if progress is not None:
                    progress(fill)
            if not fill.finished:
                break
            if end < len(prompt):
                self._save()
        fill.seconds = time.perf_counter() - started
        self.totals.kept_tokens += fill.kept_tokens
        self.totals.evaluated_tokens += fill.evaluated_tokens
        if getattr(llm, "verbose", False):
            print(f"tca: {fill}; {self.describe()}", file=sys.stderr)
        return fill

    def describe(self) -> str:
        """The checkpoints in one phrase."""
        if not self.bounded:
            return "no checkpoints needed: the cache takes back any number of tokens"
        kept = self.checkpoints
        return f"{len(kept)} checkpoints, {kept.n_bytes / 2**20:.1f} of {kept.limit_bytes / 2**20:.0f} MiB"


def user_marker(llm: Any) -> list[int]:
    """The tokens with which the file's chat template starts a message of the user; [] if that cannot be told.

    The template writes a conversation of marked messages; what stands before each of the user's messages, as far as it is the
    same, is the marker. Only its beginning up to the message counts, without the white space that a tokenizer may join to it.
    """
    from .chat import chat_prompt

    first, answer, second = "\u2020one\u2020", "\u2020two\u2020", "\u2020three\u2020"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}, {"role": "user", "content": second}]
    try:
        text = chat_prompt(llm, messages)
    except TcaError:
        return []
    if not text.find(first) < text.find(answer) < text.find(second) or first not in text:
        return []
    before_one = text[: text.index(first)]
    before_two = text[text.index(answer) + len(answer) : text.index(second)]
    n = 0
    while n < min(len(before_one), len(before_two)) and before_one[-1 - n] == before_two[-1 - n]:
        n += 1
    marker = before_two[len(before_two) - n :].strip()
    return list(llm.tokenize(marker.encode("utf-8"), add_bos=False, special=True)) if marker else []
