"""Models by name: a made-up Ollama store and a made-up Hugging Face cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tca_gguf import names
from tca_gguf.errors import TcaError

DIGEST = "sha256:" + "5a" * 32


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store = tmp_path / "models"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / DIGEST.replace(":", "-")).write_bytes(b"GGUF")
    model = {"mediaType": names.MODEL_LAYER, "digest": DIGEST}
    manifests = {"some.host/library/tiny/latest": [{"mediaType": "x/template", "digest": "sha256:" + "00" * 32}, model],
                 "some.host/library/tiny/0.5b": [model], "some.host/ann/own/v1": [model], "other.host/org/repo/Q4_K_M": [model],
                 "some.host/library/gone/latest": [{**model, "digest": "sha256:" + "11" * 32}], "some.host/library/cloud/latest": [],
                 "some.host/library/evil/latest": [{**model, "digest": "sha256:../../x"}]}  # fmt: skip
    for path, layers in manifests.items():
        (store / "manifests" / path).parent.mkdir(parents=True, exist_ok=True)
        (store / "manifests" / path).write_text(json.dumps({"layers": layers}))
    (store / "manifests/some.host/library/torn").mkdir()
    (store / "manifests/some.host/library/torn/latest").write_text("{")
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    return store


@pytest.mark.parametrize("name", ["tiny", "tiny:latest", "tiny:0.5b", "ann/own:v1", "other.host/org/repo:Q4_K_M", "library/tiny"])
def test_ollama(ollama: Path, name: str) -> None:
    assert names.resolve(f"ollama:{name}") == ollama / "blobs" / DIGEST.replace(":", "-")


@pytest.mark.parametrize(("name", "text"), [
    ("none", "ollama:none is not in .*models; there are: .*tiny:0.5b"), ("tiny:7b", "there are: "), ("gone", "is missing; run: ollama pull gone"),
    ("cloud", "names no GGUF file"), ("evil", "names no GGUF file"), ("torn", "names no GGUF file"), ("", "not a name of Ollama's"),
    ("../../etc", "not a name of Ollama's"), ("a/b/c/d", "not a name of Ollama's"), ("tiny:", "not a name of Ollama's"),
])  # fmt: skip
def test_ollama_names_that_are_none(ollama: Path, name: str, text: str) -> None:
    with pytest.raises(TcaError, match=text):
        names.resolve(f"ollama:{name}")


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(names, "ollama_folders", lambda: [tmp_path / "none"])
    with pytest.raises(TcaError, match="set OLLAMA_MODELS if the store is elsewhere"):
        names.resolve("ollama:tiny")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repo = tmp_path / "hub" / "models--org--repo"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / ("ab" * 32)).write_bytes(b"GGUF")
    for commit, files in {"new": ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-f16.gguf"], "old": ["m-Q2_K.gguf"]}.items():
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in files:
            (repo / "snapshots" / commit / file).symlink_to(repo / "blobs" / ("ab" * 32))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("new")
    split = tmp_path / "hub" / "models--org--split" / "snapshots" / "c"
    split.mkdir(parents=True)
    for i in (1, 2):
        (split / f"big-0000{i}-of-00002.gguf").write_bytes(b"GGUF")
    (split / "big.tca.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(("name", "file"), [
    ("org/repo:Q4_K_M", "new/m-Q4_K_M.gguf"), ("org/repo:q8_0", "new/m-Q8_0.gguf"), ("org/repo/m-Q8_0.gguf", "new/m-Q8_0.gguf"),
    ("org/repo:Q2_K", "old/m-Q2_K.gguf"), ("org/split", "c/big-00001-of-00002.gguf"),
])  # fmt: skip
def test_hugging_face(hub: Path, name: str, file: str) -> None:
    found = names.resolve(f"hf:{name}")
    assert found.parts[-2:] == Path(file).parts and found.is_file()


@pytest.mark.parametrize(("name", "text"), [
    ("org/repo", "there are several; name one: hf:org/repo:m-Q4_K_M.gguf, hf:org/repo:m-Q8_0.gguf"), ("org/repo:Q3", "no such GGUF file"),
    ("org/none", "nothing is downloaded; run: hf download org/none"), ("repo", "give it as hf:ORG/REPO"), ("../x", "give it as hf:ORG/REPO"),
])  # fmt: skip
def test_hugging_face_names_that_are_none(hub: Path, name: str, text: str) -> None:
    with pytest.raises(TcaError, match=text):
        names.resolve(f"hf:{name}")


def test_paths_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.resolve("none.gguf") == Path("none.gguf") and names.resolve(tmp_path / "x") == tmp_path / "x"
    assert names.resolve("~/m.gguf") == Path.home() / "m.gguf"
    Path("m.tca.gguf").touch()
    with pytest.raises(TcaError, match="m.tca.gguf holds budgets and no model; give the model$"):
        names.resolve("m.tca.gguf")
    Path("m.gguf").touch()
    with pytest.raises(TcaError, match="give the model, m.gguf"):
        names.resolve("m.tca.gguf")
