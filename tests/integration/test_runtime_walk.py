"""Short random walks and some damaged states; the long ones are commands (random_walk.py, damaged_states.py)."""

from __future__ import annotations

import pytest

from damaged_states import run
from random_walk import walk


@pytest.mark.parametrize("shared", [False, True], ids=["parts", "shared"])
@pytest.mark.parametrize(("model", "n_ubatch"), [("llama", 1), ("llama", 64), ("gemma3", 64)])
def test_a_random_walk(model: str, n_ubatch: int, shared: bool) -> None:
    counts = walk(model, 400, seed=11, n_ubatch=n_ubatch, shared=shared)
    for outcome in ("decode: done", "remove: done", "remove: refused", "remove: over a compaction", "restore: partial", "restore: full",
                    "copy: done", "abort: aborted", "damaged: refused"):  # fmt: skip
        assert counts[outcome] > 0, (outcome, counts)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_damaged_states(cache_type: str) -> None:
    """A hundred of each kind are a command (damaged_states.py)."""
    counts = run("llama", cache_type, 70, seed=2)
    for kind in ("cut short", "other budgets", "a number of tokens", "of another model's cache type"):
        assert counts[kind, "refused, nothing changed"] == 10
    assert counts["longer", "as it was"] == 10
