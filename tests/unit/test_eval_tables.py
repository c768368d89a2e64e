"""Tables of saved evaluations: several files as one, a line a row or a line a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tca_gguf.eval.run import Result
from tca_gguf.eval.tables import main


def score(policy: str, keep: float, length: int, right: int, kept: float | None = 0.75) -> dict:
    return {"suite": "needle", "length": length, "keep": keep, "policy": policy, "kv_type": "f16", "samples": 8, "answers": 8, "dense": 0.5, "tca": right / 8,
            "kept": kept, "kept_ci": None if kept is None else [0.3, 0.95], "tca_ci": [0.1, 0.9], "dense_correct": 4, "tca_correct": right,
            "kv_bytes": round(1000 * keep), "kv_bytes_dense": 1000}  # fmt: skip


def divergence(policy: str, keep: float, uniform: float | None) -> dict:
    return {"suite": "kld", "length": 8192, "keep": keep, "policy": policy, "mean_kl": 0.01 * (1 - keep), "mean_kl_ci": [0.001, 0.02], "mean_kl_uniform": uniform,
            "kl_99": 0.2, "top1": 0.97, "ppl_dense": 7.5, "ppl_tca": 7.25, "kv_bytes": round(1000 * keep), "kv_bytes_dense": 1000}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> list[str]:
    first = [score("calibrated-0.39", 0.39, 4096, 4, 1.0), score("key-diff", 0.25, 4096, 3), score("calibrated-0.25", 0.25, 4096, 3)]
    second = [score("calibrated-0.25", 0.25, 8192, 2, None), divergence("calibrated-0.25", 0.25, 0.03), divergence("dense-q8_0", 1.0, None)]
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, rows in zip(paths, (first, second), strict=True):
        settings = {"model": "m.gguf", "suites": ["needle"], "lengths": sorted({r["length"] for r in rows}), "policies": ["a.gguf"]}
        Result({"cpu": "Test"}, settings, rows, [{"text": "é"}], ["kld: lost"]).save(path)
    return [str(path) for path in paths]


def run(*args: str):
    return CliRunner().invoke(main, args)


def test_a_line_a_row(saved):
    lines = run(*saved).stdout.splitlines()
    assert "| `needle` | 4,096 | calibrated-0.39 | 39.0% | 4 of 8 | 4 | 1.000 (30%-95%) |" in lines
    assert "| `needle` | 4,096 | key-diff 0.25 | 25.0% | 4 of 8 | 3 | 0.750 (30%-95%) |" in lines
    assert "| `needle` | 8,192 | calibrated-0.25 | 25.0% | 4 of 8 | 2 | - |" in lines  # the dense model answers nothing
    assert "| 8,192 | calibrated-0.25 | 25.0% | 0.0075 (0.0010-0.0200) | 0.25 | 0.200 | 97.0% | 7.250, 7.500 |" in lines
    assert any(line.startswith("| 8,192 | dense-q8_0 | 100.0% | 0.0000 ") and "|  |" in line for line in lines)


def test_a_line_a_policy(saved):
    lines = run(*saved, "--pivot").stdout.splitlines()
    assert lines[0] == "| policy | `needle` 4,096, dense 4 of 8 | `needle` 8,192, dense 4 of 8 | `kld` 8,192 |"
    assert "| calibrated | 4 (1.000) / 3 (0.750) | 2 (-) | 0.0075 |" in lines and "| key-diff | 3 (0.750) |  |  |" in lines


def test_several_files_become_one(saved, tmp_path):
    merged = tmp_path / "all.json"
    assert run(*saved, "--merge", str(merged)).exit_code == 0
    result = Result.read(merged)
    assert len(result.rows) == 6 and result.answers == [{"text": "é"}] * 2 and result.errors == ["kld: lost"] * 2
    assert result.settings["lengths"] == [4096, 8192] and result.settings["policies"] == ["a.gguf"]


def test_a_file_that_is_something_else(tmp_path):
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"rows": []}'):
        bad.write_text(text)
        found = run(str(bad))
        assert found.exit_code == 1 and found.stderr == f"Error: {bad} is not what eval --save writes\n"
    assert "cannot be read" in run(str(tmp_path / "none.json")).stderr
