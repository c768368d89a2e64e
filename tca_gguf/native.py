"""Typed access to our C API (native/include/tca.h). The one module that imports the extension tca_gguf._tca.

Arrays are numpy, row-major, and copied only where their type or layout does not fit. Contexts are passed as the address
of the llama_context (an int), which any binding can give. Every failure is a TcaError with the text of the C API.
The extension is loaded at the first call, not at import.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tca_gguf.errors import TcaError

if TYPE_CHECKING:
    from tca_gguf.budgets import Budgets

Impl = Literal["cpu", "reference"]  # the op that the runtime uses, or the plain scalar reference
DENSE, SLIDING = -1, -2  # TCA_HEAD_*, checked when the extension is loaded

_MAX_LAYERS = 512  # llama.cpp's own limit
_MAX_ROPE_PAIRS = 4096  # half of the largest head size we ask the rotary table for


@functools.cache
def _extension() -> tuple[Any, Any]:
    """(ffi, lib) of the extension."""
    try:
        _tca = importlib.import_module("tca_gguf._tca")
    except ModuleNotFoundError as error:
        if error.name not in ("tca_gguf._tca", "_cffi_backend"):
            raise
        missing = "cffi" if error.name == "_cffi_backend" else "its native part"
        raise TcaError(f"tca_gguf is installed without {missing}; run: pip install . (in the checkout of tca-gguf)") from None
    except ImportError as error:
        raise TcaError(f"the native part of tca_gguf cannot be loaded ({error}); reinstall it with: "
                       "pip install --force-reinstall --no-deps . (in the checkout of tca-gguf)") from None
    assert (_tca.lib.TCA_HEAD_DENSE, _tca.lib.TCA_HEAD_SLIDING) == (DENSE, SLIDING)
    return _tca.ffi, _tca.lib


def check_status(status: int) -> int:
    """Returns a status or count that is not negative; raises TcaError with the C API's text for any other."""
    if status < 0:
        ffi, lib = _extension()
        raise TcaError(ffi.string(lib.tca_last_error()).decode("utf-8", "replace") or f"tca.h: status {status}")
    return int(status)


def build_info() -> dict[str, Any]:
    """What this build is: version, upstream, upstream_commit, patch, compiler, simd, cuda."""
    ffi, lib = _extension()
    return json.loads(ffi.string(lib.tca_build_info()))


# ---- budgets and plan ------------------------------------------------------------------------------------------------


def _pointer(array: NDArray[Any], ctype: str) -> Any:
    """A C pointer to a contiguous array; it keeps the array alive."""
    ffi, _ = _extension()
    return ffi.from_buffer(f"{ctype}[]", array)


def _int32(values: ArrayLike, name: str) -> NDArray[np.int32]:
    """`values` as a contiguous int32 array; TcaError if one of them is no 32-bit integer."""
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TcaError(f"{name} holds {array.dtype.name} values; integers are needed")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise TcaError(f"{name} holds a value that does not fit 32 bits")
    return np.ascontiguousarray(array, dtype=np.int32)


