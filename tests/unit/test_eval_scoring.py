"""How an answer counts, and the intervals around a share and a mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca_gguf.eval.policies import DENSE
from tca_gguf.eval.questions import NUMBER, WORD, Question, answers_in, is_complete, score
from tca_gguf.eval.stats import mean_interval, wilson
from tca_gguf.eval.suites.base import score_row
from tca_gguf.eval.suites.kld import kl_divergence, log_softmax

ONE = Question("The code is", ("48213",))
FOUR = Question("The codes are", ("11", "22", "33", "44"))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 48213.", True),
        (" 48213", True),
        (" is 48213. The code for Oslo is 11111", True),
        (" 4821", False),
        (" 482130", False),
        (" 11111, not 48213", False),
        (" the secret code for Oslo is", False),
        ("", False),
    ],
)
def test_one_answer(text, right):
    assert score(text, ONE) == [right]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 11, 22, 33 and 44.", [True, True, True, True]),
        (" 44, 33, 22 and 11.", [True, True, True, True]),
        (" 11, 11, 11, 22", [True, True, False, False]),
        (" 1, 2, 3, 4, 11, 22, 33, 44", [False, False, False, False]),  # more than was asked for earns nothing
        (" 11 and 222", [True, False, False, False]),
    ],
)
def test_several_answers(text, right):
    assert score(text, FOUR) == right


def test_words_are_compared_whole_and_without_case():
    question = Question("", ("Peru",), WORD)
    assert score(" peru.", question) == [True]
    assert score(" Peruvian", question) == [False]
    assert answers_in("Red, red and Blue", WORD, 3) == ["red", "and", "blue"]


@pytest.mark.parametrize(
    ("text", "complete"), [("", False), (" 4821", False), (" 48213", False), (" 48213.", True), (" 48213, 5", True)]
)
def test_generation_ends_when_the_score_is_settled(text, complete):
    assert is_complete(text, ONE) is complete


@given(st.text(alphabet="0123 ,.", max_size=24), st.text(alphabet="0123 ,.", max_size=8))
def test_what_follows_a_complete_answer_changes_nothing(text, rest):
    question = Question("", ("1", "22"), NUMBER)
    if is_complete(text, question):
        assert score(text + rest, question) == score(text, question)


def test_wilson():
    # values of the closed formula, as tabulated for 10 trials
    assert wilson(0, 0) is None
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_is_symmetric(case):
    hits, n = case
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_mean_interval():
    assert mean_interval([1.0] * 31) is None
    assert mean_interval([2.0] * 64) == (2.0, 2.0)
    low, high = mean_interval(np.repeat(np.arange(16.0), 4))  # 16 stretches that differ: their spread counts, not that inside them
    half = 1.959964 * np.arange(16.0).std(ddof=1) / 4
    assert (low, high) == pytest.approx((7.5 - half, 7.5 + half))


def test_kept_counts_only_what_the_dense_model_answered():
    dense, tca = [True, True, True, False, False], [True, True, False, True, False]
    row = score_row("s", 4096, DENSE, 5, dense, tca)
    assert (row["dense"], row["tca"]) == (0.6, 0.6)
    assert row["kept"] == pytest.approx(2 / 3) and row["kept_ci"] == wilson(2, 3)
    assert list(row)[:8] == ["suite", "length", "keep", "policy", "kv_type", "samples", "answers", "dense"]
    nothing = score_row("s", 4096, DENSE, 2, [False, False], [True, False])
    assert nothing["kept"] is None and nothing["kept_ci"] is None
    with pytest.raises(ValueError):
        score_row("s", 4096, DENSE, 2, [True], [True, False])


def test_kl_divergence():
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    assert kl_divergence(p, p) == 0.0
    assert kl_divergence(p, q) == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert np.isnan(kl_divergence(p, q + np.nan))
    logits = np.array([1000.0, 1001.0, -1000.0], np.float32)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1.0)
    assert log_softmax(logits)[1] - log_softmax(logits)[0] == pytest.approx(1.0)
    assert np.isfinite(log_softmax(logits)).all()
