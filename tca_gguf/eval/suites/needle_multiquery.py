"""needle-multiquery: sixteen facts of one form; four of them are asked for at once.

RULER-style multi-query retrieval (Hsieh et al. 2024).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tca_gguf.calib.facts import digits, shuffled

from ..questions import Document, Question
from ..texts import Size, Tokenize, weave
from .base import TextSuite
from .needle import CITIES
from .needle_multikey import STATEMENT

FACTS, QUERIES = 16, 4


class MultiQuery(TextSuite):
    name = "needle-multiquery"
    samples = 16
    per_document = FACTS // QUERIES
    answer_tokens = 48

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        codes = {city: digits(rng, 5) for city in shuffled(rng, CITIES)[:FACTS]}
        tokens, _ = weave(tokenize, size, source, rng, [STATEMENT.format(city=city, code=code) for city, code in codes.items()])
        cities, questions = shuffled(rng, list(codes)), []
        for i in range(0, FACTS, QUERIES):
            asked = cities[i : i + QUERIES]
            names = f"{', '.join(asked[:-1])} and {asked[-1]}"
            prompt = f"\n\nQuestion: What are the secret codes for {names}?\nAnswer: The secret codes for {names} are"
            questions.append(Question(prompt, tuple(codes[city] for city in asked), n_tokens=self.answer_tokens))
        return Document(tokens, tuple(questions))
