"""llama.cpp's programs, as `exec` runs them: each starts, from where it is installed."""

from __future__ import annotations

import subprocess

import pytest

from tca_gguf import native
from tca_gguf.cli.execute import PROGRAMS
from tca_gguf.llama import lib_dir, program


@pytest.mark.parametrize("name", PROGRAMS)
def test_starts(name: str) -> None:
    result = subprocess.run([program(name), "-h"], capture_output=True, text=True, timeout=60)
    text = result.stdout + result.stderr
    assert "error while loading" not in text
    assert "usage" in text.lower() or "-h," in text, text[:500]


def test_the_build_says_which_cpu_backend_runs() -> None:
    info = native.build_info()
    assert info["simd"] in ("avx512", "avx2", "neon", "generic")
    assert (lib_dir() / info["cpu"]).is_file() and "ggml-cpu" in info["cpu"]
