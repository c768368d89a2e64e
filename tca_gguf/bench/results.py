"""What a run found, and what follows from it: plain arithmetic, no model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attention:
    """Attention inside a forward pass, per token: milliseconds, bytes of K and V read, floating-point operations.

    select_share: part of the whole pass that selection and compaction took (0 for the stock cache).
    """

    ms: float
    bytes: float
    flops: float
    select_share: float = 0.0

    @property
    def gbps(self) -> float:
        return self.bytes / self.ms / 1e6

    @property
    def gflops(self) -> float:
        return self.flops / self.ms / 1e6

    def as_json(self) -> dict[str, Any]:
        return {
            "ms": round(self.ms, 4),
            "bytes": round(self.bytes),
            "gbps": round(self.gbps, 2),
            "gflops": round(self.gflops, 1),
            "select_share": round(self.select_share, 4),
        }


@dataclass
class Sample:
    """All measurements of one test of one case. tps: one rate a repeat; token_ms: every single token of a decode test."""

    test: str
    depth: int
    kv_type: str
    config: str
    budgets: str | None
    kv_bytes: int
    tps: list[float]
    token_ms: list[float] = field(default_factory=list)
    attention: Attention | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.tps)

    @property
    def spread(self) -> float:
        """(max - min) / median of the repeats."""
        return (max(self.tps) - min(self.tps)) / self.median

    def as_json(self) -> dict[str, Any]:
        return {
            "test": self.test,
            "depth": self.depth,
            "kv_type": self.kv_type,
            "config": self.config,
            "budgets": self.budgets,
            "kv_bytes": self.kv_bytes,
            "tps": [round(x, 3) for x in self.tps],
            "token_ms": [round(x, 3) for x in self.token_ms],
            "attention": self.attention.as_json() if self.attention else None,
        }


@dataclass(frozen=True)
class Row:
    """One line of the result: one test of TCA against the faster dense configuration. Rates in tokens a second, medians; bytes
    of a cache for this depth. The fields of the attention are None where it was not measured."""

    test: str
    depth: int
    kv_type: str
    dense_tps: float
    dense_config: str
    tca_tps: float
    ratio: float
    dense_kv_bytes: int
    tca_kv_bytes: int
    kv_ratio: float
    budgets: str = "file"
    dense_kv_type: str = "f16"
    dense_attn: Attention | None = None
    tca_attn: Attention | None = None

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        for side in ("dense", "tca"):
            attention = getattr(self, f"{side}_attn")
            figures = attention.as_json() if attention else dict.fromkeys(("ms", "bytes", "gbps", "gflops", "select_share"))
            del values[f"{side}_attn"]
            values |= {f"{side}_attn_{name}": figures[name] for name in ("ms", "bytes", "gbps", "gflops")}
            if side == "tca":
                values["tca_select_share"] = figures["select_share"]
        both = self.dense_attn and self.tca_attn
        return values | {"attn_ratio": round(self.dense_attn.ms / self.tca_attn.ms, 3) if both else None}


@dataclass
class Result:
    hardware: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    stalls: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "hardware": self.hardware,
            "rows": [row.as_json() for row in self.rows],
            "summary": summary(self.rows, self.samples),
            "compaction": self.stalls,
            "settings": self.settings,
            "samples": [sample.as_json() for sample in self.samples],
            "interrupted": self.interrupted,
        }


def rows_of(samples: Sequence[Sample]) -> list[Row]:
    """One row for each TCA sample, against the faster of the dense samples of the same test and depth among ``samples``."""
    rows = []
    for ours in samples:
        if ours.budgets is None:
            continue
        dense = [s for s in samples if s.budgets is None and (s.test, s.depth) == (ours.test, ours.depth)]
        best = max(dense, key=lambda s: s.median)
        rows.append(
            Row(
                ours.test,
                ours.depth,
                ours.kv_type,
                round(best.median, 3),
                best.config,
                round(ours.median, 3),
                round(ours.median / best.median, 4),
                best.kv_bytes,
                ours.kv_bytes,
                round(ours.kv_bytes / best.kv_bytes, 4),
                ours.budgets,
                best.kv_type,
                best.attention,
                ours.attention,
            )
        )
    return rows


def attention_work(
    lengths: Iterable[int], n_tokens: int, n_head: int, n_head_kv: int, head_dims: tuple[int, int], row_bytes: int
) -> tuple[float, float]:
    """(bytes of K and V, floating-point operations) a token, for n_tokens tokens behind regions of these lengths.

    lengths: slots in use of every (layer, KV head) before the tokens; token t sees t + 1 more. Operations: 2 for each
    multiply-add of scores and output, per query head; softmax is not counted. row_bytes: one slot's K and V; each is counted
    once a token, as a perfect decode reads it (in prefill many tokens share one reading).
    """
    seen = sum(lengths_of_token(length, n_tokens) for length in lengths)
    return row_bytes * seen, 2 * (head_dims[0] + head_dims[1]) * (n_head // n_head_kv) * seen


def lengths_of_token(length: int, n_tokens: int) -> float:
    """Slots that a token sees on average: bottom-right causal."""
    return length + (n_tokens + 1) / 2


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Milliseconds a token more for every 1,024 tokens of depth: the least-squares line through (depth, tokens/s)."""
    if len({depth for depth, _ in points}) < 2:
        return None
    mean_x = statistics.fmean(depth for depth, _ in points)
    mean_y = statistics.fmean(1e3 / tps for _, tps in points)
    above = sum((depth - mean_x) * (1e3 / tps - mean_y) for depth, tps in points)
    return 1024 * above / sum((depth - mean_x) ** 2 for depth, _ in points)


