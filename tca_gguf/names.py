"""Models by the names that people type. Nothing is downloaded.

PATH                    a GGUF file; of a split model its first part
ollama:NAME[:TAG]       a model in Ollama's store ($OLLAMA_MODELS, ~/.ollama/models, or that of its service)
hf:ORG/REPO[:FILE]      a file in the Hugging Face cache ($HF_HUB_CACHE, $HF_HOME/hub, ~/.cache/huggingface/hub); FILE may be a
                        part of its name, such as Q4_K_M, and is needed only if the repository has several GGUF files there
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .errors import TcaError

OLLAMA, HF = "ollama:", "hf:"
MODEL_LAYER = "application/vnd.ollama.image.model"  # the layer of an Ollama manifest that is the GGUF file


def resolve(name: str | os.PathLike[str]) -> Path:
    """The file that a name stands for; a path is returned as it is, whether it exists or not. Raises TcaError."""
    text = os.fspath(name)
    if text.startswith(OLLAMA):
        return ollama(text[len(OLLAMA) :])
    if text.startswith(HF):
        return hugging_face(text[len(HF) :])
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if path.name.endswith(".tca.gguf") and path.is_file():
        models = [m.name for m in (path.with_name(path.name[: -len(".tca.gguf")] + ".gguf"),) if m.is_file()]
        raise TcaError(f"{path} holds budgets and no model; give the model{f', {path.with_name(models[0])}' if models else ''}")
    return path


def ollama_folders() -> list[Path]:
    """Where Ollama's models may be."""
    own = os.environ.get("OLLAMA_MODELS")
    return [Path(own)] if own else [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def ollama(name: str) -> Path:
    """The GGUF file of a model in Ollama's store: NAME, NAME:TAG, USER/NAME:TAG or HOST/USER/NAME:TAG."""
    where, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    parts = where.split("/")
    if not name or any(not part or part.startswith(".") for part in [*parts, tag]) or len(parts) > 3:
        raise TcaError(f"{OLLAMA}{name}: not a name of Ollama's; examples: {OLLAMA}llama3.2, {OLLAMA}qwen2.5:0.5b")
    pattern = "/".join([*["*"] * (len(parts) < 3), *["library"] * (len(parts) < 2), *parts, tag])
    for folder in ollama_folders():
        for manifest in sorted((folder / "manifests").glob(pattern)):
            return _blob(folder, manifest, name)
    there = sorted({f"{m.parent.name}:{m.name}" for folder in ollama_folders() for m in (folder / "manifests").glob("*/*/*/*") if m.is_file()})
    raise TcaError(f"{OLLAMA}{name} is not in {' or '.join(map(str, ollama_folders()))}"
                   + (f"; there are: {', '.join(there[:20])}" if there else "; set OLLAMA_MODELS if the store is elsewhere"))


def _blob(folder: Path, manifest: Path, name: str) -> Path:
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == MODEL_LAYER)
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise ValueError
    except OSError as error:
        raise TcaError(f"{manifest} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, StopIteration):
        raise TcaError(f"{OLLAMA}{name}: {manifest} names no GGUF file; Ollama runs this model in another way") from None
    blob = folder / "blobs" / digest.replace(":", "-")
    if not blob.is_file():
        raise TcaError(f"{OLLAMA}{name}: {blob} is missing; run: ollama pull {name}")
    return blob


def hub_folder() -> Path:
    """The Hugging Face cache."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "huggingface" / "hub"


def hugging_face(name: str) -> Path:
    """A GGUF file that is in the Hugging Face cache: ORG/REPO, ORG/REPO:PART-OF-NAME or ORG/REPO/FILE.gguf."""
    repository, _, wanted = name.partition(":")
    org, _, rest = repository.partition("/")
    repo, _, file = rest.partition("/")
    if not org or not repo or any(part in (".", "..") for part in (org, repo)):
        raise TcaError(f"{HF}{name}: give it as {HF}ORG/REPO or {HF}ORG/REPO:FILE")
    folder = hub_folder() / f"models--{org}--{repo}"
    if not (folder / "snapshots").is_dir():
        raise TcaError(f"{HF}{name} is not in the cache {hub_folder()}, and nothing is downloaded; run: hf download {org}/{repo} {wanted or file}".rstrip())
    snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    ref = folder / "refs" / "main"
    if ref.is_file():
        snapshots.sort(key=lambda path: path.name != ref.read_text(encoding="utf-8").strip())
    for snapshot in snapshots:
        files = sorted(path for path in snapshot.rglob("*.gguf") if not path.name.endswith(".tca.gguf"))
        # of a split model its first part stands for all; a projector for images is no model
        files = [path for path in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", path.name) and not path.name.startswith("mmproj")]
        key = (wanted or file).lower()
        exact = [path for path in files if key and str(path.relative_to(snapshot)).lower() == key]
        chosen = exact or [path for path in files if key in path.name.lower()]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            raise TcaError(f"{HF}{name}: there are several; name one: {', '.join(f'{HF}{org}/{repo}:{path.name}' for path in chosen)}")
    raise TcaError(f"{HF}{name}: no such GGUF file in {folder / 'snapshots'}")
