"""The command eval: what it passes on, what it prints, saves and draws. The evaluation itself is replaced."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from cli_runner import run
from gguf_samples import make_budgets

from tca_gguf.cli.eval import notes_of
from tca_gguf.eval import Result, Settings
from tca_gguf.eval.plot import depth_map
from tca_gguf.eval.policies import Policy
from tca_gguf.eval.suites.base import score_row


def eval_result() -> Result:
    policy = Policy("calibrated", "f16", make_budgets())
    cache = {"kv_bytes": 400, "kv_bytes_dense": 1000, "cache_tokens": 3840, "evicted_tokens": 2000.0}
    kld = {"suite": "kld", "length": 4096, "keep": 0.39, "policy": "calibrated", "kv_type": "f16", "samples": 1024, "dense": 1.0, "tca": 0.97,
           "kept": 0.97, "mean_kl": 0.0074, "mean_kl_ci": (0.007, 0.008), "mean_kl_uniform": 0.0359, "kl_99": 0.1, "top1": 0.97, "ppl_dense": 8.5,
           "ppl_tca": 8.4, **cache}  # fmt: skip
    rows = [score_row("needle", 4096, policy, 4, [True] * 4, [True, True, True, False], **cache), kld,
            score_row("turns", 4096, policy, 2, [False] * 2, [False] * 2, **cache, edited_reused=[3800], changed_reused=[0])]  # fmt: skip
    answers = [{"suite": "needle", "length": 4096, "policy": "calibrated", "keep": 0.39, "depth": i / 4, "right": [i < 3]} for i in range(4)]
    return Result({"cpu": "Test CPU"}, {"model": "m.gguf", "n_threads": 2}, rows, answers)


@pytest.fixture
def evaluated(monkeypatch):
    from tca_gguf import eval as eval_package

    seen = []

    def fake(path, settings, progress, verbose, on_row):
        seen.append(settings)
        progress(1, 2, "needle")
        return eval_result()

    monkeypatch.setattr(eval_package, "run", fake)
    return seen


def test_eval(evaluated):
    result = run("eval", "m.gguf", "--suite", "needle,kld", "--lengths", "4K,8192", "--policy", "calibrated,key-diff", "--keep", "0.39,0.25",
                 "--samples", "4", "--seed", "3", "--text", "code", "--kv-type", "q8_0", "--threads", "2", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    assert set(info) == {"hardware", "rows", "settings", "answers", "errors"}
    for row in info["rows"]:
        assert {"suite", "length", "keep", "policy", "samples", "dense", "tca", "kept"} <= set(row)
    assert {"mean_kl", "mean_kl_uniform", "kl_99", "top1", "ppl_dense", "ppl_tca"} <= set(info["rows"][1])
    assert evaluated == [Settings(("needle", "kld"), (4096, 8192), ("calibrated", "key-diff"), (0.39, 0.25), None, 4, 3, "code", "q8_0", 2, 0)]


def test_eval_table(evaluated):
    text = run("eval", "m.gguf").stdout
    assert evaluated == [Settings()]
    assert max(map(len, text.splitlines())) <= 80 and "Test CPU, 2 threads" in text
    assert "75.0% (30%-95%)" in text and "0.0074 0.0359" in text and "8.500/8.400" in text and " 40%" in text
    assert re.search(r"turns .* 0.0%  0.0% +-\s", text)  # nothing that could have been kept
    assert "2000 of 3840 tokens evicted" in text and "an edit of the last turn 3800, after a change of an early fact 0" in " ".join(text.split())


def test_eval_notes_are_of_their_own_row():
    turns = {"suite": "turns", "length": 4096, "policy": "dense-q8_0", "keep": 1.0, "evicted_tokens": 0.0, "cache_tokens": 3840,
             "edited_reused": [3800], "changed_reused": [131]}  # fmt: skip
    notes = notes_of([turns | {"policy": "key-diff", "keep": 0.25, "evicted_tokens": 2000.0, "changed_reused": [0]}, turns])
    assert [note.partition(": ")[0] for note in notes] == ["turns 4K key-diff 0.250", "turns 4K dense-q8_0 1.000"]
    assert notes[0].endswith("early fact 0") and notes[1].endswith("early fact 131") and "evicted" in notes[0] and "evicted" not in notes[1]


def test_eval_plot(evaluated, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    result = run("eval", "m.gguf", "--plot", str(picture))
    assert result.exit_code == 0 and f"picture written to {picture}" in result.stdout.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_eval_shows_what_it_has(monkeypatch):
    from tca_gguf import eval as eval_package

    monkeypatch.setattr(eval_package, "run", lambda *_, **__: replace(eval_result(), interrupted=True))
    result = run("eval", "m.gguf")
    assert result.exit_code == 130 and "75.0%" in result.stdout and result.stderr.strip() == "error: interrupted"
    assert len(json.loads(run("eval", "m.gguf", "--json").stdout)["rows"]) == 3


def test_eval_saves_every_row_as_it_comes(monkeypatch, tmp_path):
    from tca_gguf import eval as eval_package

    raw, seen = tmp_path / "raw.json", []

    def killed(path, settings, progress, verbose, on_row):
        result = replace(eval_result(), rows=[])
        for row in eval_result().rows[:2]:
            result.rows.append(row)
            on_row(result)
            seen.append(len(json.loads(raw.read_text())["rows"]))
        raise SystemExit(9)

    monkeypatch.setattr(eval_package, "run", killed)
    run("eval", "m.gguf", "--save", str(raw))
    assert seen == [1, 2] and len(json.loads(raw.read_text())["rows"]) == 2
    assert run("eval", "m.gguf", "--save", str(tmp_path / "no" / "raw.json")).stderr.count("does not exist") == 1 and seen == [1, 2]


def test_an_eval_that_failed_in_part_shows_the_rest_and_says_so(monkeypatch, tmp_path):
    from tca_gguf import eval as eval_package

    monkeypatch.setattr(eval_package, "run", lambda *_, **__: replace(eval_result(), errors=["kld: out of\nmemory", "turns 4096 random: lost"]))
    result = run("eval", "m.gguf", "--save", str(tmp_path / "raw.json"))
    assert result.exit_code == 1 and "75.0%" in result.stdout
    assert result.stderr == "error: not everything could be measured: kld: out of memory; turns 4096 random: lost\n"
    assert len(json.loads((tmp_path / "raw.json").read_text())["errors"]) == 2


def test_eval_plot_of_many_policies(tmp_path):
    """Budgets of files at several fractions are one line; every panel and map that there is data for is drawn."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from tca_gguf.eval import plot as module

    rows, answers = [], []
    names = [f"{name}-{keep}" for name in ("calibrated", "other") for keep in (0.39, 0.25)] + ["key-diff", "streaming-llm", "dense-q8_0"]
    for length in (4096, 8192):
        for i, name in enumerate(names):
            rows.append(eval_result().rows[0] | {"policy": name, "length": length, "kv_bytes": 400 + i, "kv_bytes_dense": 1000})
            answers.append({"suite": "needle", "policy": name, "keep": 0.3, "length": length, "depth": 0.1, "right": [True]})
    drawn, axes = Figure(), Figure()
    module.draw_panels(drawn, rows, [("needle", 4096), ("needle", 8192)], 4)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["calibrated", "other", "key-diff", "streaming-llm", "dense-q8_0", "dense f16"]
    assert len(drawn.axes) == 2 and [len(line.get_xdata()) for line in drawn.axes[0].get_lines()] == [2, 2, 1, 1, 1, 2]
    module.draw_maps(axes, answers, [("needle", name, 0.3) for name in names])
    assert len(axes.axes) == len(names) + 1  # and the colour bar
    module.plot(replace(eval_result(), rows=rows, answers=answers), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10000


def test_depth_map():
    grid = depth_map(eval_result().answers, [4096])
    assert grid.shape == (8, 1) and grid[[0, 2, 4], 0].tolist() == [1.0, 1.0, 1.0] and grid[6, 0] == 0.0
    assert np.isnan(grid[[1, 3, 5, 7], 0]).all()
