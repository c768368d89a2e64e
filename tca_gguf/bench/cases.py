"""What is measured side by side: the stock cache with and without flash attention, and the ragged store under some budgets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tca_gguf.budgets import DENSE as DENSE_HEAD
from tca_gguf.budgets import SLIDING, Budgets
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape, model_shape, read_model
from tca_gguf.loading import KV_TYPES, UBATCH, check_model

TESTS = ("prefill", "decode", "whole")
FILE, DENSE = "file", "dense"  # budgets by name; anything else is a kept fraction


DEPTHS = (4096, 16384)


def default_depths(trained: int) -> tuple[int, ...]:
    """DEPTHS, but none past the tokens that a model was ``trained`` for (0: unknown); a micro-batch is measured behind each."""
    last = max((trained - UBATCH) // UBATCH * UBATCH, UBATCH) if trained else DEPTHS[-1]
    return tuple(dict.fromkeys(min(depth, last) for depth in DEPTHS))


@dataclass(frozen=True)
class Settings:
    """What to measure. depths: any order, none: `default_depths`; repeat: measurements of prefill and decode at each depth; passes: fillings from an
    empty cache (tests "whole"); budgets: "file", "dense" (every head) or a kept fraction that all heads share; dense_kv: type
    of the stock cache to compare with, None: the same as the ragged store's; n_threads 0: all CPUs of the process."""

    depths: tuple[int, ...] = ()
    kv_types: tuple[str, ...] = ("f16",)
    repeat: int = 3
    n_gen: int = 32
    tests: tuple[str, ...] = ("prefill", "decode")
    flash_attn: str = "both"  # of the dense runs: "both", "on" or "off"
    n_threads: int = 0
    n_gpu_layers: int = 0
    budgets: tuple[str, ...] = (FILE,)
    dense_kv: str | None = None
    passes: int = 1


@dataclass(frozen=True)
class Case:
    """One context. budgets None: the stock cache."""

    kv_type: str
    flash: bool
    budgets: str | None = None

    @property
    def config(self) -> str:
        """Name in the results: "fa=0", "fa=1" or "tca"."""
        return f"fa={int(self.flash)}" if self.budgets is None else "tca"

    @property
    def label(self) -> str:
        return f"{self.config} {self.kv_type}" + (f", {words(self.budgets)}" if self.budgets not in (None, FILE) else "")


def words(budgets: str) -> str:
    """Budgets as a person calls them: "file", "dense budgets", "keep 0.25"."""
    return {FILE: "file", DENSE: "dense budgets"}.get(budgets, f"keep {budgets}")


def dense_configs(kv_type: str, flash_attn: str) -> list[Case]:
    """The dense runs. A quantized V cache needs flash attention."""
    cases = [Case(kv_type, False)] if kv_type == "f16" and flash_attn != "on" else []
    if flash_attn != "off":
        cases.append(Case(kv_type, True))
    if not cases:
        raise TcaError(f"--fa off: the stock cache holds {kv_type} only with flash attention; use --fa on or --kv-type f16")
    return cases


def groups(settings: Settings) -> list[list[Case]]:
    """Cases that are measured in alternation; at least one of each group is dense, and it stands first."""

    def ragged(kv_types: Sequence[str]) -> list[Case]:
        return [Case(kv_type, True, budgets) for kv_type in kv_types for budgets in settings.budgets]

    if settings.dense_kv is not None:
        return [[*dense_configs(settings.dense_kv, settings.flash_attn), *ragged(settings.kv_types)]]
    return [[*dense_configs(kv_type, settings.flash_attn), *ragged([kv_type])] for kv_type in settings.kv_types]


def uniform(shape: ModelShape, keep: float | None, own: Budgets | None = None) -> Budgets:
    """Every head under the same configuration, that of `eval`'s uniform policies; keep None: every head dense.

    own: the file's budgets, whose layout, metric, probe and sliding-window layers are taken over.
    """
    from tca_gguf.eval.policies import UNIFORM_METRIC, layout_of, uniform_budgets

    full = own.stored_layers() if own else None
    budgets = uniform_budgets(shape, own.metric if own else UNIFORM_METRIC, keep or 1.0, layout_of(own), full, own.probe if own else None)
    if keep is None:
        heads = np.where(budgets.head_config == SLIDING, SLIDING, DENSE_HEAD).astype(np.int32)
        budgets = replace(budgets, head_config=heads, kept_fraction=1.0)
    return budgets


def resolve(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Budgets]:
    """The budgets that the names stand for. TcaError: "file" and the file carries none that are enabled."""
    enabled = check_model(path)
    shape, own = read_model(path) if enabled else (model_shape(path), None)
    result = {}
    for name in names:
        if name == FILE:
            if own is None:
                raise TcaError(f"{path} carries no enabled budgets to measure; run embed-budgets first, or use --budgets 0.39")
            result[name] = own
        else:
            result[name] = uniform(shape, None if name == DENSE else float(name), own)
    return result


def ggml_type(kv_type: str) -> int:
    return KV_TYPES[kv_type]
