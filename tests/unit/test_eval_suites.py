"""What the suites ask, without a model: every text, question and chain is checked against its own definition."""

from __future__ import annotations

import random
import re
import sys

import numpy as np
import pytest
from test_calib_texts import VOCABULARY, tokenize

from tca_gguf.calib.stream import Layout
from tca_gguf.cli.eval import SUITE_NAMES
from tca_gguf.errors import TcaError
from tca_gguf.eval.questions import score
from tca_gguf.eval.suites import SUITES
from tca_gguf.eval.suites.base import TextSuite
from tca_gguf.eval.suites.common_words import OFTEN, SELDOM
from tca_gguf.eval.suites.reasoning import LINE, SHOWN, Chain, make_chain
from tca_gguf.eval.texts import ROOM, Size, plain_tokens, read_text, records, reference_text, text_size, weave

SIZE = text_size(4096, Layout())
TEXT_SUITES = [suite for suite in SUITES.values() if isinstance(suite, TextSuite)]


def text_of(tokens) -> str:
    words = {i: p for p, i in VOCABULARY.items()}
    return "".join(words[t] for t in tokens if t in words)


def document(suite: TextSuite, seed: int = 3):
    return suite.document(tokenize, SIZE, reference_text(), random.Random(seed))


def test_the_command_names_every_suite():
    assert list(SUITES) == SUITE_NAMES


@pytest.mark.parametrize("length", [1280, 1281, 2048, 4096, 4300, 5000, 8192])
def test_text_size(length):
    layout = Layout()
    size = text_size(length, layout)
    assert size.n_tokens <= length - ROOM
    # the text has been compacted as far as said, and no further group goes while a question is answered
    assert size.evicted == layout.sinks + layout.compacted(size.n_tokens) * layout.group_size > layout.sinks
    assert layout.compacted(size.n_tokens + ROOM - 1) == layout.compacted(size.n_tokens)


@pytest.mark.parametrize("length", [1, 512, 1279])
def test_text_that_is_too_short(length):
    with pytest.raises(TcaError, match="use at least 1280"):
        text_size(length, Layout())


@pytest.mark.parametrize("suite", TEXT_SUITES, ids=lambda s: s.name)
def test_documents_of_a_suite(suite):
    made = document(suite)
    text = text_of(made.tokens)
    assert 0.97 * SIZE.n_tokens <= len(made.tokens) <= SIZE.n_tokens
    assert len(made.questions) == suite.per_document
    assert made == document(suite) and made != document(suite, 4)
    evicted = text_of(made.tokens[: SIZE.evicted])
    for question in made.questions:
        assert len(set(question.expected)) == len(question.expected) > 0
        # an echo of the question, or of the whole text before it, earns nothing
        assert not any(score(question.prompt, question))
        for answer in question.expected:
            assert re.fullmatch(question.pattern, answer)
            assert answer in evicted
        assert score(" " + ", ".join(question.expected) + ".", question) == [True] * len(question.expected)
        assert score(" " + text[-2000:], question).count(True) < max(2, len(question.expected))


@pytest.mark.parametrize("suite", TEXT_SUITES, ids=lambda s: s.name)
@pytest.mark.parametrize("length", [8192, 32768])
def test_long_documents(suite, length):
    size = text_size(length, Layout())
    made = suite.document(tokenize, size, records(), random.Random(1))
    assert 0.97 * size.n_tokens <= len(made.tokens) <= size.n_tokens
    evicted = text_of(made.tokens[: size.evicted])
    assert all(answer in evicted for question in made.questions for answer in question.expected)
    if made.questions[0].depth is not None:
        depths = [question.depth for question in made.questions]
        assert min(depths) < 0.2 and max(depths) > 0.7


@pytest.mark.parametrize("name", ["needle", "needle-multikey", "needle-multivalue", "needle-multiquery", "variables"])
@pytest.mark.parametrize("seed", range(3))
def test_facts_stand_once_and_where_they_are_evicted(name, seed):
    made = document(SUITES[name], seed)
    evicted, window = text_of(made.tokens[: SIZE.evicted]), text_of(made.tokens[SIZE.evicted :])
    for question in made.questions:
        for answer in question.expected:
            if answer.isdigit() or name == "variables":
                found = len(re.findall(rf"\b{answer}\b", evicted))
                assert 1 <= found <= (2 if name == "variables" else 1), answer  # a variable is also what the next one is set to
            assert not answer.isdigit() or not re.search(rf"\b{answer}\b", window)
        if question.depth is not None:
            assert 0 <= question.depth < SIZE.evicted / SIZE.n_tokens


