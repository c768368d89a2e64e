"""Bytes of a KV cache, in one place: what a context has allocated, what a file's budgets will need, what llama.cpp's own cache needs.

All layers with keys count: those in the ragged store, and those with sliding-window attention, which llama.cpp's own cache keeps in
either case. What recurrent layers hold does not grow with the context and is in `of_context` alone. "stock" is llama.cpp's own cache for the same tokens and type, without swa_full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

if TYPE_CHECKING:
    from .budgets import Budgets
    from .gguf_file import ModelShape

# types of the KV cache that the commands offer
KV_TYPES = {
    "f16": int(GGMLQuantizationType.F16),
    "q8_0": int(GGMLQuantizationType.Q8_0),
    "q4_0": int(GGMLQuantizationType.Q4_0),
}
UBATCH = 512  # tokens of a micro-batch of the commands; the default group ends with one of this size
PADDING = 256  # llama.cpp makes contexts, and the caches of sliding windows, multiples of this


def context_size(n_tokens: int) -> int:
    """Tokens of a context for so many: llama.cpp rounds up to this."""
    return -(-n_tokens // PADDING) * PADDING


@dataclass(frozen=True)
class KvBytes:
    """Bytes of one cache, and of llama.cpp's own in its place. ragged False: it is llama.cpp's own."""

    ragged: bool
    allocated: int
    stock: int


def of_context(ctx: int) -> KvBytes:
    """What the llama_context at this address has allocated, whatever cache it has."""
    from . import native

    info = native.context_info(ctx)
    return KvBytes(info.active, info.memory_bytes, info.memory_bytes_stock)


def mean_kept(ctx: int, layers: Sequence[int] | None = None, seq_id: int = 0) -> float:
    """Slots in use in a region of the ragged store, mean over its heads. layers: of the store, if they are known."""
    from . import native

    info = native.context_info(ctx)
    if layers is None:
        layers = native.context_shape(ctx).stored
    lengths = [native.region_length(ctx, layer, seq_id, head) for layer in layers for head in range(info.n_head_kv)]
    return sum(lengths) / len(lengths)


def predicted(shape: ModelShape, budgets: Budgets, n_ctx: int, kv_type: str = "f16", n_ubatch: int = UBATCH) -> KvBytes:
    """What a context of one sequence of ``n_ctx`` tokens will take under ``budgets``."""
    from . import native

    n_ctx, kind = context_size(n_ctx), KV_TYPES[kv_type]
    ragged, dense = native.plan_bytes(budgets, shape.head_dim_k, shape.head_dim_v, kind, kind, n_ctx)
    cell = _sliding(shape, shape.n_layer - len(budgets.stored_layers()), kv_type)
    # the runtime keeps as much of the sliding layers as the ragged store can take back: window and group behind a micro-batch
    longer = n_ubatch + budgets.window + budgets.group_size
    return KvBytes(True, ragged + cell * _window_cells(shape, n_ctx, longer), dense + cell * _window_cells(shape, n_ctx, n_ubatch))


def stock(shape: ModelShape, full: Sequence[int], n_ctx: int, kv_type: str = "f16", n_ubatch: int = UBATCH) -> int:
    """Bytes of llama.cpp's own cache for one sequence. full: the layers with full attention, the others slide."""
    n_ctx = context_size(n_ctx)
    sliding = _sliding(shape, shape.n_layer - len(full), kv_type) * _window_cells(shape, n_ctx, n_ubatch)
    return len(full) * n_ctx * shape.n_head_kv * _row(shape, kv_type) + sliding


def _row(shape: ModelShape, kv_type: str) -> int:
    """Bytes of a key and a value of one KV head."""
    from . import native

    return sum(native.row_bytes(KV_TYPES[kv_type], dim) for dim in (shape.head_dim_k, shape.head_dim_v))


def _sliding(shape: ModelShape, n_kept: int, kv_type: str) -> int:
    """Bytes of a token in the layers that slide. n_kept: layers that are not in the store, which slide if any layer does."""
    from . import native

    if shape.n_swa == 0:
        return 0
    if shape.sliding is None:
        return n_kept * shape.n_head_kv * _row(shape, kv_type)
    return sum(native.row_bytes(KV_TYPES[kv_type], n) for n in shape.sliding if n > 0)


def _window_cells(shape: ModelShape, n_ctx: int, behind: int) -> int:
    """Tokens that a sliding-window layer holds: its window and ``behind`` more."""
    return context_size(min(n_ctx, shape.n_swa + behind))
