"""The text of the suites: natural paragraphs that calibration has not seen, with facts woven in where they are evicted."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tca_gguf.calib.stream import Layout
from tca_gguf.calib.texts import paragraphs, record_document
from tca_gguf.errors import TcaError

PARAGRAPH = 400  # characters; facts stand between paragraphs, so this is how exactly their depth is met
ROOM = 256  # tokens of a length that are left for a question and its answer
CODE_MODULES = ("argparse", "difflib", "doctest", "tarfile", "mailbox", "pdb", "subprocess", "configparser", "zipfile", "optparse")

Tokenize = Callable[[str, bool], Sequence[int]]


@dataclass(frozen=True)
class Size:
    """n_tokens: of the text. evicted: the first so many tokens have been compacted when the text ends."""

    n_tokens: int
    evicted: int


def text_size(length: int, layout: Layout) -> Size:
    """The text of a window of ``length`` tokens: ROOM tokens are left, in which no group is compacted.

    Selection has then finished before the question begins, whatever a metric looks at. Raises TcaError if such a text is
    too short for anything to be evicted.
    """
    n = length - ROOM
    period, first = layout.group_size, layout.first_evicting
    if n >= first:
        next_compaction = first + ((n - first) // period + 1) * period
        n = min(n, next_compaction - ROOM) if next_compaction - ROOM >= first else n
    n_groups = max(0, (n - first) // period + 1) if n >= first else 0
    if n_groups == 0:
        raise TcaError(f"a length of {length} tokens evicts nothing before a question; use at least {first + ROOM}")
    return Size(n, layout.sinks + n_groups * period)


def read_text(name: str) -> list[str]:
    """Paragraphs of a text: ``reference``, ``code``, ``records``, or the path of a UTF-8 file. Raises TcaError."""
    if name in SOURCES:
        return SOURCES[name]()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TcaError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise TcaError(f"{name} cannot be read: {error.strerror}; or name one of {', '.join(SOURCES)}") from None
    found = list(paragraphs([text], PARAGRAPH))
    if not found:
        raise TcaError(f"{name} is empty")
    return found


def reference_text() -> list[str]:
    """The language reference that Python ships (where it does): prose with examples, about 110,000 tokens."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return records()
    return list(paragraphs([topics[name] for name in sorted(topics)], PARAGRAPH))


def code() -> list[str]:
    """Modules of Python's standard library."""
    return list(paragraphs([inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES], PARAGRAPH))


def records() -> list[str]:
    """Generated log lines, JSON and tables."""
    return [p for seed in range(400) for p in paragraphs([record_document(random.Random(1000 + seed))], PARAGRAPH)]


SOURCES = {"reference": reference_text, "code": code, "records": records}


def plain_tokens(tokenize: Tokenize, n_tokens: int, source: Sequence[str], rng: random.Random) -> list[int]:
    """``n_tokens`` tokens of the source from a random paragraph on."""
    return weave(tokenize, Size(n_tokens, n_tokens), source, rng, [])[0]


def weave(
    tokenize: Tokenize, size: Size, source: Sequence[str], rng: random.Random, facts: Sequence[str], head: str = ""
) -> tuple[list[int], list[int]]:
    """A text of ``size.n_tokens`` tokens in which the facts stand in order, evenly spread over what is evicted.

    Each fact stands at a random place inside its share, behind a paragraph: a broken word would be harder to read for the
    dense model, too. head: begins the text. Returns (tokens, index of each fact's first token). Raises TcaError if there is
    no room for the facts.
    """
    start = int(rng.random() * len(source))
    tokens: list[int] = list(tokenize(head, True)) if head else []
    encoded = [list(tokenize(f" {fact}", False)) for fact in facts]
    first = len(tokens)
    longest = max((len(tokenize(p, False)) for p in source[:64]), default=0)
    shares = [i + 0.1 + 0.8 * rng.random() for i in range(len(facts))]
    # a paragraph may push a fact behind its place: if the last one then stands too late, all stand closer
    for margin in (1, 2, 3):
        span = size.evicted - first - margin * longest - sum(map(len, encoded))
        due = [first + share * span / len(facts) for share in shares]
        woven, places, paragraph, inserted = list(tokens), [], start, 0
        while len(woven) < size.n_tokens:
            woven += tokenize(("\n\n" if woven else "") + source[paragraph % len(source)], not woven)
            paragraph += 1
            while len(places) < len(facts) and len(woven) - inserted >= due[len(places)]:
                fact = encoded[len(places)]
                places.append(len(woven))
                woven += fact
                inserted += len(fact)
        if not facts or (len(places) == len(facts) and places[-1] + len(encoded[-1]) <= size.evicted):
            return woven[: size.n_tokens], places
    raise TcaError(f"{len(facts)} facts do not fit the evicted part of {size.n_tokens} tokens; use a greater length")
