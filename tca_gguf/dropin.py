"""Programs that import llama_cpp themselves, over our libraries, with nothing changed in them.

`environment` is for one run (tca-gguf exec COMMAND). `activate` makes it lasting for a virtual environment: the libraries of its
llama-cpp-python become links to ours, and an environment that has none gets our copy of the pinned version, which pip then knows
as llama-cpp-python. No .pth file, no sitecustomize: an environment works or not by what lies in it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import llama
from .errors import TcaError

LIB, STOCK = "lib", "lib.stock"  # of an installed llama_cpp: its libraries, and where its own wait while ours are in their place
MARK = "_from_tca_gguf.txt"  # in a llama_cpp that `activate` installed
# of the layer, as llama-cpp-python declares them
REQUIRES = ("typing-extensions>=4.5.0", "numpy>=1.20.0", "diskcache>=5.6.1", "jinja2>=2.11.3")


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process whose `import llama_cpp` gets the pinned layer over our libraries, whichever Python it runs in.

    That Python needs what llama-cpp-python needs (numpy, jinja2, diskcache, typing-extensions), not tca_gguf.
    """
    layer, libraries = llama.package_dir() / "_layer", str(llama.lib_dir())
    env = dict(base) | {"LLAMA_CPP_LIB_PATH": libraries, "MTMD_CPP_LIB": libraries}
    if (layer / "llama_cpp").is_dir():
        before = base.get("PYTHONPATH")
        env["PYTHONPATH"] = str(layer) + (os.pathsep + before if before else "")
    return env


def find_program(name: str, env: Mapping[str, str]) -> Path:
    """One of llama.cpp's programs from our tree, or any command. Raises TcaError.

    Without an active virtual environment the environment that tca_gguf is installed in comes first: its Python has what the
    layer needs.
    """
    if os.sep not in name:
        try:
            return llama.program(name)
        except TcaError:
            if name.startswith("llama-") and shutil.which(name, path=env.get("PATH")) is None:
                raise
    path = env.get("PATH", os.defpath)
    if "VIRTUAL_ENV" not in env:
        path = os.path.dirname(sys.executable) + os.pathsep + path
    found = shutil.which(name, path=path)
    if found is None:
        raise TcaError(f"{name} is not found; give one of llama.cpp's programs, such as llama-server, or a command, such as python app.py")
    return Path(found)


@dataclass(frozen=True)
class State:
    """What llama_cpp an environment has. package None: none. ours: its libraries are ours; added: `activate` installed it."""

    package: Path | None
    version: str | None
    ours: bool
    added: bool


def state(site: Path | None = None) -> State:
    """Of the environment that runs this. site: its site-packages, for the tests."""
    package = (site or site_packages()) / "llama_cpp"
    init = package / "__init__.py"
    if not init.is_file():
        return State(None, None, False, False)
    lib = package / LIB
    ours = lib.is_dir() and lib.resolve() == llama.lib_dir().resolve()
    return State(package, llama.version_in(init), ours, (package / MARK).is_file())


def site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def check_environment() -> None:
    """Raises TcaError outside of a virtual environment: a system's Python belongs to the system."""
    if sys.prefix == sys.base_prefix:
        raise TcaError(f"{sys.executable} is no virtual environment; activate changes one only. Install tca-gguf in the environment of "
                       "your program, or run the program with: tca-gguf exec python app.py")  # fmt: skip


