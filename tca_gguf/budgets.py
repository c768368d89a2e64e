"""Head budgets of a model: what the ``tca.*`` keys of a GGUF file say, as one value.

Words: a *budget* is the configuration of one KV head; a *configuration* says how many blocks of a group keep how many
tokens; the *kept fraction* is the share of the tokens of compacted groups that stay. Keys and rules: docs/gguf-keys.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 1
DENSE = -1  # value in head_config: the head keeps every token
SLIDING = -2  # its layer has sliding-window attention and is not in the ragged store (all heads of a layer or none)
F16 = 1  # ggml type id, the default of llama.cpp's KV cache


@dataclass(frozen=True)
class Calibration:
    """Where the budgets came from.

    tokens: tokens of the calibration text that were evaluated; text_sha256: hash of that text (UTF-8);
    target: the mean kept fraction asked for; seed: of the sampled queries and generated text;
    errors: float32 [n_layer, n_head_kv], mean relative error of each head's attention output under its budget;
    bounds: float32 [n_layer, n_head_kv], what dropped attention mass and value norms allow that error to be at most; None in
    files that do not say.
    """

    tokens: int
    text_sha256: str
    target: float
    seed: int
    errors: np.ndarray
    bounds: np.ndarray | None = None


@dataclass(frozen=True)
class Budgets:
    """Budgets of every KV head of one model.

    block_size: tokens in a block; group_size: tokens compacted together; window: newest tokens, never compacted;
    sinks: first tokens, never compacted; metric: name of the selection metric;
    keep_counts: the allowed numbers of kept tokens in a block, increasing;
    configs: int32 [n_configs, len(keep_counts)], blocks of a group that keep keep_counts[j], rows sum to group_size/block_size;
    head_config: int32 [n_layer, n_head_kv], row of configs, DENSE or SLIDING; kept_fraction: mean over
    the heads that are not SLIDING;
    enabled: whether the runtime uses the budgets when nothing overrides it;
    rollback: newest tokens that can always be taken back, also over a compaction; None: the runtime's default;
    probe: float32 [n_layer, n_head_kv, head_dim_k], the vector of each head that the metric "key-probe" multiplies keys with.
    """

    version: int
    block_size: int
    group_size: int
    window: int
    sinks: int
    metric: str
    keep_counts: tuple[int, ...]
    configs: np.ndarray
    head_config: np.ndarray
    kept_fraction: float
    enabled: bool = True
    calibration: Calibration | None = None
    probe: np.ndarray | None = None
    rollback: int | None = None

    @property
    def n_layer(self) -> int:
        return int(self.head_config.shape[0])

    @property
    def n_head_kv(self) -> int:
        return int(self.head_config.shape[1])

    def config_kept(self) -> np.ndarray:
        """int64 [n_configs]: tokens that one group leaves behind under each configuration."""
        return np.asarray(self.configs, np.int64) @ np.asarray(self.keep_counts, np.int64)

    def head_kept_fraction(self) -> np.ndarray:
        """float64 [n_layer, n_head_kv]: share of a compacted group that each head keeps: 1.0 if DENSE, NaN if SLIDING."""
        # the last entries answer SLIDING (-2) and DENSE (-1), which is how numpy reads negative indices
        per_config = np.append(self.config_kept() / self.group_size, [np.nan, 1.0])
        return per_config[np.asarray(self.head_config)]

    def stored_layers(self) -> list[int]:
        """Layers in the ragged store, all that have full attention."""
        return [layer for layer, heads in enumerate(self.head_config) if heads[0] != SLIDING]

    def check(self) -> None:
        """Checks every field and every sum just as the runtime does. Raises TcaError naming the key."""
        from . import native  # the compiled extension is loaded only where it is needed

        native.budgets_check(self)

    def kv_bytes(
        self, head_dim_k: int, head_dim_v: int, n_ctx: int, type_k: int = F16, type_v: int = F16
    ) -> tuple[int, int]:
        """Bytes of the KV cache of one sequence of ``n_ctx`` tokens: (ragged store, dense cache), without SLIDING layers."""
        from . import native

        return native.plan_bytes(self, head_dim_k, head_dim_v, type_k, type_v, n_ctx)
