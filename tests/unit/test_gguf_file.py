"""Reading, embedding and stripping budgets, on tiny generated files."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFValueType
from gguf_samples import EVERY_TYPE, HEAD_DIM, N_HEAD_KV, N_LAYER, make_budgets, same_budgets, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tca_gguf import gguf_file
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import embed_budgets, model_shape, open_header, read_budgets, strip_budgets

U32, I32, F32, STR, ARRAY = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
)


def contents(path: Path) -> dict:
    """Everything the stock reader sees of a file: {key: (types, value)}, {tensor: (type, shape, bytes)}."""
    reader = GGUFReader(path)
    keys = {
        name: ([t.name for t in f.types], f.contents()) for name, f in reader.fields.items() if not name.startswith("GGUF.")
    }
    tensors = {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes(), t.data_offset % reader.alignment) for t in reader.tensors}
    return {"keys": keys, "order": list(keys), "tensors": tensors}


@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
@pytest.mark.parametrize("alignment", [32, 8, 64, 4096])
@pytest.mark.parametrize("tensors", [True, False])
def test_embed_changes_only_its_keys_and_strip_gives_back_the_file(tmp_path, endian, alignment, tensors):
    path = write_gguf(tmp_path / "m.gguf", extra=EVERY_TYPE, alignment=alignment, endian=endian, tensors=tensors)
    original, before = path.read_bytes(), contents(path)
    budgets = make_budgets()

    embed_budgets(path, tmp_path / "out.gguf", budgets)
    assert path.read_bytes() == original
    after = contents(tmp_path / "out.gguf")
    assert {k: v for k, v in after["keys"].items() if not k.startswith("tca.")} == before["keys"]
    assert after["order"][: len(before["order"])] == before["order"]
    assert after["tensors"] == before["tensors"]
    assert all(offset == 0 for *_, offset in after["tensors"].values())
    assert same_budgets(read_budgets(tmp_path / "out.gguf"), budgets)

    embed_budgets(path, path, budgets)
    assert path.read_bytes() == (tmp_path / "out.gguf").read_bytes()
    assert strip_budgets(path, path) is True
    assert path.read_bytes() == original
    assert strip_budgets(path, path) is False
    assert os.listdir(tmp_path) and not [n for n in os.listdir(tmp_path) if n.endswith(".tmp")]


def test_key_types_are_those_of_the_format(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    embed_budgets(path, path, make_budgets())
    types = {k: tuple(t) for k, (t, _) in contents(path)["keys"].items() if k.startswith("tca.")}
    assert types == {
        "tca.version": ("UINT32",),
        "tca.enabled": ("BOOL",),
        "tca.block_size": ("UINT32",),
        "tca.group_size": ("UINT32",),
        "tca.window": ("UINT32",),
        "tca.sinks": ("UINT32",),
        "tca.metric": ("STRING",),
        "tca.keep_counts": ("ARRAY", "INT32"),
        "tca.configs": ("ARRAY", "INT32"),
        "tca.head_config": ("ARRAY", "INT32"),
        "tca.kept_fraction": ("FLOAT32",),
        "tca.calibration.tokens": ("UINT32",),
        "tca.calibration.text_sha256": ("STRING",),
        "tca.calibration.target": ("FLOAT32",),
        "tca.calibration.seed": ("UINT32",),
        "tca.calibration.error": ("ARRAY", "FLOAT32"),
        "tca.calibration.bound": ("ARRAY", "FLOAT32"),
    }


def test_a_probe_and_blocks_that_keep_nothing_survive(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    original = path.read_bytes()
    embed_budgets(path, path, make_budgets(4, metric="key-probe"))
    found = read_budgets(path)
    assert same_budgets(found, make_budgets(4, metric="key-probe"))
    assert found.keep_counts[0] == 0 and found.head_kept_fraction().min() == 0  # a head may keep nothing of a group
    assert strip_budgets(path, path) and path.read_bytes() == original


def test_embedding_again_replaces_every_key(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", extra={"tca.left_over": (3, U32)})
    embed_budgets(path, path, make_budgets(1))
    second = make_budgets(2, calibrated=False)
    embed_budgets(path, path, second)
    assert same_budgets(read_budgets(path), second)
    assert not [k for k in contents(path)["keys"] if k.startswith("tca.calibration") or k == "tca.left_over"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_keys_survives(tmp_path, data):
    integer = {GGUFValueType.UINT8: 8, GGUFValueType.UINT16: 16, U32: 32, GGUFValueType.UINT64: 64}

    def value():
        kind = data.draw(st.sampled_from(["int", "float", "text", "texts", "ints"]))
        if kind == "int":
            vtype = data.draw(st.sampled_from(list(integer)))
            return data.draw(st.integers(0, 2 ** integer[vtype] - 1)), vtype
        if kind == "float":
            return data.draw(st.floats(width=32, allow_nan=False)), F32
        if kind == "text":
            return data.draw(st.text(max_size=80)), STR
        if kind == "texts":
            return data.draw(st.lists(st.text(max_size=20), min_size=1, max_size=30)), ARRAY, STR
        return data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30)), ARRAY, I32

    keys = data.draw(st.lists(st.text("abcz._0", min_size=1, max_size=40), unique=True, max_size=12))
    extra = {f"k.{key}": value() for key in keys}
    alignment = data.draw(st.sampled_from([8, 32, 128]))
    path = write_gguf(tmp_path / "m.gguf", extra=extra, alignment=alignment)
    original, before = path.read_bytes(), contents(path)
    embed_budgets(path, path, make_budgets(data.draw(st.integers(0, 1000))))
    after = contents(path)
    assert {k: v for k, v in after["keys"].items() if not k.startswith("tca.")} == before["keys"]
    assert after["tensors"] == before["tensors"]
    strip_budgets(path, path)
    assert path.read_bytes() == original


def test_shape_of_the_model(tmp_path):
    shape = model_shape(write_gguf(tmp_path / "m.gguf"))
    assert (shape.arch, shape.n_layer, shape.n_head, shape.n_head_kv, shape.head_dim_k) == ("llama", N_LAYER, 4, N_HEAD_KV, 8)
    assert (shape.n_ctx_train, shape.name) == (4096, "m")
    extra = {
        "llama.attention.key_length": (24, U32),
        "llama.attention.value_length": (16, U32),
        "general.name": ("Tiny\x1b[31m", STR),
    }
    shape = model_shape(write_gguf(tmp_path / "n.gguf", extra=extra))
    assert (shape.head_dim_k, shape.head_dim_v, shape.name) == (24, 16, "Tiny?[31m")


def test_head_counts_per_layer(tmp_path):
    same = {"llama.attention.head_count_kv": ([2] * N_LAYER, ARRAY, I32)}
    assert model_shape(write_gguf(tmp_path / "same.gguf", extra=same)).n_head_kv == 2
    mixed = write_gguf(tmp_path / "mixed.gguf", extra={"llama.attention.head_count_kv": ([2, 1, 2], ARRAY, I32)})
    with pytest.raises(TcaError, match=r"head_count_kv differs between layers"):
        model_shape(mixed)
    assert read_budgets(mixed) is None  # no budgets, so nothing to refuse


def good_keys() -> dict[str, tuple]:
    b = make_budgets()
    return {
        "tca.version": (1, U32),
        "tca.enabled": (True, GGUFValueType.BOOL),
        "tca.block_size": (b.block_size, U32),
        "tca.group_size": (b.group_size, U32),
        "tca.window": (b.window, U32),
        "tca.sinks": (b.sinks, U32),
        "tca.metric": (b.metric, STR),
        "tca.keep_counts": (list(b.keep_counts), ARRAY, I32),
        "tca.configs": (b.configs.ravel().tolist(), ARRAY, I32),
        "tca.head_config": (b.head_config.ravel().tolist(), ARRAY, I32),
        "tca.kept_fraction": (b.kept_fraction, F32),
        "tca.calibration.tokens": (10, U32),
        "tca.calibration.text_sha256": ("00" * 32, STR),
        "tca.calibration.target": (0.39, F32),
        "tca.calibration.seed": (0, U32),
        "tca.calibration.error": ([0.0] * (N_LAYER * N_HEAD_KV), ARRAY, F32),
        "tca.calibration.bound": ([1.0] * (N_LAYER * N_HEAD_KV), ARRAY, F32),
    }


def test_the_good_keys_are_good(tmp_path):
    assert read_budgets(write_gguf(tmp_path / "m.gguf", extra=good_keys())).n_layer == N_LAYER
    keys = good_keys()
    del keys["tca.enabled"], keys["tca.calibration.bound"]
    budgets = read_budgets(write_gguf(tmp_path / "n.gguf", extra=keys))
    assert budgets.enabled is True and budgets.calibration.bounds is None


HOSTILE = [
    ("tca.version", None),
    ("tca.version", (2, U32)),
    ("tca.version", (1, I32)),
    ("tca.version", (1, GGUFValueType.UINT64)),
    ("tca.enabled", (1, U32)),
    ("tca.enabled", ("true", STR)),
    ("tca.block_size", None),
    ("tca.block_size", (0, U32)),
    ("tca.block_size", (3, U32)),
    ("tca.block_size", (1 << 31, U32)),
    ("tca.block_size", (16.0, F32)),
    ("tca.group_size", None),
    ("tca.group_size", (0, U32)),
    ("tca.group_size", (500, U32)),
    ("tca.group_size", (0xFFFFFFF0, U32)),
    ("tca.group_size", ([512], ARRAY, U32)),
    ("tca.window", None),
    ("tca.window", (0, U32)),
    ("tca.window", (0xFFFFFFFF, U32)),
    ("tca.window", ("496", STR)),
    ("tca.sinks", None),
    ("tca.sinks", (0xFFFFFFFF, U32)),
    ("tca.sinks", (16, GGUFValueType.UINT16)),
    ("tca.metric", None),
    ("tca.metric", (7, U32)),
    ("tca.metric", ("no-such\x1b[2J" + "x" * 5000, STR)),
    ("tca.metric", (b"\xff\xfe", STR)),
    ("tca.keep_counts", None),
    ("tca.keep_counts", ([1, 2, 4, 8, 17], ARRAY, I32)),
    ("tca.keep_counts", ([1, 2, 2, 8, 16], ARRAY, I32)),
    ("tca.keep_counts", ([-1, 2, 4, 8, 16], ARRAY, I32)),
    ("tca.keep_counts", ([1, 2, 4, 8, 16], ARRAY, U32)),
    ("tca.keep_counts", ([1], ARRAY, I32)),
    ("tca.keep_counts", (1, I32)),
    ("tca.configs", None),
    ("tca.configs", ([32, 0, 0, 0], ARRAY, I32)),
    ("tca.configs", ([33, -1, 0, 0, 0] * 4, ARRAY, I32)),
    ("tca.configs", ([31, 0, 0, 0, 0] * 4, ARRAY, I32)),
    ("tca.configs", ([2**31 - 1, 2**31 - 1, 34, 0, 0] * 4, ARRAY, I32)),
    ("tca.configs", ([32.0, 0.0, 0.0, 0.0, 0.0] * 4, ARRAY, F32)),
    ("tca.configs", (["32"] * 20, ARRAY, STR)),
    ("tca.configs", ([32, 0, 0, 0, 0] * 5000, ARRAY, I32)),
    ("tca.head_config", None),
    ("tca.head_config", ([0] * (N_LAYER * N_HEAD_KV - 1), ARRAY, I32)),
    ("tca.head_config", ([0] * (N_LAYER * N_HEAD_KV + 1), ARRAY, I32)),
    ("tca.head_config", ([4] + [0] * (N_LAYER * N_HEAD_KV - 1), ARRAY, I32)),
    ("tca.head_config", ([-2] + [0] * (N_LAYER * N_HEAD_KV - 1), ARRAY, I32)),
    ("tca.head_config", ([0] * (N_LAYER * N_HEAD_KV), ARRAY, GGUFValueType.INT64)),
    ("tca.head_config", ([[0, 0]] * N_LAYER, ARRAY, ARRAY)),
    ("tca.probe", (1.0, F32)),
    ("tca.probe", ([1] * (N_LAYER * N_HEAD_KV * HEAD_DIM), ARRAY, I32)),
    ("tca.probe", ([1.0] * (N_LAYER * N_HEAD_KV * HEAD_DIM - 1), ARRAY, F32)),
    ("tca.probe", ([float("nan")] * (N_LAYER * N_HEAD_KV * HEAD_DIM), ARRAY, F32)),
    ("tca.kept_fraction", (-0.1, F32)),
    ("tca.kept_fraction", (1.1, F32)),
    ("tca.kept_fraction", (float("nan"), F32)),
    ("tca.kept_fraction", (0.5, GGUFValueType.FLOAT64)),
    ("tca.calibration.tokens", None),
    ("tca.calibration.tokens", (-1, I32)),
    ("tca.calibration.text_sha256", None),
    ("tca.calibration.target", (float("inf"), F32)),
    ("tca.calibration.seed", ("x", STR)),
    ("tca.calibration.error", None),
    ("tca.calibration.error", ([0.1], ARRAY, F32)),
    ("tca.calibration.error", ([float("nan")] * (N_LAYER * N_HEAD_KV), ARRAY, F32)),
    ("tca.calibration.bound", ([0.1], ARRAY, F32)),
    ("tca.calibration.bound", ([1] * (N_LAYER * N_HEAD_KV), ARRAY, I32)),
    ("tca.calibration.bound", ([float("inf")] * (N_LAYER * N_HEAD_KV), ARRAY, F32)),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=lambda v: str(v)[:48])
def test_a_bad_key_is_one_error_that_names_it(tmp_path, key, value):
    keys = good_keys()
    keys.pop(key) if value is None else keys.update({key: value})
    path = write_gguf(tmp_path / "m.gguf", extra=keys)
    with pytest.raises(TcaError) as caught:
        read_budgets(path)
    text = str(caught.value)
    related = {"tca.block_size": ("tca.group_size", "tca.keep_counts", "tca.configs"), "tca.keep_counts": ("tca.configs",)}
    assert any(name in text for name in (key, *related.get(key, ()))), text
    assert text.isprintable() and len(text) < 600
    # whatever is wrong with them, the keys can be taken out again
    assert strip_budgets(path, path) is True
    assert read_budgets(path) is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: p.write_bytes(b""), "not a readable GGUF file"),
        (lambda p: p.write_bytes(b"GGUF"), "not a readable GGUF file"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + b"x" * 100), "magic"),
        (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60)), "not a readable GGUF file"),
        (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0)), "version 99"),
        (lambda p: p.mkdir(), "is a directory"),
        (lambda p: None, "does not exist"),
    ],
)
def test_files_that_are_no_gguf(tmp_path, make, text):
    path = tmp_path / "m.gguf"
    make(path)
    for call in (read_budgets, model_shape, lambda p: strip_budgets(p, p), lambda p: embed_budgets(p, p, make_budgets())):
        with pytest.raises(TcaError, match=text):
            call(path)


def test_array_lengths_beyond_the_file(tmp_path):
    for item_type in range(0, 14):
        for length in (1 << 60, (1 << 64) - 1, 1 << 24, 50):
            key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, item_type, length)
            path = tmp_path / "m.gguf"
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + b"\0" * 40)
            with pytest.raises(TcaError):
                read_budgets(path)


def test_mutated_files_give_an_error_or_budgets(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", extra=good_keys())
    good, header = path.read_bytes(), gguf_file.open_header(path).data_offset
    rng = np.random.default_rng(20)
    read = refused = 0
    for _ in range(1500):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, header))
            raw[at : at + 8] = rng.bytes(int(rng.integers(1, 9))) if rng.random() < 0.7 else b"\xff" * 8
        if rng.random() < 0.2:
            del raw[int(rng.integers(0, len(raw))) :]
        path.write_bytes(raw)
        try:
            read_budgets(path)
            read += 1
        except TcaError as error:
            assert "\n" not in str(error)
            refused += 1
    assert read and refused


def test_budgets_of_another_model_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    original = path.read_bytes()
    with pytest.raises(TcaError, match="2 x 2.*3 layers of 2 KV heads"):
        embed_budgets(path, path, make_budgets(n_layer=2))
    assert path.read_bytes() == original


def test_split_files_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", extra={"split.count": (3, GGUFValueType.UINT16)})
    for call in (lambda: embed_budgets(path, path, make_budgets()), lambda: strip_budgets(path, path)):
        with pytest.raises(TcaError, match="split GGUF.*--merge"):
            call()
    for harmless in (0, 1):
        path = write_gguf(tmp_path / "one.gguf", extra={"split.count": (harmless, GGUFValueType.UINT16)})
        embed_budgets(path, path, make_budgets())


def test_progress_reaches_the_end(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    seen = []
    embed_budgets(path, path, make_budgets(), progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0


def test_head_kept_fraction_by_hand():
    budgets = make_budgets()
    per_config = [32 / 512, (16 + 16 + 16 + 16 + 32) / 512, (16 + 32 + 64 + 128) / 512, 1.0]
    expected = [[1.0 if c == -1 else per_config[c] for c in row] for row in budgets.head_config.tolist()]
    assert np.allclose(budgets.head_kept_fraction(), expected)


def test_all_heads_dense_without_any_configuration(tmp_path):
    path, budgets = write_gguf(tmp_path / "m.gguf"), make_budgets()
    dense = np.full_like(budgets.head_config, -1)
    embed_budgets(path, path, replace(budgets, configs=np.zeros((0, 5), np.int32), head_config=dense))
    assert (read_budgets(path).head_kept_fraction() == 1.0).all()


def test_embedding_rejects_invalid_budgets_before_touching_anything(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    original = path.read_bytes()
    for bad in (replace(make_budgets(), metric="nope"), replace(make_budgets(), configs=np.full((4, 5), 9, np.int32))):
        with pytest.raises(TcaError, match=r"tca\."):
            embed_budgets(path, path, bad)
    assert path.read_bytes() == original and os.listdir(tmp_path) == ["m.gguf"]


def test_a_file_that_does_not_say_what_it_keeps_is_read(tmp_path):
    """tca.kept_fraction is information: the runtime does not look at it."""
    path, budgets = write_gguf(tmp_path / "m.gguf"), make_budgets()
    embed_budgets(path, path, budgets)
    reader = open_header(path)
    whole, field = path.read_bytes(), reader.get_field("tca.kept_fraction")
    start, end = field.offset, field.offset + sum(int(part.nbytes) for part in field.parts)
    count = int.from_bytes(whole[16:24], "little") - 1
    header = whole[:16] + count.to_bytes(8, "little") + whole[24:start] + whole[end : reader.data_offset]
    path.write_bytes(header + bytes(-len(header) % 32) + whole[reader.data_offset :])
    found = read_budgets(path)
    assert found.kept_fraction == pytest.approx(float(np.nanmean(budgets.head_kept_fraction())))
