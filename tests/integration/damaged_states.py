"""Damaged and foreign states by the thousand: refused, and the sequence that was there goes on to the bit; or what was changed is a
number in a row (a key, a value), which no state of llama.cpp protects.

    python tests/integration/damaged_states.py --states 1000
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import replace

import numpy as np

from random_walk import opened
from runtime_context import BF16, F16, F32, Q4_0, Q8_0, Context

TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
KINDS = ("cut short", "a bit", "bytes of the head", "other budgets", "a number of tokens", "longer", "of another model's cache type")


def damaged(kind: str, state: bytes, others: dict[str, bytes], rng: random.Random) -> bytes:
    changed = bytearray(state)
    if kind == "cut short":
        return state[: rng.randrange(len(state))]
    if kind == "a bit":
        changed[rng.randrange(len(state))] ^= 1 << rng.randrange(8)
    elif kind == "bytes of the head":
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(8, 80)] = rng.randrange(256)
    elif kind == "a number of tokens":
        changed[32:36] = rng.choice([0, 1, 200, 1024, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)]).to_bytes(4, "little")
    elif kind == "longer":
        changed += bytes(rng.randrange(1, 1000))
    else:
        return others[kind]
    return bytes(changed)


def run(model_name: str, type_name: str, states: int, seed: int) -> Counter[tuple[str, str]]:
    """How often each kind of damage came out how. Raises AssertionError where a refusal changed something."""
    counts: Counter[tuple[str, str]] = Counter()
    rng, kv = random.Random(seed), TYPES[type_name]
    with opened(model_name) as (model, budgets, _):
        settings = dict(n_ctx=1024, n_seq_max=2, n_ubatch=64, type_k=kv, type_v=kv)
        text, old = rng.sample(range(2048), 300), rng.sample(range(2048), 230)
        others = {}
        for kind, changed, cache in (("other budgets", replace(budgets, sinks=8, window=56), kv), ("of another model's cache type", budgets, F16 if kv != F16 else F32)):
            model.set_budgets(changed)
            with Context(model, **{**settings, "type_k": cache, "type_v": cache}) as c:
                c.feed(text)
                others[kind] = c.save(0)
        model.set_budgets(budgets)
        with Context(model, **settings) as c:
            c.feed(text)
            state = c.save(0)
            c.feed(old, 1)
            before, positions = c.save(1), c.positions(1)
            for i in range(states):
                kind = KINDS[i % len(KINDS)]
                data = damaged(kind, state, others, rng)
                if c.load(data, 1) == 0:
                    assert c.save(1) == before, (kind, i)
                    counts[kind, "refused, nothing changed"] += 1
                    continue
                assert c.sequence(1) == (300, 3), (kind, i)
                counts[kind, "as it was" if data[: len(state)] == state else "rows or token ids changed"] += 1
                assert c.load(before, 1) == len(before)
            assert c.save(1) == before and all(np.array_equal(a, b) for a, b in zip(positions, c.positions(1), strict=True))
            assert np.isfinite(c.feed(rng.sample(range(2048), 20), 1)).all()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=1000)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name in TYPES:
        counts = run(args.model, name, args.states, args.seed)
        print(f"{name}: {args.states} states, " + ", ".join(f"{kind} {outcome} {n}" for (kind, outcome), n in sorted(counts.items())))


if __name__ == "__main__":
    main()
