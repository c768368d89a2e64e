"""Retrieval of planted facts: does the evicted cache still answer what the dense one answers?

A haystack of natural text with ``NEEDLES`` facts is processed once; then every fact is asked for from the same saved
state, so that selection has never seen a question except through the dense window. The answer is generated greedily and
counts only if its first run of digits is the code: the prompt holds no digits, so an echo earns nothing.

    python -m tca_gguf.calib.needles model.gguf --tokens 4096 --haystacks 4 [--dense] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tca_gguf.errors import TcaError

from .facts import digits, pick, shuffled
from .runtime import Session
from .texts import paragraphs, record_document

NEEDLES = 8
CITIES = (
    "Lisbon", "Nairobi", "Kyoto", "Toronto", "Lima", "Oslo", "Cairo", "Dublin", "Hanoi", "Prague", "Quito", "Riga",
    "Seoul", "Tunis", "Vienna", "Warsaw", "Zagreb", "Athens", "Bogota", "Delhi", "Geneva", "Havana", "Jakarta", "Kigali",
)  # fmt: skip
STATEMENT = " The secret code for {city} is {code}."
QUESTION = "\n\nQuestion: What is the secret code for {city}?\nAnswer: The secret code for {city} is"
ANSWER_TOKENS = 12
PARAGRAPH = 400  # characters; facts stand between paragraphs, so this is how exactly their depth is met


@dataclass(frozen=True)
class Needle:
    city: str
    code: str
    position: int  # token index at which the fact begins


@dataclass(frozen=True)
class Haystack:
    tokens: list[int]
    needles: tuple[Needle, ...]


@dataclass(frozen=True)
class Answer:
    """One question. text is what the model generated; exact: its first run of digits is the code."""

    haystack: int
    city: str
    code: str
    position: int
    text: str
    exact: bool


@dataclass(frozen=True)
class NeedleReport:
    """kv_tokens: mean slots in use per region when the questions were asked, None for the stock cache."""

    answers: tuple[Answer, ...]
    n_tokens: int
    kv_tokens: float | None
    seconds: float

    @property
    def exact(self) -> int:
        return sum(a.exact for a in self.answers)


def natural_paragraphs() -> list[str]:
    """Text that calibration has not seen: the language reference that Python ships, else generated records."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return [p for seed in range(400) for p in paragraphs([record_document(random.Random(1000 + seed))], PARAGRAPH)]
    return list(paragraphs([topics[name] for name in sorted(topics)], longest=PARAGRAPH))


def make_haystack(tokenize: Callable[[str, bool], Sequence[int]], n_tokens: int, seed: int, source: list[str] | None = None) -> Haystack:
    """``n_tokens`` tokens of text with NEEDLES facts at evenly spread depths (each at a seeded place inside its share)."""
    rng = random.Random(seed)
    source = natural_paragraphs() if source is None else source
    start = int(rng.random() * len(source))
    cities = shuffled(rng, CITIES)[:NEEDLES]
    due = [int((i + 0.1 + 0.8 * rng.random()) * n_tokens * 0.94 / NEEDLES) for i in range(NEEDLES)]
    tokens: list[int] = []
    needles: list[Needle] = []
    i = 0
    while len(tokens) < n_tokens:
        tokens += tokenize(("\n\n" if tokens else "") + source[(start + i) % len(source)], not tokens)
        i += 1
        if len(needles) < NEEDLES and due[len(needles)] <= len(tokens):
            # behind a sentence, never inside a word: a broken word is harder to read for the dense model, too
            needle = Needle(cities[len(needles)], digits(rng, 5), len(tokens))
            tokens += tokenize(STATEMENT.format(city=needle.city, code=needle.code), False)
            needles.append(needle)
    return Haystack(tokens[:n_tokens], tuple(needles))


def is_exact(generated: str, code: str) -> bool:
    """The first run of digits in the generated text is the code."""
    found = re.search(r"\d+", generated)
    return found is not None and found.group() == code


