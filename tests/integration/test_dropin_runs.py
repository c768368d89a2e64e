"""A program that imports llama_cpp and knows nothing of us: run by exec, after `import tca_gguf`, and in an activated environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from runtime_context import make_budgets, write_model
from tca_gguf import gguf_file, llama

pytestmark = pytest.mark.slow

APP = """
import json, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=1024, verbose=True, seed=1)
out = llm.create_completion("river and mill " * 200, max_tokens=4, temperature=0)
print(json.dumps({"tokens": out["usage"], "lib": llama_cpp.llama_cpp._lib._name, "layer": llama_cpp.__file__}))
"""
SITE = sysconfig.get_paths()["purelib"]


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropin")
    path = write_model(smollm2, folder / "m.gguf", layers=2, tokenizer=True)
    gguf_file.write_keys(path, folder / "m.tca.gguf", make_budgets(path))
    return path


def check(done: subprocess.CompletedProcess[str], source: Path) -> dict:
    assert done.returncode == 0, done.stderr
    assert f"tca: ragged KV cache on" in done.stderr and f"budgets from {source}" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["lib"]).resolve().parent == llama.lib_dir().resolve() and result["tokens"]["completion_tokens"] == 4
    return result


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **env})


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


def test_exec(model: Path, app: Path) -> None:
    check(run(sys.executable, "-m", "tca_gguf", "exec", "python", app, model), model.with_name("m.tca.gguf"))


def test_after_import_tca_gguf(model: Path, app: Path) -> None:
    app.write_text("import tca_gguf\n" + APP)
    check(run(sys.executable, app, model), model.with_name("m.tca.gguf"))


def test_an_activated_environment(model: Path, app: Path, tmp_path: Path) -> None:
    """pip knows what activate installed, the program runs on our libraries, and deactivate leaves nothing behind."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    ours = f"import site; site.addsitedir({SITE!r}); from tca_gguf.cli import main; main()"  # as if it were installed there
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip())
    before = sorted(purelib.iterdir())

    done = run(python, "-c", ours, "activate", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["done"]) == 2
    assert f"Version: {llama.pinned_version()}" in run(python, "-m", "pip", "show", "llama-cpp-python").stdout
    app.write_text(f"import sys; sys.path.append({SITE!r})\n" + APP)  # for numpy and the others
    result = check(run(python, app, model), model.with_name("m.tca.gguf"))
    assert Path(result["layer"]).parent == purelib / "llama_cpp"

    assert "already" in run(python, "-c", ours, "activate").stdout
    undone = run(python, "-c", ours, "deactivate")
    assert undone.returncode == 0 and "is removed" in undone.stdout, undone.stderr
    assert sorted(purelib.iterdir()) == before
