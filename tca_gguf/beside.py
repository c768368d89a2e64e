"""Where embed-budgets writes, and what strip-budgets removes: the model's file, or a file of keys (MODEL.tca.gguf).

The runtime's rule of which budgets a model gets is in native/budgets/tca-source.h; docs/budgets-beside.md is for users.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import gguf_file, native
from .atomic import check_target
from .errors import TcaError

SUFFIX = ".tca.gguf"
LARGE = 4 << 30  # bytes of a model that is not copied for the sake of a few kilobytes
KEYS_ROOM = 1 << 20  # bytes that a file of keys needs at most, with room to spare
_CONTENT = re.compile(r"(sha256[-:])?[0-9a-f]{40,64}")  # names of files in content-addressed stores


@dataclass(frozen=True)
class Place:
    """keys: ``path`` is a file of keys, else a whole model. why: the reason for keys that nobody asked for, "" otherwise."""

    path: Path
    keys: bool
    why: str = ""


def place_for(model: Path, output: Path | None = None, beside: bool | None = None) -> Place:
    """Where the budgets of ``model`` go. beside: True, a file of keys; False, the model's file; None, as suits the model.

    Raises TcaError if a file of keys was asked for and there is nowhere to put it.
    """
    if output is not None:
        if beside is False and output.name.endswith(SUFFIX):
            raise TcaError(f"{output}: a name that ends with {SUFFIX} is that of a file of keys; leave out --in-place or choose another name")
        return Place(output, beside is True or output.name.endswith(SUFFIX))
    if beside is False:
        return Place(model, False)
    why = "" if beside else reason(model)
    if beside is None and not why:
        return Place(model, False)
    near = native.file_beside(model)
    if not in_store(model) and os.access(near.parent if str(near.parent) else Path("."), os.W_OK):
        return Place(near, True, why)
    folder = native.user_budgets()
    if folder is None:
        raise TcaError(f"{near} cannot be written, and there is no folder of yours (HOME is not set); name a file with -o and set TCA_BUDGETS to it")
    return Place(folder / f"{native.file_identity(model)}{SUFFIX}", True, why)


def reason(model: Path) -> str:
    """Why the budgets of a model do not go into its file; "" if they do."""
    if native.file_beside(model).exists():
        return f"{native.file_beside(model)} is there already and wins over keys in the model"
    if gguf_file.split_parts(model) != [model]:
        return "the model is split"
    if in_store(model):
        return "its name is that of a content-addressed store"
    if model.is_symlink() and _CONTENT.fullmatch(Path(os.path.realpath(model)).name):
        return "it is a link into a content-addressed store"
    stat = model.stat()
    if stat.st_mode & 0o222 == 0 or not os.access(model, os.W_OK) or not os.access(Path(os.path.realpath(model)).parent, os.W_OK):
        return "it is read-only"
    if stat.st_size > LARGE:
        return f"it is larger than {LARGE >> 30} GiB"
    return ""


def in_store(model: Path) -> bool:
    """Whether the model is named by its content: such a folder belongs to a program that removes what it does not know."""
    return _CONTENT.fullmatch(model.name) is not None


def check_place(model: Path, place: Place) -> gguf_file.ModelShape:
    """What would stop the writing, before the minutes of calibration. Raises TcaError."""
    if not place.keys:
        return gguf_file.check_embeddable(model, place.path)
    shape = gguf_file.check_served(model)
    native.file_identity(model)
    make_folder(place)
    check_target(place.path, KEYS_ROOM)
    return shape


def make_folder(place: Place) -> None:
    """The user's folder is made when it is first needed."""
    if place.path.parent == native.user_budgets():
        try:
            place.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TcaError(f"{place.path.parent} cannot be made: {error.strerror}") from None


def files_of(model: Path) -> list[Path]:
    """The files of keys that belong to a model: beside it, and in the user's folder. Those that TCA_BUDGETS names are not among them."""
    found = [native.file_beside(model)]
    folder = native.user_budgets()
    if folder is not None and folder.is_dir():
        found.append(folder / f"{native.file_identity(model)}{SUFFIX}")
    return [path for path in found if path.is_file()]
