"""bench: dense against TCA."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from tca_gguf.bench import Result, Settings, run
from tca_gguf.loading import KV_TYPES

from .common import (
    ChoiceList,
    IntList,
    Number,
    emit_json,
    gpu_layers_option,
    json_option,
    model_argument,
    out,
    size,
    status_line,
    threads_option,
    tokens_short,
    verbose_option,
)


def table_of(result: Result) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("test", "depth", "KV", "dense t/s", "best", "TCA t/s", "ratio", "dense KV", "TCA KV", "share"):
        table.add_column(name, justify="left" if name in ("test", "best", "KV") else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.test,
            tokens_short(row.depth),
            row.kv_type,
            f"{row.dense_tps:.1f}",
            row.dense_config,
            f"{row.tca_tps:.1f}",
            f"[{'green' if row.ratio >= 1 else 'red'}]{row.ratio:.2f}x[/]",
            size(row.dense_kv_bytes),
            size(row.tca_kv_bytes),
            f"{row.kv_ratio:.0%}",
        )
    return table


def spread(result: Result) -> str:
    """The largest (max - min) / median of any series, in words, so that a reader knows what a ratio is worth."""
    worst = 0.0
    for sample in result.samples:
        values = sorted(sample["tps"])
        worst = max(worst, (values[-1] - values[0]) / values[len(values) // 2])
    return f"{worst:.0%}" + ("; other programs disturbed this run, repeat it on a quiet machine" if worst > 0.25 else "")


@click.command("bench")
@model_argument
@click.option("--depths", type=IntList(), default="4096,16384", show_default=True, help="Tokens in the cache before a test.")
@click.option("--kv-type", "kv_types", type=ChoiceList(list(KV_TYPES)), metavar="TYPE,...", default="f16", show_default=True, help=f"Types of the KV cache: {', '.join(KV_TYPES)}.")
@click.option("--repeat", type=Number(1, 1000), default=3, show_default=True, help="Measurements of each test; the median counts.")
@click.option("-n", "--n-gen", type=Number(1, 512), default=32, show_default=True, help="Tokens of a decode test.")
@click.option("--mode", type=click.Choice(["depth", "whole"]), default="depth", show_default=True,
              help="depth: 512 more tokens and single tokens at each depth; whole: a prompt of each depth from the start.")  # fmt: skip
@click.option("--fa", type=click.Choice(["both", "on", "off"]), default="both", show_default=True,
              help="Flash attention of the dense runs; the better one counts.")  # fmt: skip
@threads_option
@gpu_layers_option
@verbose_option
@json_option
def bench_command(
    model: Path,
    depths: tuple[int, ...],
    kv_types: tuple[str, ...],
    repeat: int,
    n_gen: int,
    mode: str,
    fa: str,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure MODEL with its budgets against llama.cpp's stock attention, in alternation, in one run.

    Prefill is the speed of 512 more prompt tokens at a depth, decode that of single tokens; KV is the memory allocated
    for the cache. The dense side is the better of flash attention on and off.

    \b
    Example:
      tca-gguf bench model.gguf --depths 4096,16384
      tca-gguf bench model.gguf --depths 16K --kv-type f16,q8_0 --json > bench.json
    """
    settings = Settings(depths, kv_types, repeat, n_gen, mode, fa, threads or 0, gpu_layers)
    with status_line() as report:
        result = run(model, settings, report, verbose)
    if as_json:
        emit_json(result.as_json())
        return
    console = out()
    machine = result.hardware
    console.print(f"{model.name}: {machine['cpu']}, {machine['threads']} threads, {machine['os']}")
    console.print(table_of(result))
    console.print(f"medians of {repeat}; largest spread of one series {spread(result)}", style="dim")
