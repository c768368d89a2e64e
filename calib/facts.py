"""Planted facts with later questions, generated from a seed: what calibration needs to see so that nothing gets lost.

A fact is stated once, between paragraphs of the text, and asked after the whole text. Only ``random.Random.random`` is
used, whose sequence Python guarantees for a seed across versions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

PEOPLE = (
    "Amara Lindqvist", "Bruno Tanaka", "Celia Okonkwo", "Dmitri Fairweather", "Elsa Marchetti", "Farid Holloway",
    "Greta Sandoval", "Hugo Petrov", "Imani Castellanos", "Joost Abernathy", "Keiko Vandermeer", "Leopold Nwosu",
    "Mirela Thornton", "Niels Achebe", "Odette Kowalski", "Pavel Whitcombe", "Quentin Rossi", "Rosalind Mbeki",
    "Soren Delgado", "Tamsin Yilmaz", "Ulrich Fontaine", "Vera Ashdown", "Wendell Ivanov", "Yasmin Corbett",
)  # fmt: skip
PLACES = (
    "Aldermoor", "Brackenfield", "Corvale", "Dunmarsh", "Eastholm", "Farrowdale", "Glenhurst", "Harrowgate Cross",
    "Inverlea", "Jarrow Point", "Kestrel Bay", "Lowmere", "Marrick", "Northwold", "Oxcombe", "Pellbrook", "Quarndon",
    "Ravensby", "Saltmarsh", "Thornley", "Upper Wick", "Varlstead", "Westerfold", "Yarrowby",
)  # fmt: skip
THINGS = (
    "brass compass", "blue umbrella", "silver whistle", "paper lantern", "wooden chess set", "green suitcase",
    "copper kettle", "glass paperweight", "leather notebook", "tin drum", "velvet curtain", "ivory comb",
    "stone mortar", "wool blanket", "red bicycle", "porcelain owl", "iron key", "straw hat", "crystal vase",
    "canvas tent", "bronze bell", "cedar chest", "folding map", "pocket telescope",
)  # fmt: skip
ROOMS = ("attic", "boathouse", "cellar", "chapel", "conservatory", "dairy", "gatehouse", "granary", "laundry", "library",
         "observatory", "pantry", "smithy", "stable", "study", "workshop")  # fmt: skip
WORDS = ("amber", "basalt", "cobalt", "dahlia", "ember", "fennel", "garnet", "hazel", "indigo", "juniper", "kelp",
         "lichen", "magnet", "nettle", "onyx", "pepper", "quartz", "raven", "saffron", "tundra")  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """statement stands in the text; prompt ends right before the answer, which begins with a space."""

    statement: str
    prompt: str
    answer: str


def pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        out[i], out[j] = out[j], out[i]
    return out


def digits(rng: random.Random, n: int) -> str:
    return str(1 + int(rng.random() * 9)) + "".join(str(int(rng.random() * 10)) for _ in range(n - 1))


def make_facts(rng: random.Random, n: int) -> list[Fact]:
    """``n`` facts of six forms, one form after another; no two facts of one form are about the same thing."""
    people, places, things = shuffled(rng, PEOPLE), shuffled(rng, PLACES), shuffled(rng, THINGS)
    facts = []
    for i in range(n):
        form, person = i % 6, people[i % len(people)]
        place, thing = places[i % len(places)], things[i % len(things)]
        suffix = "" if i < len(PEOPLE) else f" {i // len(PEOPLE) + 1}"
        if form == 0:
            code = digits(rng, 5)
            facts.append(Fact(f"The access number of the {place} depot{suffix} is {code}.",
                              f"What is the access number of the {place} depot{suffix}? It is", f" {code}"))  # fmt: skip
        elif form == 1:
            room = pick(rng, ROOMS)
            facts.append(Fact(f"{person} keeps the {thing}{suffix} in the {room}.",
                              f"Where does {person} keep the {thing}{suffix}? In the", f" {room}"))  # fmt: skip
        elif form == 2:
            hour, minute = 6 + int(rng.random() * 16), int(rng.random() * 60)
            time = f"{hour:02d}:{minute:02d}"
            facts.append(Fact(f"On weekdays the last ferry to {place}{suffix} leaves at {time}.",
                              f"When does the last ferry to {place}{suffix} leave on weekdays? At", f" {time}"))  # fmt: skip
        elif form == 3:
            other = places[(i + 7) % len(places)]
            facts.append(Fact(f"{person}{suffix} was born in {other}.",
                              f"In which place was {person}{suffix} born? In", f" {other}"))  # fmt: skip
        elif form == 4:
            key, value = f"{pick(rng, WORDS)}_{pick(rng, WORDS)}_{i}", f"{pick(rng, WORDS)}-{digits(rng, 3)}"
            facts.append(Fact(f'settings["{key}"] = "{value}"',
                              f'What is the value of settings["{key}"]? It is "', f'{value}"'))  # fmt: skip
        else:
            word = f"{pick(rng, WORDS)} {pick(rng, WORDS)}"
            facts.append(Fact(f"{person}{suffix} opens the {thing} with the password \"{word}\".",
                              f'With which password does {person}{suffix} open the {thing}? With "', f'{word}"'))  # fmt: skip
    return facts
