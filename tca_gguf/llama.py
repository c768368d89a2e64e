"""llama-cpp-python's layer of the pinned version over our libraries.

    from tca_gguf.llama import Llama        # llama-cpp-python's class with checkpoints (llama_class.py); every argument works
    llama_cpp = load()                      # the module itself, as it is

Our libraries and the Python layer must come from one release: its ctypes definitions mirror the structs of that llama.cpp.
`load` therefore takes the installed llama-cpp-python if its version is the pinned one, and the copy inside this package
(_layer) if none is installed; any other version is refused with the command that fixes it. Nothing is patched: the layer
is pointed at our libraries through its own LLAMA_CPP_LIB_PATH, for the time of the import only.

`import tca_gguf; import llama_cpp` does the same: importing the package tells Python's import system where llama_cpp is
(`tca_gguf.LayerFinder`), and loads nothing. Programs that do not import tca_gguf: see dropin.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from contextlib import contextmanager
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tca_gguf.errors import TcaError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["Llama", "lib_dir", "llama_class", "load", "package_dir", "pinned_version", "program"]


def package_dir() -> Path:
    """Folder of the built package, where lib/, bin/ and the extension are (not the source tree of an editable install)."""
    spec = importlib.util.find_spec("tca_gguf._tca")
    if spec is None or spec.origin is None:
        raise TcaError("tca_gguf is installed without its native part; run: pip install . (in the checkout of tca-gguf)")
    return Path(spec.origin).parent


def lib_dir() -> Path:
    """Folder of libllama and the ggml libraries."""
    return package_dir() / "lib"


_RENAMED = {"rpc-server": "ggml-rpc-server"}  # what llama.cpp called it, and its documentation still does


def program(name: str) -> Path:
    """Path of one of llama.cpp's programs built from the same tree: llama-bench, llama-server, ..."""
    folder = package_dir() / "bin"
    file = _RENAMED.get(name, name)
    path = folder / (f"{file}.exe" if sys.platform == "win32" else file)
    if not path.is_file():
        there = sorted(entry.stem for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
        raise TcaError(f"{name} is not in {folder}; " + (f"it has {', '.join(there)}" if there else
                       "reinstall without -DTCA_BUILD_PROGRAMS=OFF in CMAKE_ARGS"))
    return path


def pinned_version() -> str:
    """Version of llama-cpp-python that our libraries were built from (native/upstream.toml)."""
    path = package_dir() / "upstream.toml"
    try:
        with open(path, "rb") as file:
            return str(tomllib.load(file)["version"])
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise TcaError(f"{path} is damaged ({error}); reinstall tca-gguf") from None


# ---- which layer -----------------------------------------------------------------------------------------------------


def version_in(init: Path) -> str | None:
    """__version__ of a llama_cpp package, read from its __init__.py: importing it would load its libraries."""
    try:
        text = init.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _fix(pin: str) -> str:
    return (f"run: pip uninstall llama-cpp-python, and tca_gguf uses its own copy of {pin} (for programs that import llama_cpp "
            "without tca_gguf run after it: tca-gguf activate)")  # fmt: skip


def layer_spec(installed: ModuleSpec | None, pin: str, own: Path) -> ModuleSpec:
    """The llama_cpp package to import: the installed one if it has the pinned version, else the copy in `own`.

    TcaError if another version is installed, or if neither is there.
    """
    if installed is not None:
        version = version_in(Path(installed.origin or ""))
        if version != pin:
            where = Path(installed.origin).parent if installed.origin else "an unknown place"
            raise TcaError(f"llama-cpp-python {version or 'of an unknown version'} is installed in {where}, "
                           f"but this tca_gguf was built from {pin}; {_fix(pin)}")
        return installed
    init = own / "llama_cpp" / "__init__.py"
    if not init.is_file():
        raise TcaError(f"tca_gguf carries no Python layer of llama-cpp-python {pin}; reinstall tca-gguf, or run: "
                       f'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python=={pin}')  # fmt: skip
    spec = importlib.util.spec_from_file_location("llama_cpp", init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    return spec


def check_loaded(module: ModuleType, pin: str, libraries: Path) -> None:
    """TcaError unless an already imported llama_cpp has the pinned version and runs on `libraries`."""
    loaded = getattr(getattr(module, "llama_cpp", None), "_lib", None)
    path = Path(getattr(loaded, "_name", None) or "unknown")
    version = getattr(module, "__version__", None)
    if version != pin:
        raise TcaError(f"llama_cpp {version or 'of an unknown version'} was imported before tca_gguf, "
                       f"which was built from {pin}; {_fix(pin)}")
    if not path.is_file() or path.resolve().parent != libraries.resolve():
        raise TcaError(f"llama_cpp was imported before tca_gguf and runs on {path}; import tca_gguf first, "
                       "or start the program with: tca-gguf exec python ...")  # fmt: skip


@contextmanager
def _library_path(libraries: Path) -> Iterator[None]:
    """LLAMA_CPP_LIB_PATH and MTMD_CPP_LIB, which the layer reads while it is imported."""
    names = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(libraries)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class LayerLoader(SourceFileLoader):
    """Executes the llama_cpp package over `libraries`."""

    libraries: Path

    def exec_module(self, module: ModuleType) -> None:
        with _library_path(self.libraries):
            super().exec_module(module)
            if any(self.libraries.glob("*mtmd*")):
                importlib.import_module("llama_cpp.mtmd_cpp")  # images and sound; it would look for its library later


def layer_over(libraries: Path, spec: ModuleSpec) -> ModuleSpec:
    """The llama_cpp package of ``spec``, to be executed over ``libraries``."""
    assert spec.origin is not None
    loader = LayerLoader("llama_cpp", spec.origin)
    loader.libraries = libraries
    ours = importlib.util.spec_from_file_location("llama_cpp", spec.origin, loader=loader,
                                                  submodule_search_locations=list(spec.submodule_search_locations or []))  # fmt: skip
    assert ours is not None
    return ours


def find_layer() -> ModuleSpec | None:
    """What `import llama_cpp` gets (tca_gguf.LayerFinder asks). None where there is nothing of ours to put under it."""
    try:
        libraries = lib_dir()
    except TcaError:
        return None  # installed without its native part
    try:
        return layer_over(libraries, layer_spec(installed(), pinned_version(), package_dir() / "_layer"))
    except TcaError as error:
        raise ImportError(str(error), name="llama_cpp") from None


def installed() -> ModuleSpec | None:
    """The llama_cpp package that Python would import without us; None if there is none."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and getattr(finder, "__name__", "") != "LayerFinder" and (spec := find("llama_cpp", None)) is not None:
            return spec
    return None


@functools.cache
def load() -> ModuleType:
    """The llama_cpp package over our libraries, imported once. After it, `import llama_cpp` gives the same module."""
    pin, libraries = pinned_version(), lib_dir()
    present = sys.modules.get("llama_cpp")
    if present is not None:
        check_loaded(present, pin, libraries)
        present.llama_cpp.llama_backend_init()
        return present
    spec = layer_over(libraries, layer_spec(installed(), pin, package_dir() / "_layer"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        for name in [name for name in sys.modules if name == "llama_cpp" or name.startswith("llama_cpp.")]:
            del sys.modules[name]
        raise TcaError(f"llama-cpp-python's Python layer cannot be loaded over {libraries}: {error}; "
                       "reinstall tca-gguf with its dependencies: pip install . (in its checkout)") from error
    check_loaded(module, pin, libraries)
    module.llama_cpp.llama_backend_init()  # loads the backends of a build that loads them at run time; calibration opens no Llama
    return module


# ---- the class -------------------------------------------------------------------------------------------------------


@functools.cache
def llama_class() -> type[Llama]:
    """tca_gguf.Llama: llama-cpp-python's class with checkpoints and room for every token (llama_class.py)."""
    from tca_gguf.llama_class import subclass

    return subclass(load().Llama)


def __getattr__(name: str) -> Any:
    if name == "Llama":
        return llama_class()
    if name == "llama_cpp":
        return load()
    raise AttributeError(f"module 'tca_gguf.llama' has no attribute {name!r}")
