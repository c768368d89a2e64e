"""Which llama-cpp-python layer tca_gguf.llama takes, and what it refuses. No native library is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import tca_gguf
from tca_gguf import llama
from tca_gguf.errors import TcaError

PIN = "9.9.9"
FIX = f'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install llama-cpp-python=={PIN}'  # where we have no copy


def write_layer(folder: Path, version: str | None) -> Path:
    """A package llama_cpp that loads its 'library' from LLAMA_CPP_LIB_PATH as the real one does."""
    package = folder / "llama_cpp"
    package.mkdir(parents=True)
    line = f'__version__ = "{version}"\n' if version else ""
    (package / "__init__.py").write_text(f"from .llama_cpp import *\n{line}class Llama: pass\n")
    (package / "llama_cpp.py").write_text(
        "import os\nfrom types import SimpleNamespace\n"
        "_lib = SimpleNamespace(_name=os.path.join(os.environ['LLAMA_CPP_LIB_PATH'], 'libllama.so'))\n"
        "n_init = 0\n"
        "def llama_backend_init():\n"
        "    global n_init\n"
        "    n_init += 1\n"
    )
    (package / "mtmd_cpp.py").write_text("import os\nfound = os.environ['MTMD_CPP_LIB']\n")
    return package


def spec_of(package: Path) -> ModuleSpec:
    spec = importlib.util.spec_from_file_location("llama_cpp", package / "__init__.py", submodule_search_locations=[str(package)])
    assert spec is not None
    return spec


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built tca_gguf of the pin with its own layer, in a process that has no llama_cpp."""
    root = tmp_path / "tca_gguf"
    write_layer(root / "_layer", PIN)
    (root / "lib").mkdir()
    (root / "lib" / "libllama.so").touch()
    (root / "lib" / "libmtmd.so").touch()
    (root / "bin").mkdir()
    (root / "bin" / "llama-bench").touch()
    (root / "upstream.toml").write_text(f'version = "{PIN}"\n')
    monkeypatch.setattr(llama, "package_dir", lambda: root)
    for cached in ("load", "llama_class"):
        monkeypatch.setattr(llama, cached, getattr(llama, cached).__wrapped__)
    monkeypatch.setattr(llama, "installed", lambda: None)
    monkeypatch.setattr(sys, "meta_path", [tca_gguf.LayerFinder, *(f for f in sys.meta_path if getattr(f, "__name__", "") != "LayerFinder")])
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        del sys.modules[name]


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str | None) -> ModuleSpec:
    spec = spec_of(write_layer(folder, version))
    monkeypatch.setattr(llama, "installed", lambda: spec)
    return spec


def test_own_layer_where_none_is_installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/somewhere/else")
    monkeypatch.delenv("MTMD_CPP_LIB", raising=False)
    module = llama.load()
    assert Path(module.__file__).parent == package / "_layer" / "llama_cpp"
    assert module.llama_cpp._lib._name == str(package / "lib" / "libllama.so")
    assert module.llama_cpp.n_init == 1, "backends that are loaded at run time were not"
    assert sys.modules["llama_cpp.mtmd_cpp"].found == str(package / "lib")
    assert os.environ["LLAMA_CPP_LIB_PATH"] == "/somewhere/else" and "MTMD_CPP_LIB" not in os.environ
    import llama_cpp

    assert llama_cpp is module and issubclass(llama.Llama, module.Llama) and llama.Llama is llama.Llama and llama.llama_cpp is module


def test_installed_layer_of_the_pinned_version(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = install(monkeypatch, tmp_path / "site", PIN)
    module = llama.load()
    assert module.__file__ == spec.origin
    assert module.llama_cpp._lib._name == str(package / "lib" / "libllama.so")


@pytest.mark.parametrize("version", ["0.1.0", None])
def test_installed_layer_of_another_version(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    install(monkeypatch, tmp_path / "site", version)
    with pytest.raises(TcaError) as caught:
        llama.load()
    text = str(caught.value)
    assert "pip uninstall llama-cpp-python" in text and "tca-gguf activate" in text and PIN in text and str(tmp_path / "site") in text
    assert (version or "unknown version") in text and "\n" not in text
    assert "llama_cpp" not in sys.modules, "its libraries were not loaded"


def imported(monkeypatch: pytest.MonkeyPatch, version: str, library: Path) -> ModuleType:
    module = ModuleType("llama_cpp")
    module.__version__ = version
    module.llama_cpp = SimpleNamespace(_lib=SimpleNamespace(_name=str(library)), llama_backend_init=lambda: None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


def test_already_imported_over_our_libraries(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported(monkeypatch, PIN, package / "lib" / "libllama.so")
    assert llama.load() is module


def test_already_imported_over_other_libraries(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "libllama.so"
    other.touch()
    imported(monkeypatch, PIN, other)
    with pytest.raises(TcaError, match=f"runs on {other}; import tca_gguf first"):
        llama.load()


def test_already_imported_in_another_version(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(monkeypatch, "0.1.0", package / "lib" / "libllama.so")
    with pytest.raises(TcaError, match="llama_cpp 0.1.0 was imported before tca_gguf"):
        llama.load()


def test_a_layer_that_does_not_load_is_taken_back(package: Path) -> None:
    (package / "_layer" / "llama_cpp" / "llama_cpp.py").write_text("import no_such_dependency\n")
    with pytest.raises(TcaError, match="no_such_dependency"):
        llama.load()
    assert "llama_cpp" not in sys.modules and "llama_cpp.llama_cpp" not in sys.modules


def test_no_layer_at_all(package: Path) -> None:
    (package / "_layer" / "llama_cpp" / "__init__.py").unlink()
    with pytest.raises(TcaError, match="carries no Python layer") as caught:
        llama.load()
    assert FIX in str(caught.value)


def test_import_llama_cpp_after_tca_gguf(package: Path) -> None:
    import llama_cpp

    assert Path(llama_cpp.__file__).parent == package / "_layer" / "llama_cpp"
    assert llama_cpp.llama_cpp._lib._name == str(package / "lib" / "libllama.so") and llama.load() is llama_cpp
    assert sys.modules["llama_cpp.mtmd_cpp"].found == str(package / "lib")


def test_import_llama_cpp_of_another_version_is_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path / "site", "0.1.0")
    with pytest.raises(ImportError, match="llama-cpp-python 0.1.0 is installed.*pip uninstall llama-cpp-python"):
        import llama_cpp  # noqa: F401


def test_the_finder_is_there_once_and_finds_nothing_else() -> None:
    importlib.reload(importlib.import_module("tca_gguf"))
    (finder,) = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") == "LayerFinder"]
    assert finder.find_spec("llama_cpp.server", ["x"]) is None and finder.find_spec("numpy", None) is None


def test_a_damaged_pin(package: Path) -> None:
    (package / "upstream.toml").write_text("nothing = 1\n")
    with pytest.raises(TcaError, match="upstream.toml is damaged"):
        llama.load()


def test_programs(package: Path) -> None:
    assert llama.program("llama-bench") == package / "bin" / "llama-bench"
    with pytest.raises(TcaError, match="llama-nothing is not in .*; it has llama-bench"):
        llama.program("llama-nothing")
    (package / "bin" / "llama-bench").unlink()
    with pytest.raises(TcaError, match="TCA_BUILD_PROGRAMS"):
        llama.program("llama-bench")


def test_importing_the_package_loads_nothing() -> None:
    code = ("import sys, tca_gguf, tca_gguf.llama, tca_gguf.native\n"
            "print([name for name in sys.modules if name.startswith('llama_cpp') or name == 'tca_gguf._tca'])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
