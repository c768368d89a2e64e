"""The native selection against the plain Python reference, and calibration's shortcut against the native selection."""

import numpy as np
import pytest
from reference_select import importance, select, unrotate

from tca_gguf import native
from tca_gguf.calib.configs import calibrated_keep_counts, config_grid, kept_per_group
from tca_gguf.calib.stream import kept_tokens, order_group
from tca_gguf.errors import TcaError

ROPES = {"none": 0, "norm": 1, "neox": 2}


@pytest.fixture(scope="module", autouse=True)
def needs_the_native_part():
    try:
        native.build_info()
    except TcaError as error:
        pytest.skip(str(error))


def rope_of(name, n_rot, scale=1.0, base=10000.0):
    freqs = (base ** (-np.arange(0, n_rot, 2) / n_rot)).astype(np.float32)
    return native.Rope(ROPES[name], n_rot, scale, freqs)


def random_case(seed):
    """Sizes, rope and keys of one case; a third of the cases have repeated keys, so that ties happen."""
    rng = np.random.default_rng(seed)
    block = int(rng.choice([4, 8, 16, 32]))
    n_blocks = int(rng.integers(1, 20))
    dim = int(rng.choice([16, 32, 64, 80, 128]))
    name = str(rng.choice(list(ROPES)))
    n_rot = int(rng.choice([dim, dim // 2 // 2 * 2]))
    rope = rope_of(name, n_rot, float(rng.choice([1.0, 1.19])), float(rng.choice([1e4, 1e6])))
    n = block * n_blocks
    keys = rng.standard_normal((n, dim)).astype(np.float32) + 2 * rng.standard_normal(dim).astype(np.float32)
    if seed % 3 == 0:
        keys = keys[rng.integers(0, max(1, n // 3), n)]
    first = int(rng.integers(0, 100_000))
    positions = np.arange(first, first + n, dtype=np.int32)
    keep = calibrated_keep_counts(block)[int(rng.integers(2)) :]  # blocks that may keep nothing, or keep one at least
    cuts = np.sort(rng.integers(0, n_blocks + 1, len(keep) - 1))
    counts = np.diff(np.concatenate([[0], cuts, [n_blocks]])).astype(np.int32)
    return keys, positions, name, rope, block, keep, counts


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_native_selection_is_the_reference(impl):
    for seed in range(1000):
        keys, positions, name, rope, block, keep, counts = random_case(seed)
        kept, scores = native.select(keys, positions, rope, block, keep, counts, impl=impl)
        expected = importance(unrotate(keys, positions, name, rope.n_rot, rope.scale, rope.freqs))
        np.testing.assert_allclose(scores, expected, atol=2e-6, err_msg=f"seed {seed}")
        assert len(kept) == int(np.dot(keep, counts))
        wanted = select(expected, block, keep, counts)
        if kept.tolist() != wanted:
            # only tokens or blocks whose scores agree to the last bits of float64 may change places
            swapped = sorted(set(kept.tolist()) ^ set(wanted))
            blocks = expected.reshape(-1, block)
            near = lambda values: np.abs(values - values.mean()).max() < 1e-11  # noqa: E731
            assert near(expected[swapped]) or near(blocks.sum(axis=1)[np.array(swapped) // block]), f"seed {seed}"


def test_calibration_keeps_what_the_runtime_keeps():
    """order_group on the native scores gives the native kept set for every configuration of the family."""
    keep = calibrated_keep_counts(16)
    configs = config_grid(32, keep)
    assert kept_per_group(configs, keep)[0] == 0  # a head may keep nothing of a group
    rope = rope_of("neox", 64, base=1e6)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        keys = (rng.standard_normal((512, 64)) + 3 * rng.standard_normal(64)).astype(np.float32)
        positions = np.arange(16 + 512 * seed, 528 + 512 * seed, dtype=np.int32)
        order = None
        for counts in configs:
            kept, scores = native.select(keys, positions, rope, 16, keep, counts)
            order = order or order_group(scores, 16)
            assert kept_tokens(order, keep, counts).tolist() == kept.tolist()