def _budgets(budgets: Budgets) -> tuple[Any, list[Any]]:
    """(struct tca_budgets *, everything it points to)."""
    ffi, lib = _extension()
    keep = _int32(budgets.keep_counts, "tca.keep_counts").reshape(-1)
    configs = _int32(budgets.configs, "tca.configs")
    head_config = _int32(budgets.head_config, "tca.head_config")
    if configs.ndim != 2 or configs.shape[1] != len(keep):
        raise TcaError(f"tca.configs has shape {configs.shape}; it needs one row a configuration and {len(keep)} columns, "
                       "one for each of tca.keep_counts")
    if head_config.ndim != 2:
        raise TcaError(f"tca.head_config has shape {head_config.shape}; it needs [n_layer, n_head_kv]")
    metric = ffi.new("char[]", str(budgets.metric).encode())
    alive = [metric, *(_pointer(array, "int32_t") for array in (keep, configs, head_config))]
    struct = ffi.new("struct tca_budgets *")
    numbers = {name: getattr(budgets, name) for name in ("version", "block_size", "group_size", "window", "sinks", "rollback")}
    if numbers["rollback"] is None:
        numbers["rollback"] = min(lib.TCA_ROLLBACK, budgets.group_size)
    for name, number in numbers.items():
        try:
            setattr(struct, name, int(number))
        except (OverflowError, TypeError, ValueError):
            raise TcaError(f"tca.{name} is {number!r}; it must be an integer from 0 to 4294967295") from None
    struct.metric, struct.keep_counts, struct.configs, struct.head_config = alive
    struct.n_keep, struct.n_configs = len(keep), configs.shape[0]
    struct.n_layer, struct.n_head_kv = head_config.shape
    if budgets.probe is not None:
        probe = np.ascontiguousarray(budgets.probe, dtype=np.float32)
        if probe.ndim != 3 or probe.shape[:2] != head_config.shape:
            raise TcaError(f"tca.probe has shape {probe.shape}; it needs [n_layer, n_head_kv, head_dim_k]")
        alive.append(_pointer(probe, "float"))
        struct.n_probe, struct.probe = probe.shape[2], alive[-1]
    return struct, alive


def _uint32(value: int, name: str) -> int:
    if not 0 <= value < 2**32:
        raise TcaError(f"{name} is {value}; it must be from 0 to 4294967295")
    return int(value)


def budgets_check(budgets: Budgets) -> None:
    """Checks every field and every sum as the runtime does. TcaError names the key that is wrong."""
    _, lib = _extension()
    struct, _alive = _budgets(budgets)
    check_status(lib.tca_budgets_check(struct))


def file_check(path: str | os.PathLike[str]) -> bool:
    """Whether a GGUF file carries valid budgets that are enabled; False if it has none or tca.enabled is false.

    TcaError if it is no GGUF file or a tca.* key is wrong. Reads the metadata only.
    """
    ffi, lib = _extension()
    if not os.path.isfile(path):
        raise TcaError(f"{os.fspath(path)}: no such file")
    try:
        return check_status(lib.tca_file_check(ffi.new("char[]", os.fsencode(path)))) == lib.TCA_OK
    except TcaError as error:
        name = os.fspath(path)
        raise error if name in str(error) else TcaError(f"{name}: {error}") from None


def _text(call: Callable[[Any, int], int], room: int = 4096) -> str | None:
    """What a function writes into a buffer of ``room`` bytes, a path; None if it answers TCA_NO_BUDGETS."""
    ffi, lib = _extension()
    buffer = ffi.new("char[]", room)
    if check_status(call(buffer, room)) == lib.TCA_NO_BUDGETS:
        return None
    return os.fsdecode(ffi.string(buffer))


def file_source(path: str | os.PathLike[str]) -> Path | None:
    """The file whose budgets the runtime takes for a model: the model's own or a file of keys; None: it has none. Raises TcaError."""
    ffi, lib = _extension()
    found = _text(lambda out, room: lib.tca_file_source(ffi.new("char[]", os.fsencode(path)), out, room))
    return None if found is None else Path(found)


def file_identity(path: str | os.PathLike[str]) -> str:
    """What tells the model's weights from another's, 16 hex digits. Raises TcaError: unreadable, incomplete."""
    ffi, lib = _extension()
    return _text(lambda out, _room: lib.tca_file_identity(ffi.new("char[]", os.fsencode(path)), out)) or ""


def file_beside(path: str | os.PathLike[str]) -> Path:
    """Where the runtime looks for a file of keys beside a model: MODEL.tca.gguf."""
    ffi, lib = _extension()
    return Path(_text(lambda out, room: lib.tca_file_beside(ffi.new("char[]", os.fsencode(path)), out, room)) or "")


def user_budgets() -> Path | None:
    """The folder of the user's files of keys, which may not exist yet; None where the system does not say."""
    _, lib = _extension()
    try:
        return Path(_text(lib.tca_user_budgets) or "")
    except TcaError:
        return None


