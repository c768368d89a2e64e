"""eval: what the cache policy costs in answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from tca_gguf.atomic import check_target
from tca_gguf.errors import TcaError
from tca_gguf.eval.lab import Settings
from tca_gguf.loading import KV_TYPES

from .common import (
    ChoiceList,
    FractionList,
    IntList,
    NameList,
    Number,
    emit_json,
    gpu_layers_option,
    json_option,
    kv_type_option,
    model_argument,
    out,
    progress_bar,
    threads_option,
    tokens_short,
    verbose_option,
)

if TYPE_CHECKING:
    from tca_gguf.eval import Result

SUITE_NAMES = ["needle", "needle-multikey", "needle-multivalue", "needle-multiquery", "variables", "common-words", "frequent-words",
               "kld", "turns", "reasoning"]  # fmt: skip


def share(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """0.973 -> "97.3%", with its interval if there is one; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" ({interval[0]:.0%}-{interval[1]:.0%})" if interval else "")


def tables_of(rows: list[dict[str, Any]]) -> list[Table]:
    """One table of the suites with right and wrong answers, one of kld; those that have rows."""
    common = ("suite", "size", "policy", "keep", "KV", "n")
    answers = ("dense", "right", "kept (95%)")
    logits = ("KL", "unif.", "99%", "top-1", "ppl dense/TCA")
    tables = []
    for names, chosen in ((answers, [r for r in rows if "mean_kl" not in r]), (logits, [r for r in rows if "mean_kl" in r])):
        if not chosen:
            continue
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for name in (*common, *names):
            table.add_column(name, justify="left" if name in ("suite", "policy") else "right", no_wrap=name != "policy", overflow="fold")
        for r in chosen:
            cells = [r["suite"], tokens_short(r["length"]), r["policy"], f"{r['keep']:.3f}", f"{r['kv_bytes'] / r['kv_bytes_dense']:.0%}"]
            cells.append(str(r.get("answers", r["samples"])))
            if "mean_kl" in r:
                uniform = "-" if r["mean_kl_uniform"] is None else f"{r['mean_kl_uniform']:.4f}"
                cells += [f"{r['mean_kl']:.4f}", uniform, f"{r['kl_99']:.3f}", share(r["top1"]), f"{r['ppl_dense']:.3f}/{r['ppl_tca']:.3f}"]
            else:
                cells += [share(r["dense"]), share(r["tca"]), share(r["kept"], r["kept_ci"])]
            table.add_row(*cells)
        tables.append(table)
    return tables


def notes_of(rows: list[dict[str, Any]]) -> list[str]:
    """How much was evicted, and what `turns` reused."""
    notes = []
    for r in rows:
        parts = []
        if r["evicted_tokens"]:
            parts.append(f"{r['evicted_tokens']:.0f} of {r['cache_tokens']} tokens evicted from a head on average")
        if "changed_reused" in r:
            parts.append(f"tokens reused after an edit of the last turn {min(r['edited_reused'])}, after a change of an early fact "
                         f"{max(r['changed_reused'])}")  # fmt: skip
        if parts:
            notes.append(f"{r['suite']} {tokens_short(r['length'])} {r['policy']} {r['keep']:.3f}: {'; '.join(parts)}")
    return notes


@click.command("eval")
@model_argument
@click.option("--suite", "suites", type=ChoiceList(SUITE_NAMES), metavar="NAME,...", default="needle,kld", show_default=True,
              help=f"What to test: {', '.join(SUITE_NAMES)}.")  # fmt: skip
@click.option("--lengths", type=IntList(), default="4096", show_default=True, help="Tokens of the window: the text, a question and its answer.")
@click.option("--policy", "policies", type=NameList(), metavar="NAME,...",
              help="calibrated; a metric (key-diff, ...) under uniform budgets; streaming-llm, sinks and a window of the same bytes; either at a fraction of its own as NAME@R; another .gguf file for its budgets; dense-q8_0 or dense-q4_0.  [default: calibrated, that is the file's own budgets]")  # fmt: skip
@click.option("--keep", "keeps", type=FractionList(), help="Calibrate at these kept fractions (nothing is written), and give them to the uniform policies too.")
@click.option("--uniform", type=Number(0.0, 1.0, above=True), help="Uniform budgets with this kept fraction; without --policy for key-diff.")
@click.option("--samples", type=Number(1, 100000), help="Questions of a suite at a length (kld: positions, reasoning: chains).  [default: as suits each]")
@click.option("--seed", type=Number(0, 2**32 - 1), default=0, show_default=True, help="Seed of the texts and questions.")
@click.option("--text", default="reference", show_default=True, help="Text around the facts, and of kld: reference (Python's), code, records, or a UTF-8 file.")
@kv_type_option
@click.option("--plot", "picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Also write the scores as a picture.")
@click.option("--save", "raw", type=click.Path(path_type=Path), metavar="FILE.json", help="Write what --json prints here, after each row.")
@threads_option
@gpu_layers_option
@verbose_option
@json_option
def eval_command(
    model: Path,
    suites: tuple[str, ...],
    lengths: tuple[int, ...],
    policies: tuple[str, ...] | None,
    keeps: tuple[float, ...] | None,
    uniform: float | None,
    samples: int | None,
    seed: int,
    text: str,
    kv_type: str,
    picture: Path | None,
    raw: Path | None,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Test what MODEL still answers under its budgets, or under other policies, against the dense model.

    Both read the same text, once; then every question is asked on top of it. "kept" is the share of the dense model's right
    answers that the policy gives too. The dense side always has the stock f16 cache and is run once for all policies; the
    KV type is that of the policies that evict.

    \b
    Example:
      tca-gguf eval model.gguf
      tca-gguf eval model.gguf --suite needle-multikey,kld --lengths 4096,8192 --json > eval.json
      tca-gguf eval model.gguf --keep 0.39,0.25 --policy calibrated,key-diff,streaming-llm --save eval.json --plot eval.png
    """
    from tca_gguf.eval import run
    from tca_gguf.eval.plot import check_plot, plot

    settings = Settings(suites, lengths, policies or (), keeps or (), uniform, samples, seed, text, kv_type, threads or 0, gpu_layers)
    if picture is not None:
        check_plot(picture)  # said before the minutes of work
    if raw is not None:
        check_target(raw, 0)
    with progress_bar() as advance:
        result = run(model, settings, advance, verbose=verbose, on_row=lambda so_far: so_far.save(raw) if raw is not None else None)
    if raw is not None:
        result.save(raw)  # with what went wrong last
    if picture is not None:
        plot(result, picture)
    if as_json:
        emit_json(result.as_json())
    else:
        show(out(), model, result)
        if picture is not None:
            click.echo(f"picture written to {picture}")
    if result.interrupted:
        raise KeyboardInterrupt
    if result.errors:
        raise TcaError("not everything could be measured: " + "; ".join(result.errors))


def show(console: Console, model: Path, result: Result) -> None:
    console.print(f"{model.name}: {result.hardware['cpu']}, {result.settings['n_threads']} threads", markup=False)
    for table in tables_of(result.rows):
        console.print(table)
    for note in notes_of(result.rows):
        console.print(note, style="dim", markup=False)
