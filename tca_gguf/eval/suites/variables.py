"""variables: chains of assignments scattered over a text; all variables that hold a value are asked for.

RULER-style variable tracking (Hsieh et al. 2024): a chain has four hops, ``X1 = 12345``, ``X2 = X1``, ... in order. Four
chains are woven into one another, and each is asked for. A solved example of another value begins the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..questions import Document, Question
from ..texts import Size, Tokenize, weave
from .base import TextSuite

CHAINS, HOPS = 4, 4
NAME = r"[A-Z]{5}"
TASK = "Keep track of the variable assignments in this text.\n\n"
QUESTION = "\n\nQuestion: Find all variables that are assigned the value {value}, directly or through other variables.\nAnswer: The {n} variables with the value {value} are"
EXAMPLE = ("VAR KLMNO = 90817. VAR QRSTU = VAR KLMNO. VAR VWXYZ = VAR QRSTU."
           + QUESTION.format(value="90817", n=3) + " KLMNO, QRSTU, VWXYZ.\n\n")  # fmt: skip


def name(rng: random.Random) -> str:
    return "".join(chr(ord("A") + int(rng.random() * 26)) for _ in range(5))


class Variables(TextSuite):
    name = "variables"
    samples = 16
    per_document = CHAINS
    answer_tokens = 48

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        names: list[str] = []
        while len(names) < CHAINS * (HOPS + 1):
            new = name(rng)
            if new not in names and new not in EXAMPLE:
                names.append(new)
        values: list[str] = []
        while len(values) < CHAINS:
            new = str(10000 + int(rng.random() * 80000))
            if new not in values:
                values.append(new)
        chains = [names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(CHAINS)]
        facts = []
        for hop in range(HOPS + 1):  # interleaved, so that a chain spans the whole text
            for chain, value in zip(chains, values, strict=True):
                facts.append(f"VAR {chain[hop]} = {value if hop == 0 else 'VAR ' + chain[hop - 1]}.")
        tokens, _ = weave(tokenize, size, source, rng, facts, head=TASK + EXAMPLE)
        return Document(tokens, tuple(
            Question(QUESTION.format(value=value, n=HOPS + 1), tuple(chain), NAME, self.answer_tokens)
            for chain, value in zip(chains, values, strict=True)
        ))  # fmt: skip
