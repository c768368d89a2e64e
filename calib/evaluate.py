"""The error that each configuration causes in each KV head, from one layer's Q, K and V.

For a query, ``o`` is the dense attention output and ``o_hat`` the output over the tokens it sees under the configuration
(`stream.visible`); the error is ``||o - o_hat|| / ||o||``. Scoring is the same for all configurations and the most
important blocks keep most, so a configuration is a sum of prefixes: the first ``N_j`` blocks of every group contribute
the tokens that separate ``keep_counts[j-1]`` from ``keep_counts[j]``. The sums over groups are formed once for a head;
after that a configuration costs n_keep additions whatever the length of the text.

The bound beside the error needs no ``o_hat``: with the dropped mass ``d``, ``u`` the mean of the dropped values and ``c`` any
fixed point, ``o - o_hat = d (u - o_hat)`` and both are means of values, so ``||o - o_hat|| <= d (max over the tokens that can be
dropped of ||v - c|| + max over all tokens of ||v - c||)``. docs/calibration.md derives it.

What budgets of cost "layer" minimise is the error as the layer sees it: ``||W_h (o - o_hat)||^2``, ``W_h`` the head's part of the output
projection, in relation to what all heads of the layer add (`contribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .contribution import Grams, equal_heads
from .stream import GroupOrder, Layout, blocks_at_least


@dataclass(frozen=True)
class HeadErrors:
    """float32 [n_configs, n_rep, n_queries] each.

    error: relative output error; dropped: dense attention mass not kept; bound: what the dropped mass and the lengths of the
    values allow the error to be at most; lost: squared length of what is missing behind the output projection.
    added: [n_rep, n_queries], squared length of what the dense head adds there.
    """

    error: np.ndarray
    dropped: np.ndarray
    bound: np.ndarray
    lost: np.ndarray
    added: np.ndarray


def head_errors(
    q: np.ndarray,
    queries: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    softcap: float,
    layout: Layout,
    orders: Sequence[GroupOrder],
    keep_counts: Sequence[int],
    configs: np.ndarray,
    grams: np.ndarray,
    sinks: np.ndarray | None = None,
) -> HeadErrors:
    """Evaluates all configurations for one KV head.

    q: [n_rep, n_queries, head_dim_k], the sampled queries of the query heads that share this KV head, float32
    queries: [n_queries], their indices in the text
    k, v: [n_kv, head_dim], keys and values of the text from its first token on
    orders: order of each group that some query sees compacted
    configs: [n_configs, n_keep]
    grams: [n_rep, head_dim_v, head_dim_v], W_h^T W_h of the query heads
    sinks: [n_rep], learned attention sinks: a score that every query sees, with a value of zero
    """
    n_rep, n_queries, dk = q.shape
    dv = v.shape[1]
    n_kv = int(queries.max()) + 1
    rows = n_rep * n_queries
    n_compacted = np.array([layout.compacted(int(i)) for i in queries])
    n_groups = int(n_compacted.max())

    # e[j, r] = exp(score of token j for query row r), 0 above the diagonal; one column is one query of one query head
    e = (k[:n_kv] @ (q.reshape(rows, dk).T * np.float32(scale))).astype(np.float32, copy=False)
    if softcap:
        e = np.float32(softcap) * np.tanh(e / np.float32(softcap))
    row_query = np.tile(queries, n_rep)
    future = np.arange(n_kv)[:, None] > row_query[None, :]
    e[future] = -np.inf
    top = e.max(axis=0)
    sink = None if sinks is None else np.repeat(np.asarray(sinks, np.float32), n_queries)
    if sink is not None:
        top = np.maximum(top, sink)
    e -= top
    np.exp(e, out=e)
    values = np.concatenate([v[:n_kv], np.ones((n_kv, 1), np.float32)], axis=1)  # the last column sums the weights

    # tokens of groups a row sees compacted go to the ranked part, all others to the dense part
    boundary = layout.sinks + np.tile(n_compacted, n_rep) * layout.group_size
    token = np.arange(n_kv)[:, None]
    is_core = (token >= layout.sinks) & (token < boundary[None, :])
    dense_part = np.where(is_core, np.float32(0), e).T @ values  # [rows, dv + 1]
    if sink is not None:
        dense_part[:, dv] += np.exp(sink - top)
    first, last = layout.sinks, layout.sinks + n_groups * layout.group_size
    core = np.where(is_core[first:last], e[first:last], np.float32(0))

    n_blocks, n_keep = layout.n_blocks, len(keep_counts)
    prefix = np.zeros((n_keep, n_blocks + 1, rows, dv + 1), np.float32)
    ranked = np.stack([o.tokens + g * layout.group_size for g, o in enumerate(orders[:n_groups])])  # [g, rank, b]
    lower = 0
    for j, upper in enumerate(keep_counts):
        if upper > lower:
            index = ranked[:, :, lower:upper].transpose(1, 0, 2).reshape(n_blocks, -1)
            for r in range(n_blocks):
                weights = core[index[r]]
                np.matmul(weights.T, values[first + index[r]], out=prefix[j, r + 1])
                prefix[j, r + 1] += prefix[j, r]
        lower = upper
    if lower < layout.block_size:  # keep counts that stop below b: the rest belongs to the dense output only
        index = ranked[:, :, lower:].reshape(-1)
        rest = core[index].T @ values[first + index]
    else:
        rest = 0.0

    full = dense_part + prefix[:, n_blocks].sum(axis=0) + rest
    out = full[:, :dv] / full[:, dv:]
    norm = np.maximum(np.linalg.norm(out, axis=1), np.float32(1e-20))
    reach = np.tile(value_reach(v[:n_kv], queries, n_compacted, layout, sinks is not None), n_rep) / norm
    error = np.empty((len(configs), rows), np.float32)
    dropped = np.empty((len(configs), rows), np.float32)
    lost = np.empty((len(configs), rows), np.float32)

    def squared_length(x: np.ndarray) -> np.ndarray:
        """||W_h x||^2 of every row, [rows, dv] -> [rows]."""
        x = x.reshape(n_rep, n_queries, dv)
        return np.maximum((np.matmul(x, grams) * x).sum(axis=2), 0).reshape(rows)

    for c, n_at_least in enumerate(blocks_at_least(configs)):
        part = dense_part.copy()
        for j in range(n_keep):
            part += prefix[j, n_at_least[j]]
        mass = np.maximum(part[:, dv:], np.float32(1e-30))
        missing = part[:, :dv] / mass - out
        error[c] = np.linalg.norm(missing, axis=1) / norm
        lost[c] = squared_length(missing)
        dropped[c] = np.maximum(1.0 - part[:, dv] / full[:, dv], 0.0)
    shape = (len(configs), n_rep, n_queries)
    return HeadErrors(error=error.reshape(shape), dropped=dropped.reshape(shape), bound=(dropped * reach).reshape(shape),
                      lost=lost.reshape(shape), added=squared_length(out).reshape(shape[1:]))  # fmt: skip


def value_reach(v: np.ndarray, queries: np.ndarray, n_compacted: np.ndarray, layout: Layout, zero: bool = False) -> np.ndarray:
    """How far the mean of dropped values and the mean of kept ones can lie apart at most, float32 [n_queries].

    v: [n_kv, head_dim_v]; queries: [n_queries] indices; n_compacted: groups that each query sees compacted. The distances are
    taken from the mean of all values; any point would do, this one is near. zero: a value of zero is among those kept.
    """
    center = v.mean(axis=0)
    distance = np.linalg.norm(v - center, axis=1)
    largest = np.maximum(np.maximum.accumulate(distance), np.linalg.norm(center) if zero else 0)
    droppable = np.maximum.accumulate(np.where(np.arange(len(v)) < layout.sinks, 0.0, distance))
    last = layout.sinks + n_compacted * layout.group_size - 1  # of the tokens that a query can miss
    reach = largest[queries] + np.where(n_compacted > 0, droppable[last], 0.0)
    return reach.astype(np.float32)


@dataclass
class ErrorTable:
    """Running means over all evaluated queries.

    error, dropped, bound, lost: float64 [n_kind, n_layer, n_head_kv, n_configs], sums until the mean is asked for.
    grams: see `contribution`.
    """

    kinds: tuple[str, ...]
    layout: Layout
    keep_counts: tuple[int, ...]
    configs: np.ndarray
    n_layer: int
    n_head_kv: int
    grams: Grams = equal_heads

    def __post_init__(self) -> None:
        shape = (len(self.kinds), self.n_layer, self.n_head_kv, len(self.configs))
        self.error_sum = np.zeros(shape)
        self.dropped_sum = np.zeros(shape)
        self.bound_sum = np.zeros(shape)
        self.lost_sum = np.zeros(shape)
        self.added_sum = np.zeros(shape[:2])
        self.count = np.zeros((len(self.kinds), self.n_layer), dtype=np.int64)
        self._orders: dict[tuple[int, int], list[GroupOrder]] = {}

    def add_layer(
        self,
        layer: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        queries: np.ndarray,
        kind_of: np.ndarray,
        scale: float,
        softcap: float,
        order: Callable[[int, slice], GroupOrder],
        sinks: np.ndarray | None = None,
    ) -> None:
        """Evaluates some queries of one layer.

        q: [n_head, len(queries), head_dim_k]; k, v: [n_head_kv, n_kv, head_dim], of the text from its first token on to the last
        query or farther; queries: their indices in the text; kind_of: [len(queries)], index into ``kinds``
        order(KV head, tokens of the group): ranks one group; sinks: [n_head], see `head_errors`
        """
        if len(queries) == 0:
            return
        n_rep = q.shape[0] // self.n_head_kv
        n_groups = self.layout.compacted(int(queries.max()))
        grams = self.grams(layer, q.shape[0], v.shape[2])
        for h in range(self.n_head_kv):
            # groups are ranked once and remembered for later queries
            orders = self._orders.setdefault((layer, h), [])
            for g in range(len(orders), n_groups):
                orders.append(order(h, self.layout.group(g)))
            sampled = np.ascontiguousarray(q[h * n_rep : (h + 1) * n_rep])
            result = head_errors(sampled, queries, k[h], v[h], scale, softcap, self.layout, orders,
                                 self.keep_counts, self.configs, grams[h * n_rep : (h + 1) * n_rep],
                                 None if sinks is None else sinks[h * n_rep : (h + 1) * n_rep])
            for kind in range(len(self.kinds)):
                mine = kind_of == kind
                for total, value in ((self.error_sum, result.error), (self.dropped_sum, result.dropped), (self.bound_sum, result.bound)):
                    total[kind, layer, h] += value[:, :, mine].mean(axis=1, dtype=np.float64).sum(axis=1)
                self.lost_sum[kind, layer, h] += result.lost[:, :, mine].sum(axis=(1, 2), dtype=np.float64)
                self.added_sum[kind, layer] += result.added[:, mine].sum(dtype=np.float64)
        for kind in range(len(self.kinds)):
            self.count[kind, layer] += int((kind_of == kind).sum())

    def mean_error(self) -> np.ndarray:
        """Mean relative output error, float64 [n_kind, n_layer, n_head_kv, n_configs]; kinds without queries are 0."""
        return self._mean(self.error_sum)

    def mean_dropped(self) -> np.ndarray:
        """Mean attention mass that selection drops, same shape."""
        return self._mean(self.dropped_sum)

    def mean_bound(self) -> np.ndarray:
        """Mean of the bounds on the errors, same shape; nowhere below `mean_error`."""
        return self._mean(self.bound_sum)

    def lost_share(self) -> np.ndarray:
        """What the layer's output loses by a head, squared, in relation to what all its heads add; same shape."""
        return self.lost_sum / np.maximum(self.added_sum, 1e-30)[:, :, None, None]

    def _mean(self, total: np.ndarray) -> np.ndarray:
        return total / np.maximum(self.count, 1)[:, :, None, None]
