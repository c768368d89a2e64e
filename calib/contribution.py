"""What a query head's output adds to the layer: the lengths that the output projection gives to it.

A layer adds ``sum over heads of W_h o_h`` to the residual stream, ``W_h`` [n_embd, head_dim_v] the head's columns of the output
projection. Only lengths ``||W_h x||`` are needed, so ``W_h^T W_h`` is kept in its place: 64 KB a head of 128 in place of 2 MB.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np

from tca_gguf.errors import TcaError

Grams = Callable[[int, int, int], np.ndarray]


def equal_heads(layer: int, n_head: int, head_dim_v: int) -> np.ndarray:
    """As if the output projection kept every length: float32 [n_head, head_dim_v, head_dim_v]."""
    return np.broadcast_to(np.eye(head_dim_v, dtype=np.float32), (n_head, head_dim_v, head_dim_v))


def output_grams(model_path: str | os.PathLike[str]) -> Grams:
    """(layer, n_head, head_dim_v) -> W_h^T W_h of every head, float32 [n_head, head_dim_v, head_dim_v].

    The weights are read from the file a layer at a time. Raises TcaError if the file does not hold them under the name that
    llama.cpp gives them, with the expected shape, in a type that the gguf package can read.
    """
    from gguf.quants import dequantize

    from tca_gguf.gguf_file import open_header, split_parts

    tensors = {tensor.name: tensor for part in split_parts(model_path) for tensor in open_header(part).tensors}

    @functools.cache
    def grams(layer: int, n_head: int, head_dim_v: int) -> np.ndarray:
        name = f"blk.{layer}.attn_output.weight"
        if name not in tensors:
            raise TcaError(f"{os.fspath(model_path)} has no tensor {name}: the output projection of its attention is not known; --cost head does without it")
        tensor = tensors[name]
        try:
            weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise TcaError(f"{os.fspath(model_path)}: {name} has type {tensor.tensor_type.name}, which gguf cannot read; --cost head does without it") from None
        latent = tensors.get(f"blk.{layer}.attn_v_b.weight")
        if latent is not None and weights.ndim == 2 and weights.shape[1] % n_head == 0:
            # latent attention: a head's values are made from latent ones, [n_head, head, head_dim_v], before the projection
            expand = dequantize(latent.data, latent.tensor_type).astype(np.float32, copy=False).reshape(n_head, -1, head_dim_v)
            heads = weights.reshape(len(weights), n_head, -1).transpose(1, 0, 2)
            return expand.transpose(0, 2, 1) @ (heads.transpose(0, 2, 1) @ heads) @ expand
        if weights.ndim != 2 or weights.shape[1] != n_head * head_dim_v:
            raise TcaError(f"{os.fspath(model_path)}: {name} is {weights.shape}, not [n_embd, {n_head} heads of {head_dim_v}]")
        heads = weights.reshape(len(weights), n_head, head_dim_v).transpose(1, 0, 2)
        return np.matmul(heads.transpose(0, 2, 1), heads)

    return grams
