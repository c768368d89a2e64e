"""Spends a cache budget over the heads: one configuration a head, the least summed error at a mean kept fraction.

Sizes are integers (tokens that a group leaves behind), so this is a multiple-choice knapsack and is solved exactly by
dynamic programming over the total; a larger budget can therefore never give a larger summed error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tca_gguf.errors import TcaError

DENSE = -1


@dataclass(frozen=True)
class Allocation:
    """choice: int32 [n_heads], index of a configuration or -1 for dense. cost: summed error. kept: tokens per group, summed."""

    choice: np.ndarray
    cost: float
    kept: int


def efficient_options(kept: np.ndarray, cost: np.ndarray, dense_kept: int) -> list[tuple[int, float, int]]:
    """(tokens, cost, index) of the configurations that nothing smaller or equal beats, by size; the dense head (cost 0) last."""
    options: list[tuple[int, float, int]] = []
    for i in sorted(range(len(kept)), key=lambda i: (int(kept[i]), float(cost[i]), i)):
        c = max(float(cost[i]), 0.0)
        if not options or c < options[-1][1]:
            options.append((int(kept[i]), c, i))
    if not options or options[-1][1] > 0:
        options.append((dense_kept, 0.0, DENSE))
    return options


def allocate(
    cost: np.ndarray,
    kept: np.ndarray,
    dense_kept: int,
    keep: float,
    errors: np.ndarray | None = None,
    max_error: float | None = None,
) -> Allocation:
    """Chooses a configuration for every head.

    cost: [n_heads, n_configs], what is minimised. kept: [n_configs], tokens per group, below ``dense_kept`` (= group size).
    keep: largest mean kept fraction of the evicted region, in (0, 1].
    errors, max_error: configurations whose error [n_heads, n_configs] is above the cap are not used; a head without any
    other becomes dense.
    Raises TcaError if the sparsest allowed choice is already above ``keep``. Ties go to the smaller head, then to the
    earlier configuration.
    """
    n_heads = cost.shape[0]
    if not 0 < keep <= 1:
        raise TcaError(f"keep is {keep}; it must be above 0 and at most 1")
    if not np.isfinite(cost).all():
        raise TcaError("calibration gave errors that are not finite; the model's activations overflow on this text")
    options = []
    for h in range(n_heads):
        allowed = np.arange(len(kept))
        if max_error is not None and errors is not None:
            allowed = allowed[errors[h] <= max_error]
        options.append([(m, c, int(allowed[i]) if i >= 0 else DENSE) for m, c, i in
                        efficient_options(kept[allowed], cost[h][allowed], dense_kept)])

    floor = sum(o[0][0] for o in options)
    capacity = int(np.floor(keep * dense_kept * n_heads + 1e-9))
    if floor > capacity:
        raise TcaError(
            f"keep {keep:g} is below the sparsest choice, {floor / (dense_kept * n_heads):.4f}; raise keep"
            + (" or max_error" if max_error is not None else "")
        )

    # best[s]: least cost of the heads so far with at most s tokens above each head's smallest option
    slack = capacity - floor
    best = np.zeros(slack + 1)
    picks = np.zeros((n_heads, slack + 1), dtype=np.int16)
    for h, head_options in enumerate(options):
        total = np.full(slack + 1, np.inf)
        for j, (m, c, _) in enumerate(head_options):
            extra = m - head_options[0][0]
            if extra > slack:
                break
            candidate = best[: slack + 1 - extra] + c
            better = candidate < total[extra:]
            total[extra:][better] = candidate[better]
            picks[h, extra:][better] = j
        best = total

    choice = np.empty(n_heads, dtype=np.int32)
    spent, used, chosen_cost = slack, 0, 0.0
    for h in range(n_heads - 1, -1, -1):
        m, c, choice[h] = options[h][picks[h, spent]]
        spent -= m - options[h][0][0]
        used += m
        chosen_cost += c
    return Allocation(choice=choice, cost=chosen_cost, kept=used)


def sparsest_within(errors: np.ndarray, kept: np.ndarray, max_error: float) -> np.ndarray:
    """The paper's rule: per head the sparsest configuration whose error is at most ``max_error``, int32 [n_heads]; -1 if none."""
    tokens = np.where(errors <= max_error, kept[None, :], np.iinfo(np.int64).max)
    best = np.argmin(tokens, axis=1)
    return np.where((errors <= max_error).any(axis=1), best, DENSE).astype(np.int32)
