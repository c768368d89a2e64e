"""needle-multivalue: four keys with four values each, mixed; all values of a key are asked for at once.

RULER-style multi-value retrieval (Hsieh et al. 2024); the other keys are distractors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tca_gguf.calib.facts import digits, shuffled

from ..questions import Document, Question
from ..texts import Size, Tokenize, weave
from .base import TextSuite
from .needle import CITIES

KEYS, VALUES = 4, 4


class MultiValue(TextSuite):
    name = "needle-multivalue"
    samples = 16
    per_document = KEYS
    answer_tokens = 48

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        codes = {city: [digits(rng, 5) for _ in range(VALUES)] for city in shuffled(rng, CITIES)[:KEYS]}
        facts = shuffled(rng, [f"One of the secret codes for {city} is {code}." for city, values in codes.items() for code in values])
        tokens, _ = weave(tokenize, size, source, rng, facts)
        return Document(tokens, tuple(
            Question(f"\n\nQuestion: What are the four secret codes for {city}?\nAnswer: The four secret codes for {city} are",
                     tuple(values), n_tokens=self.answer_tokens)
            for city, values in codes.items()
        ))  # fmt: skip
