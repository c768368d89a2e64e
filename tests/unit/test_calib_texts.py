import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca_gguf.calib.facts import make_facts, shuffled
from tca_gguf.calib.stream import Layout
from tca_gguf.calib.texts import ANSWER, PROSE, compose, default_documents, paragraphs, spread
from tca_gguf.errors import TcaError

VOCABULARY: dict[str, int] = {}


def tokenize(text, first):
    """Words, blanks and digits, about as many tokens as a real tokenizer gives."""
    pieces = re.findall(r"\n+| ?[^\W\d]{1,7}|\d| |[^\w\s]", text)
    return ([0] if first else []) + [VOCABULARY.setdefault(p, len(VOCABULARY) + 1) for p in pieces]


def test_default_text():
    text = compose(tokenize, 6144, Layout())
    assert 5900 < len(text.tokens) <= 6144
    assert text.text.count("Question:") == 24
    assert (np.diff(text.queries) > 0).all() and text.queries[0] >= 1024 and text.queries[-1] < len(text.tokens)
    assert (text.kinds == PROSE).sum() == 64 and 60 <= (text.kinds == ANSWER).sum() <= 96


def test_every_question_has_its_fact_before_it_outside_the_window():
    text = compose(tokenize, 4096, Layout()).text
    body, *questions = text.split("\n\nQuestion: ")
    for code in re.findall(r"depot\? It is (\d+)", text):
        assert code in body
    assert len(questions) >= 12
    # the last window of the body holds no fact: what is asked has been compacted
    tail = len(body) - 496 * 3
    assert not re.search(r"The access number of the|keeps the|the last ferry to", body[tail:])


def test_answer_queries_read_the_fact():
    text = compose(tokenize, 4096, Layout())
    words = {i: p for p, i in VOCABULARY.items()}
    for query in text.queries[text.kinds == ANSWER]:
        before = "".join(words.get(int(t), "") for t in text.tokens[max(0, query - 60) : query + 1])
        assert "Question:" in before


def test_deterministic_and_seeded():
    a, b, c = (compose(tokenize, 3000, Layout(), seed=s) for s in (0, 0, 1))
    assert a.sha256 == b.sha256 != c.sha256 and (a.tokens == b.tokens).all() and (a.queries == b.queries).all()


def test_the_text_is_the_same_everywhere():
    # changes whenever the package's documents or the generator change: budgets then change too, so say it in CHANGELOG
    assert compose(tokenize, 6144, Layout()).sha256 == "ab3fccc284cef0736c47df0cd4a3f92e5b171a0bded54fa70e430d9437fe9ffa"


def test_long_texts_go_on_with_records():
    text = compose(tokenize, 16000, Layout())
    assert 15700 < len(text.tokens) <= 16000 and text.text.count("Question:") > 50


def test_users_text():
    mine = compose(tokenize, 4096, Layout(), texts=["word " * 9000])
    assert "harbour" not in mine.text and mine.text.count("Question:") == 16 and len(mine.tokens) > 3800
    assert compose(tokenize, 4096, Layout(), texts=[" ".join(default_documents()).upper()]).sha256 != mine.sha256


@pytest.mark.parametrize("n", [0, 10, 1024, 1579])
def test_too_few_tokens(n):
    with pytest.raises(TcaError, match=r"eviction begins after 1024"):
        compose(tokenize, n, Layout())


def test_too_short_a_text():
    with pytest.raises(TcaError, match="the calibration text has"):
        compose(tokenize, 4096, Layout(), texts=["short"])


@given(st.integers(1580, 2600), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_any_length_has_queries(n, seed):
    text = compose(tokenize, n, Layout(), seed=seed)
    assert len(text.tokens) <= n and len(text.queries) > 0 and text.queries[0] >= 1024


@given(st.text(alphabet="ab .\n", max_size=5000), st.integers(8, 400))
def test_paragraphs_lose_only_blanks(text, longest):
    parts = list(paragraphs([text], longest))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(p) <= longest for p in parts)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 200))
def test_spread(first, length, n):
    index = spread(first, first + length, n)
    assert len(index) == min(n, length) and (np.diff(index) > 0).all()
    assert length == 0 or (index[0] >= first and index[-1] < first + length)


def test_facts_are_distinct_and_answers_stand_in_them():
    import random

    facts = make_facts(random.Random(5), 200)
    assert len({f.prompt for f in facts}) == 200
    assert all(f.answer.strip().strip('"') in f.statement for f in facts)
    assert sorted(shuffled(random.Random(1), range(50))) == list(range(50))
