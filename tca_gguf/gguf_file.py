"""Budgets in GGUF files: read, embed and strip the ``tca.*`` keys (layout: docs/gguf-keys.md).

The files are read and the new keys packed by the ``gguf`` package. Everything else in a file (header, other keys, tensor
descriptions, tensor data) is copied as it lies there, so that no type, order or byte of it can change, and stripping the
keys gives back the very file that was embedded into. Writing is atomic: see :mod:`tca_gguf.atomic`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter
from gguf.gguf_reader import ReaderField

from . import native
from .atomic import check_target, replace_file
from .budgets import FORMAT_VERSION, Budgets, Calibration
from .errors import TcaError

PREFIX = "tca."
MAX_KV_HEADS = 1 << 24  # n_layer*n_head_kv, as in the runtime
MAX_STRINGS = 1 << 24  # in one array; the largest vocabularies have a few hundred thousand
MAX_NESTED = 1 << 16  # arrays in an array
CHUNK = 8 << 20  # bytes copied at a time
_ROOM = 65536  # bytes for the new keys of a usual model; they are a few for each head
_AGAIN = "run embed-budgets again, or strip-budgets to remove the tca.* keys"

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class ModelShape:
    """What the budgets of a model depend on, as the runtime sees it (`native.ModelShape`); of a model that it does not serve, what the
    file says: stored (the layers that a ragged store holds) and sliding are then None."""

    arch: str
    name: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_swa: int = 0
    sliding: tuple[int, int] | None = None
    stored: tuple[int, ...] | None = None


class HeaderReader(GGUFReader):
    """GGUFReader for files of unknown origin: never reads past the end of the file, and handles an array as one part.

    The stock reader makes a numpy object per array element, which takes seconds for a vocabulary, and does not end in
    reasonable time for an array length of 2^60. String arrays are stepped over; their field holds raw bytes.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"the file ends at byte {len(self.data)}, its header asks for byte {end}")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = self._get(orig_offs, np.uint32)
        length = self._get(orig_offs + 4, np.uint64)
        sub_type = GGUFValueType(item_type[0])
        data_at = orig_offs + 12
        scalar = self.gguf_scalar_to_np.get(sub_type)
        if scalar is not None:
            data = self._get(data_at, scalar, int(length[0]))
        elif sub_type == GGUFValueType.STRING:
            data = self._get(data_at, np.uint8, self._string_array_size(data_at, int(length[0])))
        else:
            # llama.cpp refuses arrays of arrays; the gguf package can read them, one element at a time
            if length[0] > MAX_NESTED:
                raise ValueError(f"an array of {length[0]} arrays is too large")
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, sub_type]
        return 12 + int(data.nbytes), [item_type, length, data], [2], types

    def _string_array_size(self, offset: int, length: int) -> int:
        raw, end = memoryview(self.data), len(self.data)
        if length > min((end - offset) // 8, MAX_STRINGS):
            raise ValueError(f"an array of {length} strings is too large for a file of {end} bytes")
        size_at = struct.Struct((">" if self.endianess == GGUFEndian.BIG else "<") + "Q").unpack_from
        at = offset
        for _ in range(length):
            if at + 8 > end:
                raise ValueError(f"the file ends at byte {end}, inside an array of strings")
            at += 8 + size_at(raw, at)[0]
        return at - offset

    def metadata(self) -> list[ReaderField]:
        """The key-value fields in file order."""
        return [field for name, field in self.fields.items() if not name.startswith("GGUF.")]


def read_budgets(path: str | os.PathLike[str]) -> Budgets | None:
    """The budgets that the runtime takes for a model file, validated; None if it has none.

    They are the file's own ``tca.*`` keys or those of a file of keys, see `source_of`.
    Raises TcaError if the file is not a readable GGUF file or a ``tca.*`` key is missing, malformed or does not fit the model.
    """
    reader = open_header(path)
    return read_model(path, reader)[1] if source_of(path, reader) is not None else None


def own_budgets(path: str | os.PathLike[str]) -> Budgets | None:
    """The budgets in a file itself, a model or a file of keys; None if it has none. Raises TcaError."""
    path, reader = Path(path), open_header(path)
    return _budgets(reader, path, _shape(reader, path)) if _has_keys(reader) else None


def model_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Shape of the model in a GGUF file. Raises TcaError."""
    return _shape(open_header(path), Path(path))


def read_model(
    path: str | os.PathLike[str], reader: HeaderReader | None = None
) -> tuple[ModelShape, Budgets | None]:
    """model_shape() and read_budgets() in one read of the file (or of ``reader``, what open_header(path) returned)."""
    path = Path(path)
    reader = reader or open_header(path)
    shape, source = _shape(reader, path), source_of(path, reader)
    if source is None:
        return shape, None
    return shape, _budgets(reader if source == path else open_header(source), source, shape)


def own_keys(path: str | os.PathLike[str]) -> bool:
    """Whether a file itself has ``tca.*`` keys, good or bad. Raises TcaError."""
    return _has_keys(open_header(path))


def source_of(path: str | os.PathLike[str], reader: HeaderReader | None = None) -> Path | None:
    """The file that the runtime takes a model's budgets from: ``path`` itself or a file of keys; None if it has none.

    The rule is the runtime's, see native/budgets/tca-source.h. Raises TcaError.
    """
    path = Path(path)
    own = _has_keys(reader or open_header(path))
    folder = native.user_budgets()
    if os.environ.get("TCA_BUDGETS") or native.file_beside(path).exists() or (not own and folder is not None and folder.is_dir()):
        return native.file_source(path)
    return path if own else None


def split_parts(path: str | os.PathLike[str]) -> list[Path]:
    """All files of a model: one, or the parts of a split model whose first part is ``path``. Raises TcaError: a part is missing."""
    path = Path(path)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or not _is_split(open_header(path)):
        return [path]
    if int(match[2]) != 1:
        raise TcaError(f"{path} is not the first part of a split model; give {path.with_name(f'{match[1]}-00001-of-{match[3]}.gguf')}")
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise TcaError(f"{part} is missing; it is a part of {path}")
    return parts


def write_keys(src: str | os.PathLike[str], dst: str | os.PathLike[str], budgets: Budgets) -> None:
    """Writes ``budgets`` for the model ``src`` to ``dst``, a small GGUF file of keys alone, which also says which model it is for.

    ``src`` is only read; it may be the first part of a split model. Raises TcaError as `embed_budgets` does.
    """
    src, dst = Path(src), Path(dst)
    budgets.check()
    reader = open_header(src)
    shape = _shape(reader, src)
    budgets = _fitted(budgets, shape, src)
    identity = native.file_identity(src)
    kept = [_raw(reader, field) for field in reader.metadata() if _says_shape(field.name, shape.arch)]
    start, endian = reader.data[:8].tobytes(), reader.endianess
    order = ">" if endian == GGUFEndian.BIG else "<"

    def write(out: BinaryIO, scratch: Path) -> None:
        added = _pack_keys(budgets, endian, scratch, {"tca.model.identity": identity, "tca.model.name": shape.name})
        out.seek(0)
        out.truncate()
        out.write(start + struct.pack(order + "QQ", 0, len(kept) + len(added)) + b"".join(kept + added))

    def verify(written: Path) -> None:
        check = open_header(written)
        _budgets(check, dst, _shape(check, dst))

    replace_file(dst, _room_for(budgets), write, verify)


def embed_budgets(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], budgets: Budgets, progress: Progress | None = None
) -> None:
    """Writes a copy of ``src`` that carries ``budgets`` to ``dst`` (which may be ``src``), in place of any it had.

    Nothing but the ``tca.*`` keys changes. Either ``dst`` is the complete new file or it is as it was before.
    Raises TcaError: budgets that do not fit the model, a split or unreadable file, a target that cannot be written, a full disk.
    """
    src = Path(src)
    budgets.check()
    reader = open_header(src)
    _refuse_split(reader, src)
    shape = _shape(reader, src)
    _rewrite(reader, src, Path(dst), _fitted(budgets, shape, src), progress)


def check_embeddable(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> ModelShape:
    """What would stop embed_budgets(src, dst) for any budgets, found before they are calibrated. Raises TcaError."""
    src = Path(src)
    reader = open_header(src)
    _refuse_split(reader, src)
    _refuse_unserved(reader, src)
    shape = _shape(reader, src)
    check_target(dst, len(reader.data) + _ROOM)
    return shape


def check_served(path: str | os.PathLike[str]) -> ModelShape:
    """Shape of a model that the runtime can serve. Raises TcaError with the reason if it cannot."""
    reader = open_header(path)
    _refuse_unserved(reader, Path(path))
    return _shape(reader, Path(path))


def strip_budgets(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], progress: Progress | None = None
) -> bool:
    """Writes a copy of ``src`` without ``tca.*`` keys to ``dst`` (which may be ``src``). False if it had none.

    Works on malformed ``tca.*`` keys too. A file without keys is left alone if ``dst`` is ``src``. Raises TcaError.
    """
    src, dst = Path(src), Path(dst)
    reader = open_header(src)
    _refuse_split(reader, src)
    found = _has_keys(reader)
    if found or os.path.realpath(src) != os.path.realpath(dst):
        _rewrite(reader, src, dst, None, progress)
    return found


def open_header(path: str | os.PathLike[str]) -> HeaderReader:
    """Reads all of a GGUF file but its tensor data (which stays memory-mapped). Raises TcaError."""
    path = Path(path)
    if path.is_dir():
        raise TcaError(f"{path} is a directory; give the path of a GGUF file")
    try:
        with np.errstate(all="ignore"):  # hostile tensor shapes overflow; the bounds check answers
            return HeaderReader(path)
    except FileNotFoundError:
        raise TcaError(f"{path} does not exist") from None
    except OSError as error:
        raise TcaError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise TcaError(f"{path} is not a readable GGUF file: {_printable(str(reason), 200)}") from None


# ---- reading -----------------------------------------------------------------------------------------------------


def _printable(text: str, limit: int = 64) -> str:
    """A short form of a string from a file that cannot disturb a terminal."""
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def _type_name(types: list[GGUFValueType]) -> str:
    names = [t.name.lower() for t in types]
    return f"array of {names[1]}" if len(names) > 1 else names[0]


class _Fields:
    """Typed access to the metadata of one file; every failure is a TcaError that names file and key."""

    def __init__(self, reader: HeaderReader, path: Path):
        self.reader, self.path = reader, path

    def get(self, key: str, *types: GGUFValueType) -> Any:
        """Value of ``key``: int, float, bool, str, or a numpy array. Its types must be exactly ``types``."""
        field = self.reader.get_field(key)
        if field is None:
            raise TcaError(f"{self.path}: {key} is missing; {_AGAIN if key.startswith(PREFIX) else 'the file is incomplete'}")
        if list(field.types) != list(types):
            raise TcaError(f"{self.path}: {key} is of type {_type_name(field.types)}, it must be {_type_name(list(types))}")
        if types[0] == GGUFValueType.ARRAY:
            return field.parts[-1]
        if types[0] == GGUFValueType.STRING:
            try:
                return str(bytes(field.parts[-1]), "utf-8")
            except UnicodeDecodeError:
                raise TcaError(f"{self.path}: {key} is not valid UTF-8") from None
        return field.parts[-1].tolist()[0]

    def count(self, key: str, default: int | None = None, *, per_layer: bool = False) -> int:
        """A positive whole number of any integer type; one that may be given per layer must be the same in all."""
        field = self.reader.get_field(key)
        if field is None and default is not None:
            return default
        if field is None:
            raise TcaError(f"{self.path}: {key} is missing; the file is incomplete")
        values = field.parts[-1]
        is_array = field.types[0] == GGUFValueType.ARRAY
        if field.types[-1] in (GGUFValueType.STRING, GGUFValueType.BOOL) or values.dtype.kind not in "iu" or (is_array and not per_layer):
            raise TcaError(f"{self.path}: {key} is of type {_type_name(field.types)}, it must be a whole number")
        if values.size == 0 or (values != values[0]).any():
            raise TcaError(f"{self.path}: {key} differs between layers; such models cannot carry budgets yet")
        if not 0 < int(values[0]) < 1 << 31:
            raise TcaError(f"{self.path}: {key} is {int(values[0])}, it must be a positive number")
        return int(values[0])


def _shape(reader: HeaderReader, path: Path) -> ModelShape:
    fields = _Fields(reader, path)
    arch = fields.get("general.architecture", GGUFValueType.STRING)
    has_name = reader.get_field("general.name") is not None
    name = _printable(fields.get("general.name", GGUFValueType.STRING)) if has_name else path.stem
    reason: TcaError | None = None
    try:
        known = native.file_shape(str(reader.data.filename))  # the file that was read: `path` may be what it will be called
        return ModelShape(_printable(arch), name, known.n_layer, known.n_head, known.n_head_kv, known.head_dim_k, known.head_dim_v,
                          known.n_ctx_train, known.n_swa, known.sliding, known.stored)  # fmt: skip
    except native.Unsupported as error:
        reason = error
    except TcaError:
        pass  # llama.cpp cannot read this file (another byte order, a key that is missing): what it says all the same
    try:
        n_head = fields.count(f"{arch}.attention.head_count", per_layer=True)
        n_head_kv = fields.count(f"{arch}.attention.head_count_kv", n_head, per_layer=True)
        n_layer = fields.count(f"{arch}.block_count")
        if n_layer * n_head_kv > MAX_KV_HEADS:
            raise TcaError(f"{path}: {_printable(arch)}.block_count is {n_layer}, with {n_head_kv} KV heads that is more than {MAX_KV_HEADS} heads")
        head_dim = max(fields.count(f"{arch}.embedding_length") // n_head, 1)
        return ModelShape(
            arch=_printable(arch),
            name=name,
            n_layer=n_layer,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim_k=fields.count(f"{arch}.attention.key_length", head_dim),
            head_dim_v=fields.count(f"{arch}.attention.value_length", head_dim),
            n_ctx_train=fields.count(f"{arch}.context_length", 0),
            n_swa=fields.count(f"{arch}.attention.sliding_window", 0),
        )
    except TcaError as error:
        raise (TcaError(f"{path}: {reason}") if reason is not None else error) from None


def _has_keys(reader: HeaderReader) -> bool:
    return any(field.name.startswith(PREFIX) for field in reader.metadata())


def _budgets(reader: HeaderReader, path: Path, shape: ModelShape) -> Budgets:
    fields = _Fields(reader, path)
    array_i32 = (GGUFValueType.ARRAY, GGUFValueType.INT32)
    version = fields.get("tca.version", GGUFValueType.UINT32)
    if version != FORMAT_VERSION:
        raise TcaError(f"{path}: tca.version is {version}, this release reads version {FORMAT_VERSION}; {_AGAIN}")
    has_enabled = reader.get_field("tca.enabled") is not None
    keep_counts = fields.get("tca.keep_counts", *array_i32)
    configs = fields.get("tca.configs", *array_i32)
    head_config = fields.get("tca.head_config", *array_i32)
    if len(keep_counts) == 0 or len(configs) % len(keep_counts) != 0:
        raise TcaError(
            f"{path}: tca.configs has {len(configs)} entries, it must be a multiple of the {len(keep_counts)} entries of "
            "tca.keep_counts, which must not be empty"
        )
    if len(head_config) != shape.n_layer * shape.n_head_kv:
        raise TcaError(
            f"{path}: tca.head_config has {len(head_config)} entries, this model has {shape.n_layer} layers of "
            f"{shape.n_head_kv} KV heads = {shape.n_layer * shape.n_head_kv}"
        )
    budgets = Budgets(
        version=version,
        block_size=fields.get("tca.block_size", GGUFValueType.UINT32),
        group_size=fields.get("tca.group_size", GGUFValueType.UINT32),
        window=fields.get("tca.window", GGUFValueType.UINT32),
        sinks=fields.get("tca.sinks", GGUFValueType.UINT32),
        metric=fields.get("tca.metric", GGUFValueType.STRING),
        keep_counts=tuple(keep_counts.tolist()),
        configs=configs.astype(np.int32).reshape(-1, len(keep_counts)),
        head_config=head_config.astype(np.int32).reshape(shape.n_layer, shape.n_head_kv),
        kept_fraction=_fraction(fields, "tca.kept_fraction") if reader.get_field("tca.kept_fraction") is not None else float("nan"),
        enabled=fields.get("tca.enabled", GGUFValueType.BOOL) if has_enabled else True,
        calibration=_calibration(fields, shape),
        probe=_probe(fields, shape) if reader.get_field("tca.probe") is not None else None,
        rollback=fields.get("tca.rollback", GGUFValueType.UINT32) if reader.get_field("tca.rollback") is not None else None,
    )
    try:
        budgets.check()
    except TcaError as error:
        raise TcaError(f"{path}: {error}") from None
    if math.isnan(budgets.kept_fraction):  # information that the runtime does not read; it follows from the budgets
        budgets = replace(budgets, kept_fraction=float(np.nanmean(budgets.head_kept_fraction())))
    return budgets


def _probe(fields: _Fields, shape: ModelShape) -> np.ndarray:
    """float32 [n_layer, n_head_kv, head_dim_k]"""
    values = fields.get("tca.probe", GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    size = (shape.n_layer, shape.n_head_kv, shape.head_dim_k)
    if len(values) != np.prod(size):
        raise TcaError(f"{fields.path}: tca.probe has {len(values)} entries, this model needs {np.prod(size)}: {shape.n_layer} layers of "
                       f"{shape.n_head_kv} KV heads with keys of {shape.head_dim_k}")  # fmt: skip
    return values.astype(np.float32).reshape(size)


def _fraction(fields: _Fields, key: str) -> float:
    value = fields.get(key, GGUFValueType.FLOAT32)
    if not 0.0 <= value <= 1.0:  # refuses NaN too
        raise TcaError(f"{fields.path}: {key} is {value}, it must lie between 0 and 1")
    return value


def _calibration(fields: _Fields, shape: ModelShape) -> Calibration | None:
    if not any(field.name.startswith("tca.calibration.") for field in fields.reader.metadata()):
        return None
    has_bounds = fields.reader.get_field("tca.calibration.bound") is not None
    return Calibration(
        tokens=fields.get("tca.calibration.tokens", GGUFValueType.UINT32),
        text_sha256=fields.get("tca.calibration.text_sha256", GGUFValueType.STRING),
        target=_fraction(fields, "tca.calibration.target"),
        seed=fields.get("tca.calibration.seed", GGUFValueType.UINT32),
        errors=_per_head(fields, shape, "tca.calibration.error"),
        bounds=_per_head(fields, shape, "tca.calibration.bound") if has_bounds else None,
    )


def _per_head(fields: _Fields, shape: ModelShape, key: str) -> np.ndarray:
    """float32 [n_layer, n_head_kv]"""
    values = fields.get(key, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    if len(values) != shape.n_layer * shape.n_head_kv or not np.isfinite(values).all():
        raise TcaError(
            f"{fields.path}: {key} must hold one finite number for each of the {shape.n_layer * shape.n_head_kv} KV heads; {_AGAIN}"
        )
    return values.astype(np.float32).reshape(shape.n_layer, shape.n_head_kv)


# ---- writing -----------------------------------------------------------------------------------------------------


def _is_split(reader: HeaderReader) -> bool:
    field = reader.get_field("split.count")
    return field is not None and (field.types[0] == GGUFValueType.STRING or bool((field.parts[-1] > 1).any()))


def _refuse_unserved(reader: HeaderReader, path: Path) -> None:
    try:
        native.file_shape(str(reader.data.filename))
    except native.Unsupported as error:
        raise TcaError(f"{path}: {error}") from None
    except TcaError:
        pass  # calibration, which loads the model, says more


def _refuse_split(reader: HeaderReader, path: Path) -> None:
    if _is_split(reader):
        raise TcaError(f"{path} is one part of a split GGUF file, whose budgets lie beside it: embed-budgets FIRST_PART --beside; "
                       "or merge the parts: llama-gguf-split --merge FIRST_PART OUT")  # fmt: skip


def _says_shape(key: str, arch: str) -> bool:
    """Whether a key is one of those that a shape follows from: a file of keys repeats them of its model."""
    return key in ("general.architecture", "general.name", "general.alignment") or key.startswith(f"{arch}.")


def _fitted(budgets: Budgets, shape: ModelShape, src: Path) -> Budgets:
    """The budgets as they go into a file. Raises TcaError if they were made for another shape."""
    if budgets.head_config.shape != (shape.n_layer, shape.n_head_kv):
        raise TcaError(
            f"tca.head_config is {' x '.join(map(str, budgets.head_config.shape))}, {src} has {shape.n_layer} layers of "
            f"{shape.n_head_kv} KV heads; budgets belong to the model they were calibrated on"
        )
    if len(budgets.configs) > 0:
        return budgets
    # every head is dense; GGUF arrays cannot be empty, so the file gets one row that no head uses
    unused = np.zeros((1, len(budgets.keep_counts)), np.int32)
    unused[0, -1] = budgets.group_size // budgets.block_size
    return replace(budgets, configs=unused)


def _room_for(budgets: Budgets) -> int:
    """Bytes that the keys of these budgets take at most."""
    probe = 0 if budgets.probe is None else 4 * budgets.probe.size
    return _ROOM + 16 * budgets.head_config.size + 8 * budgets.configs.size + probe


def _pack_keys(budgets: Budgets, endian: GGUFEndian, scratch: Path, extra: dict[str, str] | None = None) -> list[bytes]:
    """The tca.* key-value pairs as they stand in a file, packed by GGUFWriter into ``scratch`` and read back."""
    writer = GGUFWriter(scratch, "tca", endianess=endian)
    for key, text in (extra or {}).items():
        writer.add_string(key, text)
    writer.add_uint32("tca.version", budgets.version)
    writer.add_bool("tca.enabled", budgets.enabled)
    writer.add_uint32("tca.block_size", budgets.block_size)
    writer.add_uint32("tca.group_size", budgets.group_size)
    writer.add_uint32("tca.window", budgets.window)
    writer.add_uint32("tca.sinks", budgets.sinks)
    if budgets.rollback is not None:
        writer.add_uint32("tca.rollback", budgets.rollback)
    writer.add_string("tca.metric", budgets.metric)
    writer.add_array("tca.keep_counts", [int(k) for k in budgets.keep_counts])
    writer.add_array("tca.configs", np.asarray(budgets.configs).ravel().tolist())
    writer.add_array("tca.head_config", np.asarray(budgets.head_config).ravel().tolist())
    writer.add_float32("tca.kept_fraction", budgets.kept_fraction)
    if budgets.probe is not None:
        writer.add_array("tca.probe", np.asarray(budgets.probe, np.float64).ravel().tolist())
    calibration = budgets.calibration
    if calibration is not None:
        writer.add_uint32("tca.calibration.tokens", calibration.tokens)
        writer.add_string("tca.calibration.text_sha256", calibration.text_sha256)
        writer.add_float32("tca.calibration.target", calibration.target)
        writer.add_uint32("tca.calibration.seed", calibration.seed)
        writer.add_array("tca.calibration.error", np.asarray(calibration.errors, np.float64).ravel().tolist())
        if calibration.bounds is not None:
            writer.add_array("tca.calibration.bound", np.asarray(calibration.bounds, np.float64).ravel().tolist())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    finally:
        writer.close()
    reader = HeaderReader(scratch)
    return [_raw(reader, field) for field in reader.metadata() if field.name.startswith(PREFIX)]


def _raw(reader: HeaderReader, field: ReaderField) -> bytes:
    size = sum(int(part.nbytes) for part in field.parts)
    return reader.data[field.offset : field.offset + size].tobytes()


def _rewrite(reader: HeaderReader, src: Path, dst: Path, budgets: Budgets | None, progress: Progress | None) -> None:
    before = os.stat(src)
    kept = [_raw(reader, field) for field in reader.metadata() if not field.name.startswith(PREFIX)]
    tensors = b"".join(_raw(reader, tensor.field) for tensor in reader.tensors)
    start = reader.data[:16].tobytes()  # magic, version, number of tensors
    pack_count = ">Q" if reader.endianess == GGUFEndian.BIG else "<Q"
    alignment, data_offset, endian = int(reader.alignment), int(reader.data_offset), reader.endianess
    data_bytes = before.st_size - data_offset  # negative: no tensors, and no padding after the header

    def write(out: BinaryIO, scratch: Path) -> None:
        added = _pack_keys(budgets, endian, scratch) if budgets is not None else []
        header = start + struct.pack(pack_count, len(kept) + len(added)) + b"".join(kept + added) + tensors
        out.seek(0)
        out.truncate()
        out.write(header)
        if data_bytes >= 0:
            out.write(b"\0" * (-len(header) % alignment))
        with open(src, "rb") as source:
            source.seek(data_offset)
            done = 0
            while done < data_bytes:
                chunk = source.read(min(CHUNK, data_bytes - done))
                if not chunk:
                    raise TcaError(f"{src} shrank while it was copied; nothing was changed")
                out.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, data_bytes)
        after = os.stat(src)
        if (after.st_ino, after.st_size, after.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
            raise TcaError(f"{src} was written to by another program meanwhile; nothing was changed")

    def verify(written: Path) -> None:
        check = open_header(written)
        if [(t.name, t.n_bytes, t.data_offset - check.data_offset) for t in check.tensors] != [
            (t.name, t.n_bytes, t.data_offset - data_offset) for t in reader.tensors
        ] or (len(check.data) - int(check.data_offset) != data_bytes and data_bytes >= 0):
            raise TcaError(f"{dst}: the new file did not read back as written; nothing was changed")
        if budgets is not None:
            _budgets(check, dst, _shape(check, dst))

    replace_file(dst, before.st_size + (_room_for(budgets) if budgets is not None else _ROOM), write, verify)
