"""Opening a model for the commands: llama-cpp-python's Llama over our libraries, with errors in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import logs
from .errors import TcaError
from .kv import KV_TYPES, UBATCH, context_size

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["KV_TYPES", "UBATCH", "check_model", "context_address", "context_size", "default_threads", "open_llama"]


def default_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def check_model(path: str | os.PathLike[str]) -> bool:
    """Whether the file carries valid budgets that are enabled. Raises TcaError: no GGUF file, or a bad ``tca.*`` key."""
    from . import native

    path = Path(path)
    if path.is_dir():
        raise TcaError(f"{path} is a directory; give the path of a GGUF file")
    if not path.exists():
        raise TcaError(f"{path} does not exist")
    return native.file_check(path)


def open_llama(
    path: str | os.PathLike[str],
    *,
    n_ctx: int,
    kv_type: str = "f16",
    dense: bool = False,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    rpc_servers: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
    checkpoint_bytes: int | None = None,
) -> Llama:
    """A tca_gguf.Llama with a context of ``n_ctx`` tokens (0: as the model was trained). dense: ignore the file's budgets.
    rpc_servers: "host:port,...", machines that may take the layers of n_gpu_layers.

    The stock cache runs without flash attention on the CPU where its type allows: that is the faster way there.

    Raises TcaError with what llama.cpp's log says if the model or the context cannot be made.
    """
    from .llama import llama_class, load

    if not dense:
        check_model(path)
    llama_cpp = load()
    log = logs.take_over(llama_cpp, verbose)
    threads = n_threads or default_threads()
    try:
        return llama_class()(
            model_path=str(path),
            n_ctx=n_ctx,
            n_batch=UBATCH,
            n_ubatch=UBATCH,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=n_gpu_layers,
            rpc_servers=rpc_servers,
            kv_overrides={"tca.enabled": False} if dense else None,
            type_k=KV_TYPES[kv_type],
            type_v=KV_TYPES[kv_type],
            flash_attn=not dense or n_gpu_layers != 0 or kv_type != "f16",
            seed=llama_cpp.LLAMA_DEFAULT_SEED if seed is None else seed,
            verbose=verbose,
            checkpoint_bytes=checkpoint_bytes,
        )
    except (ValueError, RuntimeError) as error:
        reason = log.reason() or str(error)
        raise TcaError(f"{path}: {reason}" if str(path) not in reason else reason) from None


def context_address(llm: Llama) -> int:
    """Address of the llama_context, as `native` takes it."""
    return int(llm.ctx)
