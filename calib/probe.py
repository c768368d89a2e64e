"""Fits the probe of every KV head: a vector that tells from a key alone how much later outputs will lean on its token.

What dropping token ``j`` does to the output ``o`` of a query is, to first order, ``p_j ||v_j - o|| / ||o||``: its weight times how
far its value lies from the output. The mean of that over the queries that would see the token compacted is known after a
forward pass; its logarithm is regressed on the key before RoPE (ridge regression on standardised dimensions). The metric
"key-probe" multiplies keys with the result: no queries are needed when the runtime compacts a group.

Queries that read a planted fact count as much as all others together. Without them the probe learns what prose attends to,
and loses what nobody has asked about yet (docs/calibration.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tca_gguf.errors import TcaError

from .stream import Layout

METRIC = "key-probe"  # the metric that uses the probe
RIDGE = 0.01  # relative to the variance of a standardised dimension
FLOOR = 1e-3  # of the mean: what less than that adds is noise, and its logarithm must not rule the fit
MIN_QUERIES = 32  # of every kind, before a group counts: the mean over few queries is no mean
CHUNK = 64  # queries at once


def unrotate(keys: np.ndarray, positions: np.ndarray, rope: Any) -> np.ndarray:
    """Keys [n, head_dim] as the cache holds them -> before RoPE, float64. rope: `native.Rope`, None: there is none."""
    out = keys.astype(np.float64)
    if rope is None or rope.type == 0:
        return out
    half = rope.n_rot // 2
    a = np.arange(half) * 2 if rope.type == 1 else np.arange(half)
    b = a + 1 if rope.type == 1 else a + half
    angle = positions.astype(np.float64)[:, None] * rope.freqs[:half].astype(np.float64)
    cos, sin = np.cos(angle) / rope.scale, np.sin(angle) / rope.scale
    x, y = out[:, a].copy(), out[:, b].copy()
    out[:, a], out[:, b] = x * cos + y * sin, y * cos - x * sin
    return out


def ridge(x: np.ndarray, y: np.ndarray, strength: float = RIDGE) -> np.ndarray:
    """Weights [d] of the linear fit of y [n] by x [n, d] (its constant left out); dimensions count alike whatever their scale."""
    scale = x.std(axis=0)
    scale[scale == 0] = 1.0
    z = (x - x.mean(axis=0)) / scale
    return np.linalg.solve(z.T @ z / len(z) + strength * np.eye(z.shape[1]), z.T @ (y - y.mean()) / len(z)) / scale


class ProbeFit:
    """Sums over the queries of a forward pass what each token adds, then fits.

    n_tokens: length of the text; queries: [n] indices of all queries that will be added, kinds: [n] their kinds
    probe: float32 [n_layer, n_head_kv, head_dim_k], 0 in layers that are not solved yet; None before the first
    """

    def __init__(self, layout: Layout, n_kinds: int, n_layer: int, n_head_kv: int, n_tokens: int, queries: np.ndarray, kinds: np.ndarray) -> None:
        self.layout, self.n_layer, self.n_head_kv = layout, n_layer, n_head_kv
        self.queries, self.query_kinds = queries, kinds
        self.added = np.zeros((n_kinds, n_layer, n_head_kv, n_tokens))
        compacted = np.array([layout.compacted(int(i)) for i in queries])
        used = [kind for kind in range(n_kinds) if (compacted[kinds == kind] > 0).any()]
        n_seen = [int((compacted[kinds == kind] > g).sum()) for g in range(int(compacted.max(initial=0))) for kind in used]
        seen = np.array(n_seen).reshape(-1, max(len(used), 1))
        # later groups are seen by fewer queries
        enough = (seen >= np.minimum(MIN_QUERIES, seen[:1])).all(axis=1)
        self.n_groups, self.seen, self.kinds = int(enough.sum()), seen, used
        self.probe: np.ndarray | None = None

    def add_layer(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, queries: np.ndarray, kind_of: np.ndarray,
                  scale: float, softcap: float, sinks: np.ndarray | None = None) -> None:
        """Some queries of one layer; the arguments are those of `ErrorTable.add_layer`."""
        n_rep = q.shape[0] // self.n_head_kv
        start = self.layout.sinks
        for kind in self.kinds:
            mine = np.flatnonzero((kind_of == kind) & (queries >= self.layout.first_evicting))
            for first in range(0, len(mine), CHUNK):
                rows = mine[first : first + CHUNK]
                chunk = queries[rows]
                n_kv = int(chunk[-1]) + 1
                end = start + np.array([self.layout.compacted(int(i)) for i in chunk]) * self.layout.group_size
                token = np.arange(n_kv)
                droppable = (token >= start) & (token < end[:, None])
                future = token > chunk[:, None]
                for h in range(self.n_head_kv):
                    keys, values = k[h, :n_kv], v[h, :n_kv]
                    length2 = (values**2).sum(axis=1)
                    for r in range(h * n_rep, (h + 1) * n_rep):
                        p = q[r, rows] @ keys.T * np.float32(scale)
                        if softcap:
                            p = np.float32(softcap) * np.tanh(p / np.float32(softcap))
                        p[future] = -np.inf
                        top = p.max(axis=1, keepdims=True)
                        if sinks is not None:
                            top = np.maximum(top, np.float32(sinks[r]))
                        p -= top
                        np.exp(p, out=p)
                        p /= p.sum(axis=1, keepdims=True) + (0 if sinks is None else np.exp(np.float32(sinks[r]) - top))
                        o = p @ values
                        norm2 = np.maximum((o**2).sum(axis=1, keepdims=True), np.float32(1e-30))
                        away = np.sqrt(np.maximum(length2 - 2 * (o @ values.T) + norm2, 0) / norm2)
                        p *= away
                        p *= droppable
                        self.added[kind, layer, h, :n_kv] += p.sum(axis=0)

    def solve_layer(self, layer: int, k: np.ndarray, rope: Any) -> np.ndarray:
        """Fits the heads of a layer, float32 [n_head_kv, head_dim_k]. k: all keys of the text, [n_head_kv, n_tokens, head_dim_k], as the cache
        holds them."""
        if self.n_groups == 0:
            raise TcaError("too few queries to fit a probe; use a longer calibration text")
        size, start = self.layout.group_size, self.layout.sinks
        span = slice(start, start + self.n_groups * size)
        if self.probe is None:
            self.probe = np.zeros((self.n_layer, self.n_head_kv, k.shape[2]), np.float32)
        for h in range(self.n_head_kv):
            total = np.zeros(span.stop - start)
            for column, kind in enumerate(self.kinds):
                mean = self.added[kind, layer, h, span] / np.repeat(self.seen[: self.n_groups, column], size)
                total += mean / max(mean.mean(), 1e-30)
            weights = ridge(unrotate(k[h, span], np.arange(span.start, span.stop), rope), np.log(total + FLOOR))
            if not np.isfinite(weights).all():
                raise TcaError("calibration gave errors that are not finite; the model's activations overflow on this text")
            self.probe[layer, h] = weights
        return self.probe[layer]