def faster_from(points: Sequence[tuple[int, float, float]]) -> int | None:
    """Depth from which on TCA is faster, from (depth, dense tokens/s, TCA tokens/s); None: not even at the largest depth.

    The crossing of the two times a token between the last depth at which dense is faster and the next one, on straight lines;
    the smallest depth measured if TCA is faster everywhere (it may be faster before that, too).
    """
    ordered = sorted(points)
    behind = [i for i, (_, dense, tca) in enumerate(ordered) if tca < dense]
    if not behind:
        return ordered[0][0] if ordered else None
    i = behind[-1]
    if i + 1 == len(ordered):
        return None
    (x0, dense0, tca0), (x1, dense1, tca1) = ordered[i], ordered[i + 1]
    gap0, gap1 = 1 / tca0 - 1 / dense0, 1 / tca1 - 1 / dense1  # above 0, then 0 or below
    return round(x0 + (x1 - x0) * gap0 / (gap0 - gap1))


def summary(rows: Sequence[Row], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each KV type, budgets and test: from where on TCA is faster; for decode the slopes against depth too.

    dense slope: the smaller one of the dense configurations that the rows were compared with.
    """
    found = []
    for kv_type, budgets, test, dense_kv in dict.fromkeys((r.kv_type, r.budgets, r.test, r.dense_kv_type) for r in rows):
        mine = [r for r in rows if (r.kv_type, r.budgets, r.test) == (kv_type, budgets, test)]
        entry: dict[str, Any] = {"test": test, "kv_type": kv_type, "budgets": budgets}
        entry["tca_faster_from"] = faster_from([(r.depth, r.dense_tps, r.tca_tps) for r in mine])
        if test == "decode":
            series: dict[str, list[tuple[int, float]]] = {}
            for s in samples:
                if s.test == test and s.budgets is None and s.kv_type == dense_kv:
                    series.setdefault(s.config, []).append((s.depth, s.median))
            slopes = [x for x in map(slope, series.values()) if x is not None]
            ours = slope([(r.depth, r.tca_tps) for r in mine])
            dense = min(slopes) if slopes else None
            entry["dense_ms_per_1k"] = None if dense is None else round(dense, 4)
            entry["tca_ms_per_1k"] = None if ours is None else round(ours, 4)
            entry["slope_ratio"] = None if ours is None or not dense or dense <= 0 else round(ours / dense, 4)
        found.append(entry)
    return found


def worst_spread(samples: Sequence[Sample]) -> float:
    """The largest (max - min) / median of any series: what a ratio is worth."""
    return max((s.spread for s in samples), default=0.0)


def stall(token_ms: Sequence[float]) -> dict[str, float]:
    """Longest single token against the median."""
    middle, longest = statistics.median(token_ms), max(token_ms)
    return {"median_ms": round(middle, 3), "longest_ms": round(longest, 3), "ratio": round(longest / middle, 3)}
