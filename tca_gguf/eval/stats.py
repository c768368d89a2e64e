"""Confidence intervals at 95%."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959964  # quantile of the normal distribution
BLOCKS = 16


def wilson(hits: int, n: int) -> tuple[float, float] | None:
    """Wilson score interval of a share; None without trials.

    Trials are taken as independent. Questions on one text are not quite, so the true interval is somewhat wider.
    """
    if n == 0:
        return None
    share, z2 = hits / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # at the ends the bound is exact, which rounding must not take away
    return 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)


def mean_interval(values: ArrayLike) -> tuple[float, float] | None:
    """Interval of the mean of a series whose neighbours resemble each other, from the means of BLOCKS stretches of it.

    None for fewer than two values a stretch.
    """
    series = np.asarray(values, np.float64)
    if len(series) < 2 * BLOCKS:
        return None
    means = np.array([part.mean() for part in np.array_split(series, BLOCKS)])
    half = Z * means.std(ddof=1) / math.sqrt(BLOCKS)
    return float(series.mean() - half), float(series.mean() + half)
