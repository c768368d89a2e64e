"""The cffi declarations say all of tca.h, and native.py's own checks answer before the C API is asked for nonsense."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from gguf_samples import write_gguf
from tca_gguf import native
from tca_gguf.budgets import Budgets
from tca_gguf.errors import TcaError

ROOT = Path(__file__).resolve().parents[2]
HEADER = re.sub(r"//.*", "", (ROOT / "native" / "include" / "tca.h").read_text())
CDEF = re.sub(r"/\*.*?\*/", "", (ROOT / "tca_gguf" / "_ffi.cdef.txt").read_text(), flags=re.DOTALL)


def squeeze(text: str) -> str:
    """Declarations without the differences that say nothing."""
    return re.sub(r"\s*([*(),;{}])\s*", r"\1", " ".join(text.split()))


def test_every_function_is_declared_alike() -> None:
    functions = [squeeze(text) for text in re.findall(r"TCA_API\s+([^;{]+\));", HEADER)]
    assert len(functions) >= 18
    declared = squeeze(CDEF)
    for function in functions:
        assert f"{function};" in declared, function


def test_every_struct_field_is_declared() -> None:
    structs = re.findall(r"struct (tca_\w+) \{(.*?)\};", HEADER, re.DOTALL)
    assert {name for name, _ in structs} == {
        "tca_arch", "tca_budgets", "tca_context_info", "tca_group", "tca_layer_qkv", "tca_model_shape", "tca_rope",
    }
    for name, body in structs:
        declared = re.search(rf"struct {name} \{{(.*?)\.\.\.;", CDEF, re.DOTALL)
        assert declared is not None, name
        assert squeeze(body) == squeeze(declared[1]), name


def test_every_constant_is_declared() -> None:
    names = re.findall(r"^\s+(TCA_[A-Z0-9_]+)\s*=", HEADER, re.MULTILINE) + re.findall(r"[{,]\s*(TCA_[A-Z0-9_]+)\s*=", HEADER)
    assert len(set(names)) >= 15
    for name in set(names):
        assert re.search(rf"\b{name} = \.\.\.", CDEF), f"{name}: let the compiler fill it in"


# ---- native.py -------------------------------------------------------------------------------------------------------


def budgets(**changes: object) -> Budgets:
    """Two layers of two KV heads; blocks of 16, groups of 512, two configurations."""
    values: dict = dict(
        version=1, block_size=16, group_size=512, window=496, sinks=16, metric="key-diff", keep_counts=(1, 2, 4, 8, 16),
        configs=np.array([[32, 0, 0, 0, 0], [0, 0, 16, 0, 16]], np.int32),
        head_config=np.array([[0, 1], [1, -1]], np.int32), kept_fraction=0.5, enabled=True, calibration=None,
    )  # fmt: skip
    return Budgets(**{**values, **changes})


def test_build_info() -> None:
    info = native.build_info()
    assert set(info) == {"version", "upstream", "upstream_commit", "patch", "compiler", "simd", "cpu", "cuda"}
    assert info["upstream"].startswith("llama-cpp-python ")


def test_plan_figures_by_hand() -> None:
    b = budgets()
    native.budgets_check(b)
    assert [native.kept_per_group(b, config) for config in (0, 1, -1)] == [32, 16 * 4 + 16 * 16, 512]
    # group 0 goes once 16 + 496 + 512 tokens are there
    assert [native.plan_groups(b, n) for n in (0, 1023, 1024, 1535, 1536)] == [0, 0, 1, 1, 2]
    assert native.plan_length(b, 0, 0, 1023) == 1023 and native.plan_length(b, 0, 0, 1024) == 1024 - (512 - 32)
    assert native.plan_length(b, 1, 1, 4096) == 4096
    assert native.plan_capacity(b, 1, 1, 4096) == 4096 > native.plan_capacity(b, 0, 0, 4096)
    tca, dense = native.plan_bytes(b, 64, 64, 1, 1, 4096)
    assert dense == 4096 * 4 * (64 + 64) * 2 > tca


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": -1}, "tca.block_size is -1"),
        ({"window": 2**32}, "tca.window is 4294967296"),
        ({"sinks": "x"}, "tca.sinks is 'x'"),
        ({"keep_counts": (1, 2)}, "tca.configs has shape"),
        ({"configs": np.zeros(5, np.int32)}, "tca.configs has shape"),
        ({"configs": np.zeros((2, 5))}, "tca.configs holds float64"),
        ({"head_config": np.zeros(4, np.int32)}, "tca.head_config has shape"),
        ({"head_config": np.full((2, 2), 2**40)}, "tca.head_config holds a value that does not fit"),
        ({"head_config": np.full((2, 2), 2, np.int32)}, "tca.head_config"),
        ({"metric": "nothing"}, "tca.metric"),
        ({"version": 2}, "tca.version"),
    ],
)
def test_wrong_budgets_are_named(changes: dict, words: str) -> None:
    with pytest.raises(TcaError, match=re.escape(words)):
        native.budgets_check(budgets(**changes))


def test_file_check_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(TcaError, match="no such file"):
        native.file_check(tmp_path / "none.gguf")
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF nonsense")
    for none in (path, tmp_path, Path("/dev/null")):
        with pytest.raises(TcaError, match=re.escape(str(none))):
            native.file_check(none)
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(TcaError, match="bad.gguf"):
        native.file_check(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("block_count", 0, "block_count must be a number from 1 to 512"),
        ("block_count", 100000, "block_count must be a number from 1 to 512"),
        ("nextn_predict_layers", 9, "nextn_predict_layers"),
        ("expert_count", 5000, "expert_count"),
        ("expert_count", 4, "expert_used_count does not fit"),
        ("expert_used_count", 2, "expert_used_count does not fit"),
        ("rope.scaling.type", "sideways", "rope.scaling.type is not known"),
        ("attention.head_count", [4, 4], "head_count"),  # an array for three layers
        ("attention.head_count_kv", [2, 1, 2], "different numbers of KV heads"),
    ],
)
def test_shapes_of_hostile_files(tmp_path: Path, key: str, value: object, words: str) -> None:
    """What llama.cpp itself would stop at with an assertion is one line here."""
    keys = {"block_count": 3, "context_length": 512, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2,
            "attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip

    def file(name: str, keys: dict[str, object]) -> Path:
        kinds = {int: (GGUFValueType.UINT32,), float: (GGUFValueType.FLOAT32,), str: (GGUFValueType.STRING,), list: (GGUFValueType.ARRAY, GGUFValueType.UINT32)}
        return write_gguf(tmp_path / name, shape_keys=False, extra={f"llama.{k}": (v, *kinds[type(v)]) for k, v in keys.items()})

    assert native.file_shape(file("good.gguf", keys)).stored == (0, 1, 2)
    with pytest.raises(TcaError, match=words):
        native.file_shape(file("bad.gguf", {**keys, key: value}))


def test_an_unknown_architecture_is_shown_safely(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "odd\x1b[2J" + "x" * 100)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(native.Unsupported, match=r"architecture 'odd\?\[2Jx{25}' is not known"):
        native.file_shape(path)


def test_arguments_of_the_array_functions() -> None:
    keys, positions = np.zeros((32, 8), np.float32), np.arange(32)
    with pytest.raises(TcaError, match="impl is 'gpu'"):
        native.select(keys, positions, None, 16, [1, 16], [1, 1], impl="gpu")
    with pytest.raises(TcaError, match="positions"):
        native.select(keys, positions[:5], None, 16, [1, 16], [1, 1])
    with pytest.raises(TcaError, match="same length"):
        native.select(keys, positions, None, 16, [1, 16], [1])
    with pytest.raises(TcaError, match="rope.freqs has 1 entries"):
        native.select(keys, positions, native.Rope(2, 8, 1.0, np.ones(1, np.float32)), 16, [1, 16], [1, 1])
    q, k = np.zeros((1, 2, 32), np.float32), [np.zeros((4, 32), np.float16)]
    with pytest.raises(TcaError, match="v holds 192 bytes; 4 slots"):
        native.attention(q, k, [np.zeros((3, 32), np.float16)], 1, 1, [4], 32, 32, 1.0)
    with pytest.raises(TcaError, match="no ggml type"):
        native.attention(q, k, k, 999, 1, [4], 32, 32, 1.0)
    with pytest.raises(TcaError, match="blocks of 32"):
        native.row_bytes(8, 40)
    assert native.row_bytes(8, 64) == 68 and native.row_bytes(1, 64) == 128


def test_attention_and_selection_answer() -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(2, 4, 32)), rng.normal(size=(2, 7, 32)), rng.normal(size=(2, 7, 16))
    for impl in ("reference", "cpu"):
        out = native.attention(q, list(k), list(v), 0, 0, [7, 7], 32, 16, 0.2, impl=impl)
        for t in range(2):
            for h in range(4):
                n = 7 - 2 + t + 1
                s = np.exp(0.2 * k[h // 2, :n] @ q[t, h])
                np.testing.assert_allclose(out[t, h], s @ v[h // 2, :n] / s.sum(), rtol=2e-5, atol=2e-5)
        kept, scores = native.select(rng.normal(size=(32, 8)), np.arange(32), None, 16, [1, 16], [1, 1], impl=impl)
        assert len(kept) == 17 and scores.shape == (32,) and np.all(np.diff(kept) > 0)


def test_a_closed_context_is_refused() -> None:
    with pytest.raises(TcaError, match="context is closed"):
        native.context_info(0)


def test_capture_keeps_an_exception() -> None:
    def fail(layer: native.LayerQKV) -> None:
        raise KeyboardInterrupt

    capture = native.Capture(fail)
    assert capture.eval_ptr and capture.handle
    ffi, _ = native._extension()
    layer = ffi.new("struct tca_layer_qkv *", {"n_tokens": 1, "n_kv": 1, "n_head": 1, "n_head_kv": 1, "head_dim_k": 1, "head_dim_v": 1})
    layer.q = layer.k = layer.v = value = ffi.new("float[1]", [2.0])
    assert capture._on_layer(layer) is False and isinstance(capture.error, KeyboardInterrupt)
    seen = []
    assert native.Capture(lambda one: seen.append(one.q.copy()))._on_layer(layer) is True
    assert seen[0].shape == (1, 1, 1) and seen[0] == value[0]


def test_an_interrupt_outside_of_the_callback_is_kept_too(monkeypatch) -> None:
    capture = native.Capture(lambda layer: None)
    ffi, lib = native._extension()
    calls = []

    def interrupted(self: native.Capture, layer: object) -> bool:
        calls.append(layer)
        raise KeyboardInterrupt  # as the signal handler does between two steps of Python

    monkeypatch.setattr(native.Capture, "_on_layer", interrupted)
    layer = ffi.new("struct tca_layer_qkv *")
    assert lib.tca_gguf_on_layer(layer, capture._self) is False
    assert calls and isinstance(capture.error, KeyboardInterrupt)


def test_machine_limits() -> None:
    bandwidth, flops = native.machine_limits(1)
    assert 5e8 < bandwidth < 1e13 and 5e8 < flops < 1e13
    for n_threads in (0, -1, 1025):
        with pytest.raises(TcaError, match="n_threads"):
            native.machine_limits(n_threads)


def test_a_profile_without_a_pass_says_so() -> None:
    profile = native.Profile()
    profile.learn()
    with pytest.raises(TcaError, match="another graph"):
        profile.read()
