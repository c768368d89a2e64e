"""One forward pass over the calibration text; each layer's Q, K and V are evaluated inside the callback and dropped.

The pass runs in micro-batches over the stock f16 cache. A micro-batch is handed over with all keys before it, so its
queries can be evaluated at once: memory beside the model is the dense cache, one micro-batch and one layer's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tca_gguf.errors import TcaError

from .evaluate import ErrorTable
from .stream import GroupOrder, order_group
from .texts import CalibrationText

Progress = Callable[[int, int, str], None]


def run_capture(
    session_for: Callable[[Any], Any],
    table: ErrorTable,
    text: CalibrationText,
    metric: str,
    progress: Progress | None = None,
) -> list[int]:
    """Fills ``table`` from one forward pass. Returns the layers that it evaluated: those with full attention.

    session_for(capture) -> a `runtime.Session` with room for the text, the stock cache and the capture in place.
    progress(done, total, label) is called after each layer of each micro-batch.
    """
    from tca_gguf import native

    start = done = 0
    counts = np.zeros(len(table.keep_counts), dtype=np.int32)
    counts[-1] = table.layout.n_blocks

    def on_layer(qkv: Any) -> None:
        nonlocal done
        if qkv.layer not in ropes:
            return
        if qkv.n_kv != start + qkv.n_tokens:
            raise TcaError(f"layer {qkv.layer}: captured {qkv.n_kv} keys where {start + qkv.n_tokens} were expected; "
                           "this architecture's attention is not supported")  # fmt: skip
        rope = ropes[qkv.layer]

        def order(head: int, group: slice) -> GroupOrder:
            positions = np.arange(group.start, group.stop, dtype=np.int32)
            _, scores = native.select(qkv.k[head, group], positions, rope, table.layout.block_size, table.keep_counts,
                                      counts, metric=metric, values=qkv.v[head, group], layer=qkv.layer, head=head)  # fmt: skip
            return order_group(scores, table.layout.block_size)

        mine = (text.queries >= start) & (text.queries < start + qkv.n_tokens)
        table.add_layer(qkv.layer, qkv.q, qkv.k, qkv.v, start, text.queries[mine], text.kinds[mine], qkv.scale,
                        qkv.softcap, order)  # fmt: skip
        done += 1
        if progress is not None:
            progress(done, total, f"layer {qkv.layer + 1}/{table.n_layer}")

    capture = native.Capture(on_layer)
    with session_for(capture) as session:
        full = [layer for layer in range(table.n_layer) if not native.layer_slides(session.address, layer)]
        ropes = {layer: native.context_rope(session.address, layer) for layer in full}
        total = len(full) * -(-len(text.tokens) // session.n_batch)
        for start in range(0, len(text.tokens), session.n_batch):
            try:
                session.decode(text.tokens[start : start + session.n_batch])
            except TcaError:
                if capture.error is None:
                    raise
                raise capture.error from None  # an exception in the callback aborts the pass; it is the cause
    if done != total:
        raise TcaError(f"only {done} of {total} attention layers were captured; "
                       "this architecture does not use the plain attention path")  # fmt: skip
    return full
