"""The commands without a model: arguments, exit codes, texts, JSON shapes."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runner import run
from gguf_samples import N_HEAD_KV, N_LAYER, make_budgets, same_budgets, write_gguf
from rich.console import Console

from tca_gguf import bench as bench_logic
from tca_gguf import demo as demo_logic
from tca_gguf import gguf_file
from tca_gguf.cli import bench as cli_bench
from tca_gguf.cli import cli
from tca_gguf.cli import common as cli_common
from tca_gguf.cli import docs
from tca_gguf.errors import TcaError

COMMANDS = ("embed-budgets", "strip-budgets", "inspect", "models", "generate", "chat", "bench", "eval", "demo", "exec", "activate", "deactivate", "doctor", "completion")


@pytest.fixture
def plain(tmp_path) -> str:
    return str(write_gguf(tmp_path / "plain.gguf"))


@pytest.fixture
def embedded(tmp_path) -> str:
    path = write_gguf(tmp_path / "embedded.gguf")
    gguf_file.embed_budgets(path, path, make_budgets())
    return str(path)


@pytest.fixture
def calibrated(monkeypatch):
    """embed-budgets without a model: calibrate() answers with make_budgets(); returns the keyword arguments it got."""
    from tca_gguf import calib, llama, logs

    calls = []

    def calibrate(path, **kwargs):
        calls.append({"path": Path(path), **kwargs})
        kwargs["progress"](1, 2, "layer 1")
        return make_budgets(5)

    monkeypatch.setattr(calib, "calibrate", calibrate)
    monkeypatch.setattr(llama, "load", lambda: None)
    monkeypatch.setattr(logs, "take_over", lambda *_: None)
    return calls


WRONG_USAGE = [
    (["nonsense"], "No such command 'nonsense'"),
    (["inspect"], "Missing argument 'MODEL'"),
    (["inspect", "m.gguf", "--nope"], "No such option"),
    (["embed-budgets", "m.gguf", "--keep", "0"], "0 must be above 0 and at most 1"),
    (["embed-budgets", "m.gguf", "--keep", "1.5"], "1.5 must be above 0 and at most 1"),
    (["embed-budgets", "m.gguf", "--keep", "nan"], "nan must be above 0"),
    (["embed-budgets", "m.gguf", "--keep", "lots"], "'lots' is not a number"),
    (["embed-budgets", "m.gguf", "--max-error", "0"], "0 must be above 0"),
    (["embed-budgets", "m.gguf", "--max-error", "nan"], "nan must be"),
    (["embed-budgets", "m.gguf", "--tokens", "-3"], "-3 must be at least 1"),
    (["embed-budgets", "m.gguf", "--tokens", "1.5"], "'1.5' is not a whole number"),
    (["embed-budgets", "m.gguf", "--seed", "4294967296"], "at most 4294967295"),
    (["generate", "m.gguf"], "an empty prompt"),
    (["generate", "m.gguf", "-p", "x", "--temp", "-1"], "-1 must be at least 0"),
    (["generate", "m.gguf", "-p", "x", "--kv-type", "q5"], "'q5' is not one of"),
    (["chat", "m.gguf", "-c", "-1"], "-1 must be at least 0"),
    (["bench", "m.gguf", "--depths", "4096,many"], "'many' is not a number of tokens"),
    (["bench", "m.gguf", "--depths", "0"], "'0' is not a number of tokens"),
    (["bench", "m.gguf", "--depths", ""], "is not a number of tokens"),
    (["bench", "m.gguf", "--kv-type", "f16,bf16"], "'bf16' is not one of f16, q8_0, q4_0"),
    (["bench", "m.gguf", "--repeat", "0"], "0 must be at least 1"),
    (["eval", "m.gguf", "--suite", "needle,nothing"], "'nothing' is not one of needle"),
    (["eval", "m.gguf", "--lengths", "long"], "'long' is not a number of tokens"),
    (["eval", "m.gguf", "--keep", "0.39,2"], "2 must be above 0 and at most 1"),
    (["eval", "m.gguf", "--uniform", "0"], "0 must be above 0"),
    (["eval", "m.gguf", "--samples", "0"], "0 must be at least 1"),
    (["eval", "m.gguf", "--policy", "key-diff,"], "holds an empty name"),
    (["bench", "m.gguf", "--tests", "x"], "'x' is not one of"),
    (["bench", "m.gguf", "--budgets", "file,x"], "'x' is not a number"),
    (["bench", "m.gguf", "--budgets", "1.5"], "1.5 must be above 0 and at most 1"),
    (["demo", "extra"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("args", "text"), WRONG_USAGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_usage_is_one_line_and_exit_code_2(args, text):
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert text in result.stderr and result.stderr.startswith("error: ") and "--help" in result.stderr
    assert result.stderr.count("\n") == 1


ERRORS = [
    (["inspect", "none.gguf"], "none.gguf does not exist"),
    (["inspect", "."], ". is a directory"),
    (["inspect", "junk.gguf"], "junk.gguf is not a readable GGUF file"),
    (["inspect", "plain.gguf"], "plain.gguf has no budgets; write some with: embed-budgets plain.gguf"),
    (["inspect", "plain.gguf", "--json"], "has no budgets"),
    (["inspect", "bad.gguf"], "bad.gguf: tca.version is 9"),
    (["inspect", "embedded.gguf", "--plot", "no/such/dir.png"], "cannot be written"),
    (["inspect", "embedded.gguf", "--plot", "picture.nope"], "cannot be written"),
    (["strip-budgets", "none.gguf"], "none.gguf does not exist"),
    (["strip-budgets", "split.gguf", "-o", "x.gguf"], "one part of a split GGUF file"),
    (["strip-budgets", "embedded.gguf", "-o", "no/dir/x.gguf"], "does not exist"),
    (["strip-budgets", "readonly.gguf"], "readonly.gguf is read-only"),
    (["embed-budgets", "none.gguf"], "none.gguf does not exist"),
    (["embed-budgets", "junk.gguf"], "not a readable GGUF file"),
    (["embed-budgets", "readonly.gguf", "--in-place"], "readonly.gguf is read-only"),
    (["embed-budgets", "ollama:none"], "ollama:none is not in"),
    (["chat", "hf:a/b"], "nothing is downloaded"),
    (["embed-budgets", "split.gguf"], "one part of a split GGUF file"),
    (["embed-budgets", "plain.gguf", "-o", "no/dir.gguf"], "does not exist"),
    (["embed-budgets", "plain.gguf", "--text", "none.txt"], "none.txt cannot be read"),
    (["embed-budgets", "plain.gguf", "--text", "latin1.txt"], "latin1.txt is not UTF-8"),
    (["embed-budgets", "plain.gguf", "--text", "empty.txt"], "empty.txt is empty"),
    (["generate", "none.gguf", "-p", "x"], "none.gguf does not exist"),
    (["generate", "bad.gguf", "-p", "x"], "tca.version is 9"),
    (["generate", "plain.gguf", "-f", "none.txt"], "none.txt cannot be read"),
    (["chat", "."], ". is a directory"),
    (["chat", "none.gguf"], "none.gguf does not exist"),
    (["bench", "none.gguf"], "none.gguf does not exist"),
    (["bench", "plain.gguf"], "carries no enabled budgets"),
    (["bench", "embedded.gguf", "--kv-type", "q8_0", "--fa", "off"], "only with flash attention"),
    (["eval", "none.gguf"], "none.gguf does not exist"),
    (["eval", "plain.gguf", "--lengths", "2048"], "carries no budgets; run embed-budgets"),
    (["eval", "embedded.gguf", "--lengths", "8192"], "length 8192 is past the 4096 tokens"),
    (["eval", "embedded.gguf", "--keep", "0.3", "--uniform", "0.3"], "exclude each other"),
    (["eval", "embedded.gguf", "--policy", "no-metric"], "metric"),
    (["eval", "embedded.gguf", "--policy", "dense-q8_0", "--kv-type", "q8_0"], "--kv-type belongs to the policies that evict"),
    (["eval", "embedded.gguf", "--text", "none.txt"], "none.txt cannot be read: No such file or directory; or name one of reference, code, records"),
    (["eval", "embedded.gguf", "--text", "latin1.txt"], "latin1.txt is not UTF-8"),
    (["eval", "embedded.gguf", "--plot", "no/dir.png"], "no/dir.png cannot be written"),
    (["eval", "embedded.gguf", "--plot", "picture.nope"], "picture.nope cannot be written"),
    (["exec", "llama-nothing"], "llama-nothing is not in"),
    (["exec", "no-such-program"], "no-such-program is not found"),
    (["exec", "llama-bench", "-m", "ollama:none"], "ollama:none is not in"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from gguf import GGUFValueType

    for name in ("plain", "embedded", "readonly"):
        write_gguf(Path(f"{name}.gguf"))
    for name in ("embedded", "readonly"):
        gguf_file.embed_budgets(f"{name}.gguf", f"{name}.gguf", make_budgets())
    os.chmod("readonly.gguf", 0o444)
    write_gguf(Path("bad.gguf"), extra={"tca.version": (9, GGUFValueType.UINT32)})
    write_gguf(Path("split.gguf"), extra={"split.count": (2, GGUFValueType.UINT16)})
    Path("junk.gguf").write_bytes(b"not a model" * 10)
    Path("latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty.txt").write_text(" \n")
    return tmp_path


@pytest.mark.parametrize(("args", "text"), ERRORS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_an_error_is_one_line_and_exit_code_1(folder, args, text):
    result = run(*args)
    assert result.exit_code == 1, result.output
    assert text in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"], *([name, "--help"] for name in COMMANDS), *([name, "-h"] for name in COMMANDS)])
def test_help(args):
    result = run(*args)
    assert result.exit_code == 0 and "Usage: " in result.stdout
    if args and args[0] in COMMANDS:
        assert re.search(rf"Example:\n +tca-gguf {args[0]}", result.stdout)


def test_every_command_is_there():
    assert tuple(cli.commands) == COMMANDS
    assert run("--version").output.startswith("tca-gguf, version ")


def test_docs_are_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "cli.md"
    text = path.read_text(encoding="utf-8")
    if f"with click {docs.click_version()};" in text:
        assert text == docs.document(), "run: python -m tca_gguf.cli.docs > docs/cli.md"
    for name, command in cli.commands.items():
        assert f"## {name}" in text
        for option in command.params:
            assert all(flag in text for flag in option.opts if flag.startswith("--")), (name, option.opts)


def test_models_page_is_up_to_date() -> None:
    from tca_gguf.cli import models

    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert text == models.document(), "run: python -m tca_gguf.cli.docs models > docs/models.md"


def test_models_are_listed() -> None:
    rows = json.loads(run("models", "--json").output)["architectures"]
    served = {row["architecture"] for row in rows if row["served"]}
    assert {"llama", "qwen35", "gemma3", "glm4moe"} <= served and "deepseek4" not in served
    assert all(row["remark"] for row in rows if not row["served"])
    assert "architectures are served" in run("models").output


def test_embed_in_place(plain, calibrated):
    original = Path(plain).read_bytes()
    result = run("embed-budgets", plain, "--keep", "0.25", "--seed", "3", "--threads", "2")
    assert result.exit_code == 0, result.output
    assert f"budgets written to {plain}" in result.stdout and "KV cache of 4096 tokens" in result.stdout
    call = calibrated[0]
    assert (call["path"], call["keep"], call["max_error"], call["texts"], call["tokens"], call["seed"], call["n_threads"]) == (
        Path(plain), 0.25, None, None, None, 3, 2
    )  # fmt: skip
    assert same_budgets(gguf_file.read_budgets(plain), make_budgets(5))
    assert run("strip-budgets", plain).stdout == f"budgets removed from {plain}\n"
    assert Path(plain).read_bytes() == original
    assert run("strip-budgets", plain).stdout == f"{plain} has no budgets\n"


def test_embed_elsewhere_and_dry_run(plain, calibrated, tmp_path):
    original, target, text = Path(plain).read_bytes(), tmp_path / "out.gguf", tmp_path / "t.txt"
    text.write_text("Some prose.", encoding="utf-8")
    result = run("embed-budgets", plain, "-o", str(target), "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["written"] is None and not target.exists()
    result = run("embed-budgets", plain, "-o", str(target), "--text", str(text), "--text", str(text), "--tokens", "99", "--json")
    info = json.loads(result.stdout)
    assert info["written"] == str(target) and info["kept_fraction"] == pytest.approx(make_budgets(5).kept_fraction, abs=1e-6)
    assert set(info["kv_bytes"]["4096"]) == {"dense", "tca"}
    assert calibrated[1]["texts"] == ["Some prose.", "Some prose."] and calibrated[1]["tokens"] == 99
    assert run("embed-budgets", plain, "--dry-run", "--max-error", "0.1").exit_code == 0
    assert calibrated[2]["keep"] is None and calibrated[2]["max_error"] == 0.1
    assert [call["metric"] for call in calibrated] == ["key-probe"] * 3
    assert Path(plain).read_bytes() == original
    assert same_budgets(gguf_file.read_budgets(target), make_budgets(5))
    result = run("strip-budgets", str(target), "-o", str(tmp_path / "stripped.gguf"), "--json")
    assert json.loads(result.stdout) == {"model": str(target), "written": str(tmp_path / "stripped.gguf"), "stripped": True, "deleted": []}
    assert (tmp_path / "stripped.gguf").read_bytes() == original


def test_inspect_json_shape(embedded):
    info = json.loads(run("inspect", embedded, "--json").stdout)
    assert list(info) == ["kept_fraction", "block_size", "group_size", "window", "sinks", "metric", "heads", "kv_bytes", "n_ctx_train", "source"]
    budgets = make_budgets()
    fractions, errors = budgets.head_kept_fraction(), budgets.calibration.errors
    assert len(info["heads"]) == N_LAYER * N_HEAD_KV
    for head in info["heads"]:
        assert list(head) == ["layer", "head", "kept_fraction", "error", "bound"]
        assert head["kept_fraction"] == fractions[head["layer"], head["head"]]
        assert head["error"] == pytest.approx(float(errors[head["layer"], head["head"]]))
        assert head["bound"] == pytest.approx(float(budgets.calibration.bounds[head["layer"], head["head"]]))
    assert list(info["kv_bytes"]) == ["8192", "32768", "131072"]
    for n_ctx, kv in info["kv_bytes"].items():
        assert kv["dense"] == int(n_ctx) * N_LAYER * N_HEAD_KV * (8 + 8) * 2
        assert 0 < kv["tca"]


def test_inspect_heads_that_keep_nothing(tmp_path):
    path, budgets = write_gguf(tmp_path / "m.gguf"), make_budgets(4, metric="key-probe")
    gguf_file.embed_budgets(path, path, budgets)
    info = json.loads(run("inspect", str(path), "--json").stdout)
    fractions = [head["kept_fraction"] for head in info["heads"]]
    assert info["metric"] == "key-probe" and fractions == budgets.head_kept_fraction().ravel().tolist() and min(fractions) == 0
    shown = run("inspect", str(path))
    assert shown.exit_code == 0 and "metric key-probe" in shown.stdout


def test_inspect_without_calibration_has_null_errors(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    gguf_file.embed_budgets(path, path, make_budgets(calibrated=False))
    info = json.loads(run("inspect", str(path), "--json").stdout)
    assert {head["error"] for head in info["heads"]} == {head["bound"] for head in info["heads"]} == {None}
    shown = run("inspect", str(path)).stdout
    assert "error of the attention output" not in shown and "at most that error" not in shown


@pytest.mark.parametrize("columns", ["40", "80", "160"])
def test_inspect_heat_map(embedded, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = run("inspect", embedded)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    text = result.stdout
    assert "kept, % of a head's evicted" in text and "128K" in text and "calibrated on 6000 tokens" in text
    assert "error of the attention output" in text and "at most that error" in text and "trained for" in text
    first = next(line for line in lines if re.match(r" +0 ", line))
    kept = make_budgets().head_kept_fraction()[0]
    numbers = [float(number) for number in first.split()[1 : 1 + N_HEAD_KV]]
    assert numbers == pytest.approx([100 * k for k in kept], abs=0.51)


def test_inspect_many_heads_fit_a_narrow_terminal(tmp_path, monkeypatch):
    from gguf import GGUFValueType

    extra = {"llama.attention.key_length": (8, GGUFValueType.UINT32), "llama.attention.value_length": (8, GGUFValueType.UINT32)}
    extra["llama.attention.head_count_kv"] = (64, GGUFValueType.UINT32)
    path = write_gguf(tmp_path / "wide.gguf", extra=extra)
    gguf_file.embed_budgets(path, path, make_budgets(n_head_kv=64))
    monkeypatch.setenv("COLUMNS", "80")
    result = run("inspect", str(path))
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80


def test_inspect_plot(embedded, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    result = run("inspect", embedded, "--plot", str(picture))
    assert result.exit_code == 0 and f"picture written to {picture}" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_plot_without_matplotlib(embedded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run("inspect", embedded, "--plot", str(tmp_path / "p.png"))
    assert result.exit_code == 1 and "pip install 'tca-gguf[plot]'" in result.stderr


def test_names_from_a_file_are_no_markup(tmp_path):
    from gguf import GGUFValueType

    path = write_gguf(tmp_path / "m.gguf", extra={"general.name": ("[red]x[/red] \x1b[2J", GGUFValueType.STRING)})
    gguf_file.embed_budgets(path, path, make_budgets())
    output = run("inspect", str(path)).stdout
    assert "[red]x[/red]" in output and "\x1b[2J" not in output


BENCH = bench_logic.Result(
    hardware={"cpu": "Test CPU", "cores": 2, "threads": 2, "os": "Linux", "read_gbps": 20.0, "fma_gflops": 400.0},
    settings={"model": "m.gguf", "repeat": 3},
    rows=[
        bench_logic.Row("prefill", 4096, "f16", 100.0, "fa=0", 150.0, 1.5, 1000, 400, 0.4),
        bench_logic.Row("decode", 4096, "f16", 20.0, "fa=1", 10.0, 0.5, 1000, 400, 0.4, "0.25", "f16",
                        bench_logic.Attention(40.0, 8e7, 1e9), bench_logic.Attention(8.0, 4e7, 5e8)),
    ],
    samples=[bench_logic.Sample("prefill", 4096, "f16", "tca", "file", 400, [149.0, 150.0, 152.0])],
    stalls=[{"kv_type": "f16", "budgets": "file", "tokens": 4608, "median_ms": 20.0, "longest_ms": 30.0, "ratio": 1.5}],
)  # fmt: skip


def test_bench(monkeypatch, tmp_path):
    seen = []

    def fake(path, settings, report, on_depth, verbose):
        seen.append(settings)
        report("working")
        on_depth(BENCH)
        return BENCH

    monkeypatch.setattr("tca_gguf.cli.bench.run", fake)
    raw = tmp_path / "raw.json"
    result = run("bench", "m.gguf", "--depths", "4K,16384,4096", "--kv-type", "f16,q8_0", "--repeat", "5", "-n", "8", "--tests", "decode",
                 "--budgets", "file,0.250,dense", "--dense-kv", "f16", "--passes", "2", "--save", str(raw), "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    assert list(info)[:2] == ["hardware", "rows"] and info == json.loads(raw.read_text())
    assert all(
        list(row)[:10] == ["test", "depth", "kv_type", "dense_tps", "dense_config", "tca_tps", "ratio", "dense_kv_bytes", "tca_kv_bytes", "kv_ratio"]
        for row in info["rows"]
    )
    assert seen[0] == bench_logic.Settings((4096, 16384), ("f16", "q8_0"), 5, 8, ("decode",), "both", 0, 0, ("file", "0.25", "dense"), "f16", 2)
    table = run("bench", "m.gguf").stdout
    assert "1.50x" in table and "0.50x" in table and "fa=1" in table and "Test CPU" in table and "spread of one series 2%" in table
    assert "40.00 > 8.00" in table and "5.0" in table and "keep 0.25" in table and "20.0 GB/s" in table
    assert "compaction at 4608 tokens, f16, file: longest token 30.0 ms, 1.50 times the median" in table
    assert table.count("\n") == 9  # head, 2 rows, machine, 3 conclusions, limits, spread: no line is wrapped


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bench_that_is_interrupted_keeps_what_it_has(monkeypatch, tmp_path, options):
    monkeypatch.setattr("tca_gguf.cli.bench.run", lambda *_: replace(BENCH, interrupted=True))
    raw = tmp_path / "raw.json"
    result = run("bench", "m.gguf", "--save", str(raw), *options)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert json.loads(raw.read_text())["interrupted"]
    assert json.loads(result.stdout)["interrupted"] if options else "Test CPU" in result.stdout


@pytest.mark.parametrize(("width", "missing"), [(200, []), (80, ["budgets", "best", "attention ms", "GB/s", "GFLOP/s"]),
                                                (60, ["KV", "budgets", "best", "attention ms", "GB/s", "GFLOP/s"])])  # fmt: skip
def test_bench_fits_a_terminal(width, missing):
    stream = io.StringIO()
    table = cli_bench.Table(Console(file=stream, width=width, force_terminal=True, color_system=None), bench_logic.Settings())
    table.update(BENCH)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= max(width, 67) and "1.50x" in lines[1]
    assert [name for name in missing if name not in table.left_out()[0]] == [] if missing else table.left_out() == []


def test_bench_keeps_the_columns_that_tell_rows_apart():
    names = {cli_bench.COLUMNS[i][0] for i in cli_bench.columns_for(80, wanted=[2, 3])}
    assert {"KV", "budgets", "test", "depth", "ratio"} <= names and "best" not in names


def test_progress_without_a_terminal_is_a_line_every_few_seconds():
    stream, clock = io.StringIO(), [0.0]
    progress = cli_common.PlainProgress(Console(file=stream, width=80), now=lambda: clock[0])
    for done in range(1, 21):
        clock[0] += 1
        progress.advance(done, 40, f"layer {done}")
    assert stream.getvalue().splitlines() == [f"layer {n}: {5 * n // 2}% after 0:{n:02}, about 0:{40 - n:02} left" for n in (5, 10, 15, 20)]


def test_a_status_line_steps_aside_for_rows(monkeypatch):
    calls = []
    line = cli_common.StatusLine()
    line.status = SimpleNamespace(stop=lambda: calls.append("stop"), start=lambda: calls.append("start"), update=calls.append)
    line("working [x]")
    with line.hidden():
        calls.append("row")
    assert calls == ["working \\[x]", "stop", "row", "start"]


def test_bench_checks_where_it_writes_first(monkeypatch, tmp_path):
    monkeypatch.setattr("tca_gguf.cli.bench.run", lambda *_: pytest.fail("must not be measured"))
    for option in ("--save", "--plot"):
        result = run("bench", "m.gguf", option, str(tmp_path / "none" / "x"))
        assert result.exit_code == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kv_type", "fa", "expected"),
    [
        ("f16", "both", ["fa=0", "fa=1"]),
        ("f16", "on", ["fa=1"]),
        ("f16", "off", ["fa=0"]),
        ("q8_0", "both", ["fa=1"]),
        ("q4_0", "on", ["fa=1"]),
    ],
)
def test_dense_configurations(kv_type, fa, expected):
    assert [case.config for case in bench_logic.dense_configs(kv_type, fa)] == expected


def test_hardware_names_the_machine():
    info = bench_logic.hardware()
    assert info["cpu"] and info["cores"] >= 1 and "version" in info["build"]


SIDE = {"name": "dense", "answer": "[b]48213", "correct": True, "prompt_tokens": 5000, "prefill_tps": 10.0, "decode_tps": 2.0, "kv_bytes": 1000}
DEMO = {
    "model": "m.gguf",
    "question": "Which?",
    "expected": "48213",
    "sides": [SIDE, SIDE | {"name": "TCA", "correct": False, "prefill_tps": 15.0, "kv_bytes": 400}],
}


def test_demo(monkeypatch):
    monkeypatch.setattr("tca_gguf.cli.demo.run", lambda report, progress, threads, verbose: DEMO)
    assert json.loads(run("demo", "--json").stdout) == DEMO
    text = run("demo").stdout
    assert "1.50x" in text and "40%" in text and "[b]48213" in text and "right" in text and "wrong" in text


def test_demo_document_is_the_same_every_time_and_holds_the_fact_once():
    text = demo_logic.document(3000)
    assert text == demo_logic.document(3000) != demo_logic.document(3000, seed=8)
    assert text.count(demo_logic.FACT) == 1 and demo_logic.EXPECTED in demo_logic.FACT
    assert 0.05 < text.index(demo_logic.FACT) / len(text) < 0.3
    assert 3000 <= len(text.split()) < 3100


def test_an_interrupt(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tca_gguf.cli.demo.run", interrupted)
    result = run("demo")
    assert result.exit_code == 130 and result.stderr.strip() == "error: interrupted"


def test_a_multi_line_error_becomes_one_line(monkeypatch):
    def failing(*_):
        raise TcaError("first\n  second")

    monkeypatch.setattr("tca_gguf.cli.demo.run", failing)
    assert run("demo").stderr == "error: first second\n"


def test_exec_replaces_the_process(monkeypatch, tmp_path):
    from tca_gguf import llama

    program = tmp_path / "llama-server"
    find = llama.program
    monkeypatch.setattr(llama, "program", lambda name: program if name == "llama-server" else find(name))
    seen = []
    monkeypatch.setattr(os, "execve", lambda path, args, env: seen.append((path, args, env)))
    assert run("exec", "llama-server", "-m", "x.gguf", "--help", "--port", "1", "--", "-z").exit_code == 0
    assert seen[0][0] == program and seen[0][1][:6] == [str(program), "-m", "x.gguf", "--help", "--port", "1"]
    assert seen[0][2]["LLAMA_CPP_LIB_PATH"] == str(llama.lib_dir())
    assert run("exec", "python", "app.py", "-m", "x.gguf").exit_code == 0
    assert seen[1][0].name == "python" and seen[1][1][1:] == ["app.py", "-m", "x.gguf"]
    monkeypatch.undo()
    monkeypatch.setattr(llama, "program", lambda name: program)
    result = run("exec", "llama-server")
    assert result.exit_code == 1 and "cannot be run" in result.stderr


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (98_362_432, "98.4 MB"), (491e6, "491 MB"), (3.2e9, "3.2 GB")])
def test_sizes(n, text):
    assert cli_common.size(n) == text


@pytest.mark.parametrize(("value", "numbers"), [("4096", (4096,)), ("4k, 16K", (4096, 16384)), ("5,5", (5,))])
def test_depth_lists(value, numbers):
    assert cli_common.IntList().convert(value, None, None) == numbers


def test_colour_ramp_covers_every_value():
    from tca_gguf.cli.inspect import heat_map

    for top in (1.0, 1e-9):
        lines = heat_map(np.array([[0.0, top / 2, top]]), [0], "t", top, 80)
        assert len(lines) == 3
