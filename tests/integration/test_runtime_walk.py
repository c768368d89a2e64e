"""A short random walk of every kind; the long ones are a command (random_walk.py)."""

from __future__ import annotations

import pytest

from random_walk import walk


@pytest.mark.parametrize("shared", [False, True], ids=["parts", "shared"])
@pytest.mark.parametrize(("model", "n_ubatch"), [("llama", 1), ("llama", 64), ("gemma3", 64)])
def test_a_random_walk(model: str, n_ubatch: int, shared: bool) -> None:
    counts = walk(model, 400, seed=11, n_ubatch=n_ubatch, shared=shared)
    for outcome in ("decode: done", "remove: done", "remove: refused", "remove: over a compaction", "restore: partial", "restore: full",
                    "copy: done", "abort: aborted", "damaged: refused"):  # fmt: skip
        assert counts[outcome] > 0, (outcome, counts)
