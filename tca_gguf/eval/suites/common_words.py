"""common-words: a long numbered list in which ten words stand often and the others seldom; the ten are asked for.

RULER-style common words extraction (Hsieh et al. 2024): 30 times each against 3 times. The words are those of the text
source, made-up ones where it has too few. A short solved example begins the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tca_gguf.calib.facts import shuffled
from tca_gguf.errors import TcaError

from ..questions import WORD, Document, Question
from ..texts import Size, Tokenize
from .base import TextSuite
from .frequent_words import coded_word

COMMON, OFTEN, SELDOM = 10, 30, 3
EXAMPLE_OFTEN, EXAMPLE_SELDOM, EXAMPLE_WORDS = 6, 1, 20  # of the solved example
TASK = "Here is a numbered list of words. Some of them stand in it much more often than the others.\n"
QUESTION = "\nQuestion: Which {n} words stand most often in the list above?\nAnswer: The {n} most common words of the list are:"


def vocabulary(source: Sequence[str]) -> list[str]:
    """The words of four to eight small letters in a text, in order of the alphabet."""
    return sorted(set(re.findall(r"\b[a-z]{4,8}\b", "\n".join(source))))


def numbered(words: Sequence[str]) -> str:
    return "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))


class CommonWords(TextSuite):
    name = "common-words"
    samples = 8
    per_document = 1
    answer_tokens = 64

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        words = shuffled(rng, vocabulary(source))
        shown, common, rest = words[: 3 + EXAMPLE_WORDS], words[3 + EXAMPLE_WORDS :][:COMMON], words[3 + EXAMPLE_WORDS + COMMON :]
        example = numbered(shuffled(rng, shown[:3] * EXAMPLE_OFTEN + shown[3:] * EXAMPLE_SELDOM))
        head = f"{TASK}{example}{QUESTION.format(n=3)} {', '.join(shown[:3])}.\n\n{TASK}"

        while len(rest) * SELDOM < size.n_tokens // 3:  # an entry has three tokens at least
            rest.append(coded_word(rng))

        def text(n_seldom: int) -> list[int]:
            order = shuffled(random.Random(seed), common * OFTEN + rest[:n_seldom] * SELDOM)
            return list(tokenize(head + numbered(order), True))

        # as many seldom words as fit; the list then ends at most one of them before the text does
        seed = rng.random()
        low, high = 0, len(rest)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(text(middle)) <= size.n_tokens else (low, middle - 1)
        tokens = text(low)
        if low < COMMON or len(tokens) > size.n_tokens:
            raise TcaError(f"{size.n_tokens} tokens are too few for a list of common words; use a length of 4096 or more")
        return Document(tokens, (Question(QUESTION.format(n=COMMON), tuple(common), WORD, self.answer_tokens),))
