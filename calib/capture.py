"""Forward passes over the calibration text; each layer's Q, K and V are evaluated inside the callback and dropped.

The pass runs in micro-batches over the stock f16 cache. A micro-batch is handed over with all keys before it, so its
queries can be evaluated at once: memory beside the model is the dense cache, one micro-batch and one layer's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tca_gguf.errors import TcaError

from .evaluate import ErrorTable
from .probe import ProbeFit
from .stream import GroupOrder, order_group
from .texts import CalibrationText

Progress = Callable[[int, int, str], None]


def run_pass(
    session_for: Callable[[Any], Any],
    n_layer: int,
    tokens: np.ndarray,
    visit: Callable[[Any, int, Any], None],
    progress: Progress | None = None,
) -> list[int]:
    """One forward pass over the tokens. Returns the layers that it visited: those with full attention.

    session_for(capture) -> a `runtime.Session` with room for the text, the stock cache and the capture in place.
    visit(qkv, start, rope) is called for each of these layers in each micro-batch; start: its first token in the text.
    progress(done, total, label) is called after it.
    """
    from tca_gguf import native

    start = done = 0

    def on_layer(qkv: Any) -> None:
        nonlocal done
        if qkv.layer not in ropes:
            return
        if qkv.n_kv != start + qkv.n_tokens:
            raise TcaError(f"layer {qkv.layer}: captured {qkv.n_kv} keys where {start + qkv.n_tokens} were expected; "
                           "this architecture's attention is not supported")  # fmt: skip
        visit(qkv, start, ropes[qkv.layer])
        done += 1
        if progress is not None:
            progress(done, total, f"layer {qkv.layer + 1}/{n_layer}")

    capture = native.Capture(on_layer)
    with session_for(capture) as session:
        full = [layer for layer in range(n_layer) if not native.layer_slides(session.address, layer)]
        ropes = {layer: native.context_rope(session.address, layer) for layer in full}
        total = len(full) * -(-len(tokens) // session.n_batch)
        for start in range(0, len(tokens), session.n_batch):
            try:
                session.decode(tokens[start : start + session.n_batch])
            except TcaError:
                if capture.error is None:
                    raise
                raise capture.error from None  # an exception in the callback aborts the pass; it is the cause
    if done != total:
        raise TcaError(f"only {done} of {total} attention layers were captured; "
                       "this architecture does not use the plain attention path, or the native part is older than the package: "
                       "then install it again")  # fmt: skip
    return full


def run_capture(
    session_for: Callable[[Any], Any],
    table: ErrorTable,
    text: CalibrationText,
    metric: str,
    progress: Progress | None = None,
    probe: np.ndarray | None = None,
) -> list[int]:
    """Fills ``table`` from one forward pass; see `run_pass` for the arguments and the result.

    probe: float32 [n_layer, n_head_kv, head_dim_k], for the metric that uses one.
    """
    from tca_gguf import native

    counts = np.zeros(len(table.keep_counts), dtype=np.int32)
    counts[-1] = table.layout.n_blocks

    def visit(qkv: Any, start: int, rope: Any) -> None:
        def order(head: int, group: slice) -> GroupOrder:
            positions = np.arange(group.start, group.stop, dtype=np.int32)
            _, scores = native.select(qkv.k[head, group], positions, rope, table.layout.block_size, table.keep_counts,
                                      counts, metric=metric, values=qkv.v[head, group], layer=qkv.layer, head=head,
                                      probe=None if probe is None else probe[qkv.layer, head])  # fmt: skip
            return order_group(scores, table.layout.block_size)

        mine = (text.queries >= start) & (text.queries < start + qkv.n_tokens)
        table.add_layer(qkv.layer, qkv.q, qkv.k, qkv.v, start, text.queries[mine], text.kinds[mine], qkv.scale,
                        qkv.softcap, order)  # fmt: skip

    return run_pass(session_for, table.n_layer, text.tokens, visit, progress)


def run_probe_fit(
    session_for: Callable[[Any], Any], fit: ProbeFit, n_layer: int, text: CalibrationText, progress: Progress | None = None
) -> np.ndarray:
    """The probe that ``fit`` finds in one forward pass, float32 [n_layer, n_head_kv, head_dim_k]; 0 in layers it does not visit."""

    def visit(qkv: Any, start: int, rope: Any) -> None:
        mine = (text.queries >= start) & (text.queries < start + qkv.n_tokens)
        fit.add_layer(qkv.layer, qkv.q, qkv.k, qkv.v, start, text.queries[mine], text.kinds[mine], qkv.scale, qkv.softcap)
        if qkv.n_kv == len(text.tokens):
            fit.solve_layer(qkv.layer, qkv.k, rope, n_layer)

    run_pass(session_for, n_layer, text.tokens, visit, progress)
    assert fit.probe is not None
    return fit.probe