def generate(session: Session, n: int) -> str:
    """Greedy continuation of at most ``n`` tokens; it ends early once a run of digits has ended."""
    out: list[int] = []
    text = ""
    while len(out) < n and not re.search(r"\d\D", text):
        if out:
            session.decode(out[-1:])
        token = int(session.logits().argmax())
        if session.is_end(token):
            break
        out.append(token)
        text = session.text(out)
    return text


def run_needles(
    model_path: str | os.PathLike[str],
    *,
    n_tokens: int = 4096,
    haystacks: int = 4,
    dense: bool = False,
    seed: int = 0,
    n_threads: int | None = None,
    n_ubatch: int = 512,
    type_k: int | None = None,
    type_v: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> NeedleReport:
    """Asks for every needle of every haystack; ``dense`` runs the stock cache.

    Raises TcaError if the file carries no budgets and ``dense`` is false, or if nothing was evicted.
    """
    from tca_gguf import native

    started = time.monotonic()
    source = natural_paragraphs()
    answers: list[Answer] = []
    slots: list[float] = []
    overrides = {"tca.enabled": False} if dense else {}
    with Session(model_path, n_tokens + 256, n_ubatch=n_ubatch, n_threads=n_threads, overrides=overrides, type_k=type_k,
                 type_v=type_v) as session:  # fmt: skip
        if not dense and not native.context_info(session.address).active:
            raise TcaError(f"{session.path}: no head budgets are in use; run embed-budgets on it first, or ask for --dense")
        for i in range(haystacks):
            haystack = make_haystack(session.tokenize, n_tokens, seed + i, source)
            session.clear()
            session.decode(haystack.tokens)
            if not dense:
                slots.append(mean_region(session))
                if slots[-1] >= n_tokens:
                    raise TcaError(f"nothing was evicted in {n_tokens} tokens; use a longer text")
            state = session.save()
            for needle in haystack.needles:
                session.clear()
                session.restore(state)
                session.decode(session.tokenize(QUESTION.format(city=needle.city)))
                text = generate(session, ANSWER_TOKENS)
                answers.append(Answer(i, needle.city, needle.code, needle.position, text, is_exact(text, needle.code)))
                if progress is not None:
                    progress(len(answers), haystacks * NEEDLES, needle.city)
    return NeedleReport(tuple(answers), n_tokens, sum(slots) / len(slots) if slots else None, time.monotonic() - started)


def mean_region(session: Session) -> float:
    """Slots in use, averaged over layers and KV heads."""
    from tca_gguf import native

    info = native.context_info(session.address)
    lengths = [native.region_length(session.address, layer, 0, head) for layer in range(info.n_layer)
               for head in range(info.n_head_kv)]  # fmt: skip
    return sum(lengths) / len(lengths)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tca_gguf.calib.needles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--haystacks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dense", action="store_true", help="run the stock cache")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)

    def progress(done: int, total: int, label: str) -> None:
        print(f"\r{done}/{total} {label:<12}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    from tca_gguf import llama, logs

    try:
        logs.take_over(llama.load().llama_cpp)
        report = run_needles(args.model, n_tokens=args.tokens, haystacks=args.haystacks, dense=args.dense, seed=args.seed,
                             n_threads=args.threads, progress=progress)  # fmt: skip
    except TcaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"exact": report.exact, "questions": len(report.answers), "tokens": report.n_tokens,
                          "kv_tokens": report.kv_tokens, "seconds": round(report.seconds, 1),
                          "answers": [asdict(a) for a in report.answers]}))  # fmt: skip
        return 0
    for a in report.answers:
        if not a.exact:
            print(f"missed: haystack {a.haystack}, token {a.position}, {a.city} {a.code}: {a.text!r}")
    kept = "stock cache" if report.kv_tokens is None else f"{report.kv_tokens:.0f} of {report.n_tokens} tokens kept per head"
    print(f"{report.exact} of {len(report.answers)} exact; {kept}; {report.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
