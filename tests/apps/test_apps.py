"""Programs of other people, dense and with budgets, over the same question (see README.md). Outside of CI: large, moving packages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tca_gguf import calib, demo, gguf_file, models

HERE = Path(__file__).parent
FOLDER = os.environ.get("TCA_APPS", "")
PYTHON = Path(FOLDER).absolute() / "bin" / "python"
ENV = {**os.environ, "VIRTUAL_ENV": str(PYTHON.parent.parent), "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
QUESTION = f"{demo.document(1500)}\n\n{demo.QUESTION}"
IMPORTS = {"langchain_chat": "langchain_community", "llama_index_complete": "llama_index.llms.llama_cpp", "guidance_select": "guidance",
           "outlines_choice": "outlines", "client_openai": "openai", "client_litellm": "litellm", "client_anthropic": "anthropic"}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="TCA_APPS names no environment with such programs")]


def importable(name: str) -> bool:
    """llama_index's package imports llama_cpp, which our exec provides."""
    return subprocess.run([sys.executable, "-m", "tca_gguf", "exec", "python", "-c", f"import {name}"], env=ENV, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model without budgets, and a link to it with budgets beside."""
    plain = Path(os.environ.get("TCA_APPS_MODEL") or models.fetch("smollm2", models.cache_dir()))
    link = tmp_path_factory.mktemp("apps") / "model.gguf"
    link.symlink_to(plain)
    gguf_file.write_keys(plain, link.with_name("model.tca.gguf"), gguf_file.read_budgets(plain) or calib.calibrate(plain))
    return {"dense": plain, "tca": link}


@pytest.mark.parametrize("side", ["dense", "tca"])
@pytest.mark.parametrize("program", [name for name in IMPORTS if not name.startswith("client_")])
def test_program(files: dict[str, Path], program: str, side: str) -> None:
    if not importable(IMPORTS[program]):
        pytest.skip(f"{IMPORTS[program]} is not installed in {FOLDER}")
    done = subprocess.run([sys.executable, "-m", "tca_gguf", "exec", "python", str(HERE / f"{program}.py"), str(files[side])], input=QUESTION,
                          capture_output=True, text=True, timeout=900, check=False, env=ENV)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
    assert ("ragged KV cache on" in done.stderr) == (side == "tca"), done.stderr[-2000:]
    print(f"{program}, {side}: {done.stdout.strip().splitlines()[-1]}")


@pytest.fixture(scope="module", params=["dense", "tca"])
def server(request: pytest.FixtureRequest, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(side, URL) of a llama-server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tca_gguf", "exec", "llama-server", "-m", str(files[request.param]), "-c", "4096", "-np", "1", "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.5)
            assert ("ragged KV cache on" in log.read_text()) == (request.param == "tca")
            yield request.param, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.parametrize("program", [name for name in IMPORTS if name.startswith("client_")])
def test_client(server: tuple[str, str], program: str) -> None:
    side, url = server
    if not importable(IMPORTS[program]):
        pytest.skip(f"{IMPORTS[program]} is not installed in {FOLDER}")
    done = subprocess.run([PYTHON, HERE / f"{program}.py", url], input=QUESTION, capture_output=True, text=True, timeout=900, check=False, env=ENV)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
    print(f"{program}, {side}: {done.stdout.strip().splitlines()[-1]}")
