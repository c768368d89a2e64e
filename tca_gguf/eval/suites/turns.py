"""turns: a conversation on one cache, which is kept from turn to turn as `chat` keeps it.

A text with eight facts is evaluated once. Then
- eight questions are asked one after another, each on top of all that was said before;
- the last turn is edited: another question takes its place, and only that is evaluated;
- an early fact is changed: what the cache holds is no longer the prompt, and a cache that has compacted the place must refuse
  to go back there, so that everything is evaluated again. The answer must be the new fact.
A cache that claims to have gone back into what it compacted would answer with holes: that is an error, not a low score.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tca_gguf import native
from tca_gguf.calib.facts import digits, shuffled
from tca_gguf.calib.runtime import Session
from tca_gguf.errors import TcaError

from ..lab import GENERATED_COST, Lab
from ..policies import Policy
from ..questions import Question, is_complete, score
from ..texts import ROOM, text_size, weave
from .base import Row, score_rows
from .needle import CITIES
from .needle_multikey import FACTS, QUESTION, STATEMENT

ANSWER_TOKENS = 12
EXTRA = 512  # tokens of the context behind the length, for the turns


@dataclass(frozen=True)
class Talk:
    """Two versions of a text that differ in the first fact's code."""

    tokens: Sequence[int]
    changed: Sequence[int]
    questions: tuple[Question, ...]
    changed_question: Question


class Turns:
    name = "turns"
    samples = 20  # ten a conversation

    def n_talks(self, samples: int) -> int:
        return -(-samples // (FACTS + 2))

    def cost(self, length: int, samples: int) -> int:
        return self.n_talks(samples) * (2 * (length - ROOM) + (FACTS + 2) * ANSWER_TOKENS * GENERATED_COST)

    def talk(self, lab: Lab, length: int, i: int) -> Talk:
        size = text_size(length, lab.layout)
        rng = lab.rng(self.name, length, i)
        cities = shuffled(rng, CITIES)[:FACTS]
        codes = [digits(rng, 5) for _ in range(FACTS + 1)]
        state = rng.getstate()

        def text(first: str) -> list[int]:
            rng.setstate(state)
            facts = [STATEMENT.format(city=city, code=code) for city, code in zip(cities, [first, *codes[1:FACTS]], strict=True)]
            return weave(lab.model.tokenize, size, lab.source, rng, facts)[0]

        questions = [Question(QUESTION.format(city=city), (code,), n_tokens=ANSWER_TOKENS) for city, code in zip(cities, codes, strict=False)]
        return Talk(text(codes[0]), text(codes[FACTS]), tuple(questions),
                    Question(questions[0].prompt, (codes[FACTS],), n_tokens=ANSWER_TOKENS))  # fmt: skip

    def run(self, lab: Lab, samples: int) -> Iterator[Row]:
        for length in lab.settings.lengths:
            talks = [self.talk(lab, length, i) for i in range(self.n_talks(samples))]
            n_text = text_size(length, lab.layout).n_tokens
            yield from score_rows(lab, self.name, length, self.converse, talks, length + EXTRA, n_text)

    def converse(self, lab: Lab, length: int, policy: Policy, talks: Sequence[Talk]) -> tuple[list[bool], dict[str, Any]]:
        """Scores of all turns in order, and what was reused."""
        started, scores = time.monotonic(), []
        label = f"{self.name} {length} {policy.name}"
        edited: list[int] = []
        changed: list[int] = []
        cache: dict[str, Any] = {}
        with lab.session(policy, length + EXTRA) as session:

            def turn(i: int, kind: str, prompt: list[int], question: Question, held: list[int]) -> tuple[int, list[int]]:
                """Brings the cache from ``held`` to the prompt and the question, and answers: (tokens reused, tokens held then)."""
                full = prompt + session.tokenize(question.prompt)
                reused = reuse(session, held, full, policy)
                lab.feed(session, full[reused:], label)
                text, answer = lab.generate(session, question.n_tokens, lambda said: is_complete(said, question), label)
                right = score(text, question)
                scores.extend(right)
                lab.record(self.name, length, policy, document=i, turn=kind, expected=list(question.expected), text=text,
                           right=right, reused=reused)  # fmt: skip
                return reused, full + answer[:-1]  # the last token of the answer is not in the cache

            for i, talk in enumerate(talks):
                session.clear()
                held: list[int] = []
                said = before = list(talk.tokens)
                for question in talk.questions:
                    before = said
                    reused, said = turn(i, "next", said, question, held)
                    if reused != len(held):
                        raise TcaError(f"{label}: a turn that only adds was evaluated from token {reused} of {len(held)}")
                    held = said
                reused, held = turn(i, "edited", before, talk.questions[0], held)
                edited.append(reused)
                cache = lab.cache(session, policy)
                reused, held = turn(i, "changed", list(talk.changed), talk.changed_question, held)
                changed.append(reused)
        more = {"edited_reused": edited, "changed_reused": changed, "seconds": round(time.monotonic() - started, 1)}
        return scores, cache | more


def reuse(session: Session, held: Sequence[int], wanted: Sequence[int], policy: Policy) -> int:
    """Takes the cache back to what ``held`` and ``wanted`` have in common; 0, and an empty cache, if it cannot go there.

    Raises TcaError if groups stay compacted that a fresh evaluation of what is left would not have compacted.
    """
    keep = next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted)))
    if keep == len(held):
        return keep
    if session.remove_tail(keep):
        if policy.budgets is not None and policy.keep < 1:
            groups = native.context_sequence(session.address, 0)[1]
            if groups != native.plan_groups(policy.budgets, keep):
                raise TcaError(f"the cache of policy {policy.name} went back to token {keep} with {groups} groups compacted: its text has holes now")
        return keep
    session.clear()
    return 0
