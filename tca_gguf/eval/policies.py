"""Policies by name: which tokens of the evicted region stay, at how many bytes.

calibrated        the budgets of the file, or those that calibration finds at a kept fraction
calibrated:NAME   calibrated for another metric
NAME              a metric of tca.metric (key-diff, ...) under uniform budgets: the same configuration for every head
streaming-llm     sinks and window alone, at the bytes of uniform budgets (streaming_llm.py)
NAME@R            the last two at kept fraction R, whatever the others have
PATH.gguf         the budgets that another file of the same model carries
dense-q8_0, dense-q4_0   the stock cache with quantized keys and values: nothing is evicted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tca_gguf.budgets import DENSE as DENSE_HEAD
from tca_gguf.budgets import FORMAT_VERSION, SLIDING, Budgets
from tca_gguf.calib import DEFAULT_METRIC
from tca_gguf.calib.configs import integer_counts, powers_of_two
from tca_gguf.calib.stream import Layout
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape, own_budgets, read_budgets
from tca_gguf.loading import context_size

from . import streaming_llm

CALIBRATED = "calibrated"
UNIFORM_METRIC = "key-diff"  # of uniform budgets where no metric is named: the yardstick, whatever calibration uses
DENSE_TYPES = {"dense-q8_0": "q8_0", "dense-q4_0": "q4_0"}
SIGMA = 2.0  # of the uniform configuration: the best width for uniform budgets, so that the yardstick is a fair one


@dataclass(frozen=True)
class Policy:
    """One cache to evaluate. budgets None: the stock cache.

    matched: for budgets that depend on the length, those whose bytes they are given. keep: the mean kept fraction that the
    budgets really have, of the matched ones where there are any, so that rows of equal bytes show equal fractions.
    """

    name: str
    kv_type: str
    budgets: Budgets | None = None
    matched: Budgets | None = None

    @property
    def keep(self) -> float:
        budgets = self.matched or self.budgets
        return 1.0 if budgets is None else float(np.nanmean(budgets.head_kept_fraction()))

    def at(self, n_ctx: int, n_text: int | None = None) -> Policy:
        """The policy in a context of ``n_ctx`` tokens; n_text: where the text ends and questions begin, if that matters."""
        if self.matched is None:
            return self
        return replace(self, budgets=streaming_llm.streaming_budgets(self.matched, context_size(n_ctx), n_text))


DENSE = Policy("dense", "f16")


def uniform_config(keep: float, layout: Layout) -> np.ndarray:
    """int32 [n_keep]: the row of the log-Gaussian family (width SIGMA, over `powers_of_two`) whose kept fraction is nearest ``keep``."""
    keep_counts = powers_of_two(layout.block_size)
    rows = {integer_counts(mu, SIGMA, layout.n_blocks, keep_counts) for mu in np.arange(-16.0, 20.01, 0.02)}
    kept = np.asarray(keep_counts)
    return np.array(min(sorted(rows), key=lambda row: abs(float(kept @ np.array(row)) - keep * layout.group_size)), np.int32)


def uniform_budgets(
    shape: ModelShape, metric: str, keep: float, layout: Layout, full: Sequence[int] | None = None, probe: np.ndarray | None = None
) -> Budgets:
    """The same configuration for every head of the layers with full attention, ``full`` (None: all are); at 1, all dense.

    probe: for the metric that uses one; the budgets of a file that was calibrated for it carry one.

    Raises TcaError if the runtime does not know the metric.
    """
    keep_counts, row = powers_of_two(layout.block_size), uniform_config(keep, layout)
    heads = np.full((shape.n_layer, shape.n_head_kv), SLIDING, np.int32)
    heads[slice(None) if full is None else list(full)] = DENSE_HEAD if keep == 1 else 0
    fraction = 1.0 if keep == 1 else float(np.asarray(keep_counts) @ row) / layout.group_size
    budgets = Budgets(FORMAT_VERSION, layout.block_size, layout.group_size, layout.window, layout.sinks, metric, keep_counts,
                      row[None, :], heads, fraction, probe=probe)  # fmt: skip
    budgets.check()
    return budgets


def layout_of(budgets: Budgets | None) -> Layout:
    """The sizes of a file's budgets, or the default ones."""
    if budgets is None:
        return Layout()
    return Layout(budgets.block_size, budgets.group_size, budgets.window, budgets.sinks)


def make_policies(
    names: Sequence[str],
    keeps: Sequence[float],
    kv_type: str,
    shape: ModelShape,
    own: Budgets | None,
    calibrate: Callable[[str, float], Budgets] | None,
    full: Callable[[], Sequence[int] | None] = lambda: None,
) -> list[Policy]:
    """Every named policy at every kept fraction; those that have one of their own, once.

    own: budgets of the file. keeps: empty for the file's own fraction. calibrate(metric, keep): called for ``calibrated`` if
    fractions were asked for. kv_type: of the policies that evict. full(): the layers with full attention. Raises TcaError.
    """
    layout = layout_of(own)

    def uniform(name: str, keep: float) -> Policy:
        streams = name == streaming_llm.NAME
        budgets = uniform_budgets(shape, UNIFORM_METRIC if streams else name, keep, layout, full(), own.probe if own is not None else None)
        return Policy(name, kv_type, budgets, budgets if streams else None)

    once = [policy for name in names if (policy := fixed_policy(name, kv_type, shape, uniform)) is not None]
    others = [name for name in names if name not in DENSE_TYPES and not name.endswith(".gguf") and "@" not in name]
    if others and not keeps and own is None:
        raise TcaError("the file carries no budgets; run embed-budgets on it first, or give --keep or --uniform")
    policies = []
    for keep in keeps or ([Policy(CALIBRATED, kv_type, own).keep] if own is not None else []):
        for name in others:
            base, _, metric = name.partition(":")
            if base != CALIBRATED:
                policies.append(uniform(name, keep))
                continue
            if keeps and calibrate is not None:
                budgets = calibrate(metric or (own.metric if own is not None else DEFAULT_METRIC), keep)
            elif own is None or (metric and metric != own.metric):
                raise TcaError(f"{name} needs --keep: " + ("the file carries no budgets" if own is None else f"the file was calibrated for {own.metric}"))
            else:
                budgets = own
            policies.append(Policy(name, kv_type, budgets))
    # the stock caches last
    return policies + sorted(once, key=lambda policy: policy.budgets is None)


def fixed_policy(name: str, kv_type: str, shape: ModelShape, uniform: Callable[[str, float], Policy]) -> Policy | None:
    """A policy whose kept fraction does not follow from the options; None for the others. Raises TcaError."""
    if name in DENSE_TYPES:
        return Policy(name, DENSE_TYPES[name])
    if name.endswith(".gguf"):
        budgets = own_budgets(name) or read_budgets(name)
        if budgets is None:
            raise TcaError(f"{name} carries no budgets")
        if budgets.head_config.shape != (shape.n_layer, shape.n_head_kv):
            raise TcaError(f"{name} is another model: {budgets.n_layer} layers of {budgets.n_head_kv} KV heads, not {shape.n_layer} of {shape.n_head_kv}")
        return Policy(Path(name).stem, kv_type, budgets)
    metric, at, fraction = name.partition("@")
    if not at:
        return None
    try:
        keep = float(fraction)
    except ValueError:
        keep = 0.0
    if not 0 < keep <= 1:
        raise TcaError(f"policy {name}: what follows the @ must be a kept fraction above 0 and at most 1")
    return uniform(metric, keep)
