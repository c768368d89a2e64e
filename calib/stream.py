"""The runtime's streaming rule, on the host: which tokens a query sees under a configuration.

Group ``g`` holds the tokens ``[sinks + g*G, sinks + (g+1)*G)``. A query at index ``i`` sees it compacted if and only if
``i >= sinks + window + (g+1)*G``; it sees the sinks, what compaction left of those groups, and every later token up to
itself. The rule does not depend on the size of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Sizes in tokens, as in the ``tca.*`` keys."""

    block_size: int = 16
    group_size: int = 512
    window: int = 496
    sinks: int = 16

    @property
    def n_blocks(self) -> int:
        return self.group_size // self.block_size

    @property
    def first_evicting(self) -> int:
        """Smallest query index that sees a compacted group."""
        return self.sinks + self.window + self.group_size

    def compacted(self, query: int) -> int:
        """Number of leading groups that the query at this index sees compacted."""
        return max(0, (query - self.sinks - self.window) // self.group_size)

    def group(self, g: int) -> slice:
        start = self.sinks + g * self.group_size
        return slice(start, start + self.group_size)


@dataclass(frozen=True)
class GroupOrder:
    """How selection ranks one group of one KV head; every configuration follows from it.

    blocks: int32 [n_blocks], blocks from the most important to the most redundant one.
    tokens: int32 [n_blocks, block_size], row r: tokens of block ``blocks[r]`` (indices inside the group), best first.
    """

    blocks: np.ndarray
    tokens: np.ndarray


def order_group(scores: np.ndarray, block_size: int) -> GroupOrder:
    """Ranks blocks and tokens by importance ``scores`` [n_tokens], ties towards the newer, as the runtime's select op does.

    A block's redundancy is minus the sum of its tokens' importance.
    """
    s = scores.astype(np.float64).reshape(-1, block_size)
    n_blocks = s.shape[0]
    # reversing before a stable sort on -value puts the newer of two equals first
    by_block = (n_blocks - 1 - np.argsort(-s.sum(axis=1)[::-1], kind="stable")).astype(np.int32)
    by_token = (block_size - 1 - np.argsort(-s[:, ::-1], axis=1, kind="stable")).astype(np.int32)
    return GroupOrder(blocks=by_block, tokens=by_block[:, None] * block_size + by_token[by_block])


def blocks_at_least(configs: np.ndarray) -> np.ndarray:
    """[n_configs, n_keep] -> the number of blocks that keep at least ``keep_counts[j]`` tokens.

    The most important blocks keep most, so these are always the first ones in the order of a group.
    """
    return np.cumsum(configs[:, ::-1], axis=1)[:, ::-1]


def kept_tokens(order: GroupOrder, keep_counts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Indices inside the group that a configuration keeps, increasing."""
    kept, rank = [], 0
    for k, n in zip(reversed(list(keep_counts)), reversed(list(counts)), strict=True):
        kept.append(order.tokens[rank : rank + n, :k].ravel())
        rank += n
    return np.sort(np.concatenate(kept))


def visible(layout: Layout, query: int, kept: Sequence[np.ndarray]) -> np.ndarray:
    """Token indices that a query sees; ``kept[g]`` are the indices inside group g that its configuration keeps.

    This is the definition. `evaluate` computes with sums over the same sets and is tested against it.
    """
    n_groups = layout.compacted(query)
    core = [layout.group(g).start + np.asarray(kept[g], dtype=np.int64) for g in range(n_groups)]
    recent = layout.sinks + n_groups * layout.group_size
    sinks = np.arange(min(layout.sinks, query + 1))
    return np.concatenate([sinks, *core, np.arange(recent, query + 1)]).astype(np.int64)
