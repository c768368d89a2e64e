"""The demo: a small real model answers a question over a long document, dense and with budgets, side by side.

The document is generated: a logbook of everyday entries from seeded word lists, with one fact planted early, so that by
the end it has long left the dense window.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import gguf_file, logs, models
from .chat import Engine, Sampling, Turn, cache_stats, chat_prompt
from .errors import TcaError
from .llama import load
from .loading import open_llama

MODEL = "smollm2"
N_CTX = 8192
DOCUMENT_WORDS = 4600  # about 6,100 tokens
SEED = 7
QUESTION = "What is the password of the lighthouse?"
FACT = "IMPORTANT: the password of the lighthouse is 'marigold'."
EXPECTED = "marigold"

_WHO = ("The keeper", "Marta", "Old Tomas", "The harbour master", "A fisherman", "The baker", "Her brother", "The postman")
_DID = ("repaired", "painted", "carried", "counted", "cleaned", "borrowed", "sold", "looked for")
_WHAT = ("the wooden ladder", "two lamps", "a net", "the blue boat", "some rope", "the old bell", "three barrels", "a map")
_WHERE = ("at the pier", "behind the church", "in the cellar", "near the north wall", "on the beach", "in the market")
_WEATHER = ("Rain fell until noon", "The wind turned west", "Fog covered the bay", "The sea was calm", "It was cold and clear")


@dataclass(frozen=True)
class Side:
    """One run of the demo. Rates in tokens a second."""

    name: str
    answer: str
    correct: bool
    prompt_tokens: int
    prefill_tps: float
    decode_tps: float
    kv_bytes: int


def document(n_words: int, seed: int = SEED) -> str:
    """A logbook of about ``n_words`` words with FACT after an eighth of it."""
    rng = random.Random(seed)
    entries, words, day, planted = [], 0, 0, False
    while words < n_words:
        day += 1
        sentences = [f"{rng.choice(_WEATHER)}."]
        for _ in range(rng.randint(2, 4)):
            sentences.append(f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHERE)}.")
        if not planted and words >= n_words // 8:
            sentences.append(FACT)
            planted = True
        entry = f"Day {day}. " + " ".join(sentences)
        words += len(entry.split())
        entries.append(entry)
    return "\n".join(entries)


def prepare(report: Callable[[str], None], progress: Callable[[int, int, str], None], n_threads: int | None) -> Path:
    """Path of the demo's model with budgets, in the user's cache folder; made if it is not there yet."""
    folder = models.cache_dir()
    plain = models.fetch(MODEL, folder, report)
    ready = folder / f"{plain.stem}-tca.gguf"
    if ready.is_file():
        try:
            if gguf_file.read_budgets(ready) is not None:
                return ready
        except TcaError:
            pass  # of another release, or damaged: made again
    from . import calib

    report("calibrating")
    budgets = calib.calibrate(plain, seed=0, progress=progress, n_threads=n_threads)
    gguf_file.embed_budgets(plain, ready, budgets)
    return ready


def answer(path: Path, text: str, *, dense: bool, n_threads: int | None = None, verbose: bool = False) -> Side:
    """Reads the document, answers QUESTION greedily, and measures."""
    llm = open_llama(path, n_ctx=N_CTX, dense=dense, n_threads=n_threads, seed=0, verbose=verbose)
    try:
        engine, turn = Engine(llm, Sampling(temperature=0)), Turn()
        prompt = chat_prompt(llm, [{"role": "user", "content": f"{text}\n\n{QUESTION}"}])
        reply = "".join(piece for _, piece in engine.reply(engine.tokenize_prompt(prompt), 48, turn)).strip()
        stats = cache_stats(llm)
    finally:
        llm.close()
    return Side(
        name="dense" if dense else "TCA",
        answer=reply,
        correct=EXPECTED in reply,
        prompt_tokens=turn.prompt_tokens,
        prefill_tps=turn.prefill_tps,
        decode_tps=turn.decode_tps,
        kv_bytes=stats["kv_bytes"],
    )


def run(
    report: Callable[[str], None],
    progress: Callable[[int, int, str], None],
    n_threads: int | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """The whole demo: {"model", "question", "expected", "sides": [{...dense}, {...tca}]}. Raises TcaError."""
    logs.take_over(load(), verbose)
    path = prepare(report, progress, n_threads)
    text = document(DOCUMENT_WORDS)
    sides = []
    for dense in (True, False):
        report(f"reading the document, {'dense' if dense else 'TCA'}")
        sides.append(answer(path, text, dense=dense, n_threads=n_threads, verbose=verbose))
    return {"model": str(path), "question": QUESTION, "expected": EXPECTED, "sides": [asdict(side) for side in sides]}
