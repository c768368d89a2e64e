"""What a suite is, and the suites that ask questions about a text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tca_gguf.errors import TcaError

from ..lab import GENERATED_COST, Lab
from ..policies import DENSE, Policy
from ..questions import Document
from ..stats import wilson
from ..texts import ROOM, Size, Tokenize, text_size

Row = dict[str, Any]  # keys: docs/quality.md


class Suite(Protocol):
    """One kind of test. `run` yields a row for every length and policy, each as soon as it is known."""

    name: str
    samples: int  # by default

    def cost(self, length: int, samples: int) -> int:
        """Tokens that one policy evaluates at a length, generated ones weighted: for the time left only."""
        ...

    def run(self, lab: Lab, samples: int) -> Iterator[Row]: ...


def score_row(suite: str, length: int, policy: Policy, samples: int, dense: Sequence[bool], tca: Sequence[bool], **more: Any) -> Row:
    """A row of a suite whose answers are right or wrong. dense, tca: the same answers in the same order."""
    kept = sum(a and b for a, b in zip(dense, tca, strict=True))
    n, n_dense = len(dense), sum(dense)
    return {
        "suite": suite,
        "length": length,
        "keep": round(policy.keep, 4),
        "policy": policy.name,
        "kv_type": policy.kv_type,
        "samples": samples,
        "answers": n,
        "dense": n_dense / n if n else 0.0,
        "tca": sum(tca) / n if n else 0.0,
        "kept": kept / n_dense if n_dense else None,
        "kept_ci": wilson(kept, n_dense),
        "dense_ci": wilson(n_dense, n),
        "tca_ci": wilson(sum(tca), n),
        "dense_correct": n_dense,
        "tca_correct": sum(tca),
        "kept_correct": kept,
        **more,
    }


def score_rows(
    lab: Lab, suite: str, length: int, answer: Callable[[Lab, int, Policy, Any], tuple[list[bool], dict[str, Any]]], tasks: Any,
    n_ctx: int, n_text: int | None = None, samples: int | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row for every policy that can be measured, as soon as it is; the others are noted (`Lab.attempt`).

    answer(lab, length, policy, tasks): scores of all answers in order, and more for the row. n_ctx, n_text: see `Policy.at`.
    samples: None for as many as there are answers.
    """
    dense, _ = answer(lab, length, DENSE, tasks)
    for policy in lab.policies:
        with lab.attempt(f"{suite} {length} {policy.name}"):
            policy = policy.at(n_ctx, n_text)
            tca, more = answer(lab, length, policy, tasks)
            yield score_row(suite, length, policy, len(dense) if samples is None else samples, dense, tca, **more)


class TextSuite:
    """A text is evaluated once; then each question is asked on the cache as the text left it."""

    name: str
    samples: int  # questions
    per_document: int  # questions about one text
    answer_tokens: int = 12

    def document(self, tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random) -> Document:
        """One text with ``per_document`` questions. Raises TcaError if it does not fit the size."""
        raise NotImplementedError

    def n_documents(self, samples: int) -> int:
        return -(-samples // self.per_document)

    def cost(self, length: int, samples: int) -> int:
        return self.n_documents(samples) * (length - ROOM) + samples * (self.answer_tokens * GENERATED_COST)

    def documents(self, lab: Lab, length: int, samples: int) -> list[Document]:
        size = text_size(length, lab.layout)
        made = [self.document(lab.model.tokenize, size, lab.source, lab.rng(self.name, length, i)) for i in range(self.n_documents(samples))]
        extra = sum(len(d.questions) for d in made) - samples
        if extra > 0:
            made[-1] = Document(made[-1].tokens, made[-1].questions[:-extra])
        return made

    def run(self, lab: Lab, samples: int) -> Iterator[Row]:
        for length in lab.settings.lengths:
            documents = self.documents(lab, length, samples)
            n_text = text_size(length, lab.layout).n_tokens
            yield from score_rows(lab, self.name, length, self.answer, documents, length, n_text, samples)

    def answer(self, lab: Lab, length: int, policy: Policy, documents: Sequence[Document]) -> tuple[list[bool], dict[str, Any]]:
        """Scores of all answers in order, and the figures of the cache."""
        started, scores = time.monotonic(), []
        label = f"{self.name} {length} {policy.name}"
        cache: dict[str, Any] = {}
        with lab.session(policy, length) as session:
            for i, document in enumerate(documents):
                session.clear()
                lab.feed(session, document.tokens, label)
                cache = lab.cache(session, policy)
                for question in document.questions:
                    text, right = lab.ask(session, question, label)
                    scores += right
                    lab.record(self.name, length, policy, document=i, expected=list(question.expected), text=text, right=right,
                               depth=question.depth)  # fmt: skip
                    # ROOM sees to it that nothing was compacted since the text ended
                    if not session.remove_tail(len(document.tokens)):
                        raise TcaError(f"{self.name}: the cache of policy {policy.name} could not be taken back to the end of the text")
        return scores, cache | {"seconds": round(time.monotonic() - started, 1)}