def kept_per_group(budgets: Budgets, config: int) -> int:
    """Tokens that one group of group_size leaves behind under a row of configs (group_size for DENSE)."""
    _, lib = _extension()
    struct, _alive = _budgets(budgets)
    return check_status(lib.tca_budgets_kept_per_group(struct, config))


def plan_length(budgets: Budgets, layer: int, head: int, n_tokens: int) -> int:
    """Slots in use in a head's region once a sequence has n_tokens tokens."""
    _, lib = _extension()
    struct, _alive = _budgets(budgets)
    return check_status(lib.tca_plan_length(struct, _uint32(layer, "layer"), _uint32(head, "head"), _uint32(n_tokens, "n_tokens")))


def plan_capacity(budgets: Budgets, layer: int, head: int, n_ctx: int) -> int:
    """Slots a head's region needs so that a sequence of up to n_ctx tokens fits at every step."""
    _, lib = _extension()
    struct, _alive = _budgets(budgets)
    return check_status(lib.tca_plan_capacity(struct, _uint32(layer, "layer"), _uint32(head, "head"), _uint32(n_ctx, "n_ctx")))


def plan_groups(budgets: Budgets, n_tokens: int) -> int:
    """Leading groups that are compacted once a sequence has n_tokens tokens."""
    _, lib = _extension()
    struct, _alive = _budgets(budgets)
    return check_status(lib.tca_plan_groups(struct, _uint32(n_tokens, "n_tokens")))


def plan_bytes(budgets: Budgets, head_dim_k: int, head_dim_v: int, type_k: int, type_v: int, n_ctx: int) -> tuple[int, int]:
    """Bytes of the KV cache of one sequence of n_ctx tokens: (ragged store with its positions, dense).

    type_k, type_v: ggml type numbers (0 f32, 1 f16, 2 q4_0, 8 q8_0, 30 bf16).
    """
    ffi, lib = _extension()
    struct, _alive = _budgets(budgets)
    out = ffi.new("uint64_t[2]")
    check_status(lib.tca_plan_bytes(struct, _uint32(head_dim_k, "head_dim_k"), _uint32(head_dim_v, "head_dim_v"),
                                    type_k, type_v, _uint32(n_ctx, "n_ctx"), out, out + 1))
    return int(out[0]), int(out[1])


# ---- a model ---------------------------------------------------------------------------------------------------------


def model_set_budgets(model: int, budgets: Budgets | None) -> None:
    """Contexts made from now on from the llama_model at this address use these budgets; None: the stock cache.

    Contexts that exist keep the cache they have. TcaError, and nothing changed: budgets that do not fit the model, or an
    architecture that cannot be served.
    """
    ffi, lib = _extension()
    struct, _alive = _budgets(budgets) if budgets is not None else (ffi.NULL, [])
    check_status(lib.tca_model_set_budgets(_model(model), struct))


def _model(address: int) -> Any:
    ffi, _ = _extension()
    if not address:
        raise TcaError("the model is closed: its address is 0")
    return ffi.cast("struct llama_model *", address)


