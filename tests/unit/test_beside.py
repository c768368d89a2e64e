"""Files of keys: where they go, what the runtime takes, what inspect and strip-budgets make of them. No model is run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runner import run
from gguf import GGUFEndian, GGUFValueType, GGUFWriter
from gguf_samples import make_budgets, same_budgets, write_gguf

from tca_gguf import beside, gguf_file, native
from tca_gguf.errors import TcaError

HASH = "sha256-" + "0f" * 32


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TCA_BUDGETS", raising=False)
    return tmp_path


@pytest.fixture
def model() -> Path:
    return write_gguf(Path("m.gguf"))


def write_split(stem: str, n_tensors: int = 6) -> Path:
    """A split model of three parts; its first part."""
    writer = GGUFWriter(f"{stem}.gguf", "llama", split_max_tensors=n_tensors // 3)
    for key, value in {"block_count": 3, "context_length": 4096, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    for i in range(n_tensors):
        writer.add_tensor(f"blk.{(5 * i) % 7}.weight", np.random.default_rng(i).random((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(f"{stem}-00001-of-00003.gguf")


# ---- identity --------------------------------------------------------------------------------------------------------


def test_an_identity_is_that_of_the_weights(model: Path) -> None:
    identity = native.file_identity(model)
    assert len(identity) == 16 and int(identity, 16)
    gguf_file.embed_budgets(model, "with.gguf", make_budgets())
    write_gguf(Path("named.gguf"), extra={"general.name": ("x", GGUFValueType.STRING), "tokenizer.chat_template": ("y", GGUFValueType.STRING)})
    for same in ("with.gguf", "named.gguf"):
        assert native.file_identity(same) == identity
    write_gguf(Path("rope.gguf"), extra={"llama.rope.freq_base": (1e6, GGUFValueType.FLOAT32)})
    write_gguf(Path("none.gguf"), tensors=False)
    assert len({identity, native.file_identity("rope.gguf"), native.file_identity("none.gguf")}) == 3


def test_other_weights_have_another_identity() -> None:
    whole = write_split("w")
    before = native.file_identity(whole)
    second = Path("w-00002-of-00003.gguf")
    data, reader = bytearray(second.read_bytes()), gguf_file.open_header(second)
    middle = reader.tensors[0].data_offset + reader.tensors[0].n_bytes // 2
    data[middle] ^= 1
    second.write_bytes(data)
    assert native.file_identity(whole) != before
    second.write_bytes(data[:middle])
    with pytest.raises(TcaError, match="w-00002-of-00003.gguf (ends inside tensor|cannot be read)"):
        native.file_identity(whole)
    second.unlink()
    with pytest.raises(TcaError, match="w-00002-of-00003.gguf cannot be read; it is a part of this model"):
        native.file_identity(whole)


def test_a_merged_model_has_the_identity_of_its_parts() -> None:
    assert native.file_identity(write_split("w")) == native.file_identity(write_split("v"))
    writer = GGUFWriter("merged.gguf", "llama")
    for key, value in {"block_count": 3, "context_length": 4096, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    for i in range(6):
        writer.add_tensor(f"blk.{(5 * i) % 7}.weight", np.random.default_rng(i).random((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert native.file_identity("merged.gguf") == native.file_identity("w-00001-of-00003.gguf")


# ---- which budgets ---------------------------------------------------------------------------------------------------


def test_the_rule(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCA_BUDGETS, beside, the file's own keys, the user's folder: the first that is there."""
    user, near, named = folder / "data/tca-gguf" / f"{native.file_identity(model)}.tca.gguf", Path("m.tca.gguf"), folder / "named.tca.gguf"
    assert gguf_file.source_of(model) is None and native.file_check(model) is False and gguf_file.read_budgets(model) is None
    user.parent.mkdir(parents=True)

    def taken(seed: int, source: Path) -> None:
        assert gguf_file.source_of(model) == source == native.file_source(model) and native.file_check(model)
        assert same_budgets(gguf_file.read_budgets(model), make_budgets(seed))
        assert same_budgets(gguf_file.read_model(model)[1], make_budgets(seed))

    gguf_file.write_keys(model, user, make_budgets(1))
    taken(1, user)
    gguf_file.embed_budgets(model, model, make_budgets(2))
    taken(2, model)
    gguf_file.write_keys(model, near, make_budgets(3))
    taken(3, near)
    gguf_file.write_keys(model, named, make_budgets(4))
    monkeypatch.setenv("TCA_BUDGETS", str(named))
    taken(4, named)
    many = folder / "many"
    many.mkdir()
    monkeypatch.setenv("TCA_BUDGETS", str(many))
    taken(3, near)
    gguf_file.write_keys(model, many / user.name, make_budgets(5))
    taken(5, many / user.name)
    gguf_file.write_keys(model, many / near.name, make_budgets(6))
    taken(6, many / near.name)


