"""A llama_context for tests of the runtime, through llama-cpp-python's ctypes layer over our libraries."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from tca_gguf import gguf_file, llama, native
from tca_gguf.budgets import Budgets

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # ggml types of a cache
SINKS, WINDOW, GROUP, BLOCK = 16, 48, 64, 16  # small, so that a few hundred tokens are compacted several times
FIRST = SINKS + WINDOW + GROUP  # tokens after which the first group goes

# blocks of a group that keep so many of their 16 tokens; the first row keeps nothing
KEEP_COUNTS = (0, 1, 2, 4, 8, 16)
CONFIGS = np.array([[4, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 2, 2, 0], [0, 0, 0, 0, 0, 4], [0, 2, 0, 0, 0, 2]], np.int32)


def make_budgets(path: Path, dense: bool = False, seed: int = 1, **changes: Any) -> Budgets:
    """Heads of every kind: the five configurations and dense, in no order; or all dense."""
    shape = gguf_file.model_shape(path)
    heads = np.random.default_rng(seed).integers(-1, len(CONFIGS), (shape.n_layer, shape.n_head_kv)).astype(np.int32)
    if dense:
        heads[:] = -1
    values: dict[str, Any] = dict(version=1, block_size=BLOCK, group_size=GROUP, window=WINDOW, sinks=SINKS, metric="key-diff",
                                  keep_counts=KEEP_COUNTS, configs=CONFIGS, head_config=heads, kept_fraction=0.5)  # fmt: skip
    return Budgets(**{**values, **changes})


def write_model(source: Path, target: Path, *, layers: int | None = None, f32: bool = False, arch: str | None = None,
                tensors: bool = True, tokenizer: bool = False) -> Path:
    """A copy of a GGUF model: the first layers only, weights as f32, under another architecture's name, metadata only. Without
    the tokenizer, which is slow to copy, unless it is asked for."""
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    old = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, arch or old)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name.startswith("tokenizer.") and not tokenizer:
            continue
        value = field.contents()
        if field.name == f"{old}.block_count" and layers:
            value = layers
        name = f"{arch}.{field.name.split('.', 1)[1]}" if arch and field.name.startswith(f"{old}.") else field.name
        kind = field.types[0]
        writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)
    if not tokenizer:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
    if arch and f"{arch}.attention.layer_norm_epsilon" not in reader.fields:
        writer.add_float32(f"{arch}.attention.layer_norm_epsilon", 1e-5)  # what architectures without RMS norms ask for
    for tensor in reader.tensors if tensors else []:
        if layers and tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        if f32:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LoadError(Exception):
    """The text of llama.cpp's log."""