# ---- a context -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextInfo:
    """struct tca_context_info. active False: the stock cache is in use; the fields before memory_bytes are 0."""

    active: bool
    n_layer: int
    n_head_kv: int
    n_stream: int  # sequences that can live side by side
    n_ctx_seq: int  # tokens a sequence may hold
    kv_bytes: int  # allocated for K, V and positions of the ragged store
    kv_bytes_dense: int  # what the stock cache would allocate for the same layers, n_ctx and types
    memory_bytes: int  # allocated for all layers, those with sliding windows too
    memory_bytes_stock: int  # what llama.cpp's own cache would allocate for all of them (without swa_full)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer, all scaling folded in: pair i of a key at position p was rotated by p*freqs[i].

    type: 0 none, 1 norm (pairs 2i, 2i+1), 2 neox (pairs i, i + n_rot/2); scale: magnitude the rotation multiplied the
    rotated part with; freqs: float32 [n_rot/2], radians a position.
    """

    type: int
    n_rot: int
    scale: float
    freqs: NDArray[np.float32]


def _context(address: int) -> Any:
    if not address:
        raise TcaError("the context is closed: its address is 0")
    ffi, _ = _extension()
    return ffi.cast("struct llama_context *", address)


def context_info(ctx: int) -> ContextInfo:
    """Figures of the llama_context at address ctx."""
    ffi, lib = _extension()
    info = ffi.new("struct tca_context_info *")
    check_status(lib.tca_context_get_info(_context(ctx), info))
    return ContextInfo(**{name: getattr(info, name) for name in ContextInfo.__dataclass_fields__})


def context_sequence(ctx: int, seq_id: int = 0) -> tuple[int, int]:
    """(tokens processed, groups compacted) of a sequence. TcaError if the context uses the stock cache."""
    ffi, lib = _extension()
    out = ffi.new("uint32_t[2]")
    check_status(lib.tca_context_sequence(_context(ctx), seq_id, out, out + 1))
    return int(out[0]), int(out[1])


def region_length(ctx: int, layer: int, seq_id: int, head: int) -> int:
    """Slots in use in the region of one KV head."""
    _, lib = _extension()
    return check_status(lib.tca_context_region_length(_context(ctx), _uint32(layer, "layer"), seq_id, _uint32(head, "head")))


def positions(ctx: int, layer: int, seq_id: int, head: int) -> NDArray[np.int32]:
    """int32 [region length]: position of every slot of a region, oldest first. Waits for pending work of the context."""
    _, lib = _extension()
    out = np.empty(region_length(ctx, layer, seq_id, head), dtype=np.int32)
    if len(out):
        n = check_status(lib.tca_context_positions(_context(ctx), layer, seq_id, head, _pointer(out, "int32_t"), len(out)))
        out = out[:n]
    return out


class Unsupported(TcaError):
    """TCA cannot run this model; the text says why."""


@dataclass(frozen=True)
class ModelShape:
    """What the budgets of a model look like, as the runtime sees it.

    n_layer, n_head_kv: rows and columns of head_config; stored: the layers in the ragged store, which all have the same heads;
    n_head: query heads of one of them, the most; head_dim_k, head_dim_v: elements of one key and one value of one head; n_swa: tokens
    that sliding-window layers see, 0 if there are none; sliding: elements of the keys of one token in all of those layers together,
    and of its values.
    """

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_swa: int
    sliding: tuple[int, int]
    stored: tuple[int, ...]


def model_shape(model: int) -> ModelShape:
    """Shape of a loaded model. model: address of the llama_model. Raises TcaError with the reason if TCA cannot run it."""
    _, lib = _extension()
    return _shape(lib.tca_model_get_shape, _model(model))


def file_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Shape of a model file, from its metadata. Raises Unsupported with the reason if TCA cannot run the model, TcaError if llama.cpp
    cannot read the file."""
    _, lib = _extension()
    return _shape(lib.tca_file_get_shape, os.fsencode(path))


def context_shape(ctx: int) -> ModelShape:
    """Shape of a context's model; see `model_shape`."""
    _, lib = _extension()
    return _shape(lib.tca_context_get_shape, _context(ctx))


