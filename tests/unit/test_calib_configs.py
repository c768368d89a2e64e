import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca_gguf.calib.configs import calibrated_keep_counts, config_grid, integer_counts, kept_per_group, powers_of_two

POWERS, KEEP = powers_of_two(16), calibrated_keep_counts(16)


def test_keep_counts_of_a_block():
    assert POWERS == (1, 2, 4, 8, 16) and KEEP == (0, 1, 2, 4, 8, 16)
    assert calibrated_keep_counts(1) == (0, 1) and powers_of_two(256)[-2:] == (128, 256)


@given(mu=st.floats(-40, 40), sigma=st.floats(0.05, 20), n_blocks=st.integers(1, 512), keep=st.sampled_from([POWERS, KEEP]))
def test_counts_are_non_negative_and_sum_to_the_blocks(mu, sigma, n_blocks, keep):
    counts = integer_counts(mu, sigma, n_blocks, keep)
    assert sum(counts) == n_blocks and min(counts) >= 0 and len(counts) == len(keep)


@given(mu=st.floats(-4, 8), sigma=st.floats(0.3, 3), n_blocks=st.integers(1, 64), nothing=st.booleans())
def test_counts_are_within_one_block_of_the_shares(mu, sigma, n_blocks, nothing):
    octaves = np.arange(-1.0 if nothing else 0.0, 5.0)  # nothing is placed one octave below 1
    p = np.exp(-((octaves - mu) ** 2) / (2 * sigma**2))
    assert np.abs(np.array(integer_counts(mu, sigma, n_blocks, KEEP if nothing else POWERS)) - p / p.sum() * n_blocks).max() < 1 + 1e-6


def test_symmetric_share_by_hand():
    # mu 2, sigma 1: exp(-2), exp(-.5), 1, exp(-.5), exp(-2) of a sum of 2.4837; times 32: 1.743 7.814 12.884 ...
    assert integer_counts(2.0, 1.0, 32, POWERS) == (2, 8, 13, 8, 1)  # 29.. rest by remainder .884, .814, .814, .743 (smaller k first)


@pytest.mark.parametrize("mu", [-2.0, 0.0, 1.7, 4.0])
@pytest.mark.parametrize("keep", [POWERS, KEEP])
def test_kept_tokens_grow_with_mu(mu, keep):
    assert np.dot(keep, integer_counts(mu + 0.5, 1.0, 64, keep)) >= np.dot(keep, integer_counts(mu, 1.0, 64, keep))


@pytest.mark.parametrize(("keep", "least"), [(POWERS, 32), (KEEP, 0)])
def test_the_grid_is_distinct_sorted_and_reaches_both_ends(keep, least):
    grid = config_grid(32, keep)
    kept = kept_per_group(grid, keep)
    assert 60 <= len(grid) <= 130
    assert len({tuple(row) for row in grid.tolist()}) == len(grid)
    assert (grid.sum(axis=1) == 32).all() and (np.diff(kept) >= 0).all()
    assert kept[0] == least and 0.9 * 512 < kept[-1] < 512  # one or none of every block; dense itself is not a row
    assert np.diff(kept).max() <= 0.06 * 512  # no gap in the family


@pytest.mark.parametrize(("block", "group", "keep"), [(8, 256, (1, 2, 4, 8)), (32, 512, (1, 2, 4, 8, 16, 32)), (16, 128, (0, 1, 16))])
def test_other_sizes(block, group, keep):
    grid = config_grid(group // block, keep)
    assert (grid.sum(axis=1) == group // block).all() and kept_per_group(grid, keep).max() < group


@pytest.mark.parametrize(("sigma", "n_blocks"), [(0.0, 32), (-1.0, 32), (1.0, 0)])
def test_bad_arguments(sigma, n_blocks):
    with pytest.raises(ValueError):
        integer_counts(0.0, sigma, n_blocks, KEEP)
