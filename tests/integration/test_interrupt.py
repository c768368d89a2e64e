"""An exception or Ctrl-C inside the forward pass of a calibration comes out as what it is, and the model file is unharmed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime_context import write_model
from tca_gguf import calib

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(smollm2, tmp_path_factory.mktemp("interrupt") / "model.gguf", layers=2, tokenizer=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in the callback")])
def test_what_the_callback_raises_comes_out(model: Path, error: BaseException) -> None:
    def progress(done: int, total: int, label: str) -> None:
        if done == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        calib.calibrate(model, tokens=2048, progress=progress)
    assert caught.value is error
    assert calib.calibrate(model, tokens=2048).n_layer == 2  # nothing is left behind


CTRL_C = """
import contextlib, os, signal, sys
from tca_gguf import cli
from tca_gguf.cli import embed

@contextlib.contextmanager
def progress_bar():
    yield lambda done, total, label: os.kill(os.getpid(), signal.SIGINT) if done == 3 else None

embed.progress_bar = progress_bar
cli.main()
"""


def test_ctrl_c_ends_embedding_with_130(model: Path) -> None:
    before = model.read_bytes()
    done = subprocess.run([sys.executable, "-c", CTRL_C, "embed-budgets", str(model), "--tokens", "2048"],
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "error: interrupted", "")
    assert model.read_bytes() == before and list(model.parent.iterdir()) == [model]
