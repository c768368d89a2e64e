"""Selection of the runtime against the plain C reference and against numpy: the same slots, ties and all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import reference_select
from tca_gguf import native
from tca_gguf.errors import TcaError

ROPE_NAMES = {0: "none", 1: "norm", 2: "neox"}


@dataclass
class Case:
    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    rope: native.Rope | None
    block: int
    keep: list[int]
    counts: list[int]
    layer: int
    head: int
    probe: np.ndarray

    def select(self, metric: str, impl: native.Impl) -> tuple[np.ndarray, np.ndarray]:
        return native.select(self.keys, self.positions, self.rope, self.block, self.keep, self.counts, metric, impl,
                             values=self.values, probe=self.probe, layer=self.layer, head=self.head)  # fmt: skip


def make_case(seed: int) -> Case:
    """Random sizes and rotations; some keys are repeated, zero, constant, tiny or huge."""
    rng = np.random.default_rng(seed)
    block = int(rng.choice([1, 2, 4, 8, 16, 32]))
    n_blocks = int(rng.integers(1, 33))
    n, dim = block * n_blocks, int(rng.choice([5, 8, 17, 64, 80, 96, 128]))
    keys = rng.normal(size=(n, dim)) + rng.normal(size=dim) * rng.choice([0, 1, 5])
    positions = np.cumsum(rng.integers(1, rng.choice([2, 30, 2000]) + 1, n)) + rng.integers(0, 100_000)
    rope = None
    if rng.random() < 0.75:
        n_rot = 2 * int(rng.integers(1, dim // 2 + 1))
        freqs = (10000.0 ** -(np.arange(n_rot // 2) / (n_rot // 2))).astype(np.float32)
        rope = native.Rope(int(rng.integers(0, 3)), n_rot, float(rng.choice([1.0, 1.25])), freqs)

    # ties are exact only if nothing turns the keys apart: give tied cases one position or no rotation
    kind = rng.choice(["plain", "duplicates", "blocks", "zero", "constant", "all zero", "tiny", "huge"])
    if kind in ("duplicates", "blocks", "constant"):
        positions[:] = positions[0]
    if kind == "duplicates":
        keys = keys[rng.integers(0, max(1, n // 3), n)]
    elif kind == "blocks":
        keys = keys.reshape(n_blocks, block, dim)[rng.integers(0, max(1, n_blocks // 2), n_blocks)].reshape(n, dim)
    elif kind == "zero":
        keys[rng.random(n) < 0.5] = 0
    elif kind == "constant":
        keys[:] = keys[0]
    elif kind == "all zero":
        keys[:] = 0
    elif kind in ("tiny", "huge"):
        keys *= 1e-30 if kind == "tiny" else 1e30

    keep = sorted(rng.choice(block + 1, size=int(rng.integers(1, min(block + 1, 6) + 1)), replace=False).tolist())
    counts = rng.multinomial(n_blocks, rng.dirichlet(np.ones(len(keep)))).tolist()
    values = rng.normal(size=(n, int(rng.integers(1, 70)))) * np.exp(rng.normal(size=(n, 1)))
    if kind == "duplicates":
        values = values[rng.integers(0, max(1, n // 3), n)]
    return Case(keys.astype(np.float32), values.astype(np.float32), positions.astype(np.int32), rope, block, keep, counts,
                int(rng.integers(0, 200)), int(rng.integers(0, 130)), rng.normal(size=dim).astype(np.float32))  # fmt: skip


def numpy_select(case: Case, metric: str) -> tuple[list[int], np.ndarray]:
    rope = case.rope or native.Rope(0, 0, 1.0, np.zeros(0, np.float32))
    keys = reference_select.unrotate(case.keys, case.positions, ROPE_NAMES[rope.type], rope.n_rot, rope.scale, rope.freqs)
    group = reference_select.Group(keys, case.values.astype(np.float64), case.positions, case.layer, case.head,
                                   case.probe.astype(np.float64))  # fmt: skip
    scores = reference_select.METRICS[metric](group)
    # numpy's sums may give equal rows values that differ in the last bits: rounding makes them tie again
    unit = (np.abs(scores).max() or 1.0) if metric in ("key-norm", "key-probe", "value-norm") else 1.0
    scores = np.round(scores / unit, 10) * unit
    return reference_select.select(scores, case.block, case.keep, case.counts), scores


def test_every_metric_has_a_reference() -> None:
    with_queries = {metric for metric in native.metrics() if native.needs_queries(metric)}
    assert set(native.metrics()) == set(reference_select.METRICS) | with_queries
    # native/tests/test-store.cpp and tests/integration/test_runtime_eviction.py compare these
    assert with_queries == {"observed-attn", "key-diff+observed"} and not native.needs_queries("nothing")
    assert native.metrics()[0] == "key-diff"  # the default of `select`, which needs neither probe nor queries


@pytest.mark.parametrize(("metric", "seeds"), [
    *(("key-diff", range(first, first + 100)) for first in range(0, 1000, 100)),
    *((metric, range(1000, 1200)) for metric in reference_select.METRICS if metric != "key-diff"),
])  # fmt: skip
def test_the_same_slots_in_all_three(metric: str, seeds: range) -> None:
    for seed in seeds:
        case = make_case(seed)
        kept, scores = case.select(metric, "cpu")
        kept_reference, scores_reference = case.select(metric, "reference")
        kept_numpy, scores_numpy = numpy_select(case, metric)
        assert np.isfinite(scores).all(), seed
        assert len(kept) == np.dot(case.keep, case.counts), seed
        np.testing.assert_array_equal(kept, kept_reference, err_msg=f"seed {seed}")
        np.testing.assert_allclose(scores, scores_reference, rtol=1e-6, atol=1e-7, err_msg=f"seed {seed}")
        np.testing.assert_allclose(scores, scores_numpy, rtol=1e-5, atol=1e-6, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(kept, kept_numpy, err_msg=f"seed {seed}")


def test_the_cases_hold_what_they_are_for() -> None:
    cases = [make_case(seed) for seed in range(1000)]
    types = [case.rope.type if case.rope else 0 for case in cases]
    assert min(types.count(t) for t in (0, 1, 2)) > 100
    assert sum(case.rope is not None and case.rope.n_rot < case.keys.shape[1] for case in cases) > 200
    assert sum(len(np.unique(case.keys, axis=0)) < len(case.keys) for case in cases) > 300
    assert sum(0 in case.keep for case in cases) > 200 and max(len(case.keys) for case in cases) == 1024


def test_ties_go_to_the_newer_token_and_block() -> None:
    same = np.ones((8, 4), np.float32)
    for impl in ("cpu", "reference"):
        kept, _ = native.select(same, np.arange(8), None, 4, [1, 3], [1, 1], impl=impl)
        assert kept.tolist() == [3, 5, 6, 7]  # the newer block keeps three, each block its newest


def test_unlike_keys_stay() -> None:
    keys = np.ones((64, 16), np.float32)
    keys[[5, 40, 41]] = -1
    kept, scores = native.select(keys, np.arange(64), None, 16, [1, 4], [2, 2])
    assert {5, 40, 41} <= set(kept.tolist()) and scores[5] > 1.9 > 0.1 > scores[0]


def test_a_rotation_is_undone() -> None:
    """Keys that were equal before RoPE rank by their position alone; one that differed stays, whatever its angle."""
    n, dim = 64, 32
    freqs = (10000.0 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    plain = np.tile(np.linspace(1, 2, dim), (n, 1))
    plain[17] = -plain[17]
    positions = np.arange(n) * 37 + 1000
    for rope_type in (1, 2):
        pairs = (np.arange(0, dim, 2), np.arange(1, dim, 2)) if rope_type == 1 else (np.arange(dim // 2), np.arange(dim // 2) + dim // 2)
        turned = plain.copy()
        angle = positions[:, None] * freqs[None].astype(np.float64)
        turned[:, pairs[0]] = 1.5 * (plain[:, pairs[0]] * np.cos(angle) - plain[:, pairs[1]] * np.sin(angle))
        turned[:, pairs[1]] = 1.5 * (plain[:, pairs[0]] * np.sin(angle) + plain[:, pairs[1]] * np.cos(angle))
        rope = native.Rope(rope_type, dim, 1.5, freqs)
        kept, scores = native.select(turned, positions, rope, 16, [1, 2], [3, 1])
        assert 17 in kept and scores[17] > 1.99
        assert np.abs(np.delete(scores, 17)).max() < 1e-5
        assert native.select(turned, positions, None, 16, [1, 2], [3, 1])[1].std() > 0.1  # left in, it shows


@pytest.mark.parametrize("metric", reference_select.METRICS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_do_no_harm(value: float, metric: str) -> None:
    rng = np.random.default_rng(3)
    for seed in range(20):
        keys, values = rng.normal(size=(2, 64, 16)).astype(np.float32)
        for array in (keys, values):
            array[rng.integers(0, 64, 1 + seed % 3), rng.integers(0, 16)] = value
        args = (keys, np.arange(64), None, 16, [1, 4, 16], [1, 2, 1], metric)
        given = {"values": values, "probe": np.linspace(-1, 1, 16)}
        kept, scores = native.select(*args, impl="cpu", **given)
        assert len(kept) == 25 and np.isfinite(scores).all() and (np.diff(kept) > 0).all()
        np.testing.assert_array_equal(kept, native.select(*args, impl="reference", **given)[0])


def test_random_is_even_and_differs_between_heads() -> None:
    """The mean of 4096 draws is 1/2 within five standard errors, and no two heads or layers draw alike."""
    draws = [native.select(np.zeros((4096, 1)), np.arange(4096), None, 16, [16], [256], "random", layer=layer, head=head)[1]
             for layer in (0, 1) for head in (0, 1)]  # fmt: skip
    for scores in draws:
        assert abs(scores.mean() - 0.5) < 5 / np.sqrt(12 * 4096) and 0 <= scores.min() < 0.01 and 0.99 < scores.max() <= 1
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


def test_streaming_keeps_the_newest() -> None:
    kept, _ = native.select(np.zeros((64, 4)), np.arange(64) + 500, None, 16, [0, 8, 16], [2, 1, 1], "streaming")
    assert kept.tolist() == [*range(40, 48), *range(48, 64)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "nothing"}, "unknown metric, this build knows: key-diff, "),
        ({"metric": "value-norm"}, "looks at values, none were given"),
        ({"metric": "observed-attn"}, "looks at queries, which only a running model has"),
        ({"metric": "key-diff+observed"}, "looks at queries, which only a running model has"),
        ({"metric": "key-probe"}, "needs a probe, none was given"),
        ({"metric": "key-probe", "probe": np.ones(9)}, "head_dim = 8 is needed"),
        ({"metric": "value-norm", "values": np.ones((31, 8))}, "n = 32 is needed"),
        ({"block_size": 5}, "multiple of block_size"),
        ({"block_size": 0}, "multiple of block_size"),
        ({"block_size": -16}, "multiple of block_size"),
        ({"counts": [1, 2]}, "sum to n_tokens/block_size"),
        ({"counts": [-1, 3]}, "must not be negative"),
        ({"keep_counts": [1, 17]}, "block_size at most"),
        ({"keep_counts": [4, 4]}, "must increase"),
        ({"keep_counts": [-1, 4]}, "must increase"),
        ({"rope": native.Rope(2, 7, 1.0, np.ones(3, np.float32))}, "n_rot must be even"),
        ({"rope": native.Rope(2, 10, 1.0, np.ones(5, np.float32))}, "at most head_dim_k"),
        ({"rope": native.Rope(1, 8, 0.0, np.ones(4, np.float32))}, "scale positive"),
        ({"rope": native.Rope(1, 8, float("nan"), np.ones(4, np.float32))}, "scale positive"),
    ],
)
def test_wrong_arguments(changes: dict, words: str) -> None:
    args = {"keys": np.ones((32, 8), np.float32), "positions": np.arange(32), "rope": None, "block_size": 16,
            "keep_counts": [1, 4], "counts": [1, 1]}  # fmt: skip
    for impl in ("cpu", "reference"):
        with pytest.raises(TcaError, match=words):
            native.select(**{**args, **changes}, impl=impl)
