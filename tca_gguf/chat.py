"""Answering prompts token by token, with a cache that is kept between the turns of a conversation.

`Engine` evaluates a prompt and samples a reply; of a prompt that continues what the cache holds only the new tokens are
evaluated. `Chat` is a conversation on top of it. Both work with any Llama of llama-cpp-python, dense or ragged.
"""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import kv
from .errors import TcaError
from .loading import context_address

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass
class Turn:
    """What one reply took. Seconds are wall clock; rates are tokens a second, 0 where nothing was measured."""

    prompt_tokens: int = 0
    evaluated_tokens: int = 0  # of the prompt; the others were in the cache
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = ""  # "end", "length", "context" or "interrupt"

    @property
    def prefill_tps(self) -> float:
        return self.evaluated_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tps(self) -> float:
        # the first token of a reply comes out of the prefill
        return (self.generated_tokens - 1) / self.decode_seconds if self.generated_tokens > 1 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. The seed belongs to the Llama."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05


class Engine:
    """Evaluates prompts on a Llama and streams replies."""

    def __init__(self, llm: Llama, sampling: Sampling | None = None) -> None:
        from .llama import load

        self.llm, self.sampling, self._lib = llm, sampling or Sampling(), load()
        self._vocab = self._lib.llama_model_get_vocab(llm.model)

    @property
    def n_ctx(self) -> int:
        return int(self.llm.n_ctx())

    def tokenize(self, text: str, *, first: bool = True) -> list[int]:
        """Tokens of a text; control tokens written in it are recognised. first: it starts the sequence."""
        return self.llm.tokenize(text.encode("utf-8"), add_bos=first, special=True)

    def tokenize_prompt(self, text: str) -> list[int]:
        """tokenize() of a text that starts the sequence, which a chat template may have begun with the token for that."""
        bos = self.llm.token_bos()
        written = self.llm._model.token_get_text(bos) if bos >= 0 else ""
        return self.tokenize(text, first=not (written and text.startswith(written)))

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens are empty."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def prefill(self, tokens: Sequence[int], turn: Turn, stop: Callable[[], bool] | None = None) -> bool:
        """Brings the cache to hold exactly ``tokens``, evaluating those it does not hold yet. False if ``stop`` said so.

        A cache that cannot forget the tokens past the common prefix (they were compacted) starts over.
        """
        llm, tokens = self.llm, list(tokens)
        if not tokens:
            raise TcaError("the prompt is empty")
        if len(tokens) >= self.n_ctx:
            raise TcaError(f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; give a larger --ctx")
        held = llm.input_ids[: llm.n_tokens]
        same = np.flatnonzero(held[: len(tokens)] != np.asarray(tokens[: len(held)]))
        keep = int(same[0]) if len(same) else min(len(held), len(tokens))
        keep = min(keep, len(tokens) - 1)  # the last token is evaluated again for its logits
        if keep < llm.n_tokens:
            memory = self._lib.llama_get_memory(llm.ctx)
            if not self._lib.llama_memory_seq_rm(memory, 0, keep, -1):
                keep = 0
            llm.n_tokens = keep
        if keep == 0:
            llm.reset()
        turn.prompt_tokens, turn.reused_tokens = len(tokens), keep
        started = time.perf_counter()
        for at in range(keep, len(tokens), llm.n_batch):
            if stop is not None and stop():
                turn.stopped = "interrupt"
                return False
            part = tokens[at : at + llm.n_batch]
            llm.eval(part)
            turn.evaluated_tokens += len(part)
            turn.prefill_seconds = time.perf_counter() - started
        return True

    def reply(
        self, tokens: Sequence[int], n_max: int, turn: Turn, stop: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, str]]:
        """Evaluates ``tokens`` and yields (token, text it completes) until the end of the reply, n_max or the context's end.

        ``stop()`` is asked before every step. n_max < 0: no limit but the context. The text of a token may be empty.
        """
        if not self.prefill(tokens, turn, stop):
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        s = self.sampling
        # all of the prompt is in the cache by now, so this only samples and decodes
        stream = self.llm.generate(
            list(tokens), temp=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repeat_penalty=1.0
        )
        started = time.perf_counter()
        turn.stopped = "length"
        while n_max < 0 or turn.generated_tokens < n_max:
            if stop is not None and stop():
                turn.stopped = "interrupt"
                break
            if self.llm.n_tokens >= self.n_ctx:
                turn.stopped = "context"
                break
            token = next(stream)
            if turn.generated_tokens == 0:
                started = time.perf_counter()
            turn.generated_tokens += 1
            turn.decode_seconds = time.perf_counter() - started
            if self.is_end(token):
                turn.stopped = "end"
                break
            yield token, decoder.decode(self.piece(token))
        rest = decoder.decode(b"", final=True)
        if rest:
            yield -1, rest


