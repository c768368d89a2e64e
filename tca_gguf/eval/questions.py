"""Questions over a text, and when an answer counts.

The model continues ``prompt`` greedily. Of what it says the first matches of ``pattern``, as many as answers are expected,
are its answers; an expected one counts if it is among them, whole. No prompt holds an expected answer, so an echo of the
text before it earns nothing, and a list of everything seen earns no more than its first entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = r"\d+"
WORD = r"[A-Za-z]+"


@dataclass(frozen=True)
class Question:
    """prompt: follows the text and ends right before the answer. depth: where in the text its fact stands, 0 to 1."""

    prompt: str
    expected: tuple[str, ...]
    pattern: str = NUMBER
    n_tokens: int = 12  # generated at most
    depth: float | None = None


@dataclass(frozen=True)
class Document:
    """A text and the questions that are asked about it, each on its own."""

    tokens: Sequence[int]
    questions: tuple[Question, ...]


def answers_in(text: str, pattern: str, n: int) -> list[str]:
    """The first ``n`` distinct answers in a generated text, letters small."""
    return list(dict.fromkeys(match.casefold() for match in re.findall(pattern, text)))[:n]


def score(text: str, question: Question) -> list[bool]:
    """For each expected answer whether the generated text gives it."""
    given = answers_in(text, question.pattern, len(question.expected))
    return [answer.casefold() in given for answer in question.expected]


def is_complete(text: str, question: Question) -> bool:
    """Whether nothing that follows can change the score: all answers are given and the last one has ended."""
    matches = list(re.finditer(question.pattern, text))
    distinct = {m.group().casefold() for m in matches}
    return len(distinct) > len(question.expected) or (len(distinct) == len(question.expected) and matches[-1].end() < len(text))
