"""Programs that import llama_cpp over our libraries: the environment of one run, and a virtual environment that always does."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest

from tca_gguf import dropin, llama
from tca_gguf.errors import TcaError

PIN = "9.9.9"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built tca_gguf of the pin."""
    root = tmp_path / "tca_gguf"
    (root / "_layer" / "llama_cpp" / "server" / "__pycache__").mkdir(parents=True)
    (root / "_layer" / "llama_cpp" / "__init__.py").write_text(f'__version__ = "{PIN}"\n')
    (root / "_layer" / "llama_cpp" / "server" / "app.py").touch()
    (root / "_layer" / "llama_cpp" / "server" / "__pycache__" / "app.pyc").touch()
    (root / "lib").mkdir()
    (root / "lib" / "libllama.so").write_text("ours")
    (root / "upstream.toml").write_text(f'version = "{PIN}"\n')
    monkeypatch.setattr(llama, "package_dir", lambda: root)
    return root


def install(site: Path, version: str = PIN, own: bool = True) -> Path:
    package = site / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    if own:
        (package / "lib").mkdir()
        (package / "lib" / "libllama.so").write_text("stock")
    return package


def test_the_environment_of_a_run(package: Path) -> None:
    env = dropin.environment({"PATH": "/bin", "PYTHONPATH": "/mine"})
    assert env == {"PATH": "/bin", "PYTHONPATH": f"{package / '_layer'}{os.pathsep}/mine", "LLAMA_CPP_LIB_PATH": str(package / "lib"),
                   "MTMD_CPP_LIB": str(package / "lib")}  # fmt: skip
    assert dropin.environment({})["PYTHONPATH"] == str(package / "_layer")


def test_which_program_runs(package: Path, tmp_path: Path) -> None:
    (package / "bin").mkdir()
    (package / "bin" / "llama-bench").touch()
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("python", "llama-cli"):
        (folder / name).touch()
        (folder / name).chmod(0o755)
    env = {"PATH": str(folder)}
    assert dropin.find_program("llama-bench", env) == package / "bin" / "llama-bench"
    assert dropin.find_program("llama-cli", env) == folder / "llama-cli"  # not built here: the user's own
    assert dropin.find_program("python", env).parent == Path(sys.executable).parent
    assert dropin.find_program("python", env | {"VIRTUAL_ENV": "/x"}) == folder / "python"
    assert dropin.find_program(str(folder / "python"), {}) == folder / "python"
    for name in ("llama-none", "none"):
        with pytest.raises(TcaError, match=name):
            dropin.find_program(name, env)


@pytest.mark.parametrize("own", [True, False])
def test_activate_and_back(package: Path, tmp_path: Path, own: bool) -> None:
    site = tmp_path / "site"
    installed = install(site, own=own)
    dropin.activate(site)
    assert (installed / "lib" / "libllama.so").read_text() == "ours" and dropin.state(site).ours
    assert dropin.activate(site) == ["llama_cpp runs on tca-gguf's libraries already"]
    said = dropin.deactivate(site)
    assert (installed / "lib").exists() == own and not (installed / "lib.stock").exists() and len(said) == 1
    assert not own or (installed / "lib" / "libllama.so").read_text() == "stock"
    assert "nothing to undo" in dropin.deactivate(site)[0]


def test_a_link_to_a_tca_gguf_that_is_gone_is_replaced(package: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed = install(site)
    dropin.activate(site)
    (installed / "lib").unlink()
    (installed / "lib").symlink_to(tmp_path / "gone")
    dropin.activate(site)
    assert dropin.state(site).ours
    dropin.deactivate(site)
    assert (installed / "lib" / "libllama.so").read_text() == "stock"


def test_another_version_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed = install(site, "0.1.0")
    with pytest.raises(TcaError, match=f"0.1.0 is installed .* built from {PIN}; run: pip uninstall llama-cpp-python, then: tca-gguf activate"):
        dropin.activate(site)
    assert (installed / "lib" / "libllama.so").read_text() == "stock"


def test_only_a_virtual_environment_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(TcaError, match="no virtual environment.*tca-gguf exec python app.py"):
        dropin.check_environment()


def test_the_wheel_of_our_copy(package: Path, tmp_path: Path) -> None:
    path = tmp_path / f"llama_cpp_python-{PIN}-py3-none-any.whl"
    dropin.write_wheel(path, package / "_layer" / "llama_cpp", PIN)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        record = archive.read(f"llama_cpp_python-{PIN}.dist-info/RECORD").decode().splitlines()
    assert "llama_cpp/server/app.py" in names and not any("pycache" in name for name in names)
    assert sorted(line.partition(",")[0] for line in record) == sorted(names)