def test_a_link_is_not_followed(model: Path, folder: Path) -> None:
    (folder / "blobs").mkdir()
    blob = folder / "blobs" / HASH
    model.rename(blob)
    model.symlink_to(blob)
    gguf_file.write_keys(model, "m.tca.gguf", make_budgets(1))
    assert gguf_file.source_of(model) == Path("m.tca.gguf") and gguf_file.source_of(blob) is None


def test_budgets_for_another_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_gguf(Path("other.gguf"), extra={"llama.rope.freq_base": (1e6, GGUFValueType.FLOAT32)})
    gguf_file.write_keys(other, "other.tca.gguf", make_budgets(1))
    monkeypatch.setenv("TCA_BUDGETS", "other.tca.gguf")  # one file for a process that may load several models
    assert gguf_file.source_of(model) is None and gguf_file.source_of(other) == Path("other.tca.gguf")
    monkeypatch.delenv("TCA_BUDGETS")
    os.replace("other.tca.gguf", "m.tca.gguf")
    result = run("inspect", str(model))
    assert result.exit_code == 1 and "m.tca.gguf was made for another model than m.gguf; run embed-budgets again, or delete it" in result.stderr


@pytest.mark.parametrize(("content", "text"), [(b"junk" * 9, "m.tca.gguf is not a readable GGUF file"), (None, "does not say which model its budgets are for")])
def test_a_file_beside_that_is_none(model: Path, content: bytes | None, text: str) -> None:
    if content is None:
        gguf_file.embed_budgets(model, "m.tca.gguf", make_budgets())
    else:
        Path("m.tca.gguf").write_bytes(content)
    for read in (lambda: native.file_check(model), lambda: gguf_file.read_budgets(model)):
        with pytest.raises(TcaError, match=text):
            read()


def test_a_variable_that_points_nowhere(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCA_BUDGETS", "nowhere.gguf")
    with pytest.raises(TcaError, match="TCA_BUDGETS is nowhere.gguf, which does not exist"):
        native.file_check(model)


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["key-diff", "key-probe"])
def test_keys_round_trip_in_kilobytes(model: Path, metric: str) -> None:
    before, budgets = model.read_bytes(), make_budgets(3, metric=metric)
    gguf_file.write_keys(model, "m.tca.gguf", budgets)
    assert same_budgets(gguf_file.own_budgets("m.tca.gguf"), budgets) and os.path.getsize("m.tca.gguf") < 8192
    assert model.read_bytes() == before
    assert replace(gguf_file.model_shape("m.tca.gguf"), name="m") == gguf_file.model_shape(model)


def test_budgets_that_do_not_fit_are_refused(model: Path) -> None:
    with pytest.raises(TcaError, match="budgets belong to the model they were calibrated on"):
        gguf_file.write_keys(model, "m.tca.gguf", make_budgets(n_layer=4))
    assert not Path("m.tca.gguf").exists()


