"""One forward pass over the calibration text; each layer's Q, K and V are looked at inside the callback.

The pass runs in micro-batches over the stock f16 cache. A layer's sampled queries are held until the last micro-batch, which
hands over the keys and values of the whole text: the probe that ranks tokens is then fitted, and the errors follow. Memory
beside the model is the dense cache, one micro-batch, one layer's keys and values, and the sampled queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        full = list(session.shape.stored)
        ropes = {layer: native.context_rope(session.address, layer) for layer in full}
        total = len(full) * -(-len(tokens) // session.n_batch)
        for start in range(0, len(tokens), session.n_batch):
            try:
                session.decode(tokens[start : start + session.n_batch])
            finally:
                # the runtime ends the pass where the callback failed, and llama_decode calls that a success
                if capture.error is not None:
                    raise capture.error from None
    if done != total:
        raise TcaError(f"only {done} of {total} attention layers were captured; "
                       "this architecture does not use the plain attention path, or the native part is older than the package: "
                       "then install it again")  # fmt: skip
    return full


@dataclass(frozen=True)
class Sampled:
    """Queries of a layer in one micro-batch. q: float32 [n_head, n, head_dim_k]; queries, kinds: [n], as in `CalibrationText`."""

    q: np.ndarray
    queries: np.ndarray
    kinds: np.ndarray


def sampled(qkv: Any, start: int, queries: np.ndarray, kinds: np.ndarray) -> Sampled:
    """Those of the queries that lie in the micro-batch that begins with token ``start``."""
    mine = (queries >= start) & (queries < start + qkv.n_tokens)
    return Sampled(np.ascontiguousarray(qkv.q[:, queries[mine] - start]), queries[mine], kinds[mine])


def run_capture(
    session_for: Callable[[Any], Any],
    table: ErrorTable,
    text: CalibrationText,
    metric: str,
    progress: Progress | None = None,
    fit: ProbeFit | None = None,
) -> list[int]:
    """Fills ``table`` from one forward pass; see `run_pass` for the arguments and the result.

    fit: for the metric that uses a probe, made for this text; fitted layer by layer before errors are measured.
    """
    from tca_gguf import native

    counts = np.zeros(len(table.keep_counts), dtype=np.int32)
    counts[-1] = table.layout.n_blocks
    held: dict[int, list[Sampled]] = {}

    def visit(qkv: Any, start: int, rope: Any) -> None:
        layer, probe = qkv.layer, None
        held.setdefault(layer, []).append(sampled(qkv, start, text.queries, text.kinds))
        if fit is not None:
            part = sampled(qkv, start, fit.queries, fit.query_kinds)
            fit.add_layer(layer, part.q, qkv.k, qkv.v, part.queries, part.kinds, qkv.scale, qkv.softcap, qkv.sinks)
        if qkv.n_kv < len(text.tokens):
            return
        if fit is not None:
            probe = fit.solve_layer(layer, qkv.k, rope)

        def order(head: int, group: slice) -> GroupOrder:
            positions = np.arange(group.start, group.stop, dtype=np.int32)
            _, scores = native.select(qkv.k[head, group], positions, rope, table.layout.block_size, table.keep_counts,
                                      counts, metric=metric, values=qkv.v[head, group], layer=layer, head=head,
                                      probe=None if probe is None else probe[head])  # fmt: skip
            return order_group(scores, table.layout.block_size)

        for part in held.pop(layer):
            table.add_layer(layer, part.q, qkv.k, qkv.v, part.queries, part.kinds, qkv.scale, qkv.softcap, order, qkv.sinks)

    return run_pass(session_for, table.n_layer, text.tokens, visit, progress)
