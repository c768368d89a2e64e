"""The text that calibration runs over: prose, code and records, with planted facts that are asked for at the end.

The default documents were written for this package and lie in ``calib/text``; nothing depends on the Python version, so
the same model, seed and number of tokens give the same text everywhere. Text given by the user takes their place; facts
are planted in it all the same, because budgets that never saw a fact being asked for lose facts (docs/calibration.md).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from tca_gguf.errors import TcaError

from .facts import PEOPLE, PLACES, THINGS, Fact, digits, make_facts, pick, shuffled
from .stream import Layout

PROSE, ANSWER = 0, 1
KINDS = ("prose", "answer")
# one fact for this many tokens of text: 24 in the default 6144, whose questions take about a seventh of it
TOKENS_PER_FACT = 256
LONGEST = 1200  # characters of a paragraph
DOCUMENTS = ("harbour", "glaciers", "ledger_code", "minutes", "weather_api", "orchard", "valve", "incident", "queue_code",
             "interview", "letters")  # fmt: skip


@dataclass(frozen=True)
class CalibrationText:
    """tokens: int32 [n]. queries: int64 [m], increasing token indices whose attention is evaluated; kinds: int32 [m]."""

    text: str
    tokens: np.ndarray
    queries: np.ndarray
    kinds: np.ndarray
    sha256: str


def default_documents() -> list[str]:
    folder = resources.files(__package__) / "text"
    return [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in DOCUMENTS]


def record_document(rng: random.Random) -> str:
    """Seeded records (log lines, JSON, a table): what follows when the written documents run out."""
    people, places, things = shuffled(rng, PEOPLE), shuffled(rng, PLACES), shuffled(rng, THINGS)
    form = int(rng.random() * 3)
    if form == 0:
        levels = ("INFO", "INFO", "INFO", "WARN", "ERROR")
        lines = [f"2031-{1 + i % 12:02d}-{1 + int(rng.random() * 28):02d} {digits(rng, 2)}ms {pick(rng, levels)} "
                 f"dispatch: {things[i]} for {people[i]} at {places[i]}, parcel {digits(rng, 6)}" for i in range(12)]  # fmt: skip
    elif form == 1:
        lines = ["["] + [f'  {{"id": {digits(rng, 4)}, "owner": "{people[i]}", "item": "{things[i]}", '
                         f'"site": "{places[i]}", "weight": {digits(rng, 2)}.{digits(rng, 1)}}},' for i in range(10)] + ["]"]  # fmt: skip
    else:
        lines = ["| item | owner | place | pieces |", "|---|---|---|---|"]
        lines += [f"| {things[i]} | {people[i]} | {places[i]} | {digits(rng, 3)} |" for i in range(14)]
    return "\n".join(lines)


def paragraphs(documents: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """Paragraphs in order; one longer than ``longest`` characters is cut at a line, a sentence or a blank."""
    for document in documents:
        for block in re.split(r"\n[ \t]*\n", document.replace("\r\n", "\n").strip("\n")):
            while len(block) > longest:
                head = block[:longest]
                cut = max(head.rfind("\n"), head.rfind(". ") + 1, 0)
                if cut < longest // 4:
                    cut = head.rfind(" ") if head.rfind(" ") > longest // 4 else longest
                yield block[:cut].rstrip("\n")
                block = block[cut:].lstrip("\n")
            if block.strip():
                yield block


def shortest_text(layout: Layout) -> int:
    """Tokens below which calibration is refused: half a group's worth of queries, whatever the paragraphs' lengths."""
    return layout.first_evicting + LONGEST // 4 + layout.group_size // 2


def spread(first: int, last: int, n: int) -> np.ndarray:
    """``n`` or fewer distinct indices in [first, last), evenly spaced, the middle of each share."""
    if last <= first:
        return np.zeros(0, dtype=np.int64)
    n = min(n, last - first)
    return first + ((np.arange(n) + 0.5) * (last - first) / n).astype(np.int64)


def compose(
    tokenize: Callable[[str, bool], Sequence[int]],
    n_tokens: int,
    layout: Layout,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    n_prose: int = 64,
    n_answer: int = 96,
) -> CalibrationText:
    """Builds a calibration text of at most ``n_tokens`` tokens.

    tokenize(text, first): token ids; ``first`` asks for the tokens that start a sequence (BOS) in front.
    texts: documents of the user in place of the package's own; used in the given order, once.
    n_prose, n_answer: how many query positions of each kind are sampled. A query of kind "answer" stands right before an
    answer token, where the model has to read the fact.
    Raises TcaError if the text is too short for anything to be evicted.
    """
    need = shortest_text(layout)
    if n_tokens < need:
        raise TcaError(
            f"{n_tokens} tokens are too few to calibrate: eviction begins after {layout.first_evicting} "
            f"(sinks + window + group); use at least {need}"
        )
    rng = random.Random(seed)
    facts = make_facts(rng, max(2, n_tokens // TOKENS_PER_FACT))
    questions = [(fact, list(tokenize(f"\n\nQuestion: {fact.prompt}", False)), list(tokenize(fact.answer, False)))
                 for fact in shuffled(rng, facts)]  # fmt: skip
    n_tail = sum(len(p) + len(a) for _, p, a in questions)
    body_end = n_tokens - n_tail
    # facts stand where they are compacted before the first question; the longest paragraph may delay the last one
    last_fact = max(body_end - layout.window - LONGEST // 4, body_end // 2)

    def source() -> Iterator[str]:
        if texts is not None:
            yield from paragraphs(texts)
            return
        yield from paragraphs(default_documents())
        while True:
            yield from paragraphs([record_document(rng)])

    pieces: list[str] = []
    tokens: list[int] = []
    waiting: list[Fact] = list(facts)

    def append(piece: str) -> bool:
        text = piece if not pieces else "\n\n" + piece
        new = list(tokenize(text, not pieces))
        if len(tokens) + len(new) > body_end:
            return False
        pieces.append(text)
        tokens.extend(new)
        return True

    for paragraph in source():
        if not append(paragraph):
            break
        # a fact is due whenever the text has reached its even share
        while waiting and len(tokens) >= last_fact * (len(facts) - len(waiting) + 0.5) / len(facts):
            if not append(waiting[0].statement):
                break
            waiting.pop(0)
    asked = {id(fact) for fact in facts} - {id(fact) for fact in waiting}
    n_body = len(tokens)

    answers: list[int] = []
    for fact, prompt, answer in questions:
        if id(fact) not in asked:
            continue
        pieces.append(f"\n\nQuestion: {fact.prompt}{fact.answer}")
        tokens.extend(prompt)
        answers.extend(range(len(tokens) - 1, len(tokens) - 1 + len(answer)))
        tokens.extend(answer)

    if len(tokens) < layout.first_evicting + layout.block_size:
        raise TcaError(
            f"the calibration text has {len(tokens)} tokens; eviction begins after {layout.first_evicting} "
            f"(sinks + window + group): give at least {need}"
        )
    answers = [i for i in answers if i >= layout.first_evicting]
    chosen = np.array(answers, dtype=np.int64)[spread(0, len(answers), n_answer)]
    prose_end = n_body if n_body > layout.first_evicting else len(tokens)
    prose = np.setdiff1d(spread(layout.first_evicting, prose_end, n_prose), chosen)
    queries = np.concatenate([prose, chosen])
    kinds = np.concatenate([np.full(len(prose), PROSE), np.full(len(chosen), ANSWER)])
    by_index = np.argsort(queries, kind="stable")
    text = "".join(pieces)
    return CalibrationText(
        text=text,
        tokens=np.array(tokens, dtype=np.int32),
        queries=queries[by_index],
        kinds=kinds[by_index].astype(np.int32),
        sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
    )
