"""Python started inside the checkout: the source package there has no native part, the installed one is meant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "tca_gguf"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "checkout" / "tca_gguf").mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(SOURCE / name, tmp_path / "checkout" / "tca_gguf" / name)
    (tmp_path / "checkout" / "tca_gguf" / "where.py").write_text("HERE = 'checkout'\n")
    return tmp_path / "checkout"


def where(checkout: Path, site: Path) -> str:
    """Which package `tca_gguf.where` comes from. -S: without the packages of this environment."""
    code = "from tca_gguf.where import HERE; from tca_gguf import TcaError; print(HERE)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=checkout, env=environment, capture_output=True, text=True,
                          check=True).stdout.strip()  # fmt: skip


def test_the_installed_package_is_used(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(checkout / "tca_gguf", site / "tca_gguf")
    (site / "tca_gguf" / "where.py").write_text("HERE = 'site'\n")
    (site / "tca_gguf" / "_tca.py").write_text("")
    assert where(checkout, site) == "site"


def test_without_an_installed_package_the_source_stays(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "tca_gguf").mkdir(parents=True)  # an empty folder is no package
    assert where(checkout, tmp_path / "site") == "checkout"


def test_a_built_package_stays(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tca_gguf" / "_tca.py").write_text("")
    site = tmp_path / "site"
    shutil.copytree(checkout / "tca_gguf", site / "tca_gguf")
    (site / "tca_gguf" / "where.py").write_text("HERE = 'site'\n")
    assert where(checkout, site) == "checkout"
