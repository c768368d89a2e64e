"""The CUDA sources compile, where there is an nvcc; a machine needs no GPU for that. Skipped by name elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "build" / "upstream" / "source" / "vendor" / "llama.cpp"  # where the build of the checkout leaves it
SOURCES = sorted((ROOT / "native" / "cuda").glob("*.cu"))


# upstream's default list of architectures begins before the instructions that our kernels use: they must compile there, too
OLD = [source for source in SOURCES if "TCA_ASM" in source.read_text() or "tca_mma(" in source.read_text()]
CASES = [(source, "90a" if source.stem.endswith("-hopper") else "90") for source in SOURCES] + [(source, "75") for source in OLD]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), CASES, ids=[f"{source.stem}-{arch}" for source, arch in CASES])
def test_compiles(source: Path, arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    if not UPSTREAM.is_dir():
        pytest.skip("no upstream source: the package was not built in this checkout")
    hopper = source.stem.endswith("-hopper")
    includes = [ROOT / "native", ROOT / "native/include", *(UPSTREAM / "ggml" / d for d in ("include", "src", "src/ggml-cuda"))]
    # without optimisation in the last step: seconds in place of minutes
    result = subprocess.run(
        [nvcc, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-extended-lambda", "-Xptxas=-O0", "-Xcompiler=-Wall,-Wextra",
         "-DGGML_USE_CUDA", *(["-DTCA_CUDA_HOPPER"] if hopper else []), *(f"-I{path}" for path in includes),
         "-c", str(source), "-o", str(tmp_path / "out.o")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
