"""The plan's figures through the binding against a simulation that moves one token at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tca_gguf import native
from tca_gguf.budgets import Budgets
from tca_gguf.errors import TcaError


def make_budgets(seed: int) -> Budgets:
    rng = np.random.default_rng(seed)
    block = int(2 ** rng.integers(0, 5))
    n_blocks = int(rng.integers(1, 6))
    keep = sorted({0, 1, block // 2, block}) if rng.random() < 0.5 else sorted({1, block})
    configs = rng.multinomial(n_blocks, np.ones(len(keep)) / len(keep), size=3).astype(np.int32)
    heads = rng.integers(-1, 3, (2, 3)).astype(np.int32)
    return Budgets(1, block, block * n_blocks, int(rng.integers(1, 60)), int(rng.integers(0, 20)), "key-diff", tuple(keep), configs, heads, 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_lengths_and_capacities(seed: int) -> None:
    b = make_budgets(seed)
    native.budgets_check(b)
    kept = np.append(b.config_kept(), b.group_size)[b.head_config]
    length, longest, groups = np.zeros((2, 3), int), np.zeros((2, 3), int), 0
    for n in range(1, 301):
        length += 1
        longest = np.maximum(longest, length)
        if n >= b.sinks + b.window + (groups + 1) * b.group_size:
            length -= b.group_size - kept
            groups += 1
        assert native.plan_groups(b, n) == groups
        if n % 7 == 0 or n > 290:
            for layer in range(2):
                for head in range(3):
                    assert native.plan_length(b, layer, head, n) == length[layer, head]
                    spare = min(64, b.group_size) if groups > 0 and kept[layer, head] < b.group_size else 0  # for what is taken back
                    assert native.plan_capacity(b, layer, head, n) == longest[layer, head] + spare
                    assert native.plan_capacity(replace(b, rollback=0), layer, head, n) == longest[layer, head]
    tca, dense = native.plan_bytes(b, 64, 96, 1, 8, 300)
    row = 64 * 2 + 96 // 32 * 34
    spare = min(64, b.group_size) * (kept < b.group_size).sum()
    assert dense == 300 * 6 * row and tca == (longest.sum() + spare) * (row + 4)


def test_long_contexts() -> None:
    b = Budgets(1, 16, 512, 496, 16, "key-diff", (1, 16), np.array([[32, 0]], np.int32), np.array([[0, -1]], np.int32), 0.5)
    for n in (2**20, 2**31 - 1, 2**31, 2**32 - 1):
        groups = (n - 512) // 512
        assert native.plan_groups(b, n) == groups
        assert native.plan_length(b, 0, 0, n) == n - groups * 480 <= native.plan_capacity(b, 0, 0, n) <= n - (groups - 1) * 480 + 64
        assert native.plan_capacity(b, 0, 1, n) == n
    assert native.plan_capacity(b, 0, 0, 0) == 0 == native.plan_length(b, 0, 0, 0)
    with pytest.raises(TcaError, match="n_tokens is 4294967296"):
        native.plan_length(b, 0, 0, 2**32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: native.plan_length(b, 2, 0, 5), "layer 2, KV head 0: the budgets have 2 layers of 3 KV heads"),
        (lambda b: native.plan_capacity(b, 0, 3, 5), "layer 0, KV head 3"),
        (lambda b: native.plan_length(b, -1, 0, 5), "layer is -1"),
        (lambda b: native.kept_per_group(b, 3), "configuration 3 does not exist"),
        (lambda b: native.kept_per_group(b, -2), "configuration -2 does not exist"),
        (lambda b: native.plan_bytes(b, 80, 64, 8, 1, 5), "cache type 8 does not fit a head size of 80"),
        (lambda b: native.plan_bytes(b, 64, 64, 1, 77, 5), "cache type 77"),
        (lambda b: native.plan_bytes(b, 64, 64, 4, 1, 5), "cache type 4"),  # a type that was removed from ggml
    ],
)
def test_wrong_arguments(call, words: str) -> None:
    with pytest.raises(TcaError, match=words):
        call(make_budgets(0))