def activate(site: Path | None = None) -> list[str]:
    """Makes `import llama_cpp` in this environment run on our libraries; what was done, a line each. Raises TcaError.

    Refused if another version of llama-cpp-python is installed.
    """
    pin, now = llama.pinned_version(), state(site)
    if now.ours:
        return ["llama_cpp runs on tca-gguf's libraries already"]
    done = []
    if now.package is None:
        package = install_layer(pin)
        done.append(f"llama-cpp-python {pin} installed from tca-gguf's own copy")
    elif now.version != pin:
        raise TcaError(f"llama-cpp-python {now.version or 'of an unknown version'} is installed in {now.package.parent}, tca-gguf was built "
                       f"from {pin}; run: pip uninstall llama-cpp-python, then: tca-gguf activate")  # fmt: skip
    else:
        package = now.package
    lib, stock = package / LIB, package / STOCK
    try:
        if lib.is_symlink():
            lib.unlink()  # to a tca-gguf that is gone
        elif lib.exists():
            if stock.exists():
                raise TcaError(f"{stock} and {lib} are both there; remove the one that is not llama-cpp-python's")
            lib.rename(stock)
            done.append(f"its own libraries wait in {stock}")
        lib.symlink_to(llama.lib_dir(), target_is_directory=True)
    except OSError as error:
        raise TcaError(f"{lib} cannot be made a link to {llama.lib_dir()}: {error.strerror}; use: tca-gguf exec python app.py") from None
    return [*done, f"import llama_cpp runs on {llama.lib_dir()}"]


def deactivate(site: Path | None = None) -> list[str]:
    """Undoes `activate`; what was done, a line each. Raises TcaError."""
    now = state(site)
    if now.package is None or not (now.ours or now.added or (now.package / STOCK).exists()):
        return ["nothing to undo: this environment's llama_cpp is not tca-gguf's"]
    lib, stock, done = now.package / LIB, now.package / STOCK, []
    try:
        if lib.is_symlink():
            lib.unlink()
        if stock.exists():
            stock.rename(lib)
            done.append(f"llama-cpp-python {now.version} runs on its own libraries again")
    except OSError as error:
        raise TcaError(f"{lib} cannot be put back: {error.strerror}") from None
    if now.added:
        pip("uninstall", "--yes", "llama-cpp-python")
        shutil.rmtree(now.package, ignore_errors=True)  # compiled files
        done.append(f"llama-cpp-python {now.version}, which activate had installed, is removed")
    return done or [f"llama-cpp-python {now.version} is as it was, without libraries of its own"]


def install_layer(pin: str) -> Path:
    """Installs our copy of the layer as llama-cpp-python, with pip; its folder."""
    source = llama.package_dir() / "_layer" / "llama_cpp"
    if not source.is_dir():
        raise TcaError("tca_gguf carries no Python layer; reinstall it")
    with tempfile.TemporaryDirectory(prefix="tca-gguf-") as folder:
        wheel = Path(folder) / f"llama_cpp_python-{pin}-py3-none-any.whl"
        write_wheel(wheel, source, pin)
        pip("install", "--no-deps", "--no-index", str(wheel))
    return site_packages() / "llama_cpp"


def write_wheel(path: Path, source: Path, version: str) -> None:
    """A wheel of the Python files in ``source``, so that pip knows what it installs and can remove it."""
    info = f"llama_cpp_python-{version}.dist-info"
    files = {f"llama_cpp/{file.relative_to(source).as_posix()}": file.read_bytes() for file in sorted(source.rglob("*"))
             if file.is_file() and "__pycache__" not in file.parts}  # fmt: skip
    files[f"llama_cpp/{MARK}"] = b"tca-gguf activate installed this copy; tca-gguf deactivate removes it.\n"
    requires = "".join(f"Requires-Dist: {name}\n" for name in REQUIRES)
    files[f"{info}/METADATA"] = (f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\nLicense: MIT\n"
                                 f"Summary: the Python layer of llama-cpp-python over the libraries of tca-gguf\n{requires}").encode()  # fmt: skip
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tca-gguf\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
                     for name, data in files.items())  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


def pip(*arguments: str) -> None:
    """Runs this environment's pip. Raises TcaError with its last words."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise TcaError(f"pip {arguments[0]} failed: {lines[-1].removeprefix('ERROR: ') if lines else 'it does not say why'}"
                       f"{'; run: ' + sys.executable + ' -m ensurepip' if 'No module named pip' in result.stderr else ''}")  # fmt: skip
