"""Conversations as they go, through tca_gguf.Llama and the real runtime: regenerate, stop, edit, branch, save and restore.

After every step the logits are those of a fresh context that is given the same tokens, and what was evaluated is counted.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_context import FIRST, make_budgets, write_model
from tca_gguf import gguf_file, native
from tca_gguf.chat import Chat, Engine, Sampling
from tca_gguf.loading import open_llama

ROLLBACK = 256  # more than any cache of these tests takes back by itself
TEXT = " ".join(f"In the year {1400 + 7 * i} the harbour of number {i * 37 % 991} had {i} lanterns." for i in range(60))


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of SmolLM2, f32 weights, with its tokenizer; budgets of every kind, groups of 64 tokens."""
    path = write_model(smollm2, tmp_path_factory.mktemp("turns") / "plain.gguf", layers=2, f32=True, tokenizer=True)
    gguf_file.embed_budgets(path, path.with_name("tca.gguf"), make_budgets(path))
    return path.with_name("tca.gguf")


@pytest.fixture
def llama(model: Path):
    """Makes a Llama of the model; all are closed at the end."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(open_llama(model, n_ctx=4096, n_threads=1, seed=1, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def logits(llm: Any) -> bytes:
    from tca_gguf.llama import load

    pointer = load().llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).tobytes()


def held(llm: Any) -> list[int]:
    return llm.input_ids[: llm.n_tokens].tolist()


def step(llm: Any, fresh: Any, tokens: list[int], reply: int) -> int:
    """A prompt and a reply; returns the tokens that were evaluated. The logits are those of a fresh context."""
    fill = llm.prefix.fill(tokens)
    assert held(llm) == tokens and native.context_sequence(int(llm.ctx))[0] == len(tokens)
    fresh.reset()
    fresh.prefix.fill(tokens)
    ours, theirs = (np.frombuffer(logits(x), np.float32) for x in (llm, fresh))
    # the micro-batches are other ones, and the order of sums with them; a lost or a wrong row would be a thousand times this
    assert np.abs(ours - theirs).max() <= 2e-3 * np.abs(theirs).max()
    for layer in range(2):
        for head in range(3):
            there = [native.positions(int(x.ctx), layer, 0, head) for x in (llm, fresh)]
            assert np.array_equal(*there), "the same tokens kept"
    for _ in range(reply):
        llm.eval([int(np.frombuffer(logits(llm), np.float32).argmax())])
    return fill.evaluated_tokens


def test_going_back_costs_what_is_new(llama):
    llm, fresh = llama(), llama(checkpoint_bytes=0)
    document = llm.tokenize(TEXT.encode())
    question, other = llm.tokenize(b"\nWhere?", add_bos=False), llm.tokenize(b"\nWhich of them?", add_bos=False)
    prompt = document + question
    assert len(prompt) > FIRST + 512
    assert step(llm, fresh, prompt, ROLLBACK) == len(prompt)
    assert step(llm, fresh, prompt, ROLLBACK) == 1, "regenerated"
    said = held(llm)
    assert step(llm, fresh, said + other, 5) == len(other), "goes on"
    assert step(llm, fresh, prompt + other, 30) <= len(other) + 1, "another branch at the end of the prompt"
    assert step(llm, fresh, said + question, 3) <= ROLLBACK + len(question), "and back: the core rows of that answer are gone"
    assert step(llm, fresh, document + other, 0) <= 1024 + len(other), "edited: from the nearest checkpoint"
    assert llm.prefix.totals.restored >= 3 and llm.checkpoints.n_bytes <= llm.checkpoints.limit_bytes


def test_the_same_answers_with_and_without(llama):
    """Whole conversations through chat completion: the same text with checkpoints and with every prompt evaluated whole."""
    talks = {}
    for name, options in (("checkpoints", {}), ("none", {"checkpoint_bytes": 0})):
        llm = llama(**options)
        chat = Chat(Engine(llm, Sampling(temperature=0)), system=TEXT, n_max=ROLLBACK)
        said = ["".join(chat.ask("Where does it stand?")), "".join(chat.ask("And then?")), "".join(chat.retry())]
        chat.undo()
        said.append("".join(chat.ask("And before?")))
        said.append("".join(chat.edit("And after?")))
        talks[name] = (said, [turn.evaluated_tokens for turn in chat.turns], llm.prefix.totals)
    (said, few, totals), (same, many, _) = talks.values()
    assert said == same and totals.restored >= 2
    assert few[0] == many[0] and all(a <= 40 for a in few[1:]) and max(many[1:]) > 500


def test_a_caller_that_lowers_the_count(llama):
    """As guidance does: n_tokens is set, the next evaluation goes on from there."""
    llm, fresh = llama(), llama(checkpoint_bytes=0)
    tokens = llm.tokenize(TEXT.encode())
    llm.prefix.fill(tokens)
    for _ in range(ROLLBACK):
        llm.eval([int(np.frombuffer(logits(llm), np.float32).argmax())])
    llm.n_tokens = len(tokens) - 3
    llm.eval([11, 12])
    assert native.context_sequence(int(llm.ctx))[0] == len(tokens) - 1
    assert step(llm, fresh, [*tokens[:-3], 11, 12, 13], 0) == 1


def ask(llm: Any, messages: list[dict[str, str]]) -> tuple[int, int, str]:
    """(prompt tokens evaluated, prompt tokens, answer) of a chat completion that does not end early."""
    answer = llm.create_chat_completion(messages, max_tokens=ROLLBACK, temperature=0, logit_bias={llm.token_eos(): -100.0})
    usage = answer["usage"]
    evaluated = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return evaluated, usage["prompt_tokens"], answer["choices"][0]["message"]["content"]


ONE = [{"role": "user", "content": TEXT + " Where?"}]
TWO = [{"role": "user", "content": "Another one. " + TEXT + " Where?"}]


def test_a_ram_cache_brings_checkpoints_back(llama):
    import llama_cpp

    llm = llama()
    llm.set_cache(llama_cpp.LlamaRAMCache())
    evaluated, n_prompt, first = ask(llm, ONE)
    assert evaluated == n_prompt > 1000
    evaluated, n_prompt, _ = ask(llm, TWO)
    assert evaluated > n_prompt - 40
    evaluated, _, again = ask(llm, ONE)
    assert evaluated == 1 and again == first, "back in the first, before its answer"


def test_a_disk_cache_brings_checkpoints_back(llama, tmp_path):
    """In another process, say. (LlamaDiskCache takes out an entry when it looks it up, so two conversations cannot take turns.)"""
    import llama_cpp

    answers = []
    for _ in range(2):
        llm = llama()
        llm.set_cache(llama_cpp.LlamaDiskCache(str(tmp_path / "cache")))
        answers.append(ask(llm, ONE))
    assert answers[0][0] == answers[0][1] > 1000 and answers[1][0] == 1
    assert answers[0][2] == answers[1][2]


def test_a_saved_state_is_small_and_a_refused_one_changes_nothing(llama):
    llm, other = llama(), llama()
    prompt = llm.tokenize(TEXT.encode())
    llm.prefix.fill(prompt)
    for _ in range(ROLLBACK):
        llm.eval([5])
    state = llm.save_state()
    # upstream's layer adds the scores: n_batch rows of the vocabulary
    assert len(pickle.dumps(state)) < 1.1 * (state.llama_state_size + state.input_ids.nbytes)
    other.load_state(pickle.loads(pickle.dumps(state)))
    assert held(other) == held(llm) and len(other.checkpoints) == len(llm.checkpoints) > 0
    assert other.prefix.fill(prompt).evaluated_tokens == 1
    before, marks = held(other), len(other.checkpoints)
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    with pytest.raises(RuntimeError, match="Failed to set llama state data"):
        other.load_state(state)
    assert held(other) == before and len(other.checkpoints) == marks


def test_pickled_and_reset(llama, model):
    llm = llama(checkpoint_bytes=5 << 20)
    settings = llm.__getstate__()
    assert settings["checkpoint_bytes"] == 5 << 20
    assert pickle.loads(pickle.dumps(type(llm))) is type(llm)
    llm.prefix.fill(llm.tokenize(TEXT.encode()))
    llm.reset()
    assert len(llm.checkpoints) == 0 and llm.prefix.fill(llm.tokenize(TEXT.encode())).kept_tokens == 0