def test_needles_are_spread_over_the_depths():
    depths = [q.depth for seed in range(8) for q in document(SUITES["needle"], seed).questions]
    counts, _ = np.histogram(depths, bins=8, range=(0, SIZE.evicted / SIZE.n_tokens))
    assert counts.min() >= 3 and counts.sum() == 64


def test_chains_of_variables():
    made = document(SUITES["variables"])
    text = text_of(made.tokens)
    for question in made.questions:
        value = re.search(r"the value (\d+)", question.prompt).group(1)
        held = set(re.findall(rf"VAR ([A-Z]{{5}}) = {value}\b", text))
        while new := {a for a, b in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", text) if b in held} - held:
            held |= new
        assert held == set(question.expected) and len(held) == 5


@pytest.mark.parametrize("source", [reference_text(), records()], ids=["many words", "few words"])
def test_common_words_are_the_common_ones(source):
    made = SUITES["common-words"].document(tokenize, SIZE, source, random.Random(3))
    words = re.findall(r"\d+\. ([a-z]+)", text_of(made.tokens).rpartition("Here is a numbered list")[2])
    expected = made.questions[0].expected
    assert {words.count(word) for word in expected} == {OFTEN}
    assert {words.count(word) for word in words if word not in expected} == {SELDOM}


def test_frequent_words_are_the_most_frequent():
    made = document(SUITES["frequent-words"])
    words = re.findall(r"\b[a-z]{6}\b", text_of(made.tokens).partition("\n\n")[2])
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert tuple(ranked[:3]) == made.questions[0].expected
    assert words.count(ranked[2]) > words.count(ranked[3])


def test_chain_of_moves():
    chain = make_chain(random.Random(1), 200)
    assert all(10 <= value <= 99 for value in chain.results()) and all(1 <= abs(m) <= 9 for m in chain.moves)
    assert all(re.fullmatch(LINE, line) for line in chain.lines())
    lines = chain.lines()
    assert all(line in chain.prompt() for line in lines[:SHOWN]) and lines[SHOWN] not in chain.prompt()
    assert chain.score("\n".join(lines[SHOWN:])) == [True] * (200 - SHOWN)
    # an echo of the prompt, a chain that skips a line, and one that ends early
    assert not any(chain.score(chain.prompt()))
    assert sum(chain.score("\n".join(lines[SHOWN : SHOWN + 10] + lines[SHOWN + 11 :]))) == 10
    assert sum(chain.score("\n".join(lines[SHOWN : SHOWN + 10]))) == 10


def test_a_wrong_line_of_a_chain_does_not_spoil_the_next():
    chain = Chain(50, (3, 4, 5, 6, -7, 8))
    good = "move 4: 62 + 6 = 68\nmove 5: 68 - 7 = 61\nmove 6: 61 + 8 = 69\n"
    assert chain.score(good) == [True, True, True]
    assert chain.score(good.replace("= 68\nmove 5: 68 - 7 = 61\nmove 6: 61 + 8 = 69", "= 67\nmove 5: 67 - 7 = 60\nmove 6: 60 + 8 = 68")) == [False, True, True]
    assert chain.score(good.replace("- 7 = 61", "+ 7 = 75").replace("61 + 8 = 69", "75 + 8 = 83")) == [True, False, True]  # a wrong move
    assert chain.score(good.replace("68 - 7 = 61", "60 - 7 = 53")) == [True, False, False]  # not its own last result


def test_weave():
    source = [f"paragraph number {i} of some length, with words in it." for i in range(500)]
    facts = [f"Fact {i} is here." for i in range(16)]
    tokens, places = weave(tokenize, Size(2000, 1500), source, random.Random(0), facts, head="A head. ")
    assert len(tokens) == 2000 and places == sorted(places)
    for fact, place in zip(facts, places, strict=True):
        n = len(tokenize(f" {fact}", False))
        assert text_of(tokens[place : place + n]) == f" {fact}" and place + n <= 1500
    assert text_of(tokens).startswith("A head. ")
    with pytest.raises(TcaError, match="do not fit"):
        weave(tokenize, Size(2000, 100), source, random.Random(0), facts)


def test_plain_tokens_start_where_the_seed_says():
    source = [f"paragraph {i}." for i in range(100)]
    one, other = (plain_tokens(tokenize, 300, source, random.Random(s)) for s in (1, 2))
    assert len(one) == len(other) == 300 and one != other


def test_texts(tmp_path, monkeypatch):
    for name in ("reference", "code", "records"):
        assert sum(map(len, read_text(name))) > 200_000
    path = tmp_path / "t.txt"
    path.write_text("One.\n\nTwo.", encoding="utf-8")
    assert read_text(str(path)) == ["One.", "Two."]
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(TcaError, match="is empty"):
        read_text(str(path))
    with pytest.raises(TcaError, match="cannot be read"):
        read_text(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert reference_text() == records()
