"""TCA-Attention inside llama.cpp: per-head KV budgets for GGUF models.

    from tca_gguf import Llama
    llm = Llama("model.gguf", n_ctx=32768)      # llama-cpp-python's class over the patched runtime

`import llama_cpp` after `import tca_gguf` gives llama-cpp-python over the patched runtime, too. Importing the package loads no
native library; the first use of `Llama`, of `tca_gguf.native` or of llama_cpp does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any


def _find_built_package() -> None:
    """Lets `python -m tca_gguf` work inside the checkout after `pip install .`.

    Python looks in the current folder first and finds this source package, which has no native part. All modules then come
    from the installed package. Where none is installed nothing changes, and the first use of the native part says so.
    """
    if importlib.util.find_spec(f"{__name__}._tca"):
        return
    source = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.realpath(path) != source])
    if spec is not None and spec.origin is not None:
        __path__[:] = spec.submodule_search_locations or []


_find_built_package()

from tca_gguf.errors import TcaError  # noqa: E402


class LayerFinder:
    """Tells Python's import system that llama_cpp is the layer over our libraries; stands in sys.meta_path and loads nothing itself."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "llama_cpp" or path is not None:
            return None
        from tca_gguf.llama import find_layer

        return find_layer()


if not any(getattr(finder, "__name__", "") == "LayerFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, LayerFinder)

if TYPE_CHECKING:
    from collections.abc import Sequence

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
