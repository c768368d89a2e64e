"""Candidate budgets: the log-Gaussian family of configurations (TCA-Attention, arXiv 2512.09238, offline calibration).

A configuration says how many of a group's blocks keep ``k`` of their tokens: shares ``p_k`` proportional to
``exp(-(log2 k - mu)^2 / (2 sigma^2))``, turned into integers that add up to the number of blocks in a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIGMAS = (0.5, 1.0, 2.0)
# log2 k runs from -1 (nothing) to 4; the tails beyond it give the nearly pure ends of the family
MUS = tuple(np.arange(-4.0, 8.01, 0.25).tolist())


def powers_of_two(block_size: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``block_size``: the paper's numbers of kept tokens, those of uniform budgets."""
    return tuple(1 << i for i in range(block_size.bit_length()))


def calibrated_keep_counts(block_size: int) -> tuple[int, ...]:
    """0, 1, 2, 4, ... up to ``block_size``: what a block may keep under calibrated budgets (docs/calibration.md says why nothing, too)."""
    return (0, *powers_of_two(block_size))


def integer_counts(mu: float, sigma: float, n_blocks: int, keep_counts: Sequence[int]) -> tuple[int, ...]:
    """Blocks of a group that keep ``keep_counts[j]`` tokens, by the method of largest remainders (ties to the smaller k).

    Returns ``len(keep_counts)`` non-negative integers that sum to ``n_blocks``. A keep count of 0 is placed one octave
    below 1, at log2 k = -1.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if n_blocks < 1:
        raise ValueError(f"n_blocks must be at least 1, got {n_blocks}")
    octave = np.array([np.log2(k) if k > 0 else -1.0 for k in keep_counts])
    log_p = -((octave - mu) ** 2) / (2.0 * sigma**2)
    p = np.exp(log_p - log_p.max())  # relative to the largest: a far-away mu must not underflow to 0/0
    share = p / p.sum() * n_blocks
    counts = np.floor(share).astype(np.int64)
    # round before ranking, so that equal remainders stay equal on every machine
    remainder = np.round(share - counts, 9)
    for j in np.argsort(-remainder, kind="stable")[: n_blocks - int(counts.sum())]:
        counts[j] += 1
    return tuple(int(n) for n in counts)


def config_grid(
    n_blocks: int,
    keep_counts: Sequence[int],
    mus: Sequence[float] = MUS,
    sigmas: Sequence[float] = SIGMAS,
) -> np.ndarray:
    """All distinct configurations of the family, int32 [n_configs, n_keep], by kept tokens and then by counts.

    Configurations that keep every token are left out: they are the dense head.
    """
    keep = np.asarray(keep_counts, dtype=np.int64)
    rows = {integer_counts(mu, sigma, n_blocks, keep_counts) for sigma in sigmas for mu in mus}
    dense = n_blocks * int(keep.max())
    ordered = sorted(rows, key=lambda row: (int(keep @ np.array(row)), row))
    return np.array([row for row in ordered if int(keep @ np.array(row)) < dense], dtype=np.int32)


def kept_per_group(configs: np.ndarray, keep_counts: Sequence[int]) -> np.ndarray:
    """Tokens that one group leaves behind under each configuration, int64 [n_configs]."""
    return configs.astype(np.int64) @ np.asarray(keep_counts, dtype=np.int64)
