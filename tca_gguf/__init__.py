"""TCA-Attention inside llama.cpp: per-head KV budgets for GGUF models.

    from tca_gguf import Llama
    llm = Llama("model.gguf", n_ctx=32768)      # llama-cpp-python's class over the patched runtime

Importing the package loads no native library; the first use of `Llama` or of `tca_gguf.native` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tca_gguf.errors import TcaError

if TYPE_CHECKING:
    from tca_gguf.budgets import Budgets
    from tca_gguf.llama import Llama

__version__ = "0.1.0"
__all__ = ["Budgets", "Llama", "TcaError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Llama":
        from tca_gguf.llama import Llama

        return Llama
    if name == "Budgets":
        from tca_gguf.budgets import Budgets

        return Budgets
    raise AttributeError(f"module 'tca_gguf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
