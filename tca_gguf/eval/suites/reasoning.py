"""reasoning: a long chain of small steps that the model writes itself, so that eviction happens while it decodes.

A list of moves stands at the beginning; the model works through it line by line, reading one move of the list and the result
of its own last line each time. By the end the list has been compacted; that eviction happened while it wrote is checked. A line counts if it applies the right move of the list
and its arithmetic is right; a wrong result does not spoil the lines after it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError

from ..lab import GENERATED_COST, Lab
from ..policies import Policy
from .base import Row, score_rows

SHOWN = 3  # lines that are given, for the form
LINE = r"move (\d+): (-?\d+) ([+-]) (\d+) = (-?\d+)"
MARGIN = 64  # tokens of a length that are left


@dataclass(frozen=True)
class Chain:
    """moves: signed numbers, applied in order to ``start``."""

    start: int
    moves: tuple[int, ...]

    def results(self) -> list[int]:
        value, values = self.start, []
        for move in self.moves:
            value += move
            values.append(value)
        return values

    def lines(self) -> list[str]:
        values = [self.start, *self.results()]
        return [f"move {i}: {values[i - 1]} {'+' if move > 0 else '-'} {abs(move)} = {values[i]}" for i, move in enumerate(self.moves, 1)]

    def prompt(self) -> str:
        listed = "\n".join(f"{i}. {'add' if move > 0 else 'subtract'} {abs(move)}" for i, move in enumerate(self.moves, 1))
        shown = "\n".join(self.lines()[:SHOWN])
        return f"A counter starts at {self.start}. These are the moves:\n{listed}\n\nNow all moves are worked out one by one:\n{shown}\n"

    def score(self, text: str) -> list[bool]:
        """For each line behind the given ones whether it stands in ``text``, with the right move and right arithmetic."""
        right = [False] * (len(self.moves) - SHOWN)
        value, expected = self.results()[SHOWN - 1], SHOWN + 1
        for number, before, sign, amount, result in re.findall(LINE, text):
            if int(number) != expected or expected > len(self.moves):
                break  # the chain is lost: what follows answers nothing
            move = int(amount) if sign == "+" else -int(amount)
            right[expected - SHOWN - 1] = move == self.moves[expected - 1] and int(before) == value and value + move == int(result)
            value, expected = int(result), expected + 1
        return right


def make_chain(rng: random.Random, n_moves: int) -> Chain:
    """Moves of 1 to 9 that keep the counter between 10 and 99."""
    start = value = 30 + int(rng.random() * 40)
    moves = []
    for _ in range(n_moves):
        move = 1 + int(rng.random() * 9)
        if value + move > 99 or (value - move >= 10 and rng.random() < 0.5):
            move = -move
        moves.append(move)
        value += move
    return Chain(start, tuple(moves))


class Reasoning:
    name = "reasoning"
    samples = 4  # chains

    def cost(self, length: int, samples: int) -> int:
        return samples * (length // 3 + 2 * length // 3 * GENERATED_COST)

    def chains(self, lab: Lab, length: int, samples: int) -> list[Chain]:
        """Chains whose list and worked lines together take about ``length`` tokens."""
        def tokens(chain: Chain) -> int:
            return len(lab.model.tokenize(chain.prompt() + "\n".join(chain.lines()[SHOWN:]), True))

        trial = make_chain(lab.rng(self.name, length), 100)
        n_moves = int((length - MARGIN) / (tokens(trial) / 100))
        chains = [make_chain(lab.rng(self.name, length, i), n_moves) for i in range(samples)]
        while max(map(tokens, chains)) > length - MARGIN:
            chains = [Chain(chain.start, chain.moves[:-1]) for chain in chains]
        if length < lab.layout.first_evicting + lab.layout.group_size // 2 or len(chains[0].moves) <= SHOWN:
            raise TcaError(f"reasoning: a length of {length} tokens evicts too little; use at least {evicting(lab.layout)}")
        return chains

    def run(self, lab: Lab, samples: int) -> Iterator[Row]:
        for length in lab.settings.lengths:
            chains = self.chains(lab, length, samples)
            yield from score_rows(lab, self.name, length, self.work, chains, length, samples=samples)

    def work(self, lab: Lab, length: int, policy: Policy, chains: Sequence[Chain]) -> tuple[list[bool], dict[str, Any]]:
        started, scores = time.monotonic(), []
        label = f"{self.name} {length} {policy.name}"
        cache: dict[str, Any] = {}
        evicted: list[float] = []
        decoding: list[float] = []  # of these, while the model writes: a chain that breaks off early evicts little
        with lab.session(policy, length) as session:
            for i, chain in enumerate(chains):
                session.clear()
                lab.feed(session, session.tokenize(chain.prompt(), True), label)
                at_start = session.length()
                before = lab.cache(session, policy, evicts=False)["evicted_tokens"]
                end = f"move {len(chain.moves)}:"
                text, tokens = lab.generate(session, length - at_start - 1, lambda said, end=end: said.partition(end)[2].endswith("\n"), label)
                right = chain.score(text)
                scores += right
                cache = lab.cache(session, policy, evicts=False)
                evicted.append(cache["evicted_tokens"])
                decoding.append(cache["evicted_tokens"] - before)
                lab.record(self.name, length, policy, document=i, start=chain.start, moves=list(chain.moves), text=text,
                           right=right, generated_tokens=len(tokens), prompt_tokens=at_start)  # fmt: skip
        if policy.keep < 1 and not any(decoding):
            raise TcaError(f"policy {policy.name} evicted nothing while the model wrote: its chains broke off; use a greater length")
        more = {"evicted_tokens": sum(evicted) / len(evicted), "evicted_decoding": sum(decoding) / len(decoding)}
        return scores, cache | more | {"seconds": round(time.monotonic() - started, 1)}


def evicting(layout: Layout) -> int:
    """The shortest length for this suite."""
    return layout.first_evicting + layout.group_size // 2