def _shape(ask: Callable[..., int], of: Any) -> ModelShape:
    ffi, lib = _extension()
    shape, stored = ffi.new("struct tca_model_shape *"), ffi.new("bool[]", _MAX_LAYERS)
    status = ask(of, shape, stored, _MAX_LAYERS)
    if status == lib.TCA_ERR_UNSUPPORTED:
        raise Unsupported(ffi.string(lib.tca_last_error()).decode("utf-8", "replace"))
    check_status(status)
    return ModelShape(shape.n_layer, shape.n_head, shape.n_head_kv, shape.head_dim_k, shape.head_dim_v, shape.n_ctx_train, shape.n_swa,
                      (shape.sliding_k, shape.sliding_v), tuple(layer for layer in range(shape.n_layer) if stored[layer]))  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures. name: value of ``general.architecture``; inputs: which kinds of attention layers are
    served, of "kv" (every layer alike), "iswa" (some slide), "hybrid" (some are recurrent), "latent" (MLA), none if it is refused; remark: why, or
    what to know."""

    name: str
    inputs: tuple[str, ...]
    remark: str

    @property
    def served(self) -> bool:
        return bool(self.inputs)


def architectures() -> tuple[Architecture, ...]:
    """Every architecture that llama.cpp knows, in the order of the runtime's table."""
    ffi, lib = _extension()
    bits = {"kv": lib.TCA_ARCH_KV, "iswa": lib.TCA_ARCH_ISWA, "hybrid": lib.TCA_ARCH_HYBRID, "latent": lib.TCA_ARCH_LATENT}
    entry, found = ffi.new("struct tca_arch *"), []
    while lib.tca_arch_info(len(found), entry):
        inputs = tuple(name for name, bit in bits.items() if entry.inputs & bit)
        found.append(Architecture(ffi.string(entry.name).decode(), inputs, ffi.string(entry.remark).decode()))
    return tuple(found)


