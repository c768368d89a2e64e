"""Selection in plain numpy, written from the definitions: the independent reference of the native code. float64 throughout.

METRICS has one function a metric: a Group -> importance of every token [n], the larger, the longer it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """keys: [n, dk] before the rotary embedding, values: [n, dv], positions: [n]; layer, head: which head it is; probe: [dk]."""

    keys: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    layer: int = 0
    head: int = 0
    probe: np.ndarray | None = None


def unrotate(keys: np.ndarray, positions: np.ndarray, rope_type: str, n_rot: int, scale: float, freqs: np.ndarray) -> np.ndarray:
    """keys [n, d] as stored -> before RoPE, float64. Pair i was rotated by positions*freqs[i] and multiplied by scale.

    rope_type: "none", "norm" (pairs 2i, 2i+1) or "neox" (pairs i, i + n_rot/2).
    """
    out = keys.astype(np.float64)
    if rope_type == "none":
        return out
    half = n_rot // 2
    if rope_type == "norm":
        a, b = np.arange(0, n_rot, 2), np.arange(1, n_rot, 2)
    else:
        a, b = np.arange(half), np.arange(half) + half
    angle = positions.astype(np.float64)[:, None] * freqs.astype(np.float64)[None, :]
    pairs = (out[:, a] + 1j * out[:, b]) * np.exp(-1j * angle) / np.float64(np.float32(scale))
    out[:, a], out[:, b] = pairs.real, pairs.imag
    return out


def importance(keys: np.ndarray) -> np.ndarray:
    """keys [n, d] before RoPE -> [n]; a key or a mean without direction counts as orthogonal (importance 1)."""
    mean = keys.mean(axis=0)
    norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(mean)
    cosine = np.divide(keys @ mean, norms, out=np.zeros(len(keys)), where=norms > 0)
    return 1.0 - cosine


def splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random(group: Group) -> np.ndarray:
    """Hash of (position, layer, head), side by side in 32 + 16 + 16 bits, as a fraction of 53 bits."""
    word = (group.positions.astype(np.uint64) << np.uint64(32)) + np.uint64((group.layer << 16) + group.head)
    return (splitmix64(word) >> np.uint64(11)).astype(np.float64) / 2.0**53


METRICS = {
    "key-diff": lambda group: importance(group.keys),
    "key-probe": lambda group: (group.keys * group.probe).sum(axis=1),
    "key-norm": lambda group: -np.linalg.norm(group.keys, axis=1),
    "value-norm": lambda group: np.linalg.norm(group.values, axis=1),
    "streaming": lambda group: group.positions.astype(np.float64),
    "random": random,
}


def select(scores: np.ndarray, block_size: int, keep_counts: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Indices kept, increasing. Most important blocks (largest sum of scores) keep most; ties towards the newer."""
    n_blocks = len(scores) // block_size
    blocks = [list(range(b * block_size, (b + 1) * block_size)) for b in range(n_blocks)]
    by_importance = sorted(range(n_blocks), key=lambda b: (sum(float(scores[t]) for t in blocks[b]), b), reverse=True)
    plan = [k for k, n in sorted(zip(keep_counts, counts, strict=True), reverse=True) for _ in range(n)]
    kept: list[int] = []
    for b, k in zip(by_importance, plan, strict=True):
        kept += sorted(blocks[b], key=lambda t: (float(scores[t]), t), reverse=True)[:k]
    return sorted(kept)
