"""tca_gguf.Llama: llama-cpp-python's class, which goes back in a conversation without reading all of it again.

Every argument and method of llama_cpp.Llama works. What differs: a prompt goes into the cache by `Prefix.fill` (checkpoints.py), so
that everything built on `generate` (completions, chat completions, the RAM and disk caches, the server) uses checkpoints.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import names
from .checkpoints import Checkpoints, Prefix


@functools.cache
def subclass(base: type) -> type:
    """The subclass of a llama_cpp.Llama; the class itself if it is one already (the server puts ours in its place)."""
    if base.__module__ == "tca_gguf.llama":
        return base

    class Llama(base):  # type: ignore[misc, valid-type]
        """llama_cpp.Llama with checkpoints. Two arguments more:

        checkpoint_bytes: host memory that checkpoints may take, in bytes; 0: none. [default: TCA_CHECKPOINT_MIB, else 512 MiB]
        rpc_servers: "host:port,...", machines that may take layers (tca_gguf.remote).

        `prefix.last` says what the last prompt took, `checkpoints` what is kept. With a cache that takes back any number of
        tokens (no budgets, plain attention) no checkpoints are made.
        """

        def __init__(self, model_path: str, *, checkpoint_bytes: int | None = None, rpc_servers: str | None = None, **kwargs: Any) -> None:
            checkpoints = Checkpoints(checkpoint_bytes)  # a bad bound is refused before the model is loaded
            if rpc_servers:
                from tca_gguf.remote import add_servers

                add_servers(rpc_servers)
            super().__init__(str(names.resolve(model_path)), **kwargs)
            # llama.cpp rounds n_ctx up to a multiple of 256; the layer keeps arrays of the n_ctx that was asked for, and a text
            # that passes it ends in a numpy error
            n_ctx = int(self.n_ctx())
            if len(self.input_ids) < n_ctx:
                self.input_ids = np.zeros(n_ctx, dtype=self.input_ids.dtype)
                if self._logits_all:
                    self.scores = np.zeros((n_ctx, self.scores.shape[1]), dtype=self.scores.dtype)
            self.checkpoint_bytes = checkpoint_bytes
            self.prefix = Prefix(self, checkpoints)

        @property
        def checkpoints(self) -> Checkpoints:
            return self.prefix.checkpoints

        def reset(self) -> None:
            """Forgets the tokens and the checkpoints: the next prompt is evaluated whole."""
            super().reset()
            if "prefix" in self.__dict__:
                self.checkpoints.clear()

        def eval(self, tokens: Sequence[int]) -> None:
            if "prefix" in self.__dict__:
                self.prefix.catch_up()
            super().eval(tokens)

        def generate(self, *args: Any, **kwargs: Any) -> Iterator[int]:
            call = inspect.signature(super().generate).bind(*args, **kwargs)
            tokens = call.arguments["tokens"] = list(call.arguments["tokens"])
            if call.arguments.get("reset", True) and tokens:
                self.prefix.fill(tokens)  # from here on the prompt is in the cache, and the layer samples at once
            return (yield from super().generate(*call.args, **call.kwargs))

        def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for response in super()._create_completion(*args, **kwargs):
                if "usage" in response:  # as OpenAI's API says it
                    response["usage"]["prompt_tokens_details"] = {"cached_tokens": self.prefix.last.kept_tokens}
                yield response

        # ---- states: for LlamaRAMCache, LlamaDiskCache and callers -------------------------------------------------

        def save_state(self) -> Any:
            """The context's state with its checkpoints. Scores are kept only where they are computed (logits_all)."""
            lib = self.prefix._lib
            size = int(lib.llama_state_get_size(self.ctx))
            data = (ctypes.c_uint8 * size)()
            written = int(lib.llama_state_get_data(self.ctx, data, size))
            if not 0 < written <= size:
                raise RuntimeError("Failed to copy llama state data")
            n_rows = self.n_tokens if self._logits_all else 0
            state = sys.modules[base.__module__].LlamaState(
                input_ids=self.input_ids.copy(),
                scores=self.scores[:n_rows].copy(),
                n_tokens=self.n_tokens,
                llama_state=bytes(memoryview(data)[:written]),
                llama_state_size=written + self.checkpoints.n_bytes,  # what the caches count against their capacity
                seed=self._seed,
            )
            state.input_ids[self.n_tokens :] = -1  # a cache compares all of them with a prompt
            state.checkpoints = list(self.checkpoints)
            return state

        def load_state(self, state: Any) -> None:
            """Brings a saved state back. RuntimeError, and everything as it was, if the context refuses it."""
            lib = self.prefix._lib
            size = len(state.llama_state)
            data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
            if lib.llama_state_set_data(self.ctx, data, size) != size:
                raise RuntimeError("Failed to set llama state data")
            rows = np.asarray(state.scores)
            self.scores[: len(rows), :] = rows
            self.scores[len(rows) :, :] = 0.0
            self.input_ids = state.input_ids.copy()
            self.n_tokens, self._requires_eval, self._seed = state.n_tokens, True, state.seed
            self.checkpoints.replace(getattr(state, "checkpoints", ()))

        def __getstate__(self) -> dict[str, Any]:
            return super().__getstate__() | {"checkpoint_bytes": self.checkpoint_bytes}

    Llama.__module__, Llama.__qualname__ = "tca_gguf.llama", "Llama"  # where pickle finds it
    return Llama