def test_where_budgets_go(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, user = Path("m.tca.gguf"), folder / "data/tca-gguf"
    assert beside.place_for(model) == beside.Place(model, False)
    assert beside.place_for(model, beside=True) == beside.Place(near, True)
    assert beside.place_for(model, Path("x.gguf")) == beside.Place(Path("x.gguf"), False)
    assert beside.place_for(model, Path("x.tca.gguf")) == beside.Place(Path("x.tca.gguf"), True)
    with pytest.raises(TcaError, match="leave out --in-place"):
        beside.place_for(model, Path("x.tca.gguf"), False)

    model.chmod(0o444)
    assert beside.place_for(model) == beside.Place(near, True, "it is read-only")
    assert beside.place_for(model, beside=False) == beside.Place(model, False)
    model.chmod(0o644)
    monkeypatch.setattr(beside, "LARGE", 100)
    assert "larger than" in beside.place_for(model).why
    monkeypatch.setattr(beside, "LARGE", 1 << 30)
    near.touch()
    assert beside.place_for(model).path == near and "there already" in beside.place_for(model).why
    near.unlink()

    split = write_split("w")
    assert beside.place_for(split) == beside.Place(Path("w.tca.gguf"), True, "the model is split")
    with pytest.raises(TcaError, match="not the first part of a split model; give w-00001-of-00003.gguf"):
        beside.place_for(Path("w-00002-of-00003.gguf"))

    store = folder / "blobs"
    store.mkdir()
    blob = write_gguf(store / HASH)
    place = beside.place_for(blob)
    assert place.path == user / f"{native.file_identity(blob)}.tca.gguf" and "content-addressed" in place.why
    link = Path("link.gguf")
    link.symlink_to(blob)
    assert beside.place_for(link) == beside.Place(Path("link.tca.gguf"), True, "it is a link into a content-addressed store")
    monkeypatch.setattr(beside.os, "access", lambda *_: False)
    assert beside.place_for(link).path.parent == user
    monkeypatch.setattr(beside.native, "user_budgets", lambda: None)
    with pytest.raises(TcaError, match="name a file with -o and set TCA_BUDGETS"):
        beside.place_for(link)


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    from tca_gguf import calib, llama, logs

    monkeypatch.setattr(calib, "calibrate", lambda path, **_: make_budgets(5))
    monkeypatch.setattr(llama, "load", lambda: None)
    monkeypatch.setattr(logs, "take_over", lambda *_: None)


def test_embed_inspect_strip_beside(model: Path, calibrated: None) -> None:
    before = model.read_bytes()
    result = run("embed-budgets", str(model), "--beside")
    assert result.exit_code == 0 and "budgets written to m.tca.gguf" in result.stdout and result.stderr == ""
    assert "budgets from m.tca.gguf" in run("inspect", str(model)).stdout
    assert json.loads(run("inspect", str(model), "--json").stdout)["source"] == "m.tca.gguf"
    again = run("embed-budgets", str(model))
    assert "note: m.tca.gguf is there already and wins over keys in the model; the budgets go to m.tca.gguf" in again.stderr
    assert model.read_bytes() == before
    stripped = json.loads(run("strip-budgets", str(model), "--json").stdout)
    assert stripped == {"model": "m.gguf", "written": None, "stripped": True, "deleted": ["m.tca.gguf"]}
    assert model.read_bytes() == before and "m.gguf has no budgets" in run("strip-budgets", str(model)).stdout


def test_a_store_is_left_alone(folder: Path, calibrated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = folder / "ollama"
    (store / "blobs").mkdir(parents=True)
    manifest = store / "manifests/some.host/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": HASH.replace("-", ":")}
    manifest.write_text(json.dumps({"layers": [layer]}))
    blob = write_gguf(store / "blobs" / HASH)
    blob.chmod(0o444)
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    before = sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*"))

    result = run("embed-budgets", "ollama:tiny")
    user = folder / "data/tca-gguf" / f"{native.file_identity(blob)}.tca.gguf"
    assert result.exit_code == 0, result.output
    assert f"content-addressed store; the budgets go to {user}" in result.stderr and user.is_file()
    assert f"budgets from {user}" in "".join(run("inspect", "ollama:tiny").stdout.split("\n"))
    assert f"{user} deleted" in "".join(run("strip-budgets", "ollama:tiny").stdout.split("\n")) and not user.exists()
    assert sorted((path, path.stat().st_mtime_ns) for path in store.rglob("*")) == before


def test_split_models(calibrated: None) -> None:
    first = write_split("w")
    result = run("embed-budgets", str(first))
    assert result.exit_code == 0 and "note: the model is split; the budgets go to w.tca.gguf" in result.stderr
    assert "budgets from w.tca.gguf" in run("inspect", str(first)).stdout
    assert run("embed-budgets", str(first), "--in-place").exit_code == 1
    Path("w-00003-of-00003.gguf").unlink()
    missing = run("embed-budgets", str(first), "-o", "x.tca.gguf")
    assert missing.exit_code == 1 and "w-00003-of-00003.gguf" in missing.stderr


def test_big_endian_files_of_keys() -> None:
    """Such files are written and read by Python; the runtime of this machine refuses such models."""
    path = write_gguf(Path("big.gguf"), endian=GGUFEndian.BIG)
    with pytest.raises(TcaError, match="big.gguf"):
        gguf_file.write_keys(path, "big.tca.gguf", make_budgets())