class Context:
    """A model and a context of one thread. Tokens are lists of ints; positions of a sequence count from 0.

    source: path of a model, or something with the `handle` of an open one, which stays open.
    """

    lines: list[str] = []
    _log: Any = None

    def __init__(self, source: Any, *, n_ctx: int = 1024, n_ubatch: int = 512, n_batch: int = 2048, type_k: int = F32, type_v: int = F32,
                 n_seq_max: int = 1, kv_unified: bool = False, flash: int | None = None, enabled: bool | int | str | None = None,
                 swa_full: bool = True, embeddings: bool = False, abort: Callable[[], bool] | None = None, profile: native.Profile | None = None,
                 capture: native.Capture | None = None, other: Any = None) -> None:  # fmt: skip
        self.C = C = llama.load().llama_cpp
        self._take_log()
        self.model = self.ctx = None
        params = C.llama_model_default_params()
        if enabled is not None:
            override = (C.llama_model_kv_override * 2)()
            override[0].key = b"tca.enabled"
            if isinstance(enabled, bool):
                override[0].tag, override[0].value.val_bool = C.LLAMA_KV_OVERRIDE_TYPE_BOOL, enabled
            elif isinstance(enabled, int):
                override[0].tag, override[0].value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, enabled
            else:
                override[0].tag, override[0].value.val_str = C.LLAMA_KV_OVERRIDE_TYPE_STR, enabled.encode()
            self._override = params.kv_overrides = override
        self._owned = not hasattr(source, "handle")
        self.model = C.llama_model_load_from_file(str(source).encode(), params) if self._owned else source.handle
        if not self.model:
            raise LoadError("".join(self.lines))
        p = C.llama_context_default_params()
        p.n_ctx, p.n_ubatch, p.n_batch, p.n_seq_max, p.kv_unified = n_ctx, n_ubatch, n_batch, n_seq_max, kv_unified
        p.type_k, p.type_v, p.no_perf, p.n_threads, p.n_threads_batch = type_k, type_v, True, 1, 1
        p.swa_full, p.embeddings = swa_full, embeddings
        # stock flash attention rounds f32 caches to f16; without it a quantized V is refused
        p.flash_attn_type = int(type_v in (Q4_0, Q8_0)) if flash is None else flash
        if abort is not None:
            self._abort = C.ggml_abort_callback(lambda _: abort())
            p.abort_callback = self._abort
        self._profile = profile
        if profile is not None:
            p.cb_eval, p.cb_eval_user_data = type(p.cb_eval)(profile.eval_ptr), profile.handle
        if other is not None:
            p.ctx_other = other
        self._capture = capture
        if capture is not None:
            p.cb_eval, p.cb_eval_user_data = type(p.cb_eval)(capture.eval_ptr), capture.handle
        self.ctx = C.llama_init_from_model(self.model, p)
        if not self.ctx:
            if self._owned:
                C.llama_model_free(self.model)
            raise LoadError("".join(self.lines))
        self.address = ctypes.cast(self.ctx, ctypes.c_void_p).value or 0
        self.memory = C.llama_get_memory(self.ctx)
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.model))
        self.n_batch = n_batch

    def _take_log(self) -> None:
        """The lines of the log since the last context was opened; kept by the class, as the library keeps the callback."""
        Context.lines = []
        last = 0

        def receive(level: int, text: bytes, _: object) -> None:
            nonlocal last
            last = last if level == 5 else level  # 5 continues the line before
            if last >= 2:  # info
                Context.lines.append(text.decode("utf-8", "replace"))

        Context._log = self.C.llama_log_callback(receive)
        self.C.llama_log_set(Context._log, ctypes.c_void_p(0))

    def close(self) -> None:
        if self.ctx:
            self.C.llama_free(self.ctx)
            if self._owned:
                self.C.llama_model_free(self.model)
            self.ctx = self.model = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> int:
        """llama_decode of (token, position, sequences, wants logits) entries. Returns its status."""
        C = self.C
        b = C.llama_batch_init(len(tokens), 0, max(len(seqs) for _, _, seqs, _ in tokens))
        b.n_tokens = len(tokens)
        for i, (token, position, sequences, logits) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, len(sequences), logits
            for j, sequence in enumerate(sequences):
                b.seq_id[i][j] = sequence
        status = C.llama_decode(self.ctx, b)
        C.llama_batch_free(b)
        return status

    def logits(self, index: int = -1) -> np.ndarray:
        return np.ctypeslib.as_array(self.C.llama_get_logits_ith(self.ctx, index), shape=(self.n_vocab,)).copy()

    def feed(self, ids: Sequence[int], seq: int = 0, every: int = 0) -> np.ndarray:
        """Appends tokens to a sequence; logits of the last, or of each every-th and the last as [n, n_vocab]."""
        start, rows = self.pos_max(seq) + 1, []
        for i in range(0, len(ids), self.n_batch):
            part = ids[i : i + self.n_batch]
            want = [i + j == len(ids) - 1 or (every > 0 and (i + j) % every == 0) for j in range(len(part))]
            status = self.batch([(t, start + i + j, [seq], want[j]) for j, t in enumerate(part)])
            assert status == 0, f"llama_decode: {status}"
            rows += [self.logits(j) for j in range(len(part)) if want[j]]
        return np.stack(rows) if every else rows[-1]

    def greedy(self, ids: Sequence[int], n: int, seq: int = 0) -> list[int]:
        out = [int(self.feed(ids, seq).argmax())]
        while len(out) < n:
            out.append(int(self.feed(out[-1:], seq).argmax()))
        return out

    # ---- memory ------------------------------------------------------------------------------------------------------

    def pos_min(self, seq: int = 0) -> int:
        return self.C.llama_memory_seq_pos_min(self.memory, seq)

    def pos_max(self, seq: int = 0) -> int:
        return self.C.llama_memory_seq_pos_max(self.memory, seq)

    def rm(self, seq: int, p0: int, p1: int) -> bool:
        return self.C.llama_memory_seq_rm(self.memory, seq, p0, p1)

    def info(self) -> native.ContextInfo:
        return native.context_info(self.address)

    def sequence(self, seq: int = 0) -> tuple[int, int]:
        return native.context_sequence(self.address, seq)

    def positions(self, seq: int = 0) -> list[np.ndarray]:
        """Positions of every region of a sequence, layer by layer and head by head."""
        info = self.info()
        return [native.positions(self.address, layer, seq, head) for layer in range(info.n_layer) for head in range(info.n_head_kv)]

    # ---- state -------------------------------------------------------------------------------------------------------

    def save(self, seq: int | None = None, partial: bool = False) -> bytes:
        C = self.C
        flags = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        size = C.llama_state_get_size(self.ctx) if seq is None else C.llama_state_seq_get_size_ext(self.ctx, seq, flags)
        buffer = (ctypes.c_uint8 * size)()
        n = C.llama_state_get_data(self.ctx, buffer, size) if seq is None else C.llama_state_seq_get_data_ext(self.ctx, buffer, size, seq, flags)
        assert n == size > 0
        return bytes(buffer)

    def load(self, data: bytes, seq: int | None = None, partial: bool = False) -> int:
        """Bytes read, 0 on failure."""
        C = self.C
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        flags = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        return (C.llama_state_set_data(self.ctx, buffer, len(data)) if seq is None else
                C.llama_state_seq_set_data_ext(self.ctx, buffer, len(data), seq, flags))  # fmt: skip


def same_positions(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
