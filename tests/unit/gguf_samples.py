"""Tiny GGUF files and budgets for tests; no model behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter

from tca_gguf.budgets import Budgets, Calibration

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM = 3, 4, 2, 8


def make_budgets(seed: int = 0, n_layer: int = N_LAYER, n_head_kv: int = N_HEAD_KV, calibrated: bool = True, metric: str = "key-diff") -> Budgets:
    """metric "key-probe": with a probe and, as calibration makes them by default, with blocks that keep nothing, in the first head all of them."""
    rng = np.random.default_rng(seed)
    keep_counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    configs = np.array([[32, 0, 0, 0, 0], [16, 8, 4, 2, 2], [0, 8, 8, 8, 8], [0, 0, 0, 0, 32]], np.int32)
    if metric == "key-probe":
        keep_counts = (0, *keep_counts)
        configs = np.array([[32, 0, 0, 0, 0, 0], [20, 4, 3, 2, 2, 1], [0, 0, 8, 8, 8, 8]], np.int32)
    head_config = rng.integers(-1, len(configs), (n_layer, n_head_kv), dtype=np.int32)
    if metric == "key-probe":
        head_config[0, 0] = 0
    errors = rng.random((n_layer, n_head_kv)).astype(np.float32)
    calibration = Calibration(6000, "ab" * 32, float(np.float32(0.39)), seed, errors, 4 * errors) if calibrated else None
    budgets = Budgets(1, 16, 512, 496, 16, "key-diff", keep_counts, configs, head_config, 0.0, True, calibration)
    kept = float(np.float32(budgets.head_kept_fraction().mean()))
    probe = rng.standard_normal((n_layer, n_head_kv, HEAD_DIM)).astype(np.float32) if metric == "key-probe" else None
    return Budgets(1, 16, 512, 496, 16, metric, keep_counts, configs, head_config, kept, True, calibration, probe)


def same_budgets(a: Budgets, b: Budgets) -> bool:
    scalars = ("version", "block_size", "group_size", "window", "sinks", "metric", "keep_counts", "kept_fraction", "enabled")
    if any(getattr(a, name) != getattr(b, name) for name in scalars):
        return False
    if not (np.array_equal(a.configs, b.configs) and np.array_equal(a.head_config, b.head_config)):
        return False
    if (a.probe is None) != (b.probe is None) or (a.probe is not None and not np.array_equal(a.probe, b.probe)):
        return False
    if (a.calibration is None) != (b.calibration is None):
        return False
    if a.calibration is None:
        return True
    one, two = a.calibration, b.calibration
    return (one.tokens, one.text_sha256, one.target, one.seed) == (two.tokens, two.text_sha256, two.target, two.seed) and bool(
        np.array_equal(one.errors, two.errors) and np.array_equal(one.bounds, two.bounds)
    )


def write_gguf(
    path: Path,
    *,
    extra: dict[str, tuple] | None = None,
    alignment: int = 32,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    tensors: bool = True,
    shape_keys: bool = True,
) -> Path:
    """A small llama-like file; ``extra`` maps keys to (value, type[, item type])."""
    writer = GGUFWriter(path, "llama", endianess=endian)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    if shape_keys:
        writer.add_uint32("llama.block_count", N_LAYER)
        writer.add_uint32("llama.context_length", 4096)
        writer.add_uint32("llama.embedding_length", N_HEAD * HEAD_DIM)
        writer.add_uint32("llama.attention.head_count", N_HEAD)
        writer.add_uint32("llama.attention.head_count_kv", N_HEAD_KV)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "näh", "x" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 3.5])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, *value)
    rng = np.random.default_rng(1)
    if tensors:
        writer.add_tensor("token_embd.weight", rng.random((5, 32), dtype=np.float32))
        writer.add_tensor("blk.0.odd", rng.integers(-9, 9, 7, dtype=np.int8))
        raw = rng.integers(0, 255, (4, 34 * 2), dtype=np.uint8)
        writer.add_tensor("blk.0.q8", raw, raw_dtype=GGMLQuantizationType.Q8_0)
        writer.add_tensor("output.weight", rng.random((3, 5)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EVERY_TYPE = {
    "x.u8": (200, GGUFValueType.UINT8),
    "x.i8": (-100, GGUFValueType.INT8),
    "x.u16": (60000, GGUFValueType.UINT16),
    "x.i16": (-30000, GGUFValueType.INT16),
    "x.u32": (4_000_000_000, GGUFValueType.UINT32),
    "x.i32": (-2_000_000_000, GGUFValueType.INT32),
    "x.u64": (1 << 63, GGUFValueType.UINT64),
    "x.i64": (-(1 << 62), GGUFValueType.INT64),
    "x.f32": (1.5, GGUFValueType.FLOAT32),
    "x.f64": (0.1, GGUFValueType.FLOAT64),
    "x.bool": (True, GGUFValueType.BOOL),
    "x.str": ("line\nbreak \u00fc", GGUFValueType.STRING),
    "x.empty": ("", GGUFValueType.STRING),
    "x.a.u8": ([1, 2, 255], GGUFValueType.ARRAY, GGUFValueType.UINT8),
    "x.a.i64": ([-1, 1 << 40], GGUFValueType.ARRAY, GGUFValueType.INT64),
    "x.a.f64": ([0.1, 0.2], GGUFValueType.ARRAY, GGUFValueType.FLOAT64),
    "x.a.bool": ([True, False, True], GGUFValueType.ARRAY, GGUFValueType.BOOL),
    "x.a.str": (["", "a", "\u20ac" * 50], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "x.a.nested": ([[1, 2], [3, 4, 5]], GGUFValueType.ARRAY, GGUFValueType.ARRAY),
}
