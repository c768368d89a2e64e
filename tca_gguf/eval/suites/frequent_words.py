"""frequent-words: a text of made-up words whose frequencies fall as a power of their rank; the three most frequent are asked for.

RULER-style frequent words extraction (Hsieh et al. 2024): zeta distribution with exponent 2, whose first rank is a row of dots
that does not count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tca_gguf.calib.facts import pick, shuffled

from ..questions import Document, Question
from ..texts import Size, Tokenize
from .base import TextSuite

ASKED, ALPHA, RANKS = 3, 2.0, 400
WORD = r"\b[a-z]{6}\b"
TASK = "This is a coded text. Find the coded words that stand in it most often; the dots are noise.\n\n"
QUESTION = ("\n\nQuestion: Which three coded words stand most often in the text above? Leave out the dots.\n"
            "Answer: The three coded words that stand most often in the text above are:")  # fmt: skip


def coded_word(rng: random.Random) -> str:
    return "".join(pick(rng, "bdfgklmnprstvz") + pick(rng, "aeiou") for _ in range(3))


def counts(n_words: int) -> list[int]:
    """How often each rank stands in a text of about ``n_words`` words, the first rank being the dots."""
    weights = [rank**-ALPHA for rank in range(1, RANKS + 1)]
    return [round(n_words * weight / sum(weights)) for weight in weights]


class FrequentWords(TextSuite):
    name = "frequent-words"
    samples = 16
    per_document = 1
    answer_tokens = 32

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        words: list[str] = []
        while len(words) < RANKS - 1:
            word = coded_word(rng)
            if word not in words:
                words.append(word)
        seed = rng.random()

        def text(n_words: int) -> list[int]:
            drawn = [word for word, n in zip(["....", *words], counts(n_words), strict=True) for _ in range(n)]
            return list(tokenize(TASK + " ".join(shuffled(random.Random(seed), drawn)), True))

        low, high = 0, size.n_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(text(middle)) <= size.n_tokens else (low, middle - 1)
        return Document(text(low), (Question(QUESTION, tuple(words[:ASKED]), WORD, self.answer_tokens),))
