"""Budgets beside a real model: every way to the runtime takes them, split models and a made-up Ollama store among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from runtime_context import F16, Context, LoadError, make_budgets, same_positions, write_model
from tca_gguf import gguf_file, native

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TCA_BUDGETS", raising=False)
    return tmp_path


def split(source: Path, target: Path, n_tensors: int) -> Path:
    """The model in parts of ``n_tensors`` tensors; its first part."""
    reader = GGUFReader(source)
    arch = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, arch, split_max_tensors=n_tensors)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(target.parent.glob(f"{target.stem}-*-of-*.gguf"))


def positions_of(path: Path, ids: list[int]) -> list[np.ndarray]:
    with Context(path, type_k=F16, type_v=F16) as c:
        c.feed(ids)
        return c.positions() if c.info().active else []


def test_the_runtime_takes_what_lies_beside(stock_model: Path, folder: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder / "m.gguf"
    model.symlink_to(stock_model)
    one, two = make_budgets(model, seed=1), make_budgets(model, seed=2)
    gguf_file.embed_budgets(model, folder / "own.gguf", one)
    want = positions_of(folder / "own.gguf", ids)
    assert positions_of(model, ids) == []
    gguf_file.write_keys(model, folder / "m.tca.gguf", one)
    assert same_positions(positions_of(model, ids), want)
    (line,) = [line for line in Context.lines if "ragged KV cache on" in line]
    assert f"have budgets from {folder}/m.tca.gguf;" in line
    with Context(model, enabled=False) as c:
        assert not c.info().active
    # beside wins over the model's own keys, the variable over both
    gguf_file.write_keys(model, folder / "own.tca.gguf", two)
    other = positions_of(folder / "own.gguf", ids)
    assert not same_positions(other, want)
    gguf_file.write_keys(model, folder / "named.tca.gguf", one)
    monkeypatch.setenv("TCA_BUDGETS", str(folder / "named.tca.gguf"))
    assert same_positions(positions_of(folder / "own.gguf", ids), want)


def test_the_runtime_refuses_budgets_for_other_weights(stock_model: Path, folder: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder / "m.gguf"
    data = bytearray(stock_model.read_bytes())
    reader = gguf_file.open_header(stock_model)
    tensor = next(t for t in reader.tensors if t.name == "blk.3.attn_k.weight")
    at = tensor.data_offset + tensor.n_bytes // 2
    data[at : at + 4] = np.float32(0.5).tobytes()
    model.write_bytes(data)
    gguf_file.write_keys(stock_model, folder / "m.tca.gguf", make_budgets(stock_model))
    with pytest.raises(LoadError, match="m.tca.gguf was made for another model than .*m.gguf; run embed-budgets again, or delete it"):
        Context(model)
    os.replace(folder / "m.tca.gguf", folder / "named.tca.gguf")
    monkeypatch.setenv("TCA_BUDGETS", str(folder / "named.tca.gguf"))
    assert positions_of(model, ids) == [] and any("were made for another model" in line for line in Context.lines)


def test_split_models(stock_model: Path, folder: Path, ids: list[int]) -> None:
    first = split(stock_model, folder / "s.gguf", 20)
    assert native.file_identity(first) == native.file_identity(stock_model)
    gguf_file.write_keys(first, folder / "s.tca.gguf", make_budgets(first))
    gguf_file.embed_budgets(stock_model, folder / "own.gguf", make_budgets(stock_model))
    assert same_positions(positions_of(first, ids), positions_of(folder / "own.gguf", ids))


def call(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tca_gguf", *map(str, args)], capture_output=True, text=True, timeout=600, check=False,
                          env={**os.environ, **env})  # fmt: skip


def test_ollama_and_split_from_calibration_to_answer(smollm2: Path, folder: Path) -> None:
    """embed-budgets, inspect, generate, bench, llama.cpp's own program and strip-budgets by the names that people type."""
    plain = write_model(smollm2, folder / "plain.gguf", layers=2, tokenizer=True)
    store = folder / "ollama"
    digest = "sha256:" + "3c" * 32
    blob, manifest = store / "blobs" / digest.replace(":", "-"), store / "manifests/some.host/library/tiny/latest"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]}))
    plain.rename(blob)
    blob.chmod(0o444)
    first = split(blob, folder / "s.gguf", 8)
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))
    env = {"OLLAMA_MODELS": str(store)}
    for name, where in (("ollama:tiny", folder / "data/tca-gguf" / f"{native.file_identity(blob)}.tca.gguf"), (str(first), folder / "s.tca.gguf")):
        done = call("embed-budgets", name, "--tokens", "2048", "--json", **env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["written"] == str(where) and where.stat().st_size < 65536
        assert json.loads(call("inspect", name, "--json", **env).stdout)["source"] == str(where)
        text = "river and mill " * 700
        answer = call("generate", name, "-p", text, "-n", "4", "--raw", "--json", **env)
        assert answer.returncode == 0, answer.stderr
        stats = json.loads(answer.stdout)
        assert stats["tca"] and stats["kept_tokens_mean"] < 0.9 * stats["tokens"]
        bench = call("bench", name, "--depths", "512", "--repeat", "1", "-n", "2", "--json", **env)
        assert bench.returncode == 0 and json.loads(bench.stdout)["rows"], bench.stderr
        own = call("exec", "llama-completion", "-m", name, "-p", "Hello", "-n", "2", "-no-cnv", **env)
        assert own.returncode == 0 and f"have budgets from {where};" in own.stderr, own.stderr
        assert call("strip-budgets", name, **env).returncode == 0 and not where.exists()
    assert sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*")) == before
