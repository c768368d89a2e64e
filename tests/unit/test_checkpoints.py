"""Which checkpoints are kept, and that a prompt is in the cache after fill() whatever came before, evaluating as little as can be."""

from __future__ import annotations

import random

import pytest

import test_chat
from tca_gguf import checkpoints
from tca_gguf.chat import Engine
from tca_gguf.checkpoints import ENVIRONMENT, MOST, SPACING, Checkpoint, Checkpoints, Fill, Prefix, as_bytes, common_prefix, default_limit
from tca_gguf.errors import TcaError
from test_chat import FakeLlama

fake_library = test_chat.fake_library  # the fixture, used by every test here too


def checkpoint(n: int, size: int = 100, first: int = 7) -> Checkpoint:
    prefix = as_bytes([first, *range(1, n)])
    return Checkpoint(prefix, bytes(size - len(prefix)))


def lengths(kept: Checkpoints) -> list[int]:
    return list(map(len, kept))


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2 and common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0 and common_prefix([2], [1]) == 0


def test_the_bound_drops_what_is_missed_least():
    kept = Checkpoints(600)
    for n in (2, 10, 11, 20, 21, 22):
        kept.add(checkpoint(n))
    assert lengths(kept) == [2, 10, 11, 20, 21, 22] and kept.n_bytes == 600
    kept.add(checkpoint(23))  # of the old ones 2, 10, 11 and 20 the loss of 2 costs 10 tokens, of 10 nine, of 11 ten, of 20 ten
    assert lengths(kept) == [2, 11, 20, 21, 22, 23]
    kept.add(checkpoint(20))  # the same tokens again: the newest of them
    assert lengths(kept) == [2, 11, 21, 22, 23, 20]
    kept.replace([checkpoint(1, 500), checkpoint(2, 500)])
    assert lengths(kept) == [2]
    kept.add(checkpoint(3, 700))
    assert lengths(kept) == [] and kept.n_bytes == 0


def test_branches_do_not_fill_each_other_s_gaps():
    kept = Checkpoints(1000)
    for n, first in ((10, 1), (11, 2), (20, 1), (21, 2), (30, 1)):
        kept.add(checkpoint(n, 200, first))
    assert kept.behind([1, *range(1, 40)], 15) == 5 and kept.behind([3, *range(1, 40)], 15) == 15
    assert [len(c) for c in kept.of([1, *range(1, 40)], 10, 30)] == [30, 20]
    assert kept.of([2, *range(1, 12)], 0, 12)[0] is next(c for c in kept if len(c) == 11)


