"""From a model file to head budgets: text -> forward pass -> error per head and configuration -> allocation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tca_gguf.errors import TcaError
from tca_gguf.loading import context_size

from .allocate import DENSE, allocate, sparsest_within
from .capture import Progress, run_capture
from .configs import calibrated_keep_counts, config_grid, integer_counts, kept_per_group
from .contribution import equal_heads, output_grams
from .evaluate import ErrorTable
from .probe import METRIC as PROBE_METRIC
from .probe import ProbeFit
from .runtime import Model, Session
from .stream import Layout
from .texts import KINDS, CalibrationText, compose, shortest_text

if TYPE_CHECKING:
    from tca_gguf.budgets import Budgets

DEFAULT_KEEP = 0.25
DEFAULT_METRIC = PROBE_METRIC
DEFAULT_TOKENS = 6144
# Tokens of a micro-batch: what the pass needs beside model and cache grows with it (docs/calibration.md, "Memory").
UBATCH = 512
# Queries of each kind that the probe is fitted to: far more than errors are measured with, since every token needs some.
FIT_QUERIES = (512, 512)
# What budgets minimise: "layer", what the layer's output loses by a head behind the output projection, squared
# (ErrorTable.lost_share); "head", the relative error of the head's output. docs/calibration.md compares them.
COSTS = ("layer", "head")
# The kinds of queries are put on one scale by their mean error under this configuration, then added (prototype.md, 3).
YARDSTICK = (1.0, 2.0)


@dataclass(frozen=True)
class Measurement:
    """What one forward pass measured; every budget for this model and text follows from it.

    error, dropped, bound: float64 [n_kind, n_layer, n_head_kv, n_configs], mean relative output error, dropped attention mass,
    and the bound on the error that follows from it. lost: the same shape, what the layer's output loses by the head, squared and
    relative (`ErrorTable.lost_share`), or None if it was not measured. full: the layers with full attention; the others, whose attention slides
    over a window, get no budget. probe: what the metric "key-probe" uses, float32 [n_layer, n_head_kv, head_dim_k].
    """

    layout: Layout
    keep_counts: tuple[int, ...]
    configs: np.ndarray
    metric: str
    seed: int
    kinds: tuple[str, ...]
    error: np.ndarray
    dropped: np.ndarray
    bound: np.ndarray
    lost: np.ndarray | None
    n_tokens: int
    text_sha256: str
    full: tuple[int, ...]
    probe: np.ndarray | None = None

    def combined(self, cost: str = COSTS[0]) -> np.ndarray:
        """What allocation minimises, [n_layer, n_head_kv, n_configs]: ``cost`` (see COSTS), the kinds on one scale, averaged.

        Raises TcaError if it was not measured.
        """
        values = self.lost if cost == "layer" else self.error
        if values is None:
            raise TcaError("this measurement was made for the cost 'head' and holds nothing for 'layer'")
        yard = np.array(integer_counts(*YARDSTICK, self.layout.n_blocks, self.keep_counts))
        row = int(np.flatnonzero((self.configs == yard).all(axis=1))[0])
        level = values[:, :, :, row].mean(axis=(1, 2))
        used = level > 0
        if not used.any():
            return values.mean(axis=0)
        return (values[used] / level[used][:, None, None, None]).mean(axis=0) * level[used].mean()

    def head_error(self) -> np.ndarray:
        """Relative output error averaged over the kinds that had queries, [n_layer, n_head_kv, n_configs]."""
        return self._over_kinds(self.error)

    def head_bound(self) -> np.ndarray:
        """The bound on `head_error`, same shape."""
        return self._over_kinds(self.bound)

    def _over_kinds(self, values: np.ndarray) -> np.ndarray:
        used = self.error.max(axis=(1, 2, 3)) > 0
        return values[used].mean(axis=0) if used.any() else values.mean(axis=0)


def measure(
    model_path: str | os.PathLike[str],
    *,
    texts: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    n_threads: int | None = None,
    layout: Layout | None = None,
    keep_counts: tuple[int, ...] | None = None,
    configs: np.ndarray | None = None,
    metric: str = DEFAULT_METRIC,
    cost: str = COSTS[0],
    n_ubatch: int = UBATCH,
    n_gpu_layers: int = 0,
) -> Measurement:
    """One forward pass over the calibration text; see `calibrate` for the arguments.

    keep_counts: what a block may keep, increasing (default `calibrated_keep_counts`); configs: int32 [n_configs, n_keep]
    (default `config_grid`)
    """
    from tca_gguf import native

    if cost not in COSTS:
        raise TcaError(f"cost is {cost!r}; it must be one of {', '.join(COSTS)}")
    if native.needs_queries(metric):
        raise TcaError(f"metric {metric} looks at the queries of a running model, so there is nothing to calibrate; use it under "
                       f"uniform budgets: eval MODEL --uniform 0.25 --policy {metric}")  # fmt: skip
    behind_projection = cost == "layer"
    layout = layout or Layout()
    keep_counts = calibrated_keep_counts(layout.block_size) if keep_counts is None else keep_counts
    configs = config_grid(layout.n_blocks, keep_counts) if configs is None else configs
    with Model(model_path, overrides={"tca.enabled": False}, n_gpu_layers=n_gpu_layers) as model:
        wanted = min(tokens or DEFAULT_TOKENS, model.n_ctx_train)
        if wanted < shortest_text(layout) and model.n_ctx_train < shortest_text(layout):
            raise TcaError(
                f"{model.path}: its context of {model.n_ctx_train} tokens is too short to evict anything "
                f"(sinks + window + group = {layout.first_evicting}); it runs dense as it is"
            )
        text: CalibrationText = compose(model.tokenize, wanted, layout, texts, seed)
        table = ErrorTable(KINDS, layout, keep_counts, configs, model.n_layer, model.n_head_kv,
                           output_grams(model_path) if behind_projection else equal_heads)  # fmt: skip

        def session_for(capture: object) -> Session:
            return Session(model, context_size(len(text.tokens)), n_ubatch=n_ubatch, n_threads=n_threads, capture=capture)

        fit = None
        if metric == PROBE_METRIC:
            more = compose(model.tokenize, wanted, layout, texts, seed, *FIT_QUERIES)  # the same text
            fit = ProbeFit(layout, len(KINDS), model.n_layer, model.n_head_kv, len(more.tokens), more.queries, more.kinds)
        full = run_capture(session_for, table, text, metric, progress, fit)
    return Measurement(layout, keep_counts, configs, metric, seed, KINDS, table.mean_error(), table.mean_dropped(),
                       table.mean_bound(), table.lost_share() if behind_projection else None, len(text.tokens), text.sha256,
                       tuple(full), None if fit is None else fit.probe)  # fmt: skip


def choose_budgets(m: Measurement, keep: float | None = None, max_error: float | None = None, cost: str = COSTS[0]) -> Budgets:
    """Budgets from what was measured.

    keep: mean kept fraction of the evicted region at most (default DEFAULT_KEEP without ``max_error``); the summed cost is least.
    cost: one of COSTS; "layer" needs a measurement that was made with it.
    max_error: no head's relative output error is above it. Alone, every head gets the sparsest configuration within it (the
    paper's rule), and the kept fraction follows. Raises TcaError if both together cannot be met.
    """
    from tca_gguf.budgets import SLIDING, Budgets, Calibration

    kept = kept_per_group(m.configs, m.keep_counts)
    n_layer, n_head_kv, n_configs = m.error.shape[1:]
    full = list(m.full)
    errors = m.head_error()[full].reshape(-1, n_configs)
    if max_error is not None and not max_error > 0:
        raise TcaError(f"max_error is {max_error}; it must be above 0")
    if keep is None and max_error is not None:
        choice = sparsest_within(errors, kept, max_error).tolist()
    else:
        keep = DEFAULT_KEEP if keep is None else keep
        choice = allocate(m.combined(cost)[full].reshape(-1, n_configs), kept, m.layout.group_size, keep, errors, max_error).choice.tolist()

    # only the configurations in use go into the file
    rows = sorted(set(choice) - {DENSE})
    renumber = {DENSE: DENSE, **{row: i for i, row in enumerate(rows)}}
    head_config = np.full((n_layer, n_head_kv), SLIDING, dtype=np.int32)
    head_config[full] = np.array([renumber[c] for c in choice]).reshape(-1, n_head_kv)
    kept_fraction = float(np.append(kept / m.layout.group_size, 1.0)[choice].mean())

    def per_head(values: np.ndarray) -> np.ndarray:
        flat = values[full].reshape(-1, n_configs)
        chosen = np.zeros((n_layer, n_head_kv), dtype=np.float32)
        chosen[full] = np.array([0.0 if c == DENSE else flat[h, c] for h, c in enumerate(choice)]).reshape(-1, n_head_kv)
        return chosen

    return Budgets(
        version=1,
        block_size=m.layout.block_size,
        group_size=m.layout.group_size,
        window=m.layout.window,
        sinks=m.layout.sinks,
        metric=m.metric,
        keep_counts=m.keep_counts,
        configs=m.configs[rows].astype(np.int32).reshape(len(rows), len(m.keep_counts)),
        head_config=head_config,
        kept_fraction=kept_fraction,
        enabled=True,
        calibration=Calibration(
            tokens=m.n_tokens,
            text_sha256=m.text_sha256,
            target=kept_fraction if keep is None else keep,
            seed=m.seed,
            errors=per_head(m.head_error()),
            bounds=per_head(m.head_bound()),
        ),
        probe=m.probe,
    )


def calibrate(
    model_path: str | os.PathLike[str],
    *,
    keep: float | None = None,
    texts: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    n_threads: int | None = None,
    block_size: int = 16,
    group_size: int = 512,
    window: int = 496,
    sinks: int = 16,
    metric: str = DEFAULT_METRIC,
    max_error: float | None = None,
    cost: str = COSTS[0],
    n_gpu_layers: int = 0,
) -> Budgets:
    """Budgets for every head of a model, from one forward pass.

    keep, max_error, cost: see `choose_budgets`; keep is in (0, 1]
    texts: documents in place of the package's own; facts are planted in them too
    tokens: length of the calibration text (default 6144), clamped to the model's context
    seed: of the planted facts; metric: one of `native.metrics`
    n_gpu_layers: layers whose forward pass runs on the GPU, -1 for all; the evaluation is the CPU's in any case
    progress(done, total, label): called after each layer of each micro-batch
    Raises TcaError: unreadable model, an architecture without plain attention, a text or context too short to evict.
    The same model, text, tokens and seed give the same budgets.
    """
    if keep is not None and not 0 < keep <= 1:
        raise TcaError(f"keep is {keep}; it must be above 0 and at most 1")
    layout = Layout(block_size, group_size, window, sinks)
    measured = measure(model_path, texts=texts, tokens=tokens, seed=seed, progress=progress, n_threads=n_threads,
                       layout=layout, metric=metric, cost=cost, n_gpu_layers=n_gpu_layers)  # fmt: skip
    return choose_budgets(measured, keep, max_error, cost)
