"""needle-multikey: eight facts of one form in a text, each asked for on its own; the other seven are distractors.

RULER-style multi-key retrieval (Hsieh et al. 2024).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tca_gguf.calib.facts import digits, shuffled

from ..questions import Document, Question
from ..texts import Size, Tokenize, weave
from .base import TextSuite
from .needle import CITIES

STATEMENT = "The secret code for {city} is {code}."
QUESTION = "\n\nQuestion: What is the secret code for {city}?\nAnswer: The secret code for {city} is"
FACTS = 8


class MultiKey(TextSuite):
    name = "needle-multikey"
    samples = 64
    per_document = FACTS

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        cities = shuffled(rng, CITIES)[:FACTS]
        codes = [digits(rng, 5) for _ in cities]
        facts = [STATEMENT.format(city=city, code=code) for city, code in zip(cities, codes, strict=True)]
        tokens, places = weave(tokenize, size, source, rng, facts)
        return Document(tokens, tuple(
            Question(QUESTION.format(city=city), (code,), n_tokens=self.answer_tokens, depth=place / size.n_tokens)
            for city, code, place in zip(cities, codes, places, strict=True)
        ))  # fmt: skip
