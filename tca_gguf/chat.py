"""Answering prompts token by token, with a cache that is kept between the turns of a conversation.

`Engine` evaluates a prompt and samples a reply; of a prompt only what the cache does not hold, and no checkpoint brings back, is
evaluated (checkpoints.py). `Chat` is a conversation on top of it: asking, asking again, taking back, changing what was asked.
"""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import kv
from .checkpoints import Fill, Prefix
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
    source: str = ""  # of the reused ones: "cache" or "checkpoint"
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
        self.prefix: Prefix = getattr(llm, "prefix", None) or Prefix(llm)
        self._seed = int(getattr(llm, "_seed", self._lib.LLAMA_DEFAULT_SEED))

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
        """Brings the cache to hold exactly ``tokens``, evaluating those it does not hold yet. False if ``stop`` said so."""
        if len(tokens) >= self.n_ctx:
            raise TcaError(f"the prompt has {len(tokens)} tokens, the context holds {self.n_ctx}; give a larger --ctx")

        def note(fill: Fill) -> None:
            turn.prompt_tokens, turn.evaluated_tokens = fill.prompt_tokens, fill.evaluated_tokens
            turn.reused_tokens, turn.source, turn.prefill_seconds = fill.kept_tokens, fill.source, fill.seconds

        fill = self.prefix.fill(tokens, stop, note)
        note(fill)
        turn.stopped = turn.stopped if fill.finished else "interrupt"
        return fill.finished

    def reply(
        self, tokens: Sequence[int], n_max: int, turn: Turn, stop: Callable[[], bool] | None = None, attempt: int = 0
    ) -> Iterator[tuple[int, str]]:
        """Evaluates ``tokens`` and yields (token, text it completes) until the end of the reply, n_max or the context's end.

        ``stop()`` is asked before every step. n_max < 0: no limit but the context. The text of a token may be empty. attempt: with
        a seed that was given, another number samples another answer, the same every time.
        """
        if not self.prefill(tokens, turn, stop):
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        s = self.sampling
        if self._seed != self._lib.LLAMA_DEFAULT_SEED:
            self.llm.set_seed((self._seed + attempt) % 2**32)
        # all of the prompt is in the cache by now, so this only samples and decodes
        stream = self.llm.generate(
            [], reset=False, temp=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repeat_penalty=1.0
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
    """A conversation. `ask`, `retry` and `edit` stream the reply; `turns` holds what each one took.

    The tokens of what was said stay in the cache: the next prompt evaluates only its new ones. What is taken back costs no more
    than the way from the nearest checkpoint.
    """

    engine: Engine
    system: str | None = None
    n_max: int = -1
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    # after every answer: the conversation so far as the template wrote it and the model continued it, and its tokens
    _written: list[tuple[str, list[int]]] = field(default_factory=list)
    _tries: int = 0  # answers asked for again, so that each is sampled anew

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation (the cache is cut back at the next prompt)."""
        self.messages[:] = [{"role": "system", "content": self.system}] if self.system else []
        self.turns.clear()
        self._written.clear()

    @property
    def asked(self) -> list[str]:
        """What the user said, oldest first."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    def undo(self, count: int = 1) -> list[str]:
        """Takes back the last questions with their answers and returns the questions, oldest first."""
        count = min(count, len(self.asked))
        if count < 1:
            return []
        taken = self.asked[-count:]
        del self.messages[len(self.messages) - 2 * count :]
        del self._written[len(self._written) - count :]
        return taken

    def retry(self, stop: Callable[[], bool] | None = None) -> Iterator[str]:
        """Asks the last question again and yields the new answer, sampled anew. Raises TcaError if nothing was asked."""
        return self.edit(self.asked[-1] if self.asked else "", stop)

    def edit(self, text: str, stop: Callable[[], bool] | None = None) -> Iterator[str]:
        """Asks ``text`` in place of the last question; if it is stopped before the first token, or fails, all is as before."""
        if not self.asked:
            raise TcaError("nothing was asked yet")
        messages, written = list(self.messages), list(self._written)
        self.undo()
        left = len(self.messages)
        self._tries += 1
        try:
            yield from self.ask(text, stop)
        finally:
            if len(self.messages) == left:
                self.messages[:], self._written[:] = messages, written

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
            self._written.append((prompt + answer, tokens + said))

        try:
            for token, piece in self.engine.reply(tokens, self.n_max, turn, stop, self._tries):
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
        text, tokens = self._written[-1] if self._written else ("", [])
        if text and prompt.startswith(text):
            return tokens + self.engine.tokenize(prompt[len(text) :], first=False)
        return self.engine.tokenize_prompt(prompt)


def cache_stats(llm: Llama) -> dict[str, Any]:
    """The cache of a tca_gguf.Llama: {"tca", "n_ctx", "tokens", "kept_tokens_mean", "kv_bytes", "kv_bytes_dense", "checkpoints"}.

    kept_tokens_mean: slots in use, mean over the heads of the ragged store; kv_bytes: of all layers, see `kv`.
    checkpoints: {"count", "bytes", "limit_bytes", "made", "restored"}, or None where the cache takes back any number of tokens.
    """
    ctx = context_address(llm)
    size, tokens = kv.of_context(ctx), int(llm.n_tokens)
    kept = round(kv.mean_kept(ctx), 1) if size.ragged else float(tokens)
    stats = {"tca": size.ragged, "n_ctx": int(llm.n_ctx()), "tokens": tokens, "kept_tokens_mean": kept,
             "kv_bytes": size.allocated, "kv_bytes_dense": size.stock}  # fmt: skip
    prefix = llm.prefix
    states = {"count": len(prefix.checkpoints), "bytes": prefix.checkpoints.n_bytes, "limit_bytes": prefix.checkpoints.limit_bytes,
              "made": prefix.totals.made, "restored": prefix.totals.restored}  # fmt: skip
    return stats | {"checkpoints": states if prefix.bounded else None}