def test_the_limit_of_the_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert Checkpoints().limit_bytes == default_limit() == 512 << 20
    monkeypatch.setenv(ENVIRONMENT, "3")
    assert Checkpoints().limit_bytes == 3 << 20 and Checkpoints(5).limit_bytes == 5
    for bad in ("-1", "1.5", "many", ""):
        monkeypatch.setenv(ENVIRONMENT, bad)
        with pytest.raises(TcaError, match=f"{ENVIRONMENT} is '{bad}'; give the MiB"):
            Checkpoints()
    with pytest.raises(TcaError, match="checkpoint_bytes is -1"):
        Checkpoints(-1)


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 20])
def test_random_conversations(limit, monkeypatch):
    """Any prompt after any other: the memory holds it afterwards. With room for them checkpoints save most of the way."""
    monkeypatch.setattr(checkpoints, "SPACING", 24)
    monkeypatch.setattr(checkpoints, "CLOSE", 4)
    rng = random.Random(1)
    llm = FakeLlama(n_ctx=400, dense=12)
    prefix = Prefix(llm, Checkpoints(limit))
    held: list[list[int]] = [[]]
    evaluated = asked = needed = 0
    for step in range(300):
        base = rng.choice(held[-4:])
        cut = base[: rng.randint(len(base) * 2 // 3, len(base))]
        prompt = (cut + [rng.randint(2, 4) for _ in range(rng.randint(1, 60))])[:390] if len(cut) < 330 else cut[:60]
        before, shared = len(llm.evaluated), common_prefix(llm.memory, prompt)
        fill = prefix.fill(prompt)
        assert llm.memory == prompt == llm.input_ids[: llm.n_tokens].tolist(), step
        assert fill.finished and fill.kept_tokens + fill.evaluated_tokens == fill.prompt_tokens == len(prompt)
        assert sum(map(len, llm.evaluated[before:])) == fill.evaluated_tokens
        assert prefix.checkpoints.n_bytes <= limit and len(prefix.checkpoints) <= MOST
        evaluated, asked = evaluated + fill.evaluated_tokens, asked + len(prompt)
        needed += len(prompt) - min(shared, len(prompt) - 1)  # a cache that takes back anything
        for _ in range(rng.randint(0, 30)):  # a reply
            if llm.n_tokens < 395:
                llm.eval([rng.randint(2, 4)])
        if rng.random() < 0.1:  # a caller that lowers the count
            llm.n_tokens = rng.randint(0, llm.n_tokens)
            prefix.catch_up()
            assert llm.memory == llm.input_ids[: llm.n_tokens].tolist()
        held.append(llm.memory[:])
    assert prefix.totals.evaluated_tokens == evaluated and prefix.totals.kept_tokens == asked - evaluated
    again = (evaluated - needed) / 300  # tokens a prompt, beside a cache that takes back anything
    assert again > 80 if limit == 0 else again < (40 if limit < 1 << 20 else 8) and prefix.totals.restored > 100, again


def test_a_stopped_fill_keeps_what_it_has():
    llm = FakeLlama(n_ctx=400, dense=12)
    prefix = Prefix(llm, Checkpoints(1 << 20))
    prompt, heard = list(range(2, 60)), []
    fill = prefix.fill(prompt, lambda: len(heard) == 3, lambda f: heard.append(f.evaluated_tokens))
    assert not fill.finished and fill.evaluated_tokens == 12 and llm.memory == prompt[:12] and heard == [4, 8, 12]
    fill = prefix.fill(prompt)
    assert fill.finished and (fill.kept_tokens, fill.evaluated_tokens) == (12, 46)


def test_where_checkpoints_are_made():
    llm = FakeLlama(n_ctx=9000, dense=12)
    llm.n_batch = 512
    engine = Engine(llm)
    turns = ["a" * 2500, "b" * 30, "c" * 200]
    messages = [{"role": role, "content": text} for text in turns for role in ("user", "assistant")][:-1]
    tokens = engine.tokenize_prompt(test_chat.chat_prompt(llm, messages))
    starts = [i for i in range(len(tokens)) if "".join(map(chr, tokens[i : i + 6])) == "<user>"]
    engine.prefix.fill(tokens)
    made = lengths(engine.prefix.checkpoints)
    assert made == sorted(made) and made[-1] == len(tokens) - 1
    assert starts[2] in made, "the newest question"
    assert SPACING in made and 2 * SPACING in made
    assert starts[1] in made and len(made) <= 7
    assert engine.prefix.bounded and "checkpoints" in engine.prefix.describe()


def test_no_checkpoints_where_none_are_needed():
    llm = FakeLlama(n_ctx=4000)
    prefix = Prefix(llm)
    prefix.fill(list(range(2, 3000)))
    assert not prefix.bounded and len(prefix.checkpoints) == 0 and "no checkpoints needed" in prefix.describe()


def test_what_a_fill_says(capsys):
    llm = FakeLlama(n_ctx=4000, dense=12)
    llm.verbose = True
    prefix = Prefix(llm)
    prompt = list(range(2, 302))
    prefix.fill(prompt)
    for token in range(100):
        llm.eval([token])
    prefix.fill([*prompt[:-1], 9])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tca: prompt of 300 tokens: 0 kept, 300 evaluated; ")
    assert lines[1].startswith("tca: prompt of 300 tokens: 299 kept from a checkpoint, 1 evaluated; ") and "of 512 MiB" in lines[1]
    assert str(Fill(9, 4, 5, "cache")) == "prompt of 9 tokens: 4 kept, 5 evaluated"


def test_prompts_that_cannot_be():
    prefix = Prefix(FakeLlama(n_ctx=8))
    with pytest.raises(TcaError, match="empty"):
        prefix.fill([])
    with pytest.raises(TcaError, match="9 tokens, the context holds 8"):
        prefix.fill(list(range(9)))
