"""Prefix reuse, interrupts and the conversation, over a Llama that only counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tca_gguf import chat as chat_module
from tca_gguf import llama
from tca_gguf.chat import Chat, Engine, Turn, chat_prompt
from tca_gguf.checkpoints import Checkpoints, Prefix
from tca_gguf.cli.chat import stats_text
from tca_gguf.errors import TcaError

END = 0
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


class FakeLlama:
    """Tokens are the characters' code points; the reply to anything is the script.

    Its cache keeps what it holds in `memory`. Tokens are compacted in groups of `group` once `dense` newer ones are there; a tail
    goes back only while that compacts nothing else (dense large: always). A partial state belongs to the memory as long as the
    tokens that were compacted when it was made are still the first ones.
    """

    model_path, n_batch, group, verbose = "fake.gguf", 4, 8, False
    _seed = 0

    def __init__(self, script: str = "hello", n_ctx: int = 400, dense: int = 10_000) -> None:
        self.script, self._n_ctx, self.dense = script, n_ctx, dense
        self.input_ids, self.n_tokens = np.zeros(n_ctx, np.intc), 0
        self.memory: list[int] = []
        self.evaluated: list[list[int]] = []
        self.metadata = {"tokenizer.chat_template": TEMPLATE}
        self.model = self.ctx = self
        self._model = SimpleNamespace(token_get_text=lambda token: {1: "<s>"}.get(token, ""))
        self._requires_eval = True

    def n_ctx(self):
        return self._n_ctx

    def token_bos(self):
        return 1

    def token_eos(self):
        return END

    def set_seed(self, seed: int) -> None:
        self._seed = seed

    def tokenize(self, data: bytes, add_bos: bool, special: bool):
        return ([1] if add_bos else []) + [ord(c) for c in data.decode()]

    def compacted(self, n: int) -> int:
        return max(0, n - self.dense) // self.group * self.group

    def seq_rm(self, p0: int) -> bool:
        if p0 and self.compacted(p0) != self.compacted(len(self.memory)):
            return False
        del self.memory[p0:]
        return True

    def partial(self) -> bytes:
        return np.array(self.memory, np.intc).tobytes()

    def restore(self, state: bytes) -> bool:
        tokens = np.frombuffer(state, np.intc).tolist()
        n = self.compacted(len(tokens))
        if self.compacted(len(self.memory)) < n or self.memory[:n] != tokens[:n]:
            return False
        self.memory = tokens
        return True

    def eval(self, tokens):
        assert len(self.memory) == self.n_tokens, "llama_decode would refuse these positions"
        assert self.n_tokens + len(tokens) <= self._n_ctx
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.memory += list(tokens)
        self.n_tokens += len(tokens)
        self.evaluated.append(list(tokens))
        self._requires_eval = False

    def generate(self, tokens, reset, **_):
        assert tokens == [] and not reset and not self._requires_eval, "the prompt must be in the cache by now"
        for character in self.script:
            yield ord(character)
            self.eval([ord(character)])
        while True:
            yield END


def fake_library_of_states() -> dict[str, object]:
    """What checkpoints.py calls, over FakeLlama."""

    def get(ctx, data, size, _seq, _flags):
        data[:] = ctx.partial()
        return size

    def pos_max(memory, _seq):
        return len(memory.memory) - 1

    return dict(
        LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY=1,
        LLAMA_DEFAULT_SEED=2**32 - 1,
        llama_n_rs_seq=lambda ctx: 0 if ctx.dense > 1000 else 1,
        llama_get_memory=lambda ctx: ctx,
        llama_memory_seq_rm=lambda memory, seq, p0, p1: memory.seq_rm(p0),
        llama_memory_seq_pos_max=pos_max,
        llama_state_seq_get_size_ext=lambda ctx, seq, flags: len(ctx.partial()),
        llama_state_seq_get_data_ext=get,
        llama_state_seq_set_data_ext=lambda ctx, data, size, seq, flags: size if ctx.restore(bytes(data)) else 0,
    )


@pytest.fixture(autouse=True)
def fake_library(monkeypatch):
    def piece(_vocab, token, buffer, _size, _lstrip, _special):
        data = chr(token).encode() if token > 1 else b""
        buffer.raw = data.ljust(len(buffer), b"\0")
        return len(data)

    class Formatter:
        def __init__(self, template, eos_token, bos_token):
            from jinja2 import Template

            self.template = Template(template)

        def __call__(self, messages):
            return SimpleNamespace(prompt=self.template.render(messages=messages))

    library = SimpleNamespace(
        llama_model_get_vocab=lambda model: model,
        llama_vocab_is_eog=lambda vocab, token: token == END,
        llama_token_to_piece=piece,
        **fake_library_of_states(),
        llama_chat_format=SimpleNamespace(Jinja2ChatFormatter=Formatter),
    )
    monkeypatch.setattr(llama, "load", lambda: library)


def ask(chat: Chat, text: str, stop=None) -> str:
    return "".join(chat.ask(text, stop))


def test_a_second_turn_evaluates_only_what_is_new():
    llm = FakeLlama()
    chat = Chat(Engine(llm))
    assert ask(chat, "one") == "hello"
    first, held = chat.turns[0], llm.n_tokens
    assert (first.evaluated_tokens, first.reused_tokens) == (first.prompt_tokens, 0)
    assert ask(chat, "two") == "hello"
    second = chat.turns[1]
    assert second.reused_tokens == held
    assert second.evaluated_tokens == second.prompt_tokens - held == len("<user>two<assistant>")
    assert chat.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "hello"},
    ]


def test_a_cache_that_cannot_forget_starts_over_without_checkpoints():
    for dense, limit, reused in ((100, 0, 4), (1, 0, 0), (1, 1 << 20, 0)):
        llm = FakeLlama(dense=dense)
        llm.prefix = Prefix(llm, Checkpoints(limit))
        engine = Engine(llm)
        assert engine.prefill([5, 6, 7, 8, 9, 9, 9, 9, 9, 9], Turn())
        turn = Turn()
        assert engine.prefill([5, 6, 7, 8, 1, 2], turn)
        assert (turn.reused_tokens, turn.evaluated_tokens) == (reused, 6 - reused), (dense, limit)
        assert llm.input_ids[: llm.n_tokens].tolist() == [5, 6, 7, 8, 1, 2] == llm.memory


def test_the_same_prompt_again_evaluates_one_token():
    llm = FakeLlama()
    engine = Engine(llm)
    assert engine.prefill([5, 6, 7], Turn())
    turn = Turn()  # nothing came after it: its logits are still at hand
    assert engine.prefill([5, 6, 7], turn) and (turn.reused_tokens, turn.evaluated_tokens) == (3, 0)
    llm.eval([8])
    assert engine.prefill([5, 6, 7], turn) and (turn.reused_tokens, turn.evaluated_tokens) == (2, 1)


def test_prefill_goes_in_batches_and_can_be_stopped():
    llm = FakeLlama()
    steps = iter([False, False, True])
    turn = Turn()
    assert Engine(llm).prefill(list(range(2, 20)), turn, lambda: next(steps)) is False
    assert [len(part) for part in llm.evaluated] == [4, 4] and turn.stopped == "interrupt" and turn.evaluated_tokens == 8


def test_an_interrupted_reply_counts_as_said_so_far():
    llm = FakeLlama("a long reply")
    chat = Chat(Engine(llm))
    heard = []
    for piece in chat.ask("one", lambda: len(heard) >= 3):
        heard.append(piece)
    assert "".join(heard) == "a l" and chat.turns[0].stopped == "interrupt"
    assert chat.messages[-1] == {"role": "assistant", "content": "a l"}
    assert ask(chat, "two") == "a long reply"
    assert chat.turns[1].evaluated_tokens <= len("<user>two<assistant>") + 1


def test_interrupted_before_the_first_token():
    chat = Chat(Engine(FakeLlama()))
    assert ask(chat, "one", lambda: True) == "" and chat.messages == [] and chat.turns[0].stopped == "interrupt"
    assert ask(chat, "two") == "hello" and len(chat.messages) == 2


def test_a_reader_that_stops_listening():
    chat = Chat(Engine(FakeLlama()))
    reply = chat.ask("one")
    assert next(reply) == "h"
    reply.close()
    assert chat.messages[-1]["content"] == "h"


def test_ends():
    for n_max, n_ctx, text, stopped in ((-1, 400, "hello", "end"), (3, 400, "hel", "length"), (-1, 22, "hell", "context")):
        chat = Chat(Engine(FakeLlama(n_ctx=n_ctx)), n_max=n_max)
        assert ask(chat, "x" if n_ctx == 22 else "one") == text, stopped
        assert chat.turns[0].stopped == stopped


def test_a_conversation_that_no_longer_fits():
    chat = Chat(Engine(FakeLlama(n_ctx=40)))
    ask(chat, "one")
    before = list(chat.messages)
    with pytest.raises(TcaError, match=r"the conversation has \d+ tokens .* /reset or give a larger --ctx"):
        ask(chat, "x" * 100)
    assert chat.messages == before
    chat.reset()
    assert ask(chat, "one") == "hello"


def test_system_message_and_reset():
    chat = Chat(Engine(FakeLlama()), system="be brief")
    ask(chat, "one")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be brief"}] and chat.turns == []


def test_bos_is_not_doubled():
    llm = FakeLlama()
    engine = Engine(llm)
    assert engine.tokenize_prompt("ab") == [1, 97, 98]
    assert engine.tokenize_prompt("<s>ab")[0] != 1  # the template wrote it; the fake tokenizer spells it out


def test_multi_byte_characters_come_out_whole(monkeypatch):
    llm = FakeLlama("AB")
    raw = {ord("A"): "\u20ac".encode()[:2], ord("B"): "\u20ac".encode()[2:] + b"!"}

    def piece(_vocab, token, buffer, size, _lstrip, _special):
        data = raw[token]
        buffer.raw = data.ljust(size, b"\0")
        return len(data)

    engine = Engine(llm)
    monkeypatch.setattr(engine._lib, "llama_token_to_piece", piece)
    assert [text for _, text in engine.reply([5], -1, Turn())] == ["", "\u20ac!"]


def test_long_pieces_get_a_larger_buffer(monkeypatch):
    engine = Engine(FakeLlama())

    def piece(_vocab, _token, buffer, size, _lstrip, _special):
        if size < 200:
            return -200
        buffer.raw = b" " * size
        return 200

    monkeypatch.setattr(engine._lib, "llama_token_to_piece", piece)
    assert engine.piece(7) == b" " * 200


def test_prompts_that_cannot_be():
    engine = Engine(FakeLlama(n_ctx=8))
    with pytest.raises(TcaError, match="empty"):
        engine.prefill([], Turn())
    with pytest.raises(TcaError, match="9 tokens, the context holds 8"):
        engine.prefill(list(range(9)), Turn())


def test_templates():
    llm = FakeLlama()
    llm.metadata = {}
    with pytest.raises(TcaError, match="no chat template; use: generate --raw"):
        chat_prompt(llm, [])
    llm.metadata = {"tokenizer.chat_template": "{{ 1 / 0 }}"}
    with pytest.raises(TcaError, match="chat template failed: division by zero"):
        chat_prompt(llm, [])


def test_rates_of_a_turn():
    turn = Turn(evaluated_tokens=100, prefill_seconds=2.0, generated_tokens=11, decode_seconds=5.0)
    assert (turn.prefill_tps, turn.decode_tps) == (50.0, 2.0)
    assert (Turn().prefill_tps, Turn().decode_tps, Turn(generated_tokens=1, decode_seconds=1.0).decode_tps) == (0.0, 0.0, 0.0)


def test_stats_text():
    last = {"prompt_tokens": 9, "evaluated_tokens": 5, "reused_tokens": 4, "generated_tokens": 3, "prefill_tps": 50.0, "decode_tps": 2.0}
    stats = {"tca": True, "n_ctx": 8192, "tokens": 4000, "kept_tokens_mean": 1800.0, "kv_bytes": 80e6, "kv_bytes_dense": 200e6, "last": last}
    text = stats_text(stats)
    assert "1800 tokens a head on average (45%)" in text and "80.0 MB allocated, dense would be 200 MB (40%)" in text
    assert "5 new tokens at 50/s, 4 reused" in text
    assert "from a checkpoint" not in text and "checkpoints" not in text
    assert "dense" in stats_text(stats | {"tca": False, "last": None})
    kept = {"count": 3, "bytes": 36e6, "limit_bytes": 512 << 20, "made": 9, "restored": 2}
    text = stats_text(stats | {"checkpoints": kept, "last": last | {"source": "checkpoint"}})
    assert "3 checkpoints, 36.0 MB of 537 MB" in text and "4 reused from a checkpoint" in text
    assert chat_module.Sampling().temperature == 0.8


# ---- going back in a conversation ------------------------------------------------------------------------------------


def talk(dense: int = 20, **options) -> tuple[FakeLlama, Chat]:
    llm = FakeLlama(n_ctx=4000, dense=dense, **options)
    return llm, Chat(Engine(llm), system="a long document " * 20)


def test_retry_evaluates_one_token():
    llm, chat = talk(script="an answer that is longer than what the cache takes back")
    ask(chat, "one")
    messages, prompt = list(chat.messages), chat.turns[0].prompt_tokens
    assert not llm.seq_rm(prompt - 1), "something must have been compacted for this test to mean anything"
    seed = llm._seed
    assert "".join(chat.retry()) == llm.script
    turn = chat.turns[-1]
    assert (turn.evaluated_tokens, turn.reused_tokens, turn.source) == (1, prompt - 1, "checkpoint")
    assert chat.messages == messages and llm._seed != seed


def test_edit_and_undo_go_back_to_the_nearest_checkpoint():
    llm, chat = talk(script="an answer that is longer than what the cache takes back")
    for question in ("one", "two", "three"):
        ask(chat, question)
    assert chat.undo(2) == ["two", "three"] and chat.asked == ["one"]
    ask(chat, "another")
    turn = chat.turns[-1]
    assert turn.source == "checkpoint" and turn.evaluated_tokens <= len("<user>another<assistant>") + 1
    held = chat.engine.tokenize_prompt(chat_prompt(llm, chat.messages[:-1]))
    assert llm.memory[: len(held)] == held
    "".join(chat.edit("something else"))
    assert chat.asked == ["one", "something else"] and chat.turns[-1].source == "checkpoint"
    assert chat.undo(9) == ["one", "something else"] and chat.undo() == []
    assert chat.messages == [{"role": "system", "content": chat.system}]


def test_an_edit_that_is_stopped_or_fails_changes_nothing():
    llm, chat = talk()
    ask(chat, "one")
    before = list(chat.messages)
    assert "".join(chat.edit("two", lambda: True)) == "" and chat.messages == before
    with pytest.raises(TcaError, match="start over with /reset"):
        "".join(chat.edit("x" * 5000))
    assert chat.messages == before and chat.asked == ["one"]
    said = chat._written[-1][1]
    ask(chat, "two")
    assert llm.memory[: len(said)] == said, "what was said is still known token by token"
    with pytest.raises(TcaError, match="nothing was asked yet"):
        "".join(Chat(Engine(FakeLlama())).retry())
