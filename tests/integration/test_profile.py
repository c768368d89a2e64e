"""tca_profile: attention timed inside real forward passes, which it must not change."""

from __future__ import annotations

import time

import numpy as np
import pytest

from runtime_context import FIRST, GROUP, Context
from tca_gguf import native
from tca_gguf.errors import TcaError

N = FIRST + 2 * GROUP - 1  # the next token lets a group be compacted


@pytest.mark.parametrize(("which", "flash"), [("tca", None), ("stock", 0), ("stock", 1)])
@pytest.mark.parametrize("step", [1, 3 * GROUP])
def test_seconds_add_up_to_the_pass(tca_model, stock_model, ids, which, flash, step):
    profile = native.Profile()
    with Context(tca_model if which == "tca" else stock_model, flash=flash, profile=profile) as c:
        profile.off()
        c.feed(ids[:N])
        with Context(tca_model if which == "tca" else stock_model, flash=flash) as plain:
            plain.feed(ids[:N])
            expected = plain.feed(ids[N : N + step])

        profile.learn()
        assert np.array_equal(c.feed(ids[N : N + step]), expected)
        profile.off()
        c.rm(0, -1, -1)  # all of it: what was compacted cannot be taken back
        c.feed(ids[:N])
        profile.start()
        started = time.perf_counter()
        assert np.array_equal(c.feed(ids[N : N + step]), expected)
        whole = time.perf_counter() - started
        seconds = profile.read()
        parts = (seconds.attention, seconds.append, seconds.other)
        assert all(s > 0 for s in parts) and (seconds.select > 0) == (which == "tca")
        assert sum(parts) + seconds.select < whole
        assert seconds.other > seconds.append


def test_another_graph_is_not_taken_for_the_learned_one(tca_model, ids):
    profile = native.Profile()
    with Context(tca_model, profile=profile) as c:
        profile.off()
        c.feed(ids[:N])
        profile.learn()
        c.feed(ids[N : N + 1])  # compacts
        profile.start()
        c.feed(ids[N + 1 : N + 2])  # does not
        with pytest.raises(TcaError, match="another graph"):
            profile.read()
        profile.learn()
        c.feed(ids[N + 2 : N + 3])
        profile.start()
        for i in range(3, 6):  # the graph of these is the same, and every pass counts
            c.feed(ids[N + i : N + i + 1])
        assert profile.read().attention > 0
