import re

import pytest
from test_calib_texts import VOCABULARY, tokenize

from tca_gguf.calib.needles import NEEDLES, QUESTION, is_exact, make_haystack, natural_paragraphs


@pytest.mark.parametrize(
    ("generated", "exact"),
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
def test_is_exact(generated, exact):
    assert is_exact(generated, "48213") is exact


def test_an_echo_of_the_question_earns_nothing():
    assert not re.search(r"\d", QUESTION.format(city="Oslo"))


@pytest.mark.parametrize("n_tokens", [1500, 4096])
def test_haystack(n_tokens):
    stack = make_haystack(tokenize, n_tokens, seed=3)
    words = {i: p for p, i in VOCABULARY.items()}
    text = "".join(words.get(t, "") for t in stack.tokens)
    assert len(stack.tokens) == n_tokens and len({n.city for n in stack.needles}) == NEEDLES
    for i, needle in enumerate(stack.needles):
        assert text.count(needle.code) == 1 and f"code for {needle.city} is {needle.code}" in text
        # one in each eighth of the text
        assert i / NEEDLES * 0.94 * n_tokens <= needle.position < (i + 1) / NEEDLES * 0.94 * n_tokens + 200
    assert stack == make_haystack(tokenize, n_tokens, seed=3) != make_haystack(tokenize, n_tokens, seed=4)


def test_there_is_text_without_pydoc_data(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert sum(map(len, natural_paragraphs())) > 200_000