def context_rope(ctx: int, layer: int) -> Rope:
    """Rotary embedding of a layer as this context applies it."""
    ffi, lib = _extension()
    rope, freqs = ffi.new("struct tca_rope *"), np.zeros(_MAX_ROPE_PAIRS, dtype=np.float32)
    check_status(lib.tca_context_rope(_context(ctx), _uint32(layer, "layer"), rope, _pointer(freqs, "float"), len(freqs)))
    return Rope(int(rope.type), int(rope.n_rot), float(rope.scale), freqs[: rope.n_rot // 2].copy())


# ---- selection and attention on plain arrays -------------------------------------------------------------------------


def _impl(name: Impl) -> int:
    _, lib = _extension()
    numbers = {"cpu": lib.TCA_IMPL_CPU, "reference": lib.TCA_IMPL_REFERENCE}
    if name not in numbers:
        raise TcaError(f"impl is {name!r}; it must be one of {', '.join(numbers)}")
    return numbers[name]


def metrics() -> tuple[str, ...]:
    """Names of the selection metrics: the values that ``tca.metric`` may have."""
    ffi, lib = _extension()
    names = []
    while (name := lib.tca_metric_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return tuple(names)


def needs_queries(metric: str) -> bool:
    """Whether the metric looks at the queries of a running model, so that `select` refuses it; False for unknown names."""
    _, lib = _extension()
    return bool(lib.tca_metric_needs_queries(metric.encode()))


def select(
    keys: ArrayLike,
    positions: ArrayLike,
    rope: Rope | None,
    block_size: int,
    keep_counts: Sequence[int] | NDArray[np.integer],
    counts: Sequence[int] | NDArray[np.integer],
    metric: str = "key-diff",
    impl: Impl = "cpu",
    *,
    values: ArrayLike | None = None,
    probe: ArrayLike | None = None,
    layer: int = 0,
    head: int = 0,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Scores and selects the tokens of one group of one KV head.

    keys: float32 [n, head_dim] as stored, after RoPE; positions: int32 [n]; rope: None if the keys carry no rotation;
    counts: blocks that keep keep_counts[j], summing to n/block_size; metric: one of `metrics`;
    values: float32 [n, head_dim_v], for metrics that look at them; probe: float32 [head_dim], for those that use one;
    layer, head: for metrics that tell heads apart.
    Returns (indices of the kept tokens, increasing; importance of every token, float32 [n]).
    """
    ffi, lib = _extension()
    keys_ = np.ascontiguousarray(keys, dtype=np.float32)
    positions_, keep, counts_ = _int32(positions, "positions"), _int32(keep_counts, "keep_counts"), _int32(counts, "counts")
    if keys_.ndim != 2 or positions_.shape != keys_.shape[:1]:
        raise TcaError(f"keys {keys_.shape} and positions {positions_.shape}: [n, head_dim] and [n] are needed")
    if keep.ndim != 1 or keep.shape != counts_.shape:
        raise TcaError(f"keep_counts {keep.shape} and counts {counts_.shape} must be two lists of the same length")
    n, head_dim = keys_.shape
    rope_, freqs = ffi.NULL, None
    if rope is not None:
        freqs = np.ascontiguousarray(rope.freqs, dtype=np.float32)
        if len(freqs) < rope.n_rot // 2:
            raise TcaError(f"rope.freqs has {len(freqs)} entries; n_rot {rope.n_rot} needs {rope.n_rot // 2}")
        rope_ = ffi.new("struct tca_rope *", (rope.type, rope.n_rot, rope.scale, _pointer(freqs, "float")))
    kept, scores = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.float32)
    values_ = None
    if values is not None:
        values_ = np.ascontiguousarray(values, dtype=np.float32)
        if values_.ndim != 2 or len(values_) != n:
            raise TcaError(f"values {values_.shape}: [n, head_dim_v] with n = {n} is needed")
    probe_ = None if probe is None else np.ascontiguousarray(probe, dtype=np.float32)
    if probe_ is not None and probe_.shape != (head_dim,):
        raise TcaError(f"probe {probe_.shape}: [head_dim] with head_dim = {head_dim} is needed")
    group = ffi.new("struct tca_group *", (n, head_dim, 0 if values_ is None else values_.shape[1], layer, head,
                                           _pointer(keys_, "float"), ffi.NULL if values_ is None else _pointer(values_, "float"),
                                           _pointer(positions_, "int32_t"), rope_,
                                           ffi.NULL if probe_ is None else _pointer(probe_, "float")))  # fmt: skip
    m = check_status(lib.tca_select(_impl(impl), metric.encode(), group, block_size, len(keep), _pointer(keep, "int32_t"),
                                    _pointer(counts_, "int32_t"), _pointer(kept, "int32_t"), _pointer(scores, "float")))
    return kept[:m].copy(), scores


def row_bytes(ggml_type: int, n: int) -> int:
    """Bytes of n values of a ggml type; TcaError for an unknown type or an n that is no whole number of its blocks."""
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)]
    except (KeyError, ValueError):
        raise TcaError(f"{ggml_type} is no ggml type that can hold a KV cache") from None
    if n % block:
        raise TcaError(f"ggml type {ggml_type} comes in blocks of {block} values, which do not fill {n}")
    return n // block * size


_DTYPES = {0: np.float32, 1: np.float16}  # ggml types that numpy has too


def _regions(data: Any, ggml_type: int, n_slots: int, head_dim: int, name: str) -> NDArray[np.uint8]:
    """The regions of all heads one after another as bytes."""
    if isinstance(data, (list, tuple)):
        if ggml_type in _DTYPES:
            data = [np.ascontiguousarray(region, dtype=_DTYPES[ggml_type]) for region in data]
        raw = [np.frombuffer(region, np.uint8) if isinstance(region, (bytes, bytearray, memoryview))
               else np.ascontiguousarray(region).reshape(-1).view(np.uint8) for region in data]
        flat = np.concatenate(raw) if raw else np.empty(0, np.uint8)
    elif isinstance(data, np.ndarray):
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    else:
        flat = np.frombuffer(data, np.uint8)
    needed = n_slots * row_bytes(ggml_type, head_dim)
    if flat.nbytes != needed:
        raise TcaError(f"{name} holds {flat.nbytes} bytes; {n_slots} slots of {head_dim} values of ggml type {ggml_type} are {needed}")
    return flat


def attention(
    q: ArrayLike,
    k: Any,
    v: Any,
    type_k: int,
    type_v: int,
    lengths: Sequence[int] | NDArray[np.integer],
    head_dim_k: int,
    head_dim_v: int,
    scale: float,
    softcap: float = 0.0,
    n_threads: int = 1,
    impl: Impl = "cpu",
    sinks: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Ragged attention over one region per KV head, bottom-right causal: query t sees slots [0, lengths[h] - n_tokens + t].

    q: float32 [n_tokens, n_head, head_dim_k]; k, v: one array or bytes per KV head [lengths[h], head_dim], or all of them
    one after another, in the ggml type type_k, type_v (arrays are cast for f32 and f16, quantized data is raw bytes);
    lengths: slots of each region, the n_tokens newest included; softcap: 0, or c in c*tanh(s/c);
    sinks: float32 [n_head], a score of each query head that takes its share of the softmax and adds no value.
    Returns float32 [n_tokens, n_head, head_dim_v].
    """
    ffi, lib = _extension()
    q_ = np.ascontiguousarray(q, dtype=np.float32)
    if q_.ndim != 3 or q_.shape[2] != head_dim_k:
        raise TcaError(f"q has shape {q_.shape}; [n_tokens, n_head, {head_dim_k}] is needed")
    if head_dim_k < 1 or head_dim_v < 1:
        raise TcaError(f"head sizes {head_dim_k}, {head_dim_v} must be positive")
    lengths_ = np.ascontiguousarray(lengths, dtype=np.int64).reshape(-1)
    if len(lengths_) == 0 or lengths_.min() < 0:
        raise TcaError("lengths needs one entry per KV head, none negative")
    n_slots = int(lengths_.sum())
    k_, v_ = _regions(k, type_k, n_slots, head_dim_k, "k"), _regions(v, type_v, n_slots, head_dim_v, "v")
    sinks_ = None if sinks is None else np.ascontiguousarray(sinks, dtype=np.float32)
    if sinks_ is not None and sinks_.shape != (q_.shape[1],):
        raise TcaError(f"sinks has shape {sinks_.shape}; one for each of the {q_.shape[1]} heads is needed")
    out = np.empty((q_.shape[0], q_.shape[1], head_dim_v), dtype=np.float32)
    check_status(lib.tca_attention(_impl(impl), _pointer(q_, "float"), ffi.from_buffer(k_), ffi.from_buffer(v_), type_k, type_v,
                                   q_.shape[0], q_.shape[1], len(lengths_), head_dim_k, head_dim_v,
                                   _pointer(lengths_, "int64_t"), scale, softcap,
                                   ffi.NULL if sinks_ is None else _pointer(sinks_, "float"), n_threads, _pointer(out, "float")))
    return out


# ---- capture ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerQKV:
    """One layer's attention inputs of one micro-batch. The arrays are views that end with the callback: copy what you keep.

    q: float32 [n_head, n_tokens, head_dim_k] after RoPE; k: float32 [n_head_kv, n_kv, head_dim_k] after RoPE, as the cache
    stores it; v: float32 [n_head_kv, n_kv, head_dim_v]. The n_tokens newest keys belong to the queries. sinks: float32 [n_head],
    learned attention sinks (see `attention`), or None.
    """

    layer: int
    n_tokens: int
    n_kv: int
    scale: float
    softcap: float
    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    sinks: NDArray[np.float32] | None = None


class Capture:
    """Hands every layer's Q, K and V to `callback(LayerQKV)` during llama_decode over the stock cache with flash attention.

    Put eval_ptr into llama_context_params.cb_eval and handle into cb_eval_user_data, and keep this object alive as long as
    the context. The callback returns False to abort the forward pass, anything else (None too) to go on. An exception in it
    aborts the pass and is kept in `error`.
    """

    def __init__(self, callback: Callable[[LayerQKV], bool | None]) -> None:
        ffi, lib = _extension()
        _define_on_layer()
        self.callback = callback
        self.error: BaseException | None = None
        self._self = ffi.new_handle(self)
        self._capture = ffi.gc(lib.tca_capture_new(lib.tca_gguf_on_layer, self._self), lib.tca_capture_free)
        self.eval_ptr = int(ffi.cast("uintptr_t", ffi.addressof(lib, "tca_capture_eval")))
        self.handle = int(ffi.cast("uintptr_t", self._capture))

    def _on_layer(self, layer: Any) -> bool:
        ffi, _ = _extension()

        def view(pointer: Any, *shape: int) -> NDArray[np.float32]:
            size = int(np.prod(shape)) * 4
            return np.frombuffer(ffi.buffer(pointer, size), dtype=np.float32).reshape(shape)

        try:
            answer = self.callback(LayerQKV(
                layer.layer, layer.n_tokens, layer.n_kv, layer.scale, layer.softcap,
                view(layer.q, layer.n_head, layer.n_tokens, layer.head_dim_k),
                view(layer.k, layer.n_head_kv, layer.n_kv, layer.head_dim_k),
                view(layer.v, layer.n_head_kv, layer.n_kv, layer.head_dim_v),
                None if layer.sinks == ffi.NULL else view(layer.sinks, layer.n_head),
            ))
        except BaseException as error:  # an exception cannot pass through llama_decode
            self.error = error
            return False
        return answer is not False


@functools.cache
def _define_on_layer() -> None:
    """The C side's one entry into Python; the user data says which Capture is meant."""
    ffi, _ = _extension()

    def failed(_kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """What is raised outside of `_on_layer`'s own guard: Ctrl-C between any two steps of Python. It would be printed and lost."""
        handle = trace.tb_frame.f_locals.get("user_data") if trace is not None else None
        if handle is not None:
            ffi.from_handle(handle).error = error
        else:
            traceback.print_exception(error)  # nobody to tell; the pass ends in any case

    @ffi.def_extern(name="tca_gguf_on_layer", error=False, onerror=failed)
    def on_layer(layer: Any, user_data: Any) -> bool:
        return ffi.from_handle(user_data)._on_layer(layer)


# ---- measuring -------------------------------------------------------------------------------------------------------


def machine_limits(n_threads: int) -> tuple[float, float]:
    """(bytes/s read from memory, f32 operations/s with a multiply-add counting as two), the best that n_threads reach."""
    ffi, lib = _extension()
    out = ffi.new("double[2]")
    check_status(lib.tca_machine_limits(n_threads, out, out + 1))
    return out[0], out[1]


@dataclass(frozen=True)
class PassSeconds:
    """Where the time of forward passes went: attention itself, new keys and values into the cache, selection with compaction,
    everything else."""

    attention: float
    append: float
    select: float
    other: float


class Profile:
    """Times attention inside forward passes. Goes into a context as `Capture` does: eval_ptr, handle, kept alive.

    learn(), decode one micro-batch, take it back; start(), decode the same number of tokens again (any number of times), read().
    off() in between, and before anything that is timed from outside: a context with a profile that is off runs as without one.
    """

    def __init__(self) -> None:
        ffi, lib = _extension()
        self._profile = ffi.gc(lib.tca_profile_new(), lib.tca_profile_free)
        self.eval_ptr = int(ffi.cast("uintptr_t", ffi.addressof(lib, "tca_profile_eval")))
        self.handle = int(ffi.cast("uintptr_t", self._profile))

    def off(self) -> None:
        _, lib = _extension()
        lib.tca_profile_start(self._profile, lib.TCA_PROFILE_OFF)

    def learn(self) -> None:
        _, lib = _extension()
        lib.tca_profile_start(self._profile, lib.TCA_PROFILE_LEARN)

    def start(self) -> None:
        _, lib = _extension()
        lib.tca_profile_start(self._profile, lib.TCA_PROFILE_TIME)

    def read(self) -> PassSeconds:
        """Seconds since start(). TcaError if the graph was another one than the one learned."""
        ffi, lib = _extension()
        out = ffi.new("double[]", lib.TCA_PROFILE_N_CLASSES)
        check_status(lib.tca_profile_read(self._profile, out))
        return PassSeconds(out[lib.TCA_PROFILE_ATTENTION], out[lib.TCA_PROFILE_APPEND], out[lib.TCA_PROFILE_SELECT], out[lib.TCA_PROFILE_OTHER])
