"""`.ci/setup`, the set-up behind the Makefile, on machines that lack something: one line that names the packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / ".ci" / "setup"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs to use as the whole PATH."""
    for name in ("bash", "dirname", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!{shutil.which('sh')}\n{text}\n")
    path.chmod(0o755)


def set_up(bare: Path, python: str) -> tuple[int, str]:
    environment = {"PATH": str(bare), "PYTHON": python, "VENV": str(bare / "venv"), "HOME": str(bare)}
    result = subprocess.run([str(bare / "bash"), str(SETUP), "package", "test"], env=environment, capture_output=True, text=True)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    return result.returncode, result.stderr


def test_nothing_is_installed(bare: Path) -> None:
    code, text = set_up(bare, "python3")
    assert code == 1
    assert text.endswith("run: sudo apt install python3 python3-venv python3-dev g++ patch\n")


def test_python_without_its_headers(bare: Path) -> None:
    script(bare / "python3", 'case "$2" in *Python.h*) exit 1;; esac')
    script(bare / "c++", "exit 0")
    script(bare / "git", "exit 0")
    code, text = set_up(bare, "python3")
    assert code == 1 and text.endswith("run: sudo apt install python3-dev\n")


def test_python_too_old(bare: Path) -> None:
    script(bare / "python3", 'case "$1$2" in -V*) echo Python 3.9.2;; *version_info*) exit 1;; esac')
    script(bare / "c++", "exit 0")
    script(bare / "git", "exit 0")
    code, text = set_up(bare, "python3")
    assert code == 1 and "Python 3.10 or newer" in text and "3.9.2" in text
