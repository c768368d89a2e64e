"""What is refused when a model or a context is opened: each with a reason, none with a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from runtime_context import F16, Context, LoadError, make_budgets, write_model
from tca_gguf import gguf_file, native


def copy_with(source: Path, target: Path, changes: dict) -> Path:
    """The metadata of a file, with keys replaced by (value, type[, item type]) or removed by None, and its tensors."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name in changes:
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value[0], value[1], sub_type=value[2] if len(value) > 2 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def header(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Metadata of SmolLM2 with budgets and no tensors: what is refused is refused before any tensor is looked for."""
    folder = tmp_path_factory.mktemp("load")
    plain = write_model(smollm2, folder / "plain.gguf", tensors=False)
    gguf_file.embed_budgets(plain, folder / "header.gguf", make_budgets(smollm2))
    return folder / "header.gguf"


U32, I32, BOOL, STR, F32, ARRAY = (GGUFValueType[name] for name in ("UINT32", "INT32", "BOOL", "STRING", "FLOAT32", "ARRAY"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tca.version", (2, U32)),
        ("tca.version", None),
        ("tca.block_size", (0, U32)),
        ("tca.group_size", (65, U32)),
        ("tca.window", (0, U32)),
        ("tca.window", (4_000_000_000, U32)),
        ("tca.sinks", (4, I32)),
        ("tca.metric", ("nothing", STR)),
        ("tca.probe", ([0.5], ARRAY, F32)),
        ("tca.probe", ([0.5] * 90, ARRAY, F32)),  # one entry for each of the 30 x 3 heads, whose keys have 64
        ("tca.metric", (1.0, F32)),
        ("tca.keep_counts", ([0, 1, 2, 4, 8, 17], ARRAY, I32)),
        ("tca.configs", ([4, 0, 0, 0, 1], ARRAY, I32)),
        ("tca.head_config", ([0, 1], ARRAY, I32)),
        ("tca.enabled", (1, U32)),
    ],
)
def test_a_bad_key_is_named(header: Path, tmp_path: Path, key: str, value: tuple | None) -> None:
    path = copy_with(header, tmp_path / "bad.gguf", {key: value})
    with pytest.raises(LoadError, match=key.replace(".", r"\.")) as error:
        Context(path)
    assert "tca.enabled=bool:false" in str(error.value)  # and how to load it all the same
    with pytest.raises(LoadError, match="tensor .* not found"):  # gets as far as the tensors that this file lacks
        Context(path, enabled=False)


def test_a_bad_key_does_not_matter_when_off(stock_model: Path, tca_model: Path, tmp_path: Path, ids: list[int]) -> None:
    path = copy_with(tca_model, tmp_path / "bad.gguf", {"tca.configs": ([7], ARRAY, I32)})
    with pytest.raises(LoadError, match="tca.configs"):
        Context(path)
    with Context(path, enabled=False) as c, Context(stock_model) as stock:
        assert not c.info().active and np.array_equal(c.feed(ids[:50]), stock.feed(ids[:50]))


@pytest.mark.parametrize("enabled", [0, 1, "false"])
def test_an_override_of_another_type(tca_model: Path, enabled: int | str) -> None:
    with pytest.raises(LoadError, match="overridden with a bool"):
        Context(tca_model, enabled=enabled)


def test_on_without_budgets(stock_model: Path) -> None:
    with pytest.raises(LoadError, match="holds no budgets.*embed-budgets"):
        Context(stock_model, enabled=True)


@pytest.mark.parametrize("arch", ["mpt", "bloom", "mamba", "t5", "bert"])
def test_architectures_that_cannot(header: Path, tmp_path: Path, arch: str) -> None:
    path = write_model(header, tmp_path / f"{arch}.gguf", arch=arch, tensors=False)
    with pytest.raises(LoadError) as error:
        Context(path)
    text = str(error.value)
    assert "TCA cannot run this model" in text or "error loading model hyperparameters" in text, text
    if arch in ("mpt", "bloom"):
        assert "TCA cannot run this model" in text and "strip-budgets" in text, text


def test_contexts_that_cannot(tca_model: Path, ids: list[int]) -> None:
    with pytest.raises(LoadError, match="cache type"):
        Context(tca_model, type_k=F16, type_v=10, flash=1)  # q2_K: blocks of 256 do not fit a head of 64
    with Context(tca_model, n_ctx=512) as c:  # and the model can be used after a failure
        assert c.info().active and np.isfinite(c.feed(ids[:20])).all()


def test_the_log_says_which_cache(tca_model: Path, stock_model: Path) -> None:
    with Context(tca_model) as c:
        log = [line for line in "".join(Context.lines).splitlines() if "tca" in line and "MiB" in line]
        assert len(log) == 1, Context.lines  # once
        assert c.info().active
    with Context(tca_model, enabled=False) as c:
        assert "tca: off by override" in "".join(Context.lines) and not c.info().active
    with Context(stock_model) as c:
        assert "tca:" not in "".join(Context.lines)
        with pytest.raises(native.TcaError, match="stock KV cache"):
            c.sequence()


def test_file_check_agrees(header: Path, tca_model: Path, stock_model: Path, tmp_path: Path) -> None:
    assert native.file_check(tca_model) and not native.file_check(stock_model)
    off = tmp_path / "off.gguf"
    gguf_file.embed_budgets(stock_model, off, replace(make_budgets(stock_model), enabled=False))
    assert not native.file_check(off)
