"""doctor: what it finds and what it says to do, over made-up machines; completion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import run
from gguf_samples import make_budgets, write_gguf

from tca_gguf import doctor, gguf_file, kv, llama
from tca_gguf.errors import TcaError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(doctor, "available_memory", lambda: 8 << 30)
    monkeypatch.setattr(doctor, "gpus_of_the_machine", lambda: [])
    return tmp_path


@pytest.fixture
def model() -> Path:
    path = write_gguf(Path("m.gguf"))
    gguf_file.embed_budgets(path, path, make_budgets())
    return path


def named(report: doctor.Report, name: str) -> doctor.Check:
    (check,) = [check for check in report.checks if check.name == name]
    return check


def test_a_machine_without_a_model() -> None:
    report = doctor.examine()
    assert report.well and {"build", "Python layer", "processor", "memory", "GPU"} <= {check.name for check in report.checks}
    assert all(isinstance(device["total"], int) for device in doctor.devices()) and doctor.devices()
    shown = run("doctor")
    assert shown.exit_code == 0 and "threads" in shown.stdout and "only after import tca_gguf" in "".join(shown.stdout.split("\n"))


def test_a_model_that_fits(model: Path) -> None:
    result = run("doctor", str(model), "--kv-type", "q8_0")  # 8 values of a head do not fill a block
    assert result.exit_code == 1 and "does not fit a head size of 8" in result.stdout and "-> --kv-type f16" in result.stdout
    report = json.loads(run("doctor", str(model), "-c", "3000", "--json").stdout)
    shape, budgets = gguf_file.read_model(model)
    expected = kv.predicted(shape, budgets, 3000)
    assert report["well"] and report["cache"] == {"n_ctx": 3072, "kv_type": "f16", "bytes": expected.allocated, "bytes_dense": expected.stock}
    assert {check["name"]: check["ok"] for check in report["checks"]}["it fits"] is True
    assert "in the file" in run("doctor", str(model)).stdout


def test_what_is_wrong_with_a_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_gguf(Path("plain.gguf"))
    check = named(doctor.examine(plain), "budgets")
    assert check.ok is False and check.fix == "tca-gguf embed-budgets plain.gguf"
    gguf_file.write_keys(plain, "plain.tca.gguf", make_budgets())
    assert "from plain.tca.gguf" in named(doctor.examine(plain), "budgets").text
    Path("plain.tca.gguf").write_bytes(b"junk" * 9)
    assert "not a readable GGUF file" in named(doctor.examine(plain), "budgets").text
    assert named(doctor.examine(Path("none.gguf")), "model").ok is False

    long = named(doctor.examine(model, 8192), "cache")
    assert long.ok is False and long.fix == "-c 4096" and "trained for" in long.text
    monkeypatch.setattr(doctor, "RESERVE", 0)
    sizes = {n: kv.predicted(*gguf_file.read_model(model), n).allocated for n in (2048, 4096)}
    monkeypatch.setattr(doctor, "available_memory", lambda: model.stat().st_size + (sizes[2048] + sizes[4096]) // 2)
    tight = named(doctor.examine(model, 4096), "it fits")
    assert tight.ok is False and tight.fix == "-c 2048"
    result = run("doctor", str(model), "-c", "4096")
    assert result.exit_code == 1 and "-> -c 2048" in result.stdout


def test_what_is_wrong_with_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus_of_the_machine", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(doctor, "devices", lambda: [])
    gpu = named(doctor.examine(), "GPU")
    assert gpu.ok is False and "-DGGML_CUDA=ON" in gpu.fix and "H200" in gpu.text

    def refuse(*_: object) -> None:
        raise TcaError("llama-cpp-python 0.1.0 is installed; run: pip uninstall llama-cpp-python")

    monkeypatch.setattr(llama, "layer_spec", refuse)
    layer = named(doctor.examine(), "Python layer")
    assert layer.ok is False and layer.fix == "pip uninstall llama-cpp-python"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_TCA_GGUF_COMPLETE" in script and "%(" not in script


def test_completion_completes() -> None:
    done = subprocess.run([sys.executable, "-m", "tca_gguf"], capture_output=True, text=True, check=False,
                          env={"_TCA_GGUF_COMPLETE": "bash_complete", "COMP_WORDS": "tca-gguf insp", "COMP_CWORD": "1", "PATH": ""})  # fmt: skip
    assert done.stdout.split(",")[1].strip() == "inspect", done.stderr


def test_an_unknown_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/nosuch")
    result = run("completion")
    assert result.exit_code == 1 and "name one: bash, zsh, fish" in result.stderr