def chat_prompt(llm: Llama, messages: Sequence[dict[str, str]]) -> str:
    """The conversation as the file's chat template writes it, up to where the next reply starts. Raises TcaError."""
    from .llama import load

    template = llm.metadata.get("tokenizer.chat_template")
    if not template:
        raise TcaError(f"{llm.model_path} has no chat template; use: generate --raw")
    formats = load().llama_chat_format

    def text_of(token: int) -> str:
        return llm._model.token_get_text(token) if token >= 0 else ""

    formatter = formats.Jinja2ChatFormatter(
        template=template, eos_token=text_of(llm.token_eos()), bos_token=text_of(llm.token_bos())
    )
    try:
        return formatter(messages=list(messages)).prompt
    except Exception as error:  # templates are programs: any error in one is the file's
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TcaError(f"{llm.model_path}: its chat template failed: {reason}") from None


@dataclass
class Chat:
    """A conversation. `ask` streams the reply; `turns` holds what each one took.

    The tokens of what was said stay in the cache: the next prompt evaluates only its new ones.
    """

    engine: Engine
    system: str | None = None
    n_max: int = -1
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)  # of _text
    _text: str = ""  # the conversation so far as the template wrote it and the model continued it

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation (the cache is cut back at the next prompt)."""
        self.messages[:] = [{"role": "system", "content": self.system}] if self.system else []
        self.turns.clear()
        self._tokens, self._text = [], ""

    def ask(self, text: str, stop: Callable[[], bool] | None = None) -> Iterator[str]:
        """Says ``text`` and yields the reply in pieces. An interrupted reply counts as said so far.

        Raises TcaError if the conversation no longer fits the context; the conversation is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_prompt(self.engine.llm, messages)
        tokens = self._tokens_of(prompt)
        if len(tokens) >= self.engine.n_ctx:
            raise TcaError(
                f"the conversation has {len(tokens)} tokens with this, the context holds {self.engine.n_ctx}; "
                "start over with /reset or give a larger --ctx"
            )
        turn, said, reply = Turn(), [], []

        def remember() -> None:
            self.turns.append(turn)
            if not said:  # interrupted before the first token: as if nothing had been asked
                return
            answer = "".join(reply)
            self.messages[:] = [*messages, {"role": "assistant", "content": answer}]
            self._tokens, self._text = tokens + said, prompt + answer

        try:
            for token, piece in self.engine.reply(tokens, self.n_max, turn, stop):
                if token >= 0:
                    said.append(token)
                if piece:
                    reply.append(piece)
                    yield piece
        except GeneratorExit:  # the caller has heard enough
            remember()
            raise
        remember()

    def _tokens_of(self, prompt: str) -> list[int]:
        """Tokens of a prompt; those of the conversation so far as they were, not as a tokenizer would split them again."""
        if self._text and prompt.startswith(self._text):
            return self._tokens + self.engine.tokenize(prompt[len(self._text) :], first=False)
        return self.engine.tokenize_prompt(prompt)


def cache_stats(llm: Llama) -> dict[str, Any]:
    """The cache of a Llama: {"tca", "n_ctx", "tokens", "kept_tokens_mean", "kv_bytes", "kv_bytes_dense"}.

    kept_tokens_mean: slots in use, mean over the heads of the ragged store; kv_bytes: of all layers, see `kv`.
    """
    ctx = context_address(llm)
    size, tokens = kv.of_context(ctx), int(llm.n_tokens)
    kept = round(kv.mean_kept(ctx), 1) if size.ragged else float(tokens)
    return {"tca": size.ragged, "n_ctx": int(llm.n_ctx()), "tokens": tokens, "kept_tokens_mean": kept,
            "kv_bytes": size.allocated, "kv_bytes_dense": size.stock}  # fmt: skip
