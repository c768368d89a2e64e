"""A model and contexts of the patched runtime, as calibration and evaluation need them: one sequence, plain decode."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from tca_gguf.errors import TcaError
from tca_gguf.loading import default_threads

if TYPE_CHECKING:
    from tca_gguf import native
    from tca_gguf.budgets import Budgets


def _address(pointer: Any) -> int:
    return int(pointer if isinstance(pointer, int) else ctypes.cast(pointer, ctypes.c_void_p).value or 0)


class Model:
    """The weights and the tokenizer of a model; contexts are made from it with `Session`.

    overrides: GGUF keys to override at load, ``{"tca.enabled": False}`` for the stock cache.
    Raises TcaError if loading fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overrides: Mapping[str, bool | int | float] | None = None,
        n_gpu_layers: int = 0,
    ) -> None:
        from tca_gguf import llama

        self._lib = lib = llama.load().llama_cpp  # the layer of plain ctypes functions
        self.path = Path(path)
        self.handle = None
        if not self.path.is_file():
            raise TcaError(f"{self.path}: no such file")
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.kv_overrides = self._overrides = self._override_array(overrides or {})
        self.handle = lib.llama_model_load_from_file(str(self.path).encode(), params)
        if not self.handle:
            self.handle = None
            raise TcaError(f"{self.path}: llama.cpp cannot load this model; its log says why")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(self.handle))
        self.n_vocab = int(lib.llama_vocab_n_tokens(self.vocab))

    @functools.cached_property
    def shape(self) -> native.ModelShape:
        """What the model's budgets look like. Raises TcaError with the reason if TCA cannot run it."""
        from tca_gguf import native

        try:
            return native.model_shape(_address(self.handle))
        except TcaError as error:
            raise TcaError(f"{self.path}: {error}") from None

    @property
    def n_layer(self) -> int:
        return self.shape.n_layer

    @property
    def n_head_kv(self) -> int:
        return self.shape.n_head_kv

    def _override_array(self, overrides: Mapping[str, bool | int | float]) -> Any:
        lib = self._lib
        array = (lib.llama_model_kv_override * (len(overrides) + 1))()  # an empty key ends the array
        for entry, (key, value) in zip(array, overrides.items(), strict=False):
            entry.key = key.encode()
            if isinstance(value, bool):
                entry.tag, entry.value.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            elif isinstance(value, int):
                entry.tag, entry.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
            else:
                entry.tag, entry.value.val_f64 = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        return array

    def set_budgets(self, budgets: Budgets | None) -> None:
        """Sessions opened from now on use these budgets in place of the file's; None: the stock cache."""
        from tca_gguf import native

        native.model_set_budgets(_address(self.handle), budgets)

    def tokenize(self, text: str, first: bool = False, special: bool = False) -> list[int]:
        """Token ids. first: with the tokens that start a sequence; special: control tokens in the text are recognised."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        buffer = (self._lib.llama_token * room)()
        n = self._lib.llama_tokenize(self.vocab, raw, len(raw), buffer, room, first, special)
        if n < 0:
            raise TcaError(f"{self.path}: the tokenizer failed on {text[:40]!r}")
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, control tokens as they are written."""
        n = -256  # a longer piece is answered with minus its length
        while n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:n]

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", errors="replace")

    def is_end(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        if self.handle is not None:
            self._lib.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session:
    """A context for one sequence of at most ``n_ctx`` tokens.

    model: a `Model`, which stays open when the session is closed; or a path, loaded with ``overrides`` for this session.
    capture: a `native.Capture`, called with each layer's attention inputs; it needs flash attention.
    n_outputs: tokens of a batch whose logits are asked for at most; 1 saves a buffer of n_ubatch x n_vocab floats.
    n_ctx 0: the context the model was trained with. type_k, type_v: ggml types of the cache (default f16); flash: flash
    attention, which the ragged cache and quantized values need. Raises TcaError if loading fails.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        n_ctx: int = 0,
        *,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        overrides: Mapping[str, bool | int | float] | None = None,
        capture: Any = None,
        n_outputs: int = 1,
        type_k: int | None = None,
        type_v: int | None = None,
        flash: bool = True,
    ) -> None:
        self._ctx = None
        self._owned = None if isinstance(model, Model) else Model(model, overrides=overrides)
        self.model = model if isinstance(model, Model) else self._owned
        self._lib = lib = self.model._lib
        self._capture = capture  # its address is inside the context: it must outlive it

        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx or self.n_ctx_train
        params.n_batch = params.n_ubatch = min(n_ubatch, params.n_ctx)
        params.n_seq_max = 1
        params.n_outputs_max = n_outputs
        params.n_threads = params.n_threads_batch = n_threads or default_threads()
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        if capture is not None:
            params.cb_eval = ctypes.cast(capture.eval_ptr, type(params.cb_eval))
            params.cb_eval_user_data = capture.handle
        self.n_batch = int(params.n_batch)
        self._ctx = lib.llama_init_from_model(self.model.handle, params)
        if not self._ctx:
            self._ctx = None
            self.close()
            raise TcaError(f"{self.path}: cannot create a context of {n_ctx} tokens; a smaller one needs less memory")
        self._memory = lib.llama_get_memory(self._ctx)
        self.n_ctx = int(lib.llama_n_ctx(self._ctx))

    # what a session knows of its model
    path = property(lambda self: self.model.path)
    shape = property(lambda self: self.model.shape)
    n_layer = property(lambda self: self.model.shape.n_layer)
    n_head_kv = property(lambda self: self.model.shape.n_head_kv)
    n_ctx_train = property(lambda self: self.model.n_ctx_train)
    n_vocab = property(lambda self: self.model.n_vocab)

    def tokenize(self, text: str, first: bool = False, special: bool = False) -> list[int]:
        return self.model.tokenize(text, first, special)

    def text(self, tokens: Sequence[int]) -> str:
        return self.model.text(tokens)

    def is_end(self, token: int) -> bool:
        return self.model.is_end(token)

    @property
    def address(self) -> int:
        """Address of the llama_context, as `native` takes it."""
        return _address(self._ctx)

    def decode(self, tokens: Sequence[int]) -> None:
        """Appends tokens to the sequence, in batches of n_batch."""
        for start in range(0, len(tokens), self.n_batch):
            part = [int(t) for t in tokens[start : start + self.n_batch]]
            array = (self._lib.llama_token * len(part))(*part)
            status = self._lib.llama_decode(self._ctx, self._lib.llama_batch_get_one(array, len(part)))
            if status != 0:
                raise TcaError(f"{self.path}: llama_decode failed with status {status} after {start} tokens")

    def wait(self) -> None:
        """Returns when everything that was started is done; for timing."""
        self._lib.llama_synchronize(self._ctx)

    def decode_logits(self, tokens: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
        """Appends at most n_batch tokens; logits after those at the indices ``wanted``, float32 [len(wanted), n_vocab] (a copy)."""
        lib, start = self._lib, self.length()
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = int(token), start + i, 1, 0
                batch.logits[i] = False
            for i in wanted:
                batch.logits[i] = True
            status = lib.llama_decode(self._ctx, batch)
        finally:
            lib.llama_batch_free(batch)
        if status != 0:
            raise TcaError(f"{self.path}: llama_decode failed with status {status} after {start} tokens")
        rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(self._ctx, i), shape=(self.n_vocab,)).copy() for i in wanted]
        return np.stack(rows) if rows else np.zeros((0, self.n_vocab), np.float32)

    def logits(self) -> np.ndarray:
        """Logits of the last token, float32 [n_vocab] (a copy)."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._ctx, -1), shape=(self.n_vocab,)).copy()

    def length(self) -> int:
        """Tokens in the sequence."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, 0)) + 1

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)

    def remove_tail(self, n_tokens: int) -> bool:
        """Cuts the sequence back to ``n_tokens``. False (and nothing changed) if the cache cannot forget that much."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, 0, n_tokens, -1))

    def save(self) -> bytes:
        """The sequence's whole state."""
        size = self._lib.llama_state_seq_get_size(self._ctx, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = self._lib.llama_state_seq_get_data(self._ctx, buffer, size, 0)
        if written == 0:
            raise TcaError(f"{self.path}: the state of the sequence cannot be saved")
        return bytes(memoryview(buffer)[:written])

    def restore(self, state: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self._lib.llama_state_seq_set_data(self._ctx, buffer, len(state), 0) == 0:
            raise TcaError(f"{self.path}: the state of the sequence cannot be restored")

    def close(self) -> None:
        if self._ctx is not None:
            self._lib.llama_free(self._ctx)
            self._ctx = None
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
