"""bench: dense against TCA."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tca_gguf.atomic import check_target, replace_text
from tca_gguf.bench import TESTS, Result, Row, Settings, run
from tca_gguf.bench.cases import DENSE, FILE, words
from tca_gguf.bench.plot import plot
from tca_gguf.bench.results import summary, worst_spread
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


class BudgetList(click.ParamType):
    """Budgets separated by commas: file, dense, or a kept fraction for all heads."""

    name = "budgets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = []
        for word in (part.strip() for part in str(value).split(",")):
            if word not in (FILE, DENSE):
                fraction = Number(0.0, 1.0, above=True).convert(word, param, ctx)
                word = f"{fraction:g}"
            words.append(word)
        return tuple(dict.fromkeys(words))


# name, width, how a row says it
COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("test", -8, lambda r: r.test),
    ("depth", 6, lambda r: tokens_short(r.depth)),
    ("KV", -5, lambda r: r.kv_type),
    ("budgets", -13, lambda r: words(r.budgets)),
    ("dense t/s", 10, lambda r: f"{r.dense_tps:.1f}"),
    ("best", -5, lambda r: r.dense_config),
    ("TCA t/s", 8, lambda r: f"{r.tca_tps:.1f}"),
    ("ratio", 6, lambda r: f"{r.ratio:.2f}x"),
    ("attention ms", 14, lambda r: f"{r.dense_attn.ms:.2f} > {r.tca_attn.ms:.2f}" if r.dense_attn and r.tca_attn else "-"),
    ("GB/s", 6, lambda r: f"{r.tca_attn.gbps:.1f}" if r.tca_attn and r.test == "decode" else "-"),
    ("GFLOP/s", 8, lambda r: f"{r.tca_attn.gflops:.0f}" if r.tca_attn else "-"),
    ("KV", 19, lambda r: f"{size(r.dense_kv_bytes)} > {size(r.tca_kv_bytes)}"),
)


# what a narrow terminal goes without, in this order; the first number is a column's place in COLUMNS
DISPENSABLE = (10, 9, 8, 5, 3, 2)


def columns_for(width: int | None, wanted: Collection[int] = ()) -> list[int]:
    """Places of the columns that fit a terminal of ``width`` characters; None: no limit. wanted: not to be left out."""
    chosen = list(range(len(COLUMNS)))
    for place in DISPENSABLE:
        if width is None or sum(abs(COLUMNS[i][1]) + 2 for i in chosen) - 2 <= width:
            break
        if place not in wanted:
            chosen.remove(place)
    return chosen


def line(texts: list[str], places: Sequence[int]) -> str:
    cells = [(text, COLUMNS[i][1]) for text, i in zip(texts, places, strict=True)]
    return "  ".join(f"{text:<{-width}}" if width < 0 else f"{text:>{width}}" for text, width in cells).rstrip()


class Table:
    """Prints rows as they come: whoever waits for the largest depth sees the smaller ones."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console, self.shown = console, 0
        wanted = ([2] if len(settings.kv_types) > 1 else []) + ([3] if len(settings.budgets) > 1 else [])
        self.places = columns_for(console.width if console.is_terminal else None, wanted)

    def update(self, result: Result) -> None:
        if not self.shown:
            self.console.print(line([COLUMNS[i][0] for i in self.places], self.places), style="dim", soft_wrap=True)
        for row in result.rows[self.shown :]:
            text = line([COLUMNS[i][2](row) for i in self.places], self.places)
            ratio = f"{row.ratio:.2f}x"
            self.console.print(text.replace(ratio, f"[{'green' if row.ratio >= 1 else 'red'}]{ratio}[/]", 1), soft_wrap=True)
        self.shown = len(result.rows)

    def left_out(self) -> list[str]:
        """A line about the columns that the terminal has no room for."""
        names = [name for i, (name, _, _) in enumerate(COLUMNS) if i not in self.places]
        return [f"no room here for: {', '.join(names)}; a wider terminal, a pipe and --save have them"] if names else []


def conclusions(result: Result) -> list[str]:
    """What the rows add up to, a line each."""
    lines = []
    for entry in summary(result.rows, result.samples):
        text = f"{entry['test']} {entry['kv_type']}, {words(entry['budgets'])}: "
        smallest = min(row.depth for row in result.rows)
        start = entry["tca_faster_from"]
        if start is None:
            text += "TCA is not faster at the largest depth"
        else:
            text += f"TCA is faster from {start} tokens on" if start > smallest else f"TCA is faster at every depth, from {start} tokens on"
        if entry.get("slope_ratio") is not None:
            text += (f"; every 1,024 tokens of depth cost {entry['tca_ms_per_1k']:.3f} ms a token, "
                     f"dense {entry['dense_ms_per_1k']:.3f} ({entry['slope_ratio']:.2f} of it)")  # fmt: skip
        lines.append(text)
    for stall in result.stalls:
        lines.append(
            f"compaction at {stall['tokens']} tokens, {stall['kv_type']}, {words(stall['budgets'])}: longest token "
            f"{stall['longest_ms']:.1f} ms, {stall['ratio']:.2f} times the median"
        )
    machine = result.hardware
    lines.append(f"limits of these {machine['threads']} threads, measured: {machine['read_gbps']:.1f} GB/s read, "
                 f"{machine['fma_gflops']:.0f} GFLOP/s of f32")  # fmt: skip
    spread = worst_spread(result.samples)
    text = f"medians of {result.settings['repeat']}; largest spread of one series {spread:.0%}"
    lines.append(text + ("; other programs disturbed this run, repeat it on a quiet machine" if spread > 0.25 else ""))
    return lines


def save(result: Result, path: Path) -> None:
    """The raw result, atomically: a run that is killed later leaves the last finished depth."""
    replace_text(path, json.dumps(result.as_json(), indent=1))


@click.command("bench")
@model_argument
@click.option("--depths", type=IntList(), help="Tokens in the cache before a test.  [default: 4096,16384, or what the model was trained for]")
@click.option("--kv-type", "kv_types", type=ChoiceList(list(KV_TYPES)), metavar="TYPE,...", default="f16", show_default=True, help=f"Types of the KV cache: {', '.join(KV_TYPES)}.")
@click.option("--dense-kv", type=click.Choice(list(KV_TYPES)), help="Type of the dense runs' KV cache.  [default: the same as TCA's]")
@click.option("--budgets", type=BudgetList(), metavar="file,dense,F,...", default=FILE, show_default=True,
              help="What TCA runs with: the budgets in the file, every head dense, or a kept fraction that all heads share.")  # fmt: skip
@click.option("--tests", type=ChoiceList(list(TESTS)), metavar="TEST,...", default="prefill,decode", show_default=True,
              help="prefill: 512 more tokens at each depth; decode: single tokens there; whole: a prompt of each length from the start.")  # fmt: skip
@click.option("--repeat", type=Number(1, 1000), default=3, show_default=True, help="Measurements of prefill and decode at each depth; the median counts.")
@click.option("--passes", type=Number(1, 1000), default=1, show_default=True, help="Prompts from the start; the median counts in the test whole.")
@click.option("-n", "--n-gen", type=Number(1, 512), default=32, show_default=True, help="Tokens of a decode test.")
@click.option("--fa", type=click.Choice(["both", "on", "off"]), default="both", show_default=True,
              help="Flash attention of the dense runs; the better one counts.")  # fmt: skip
@click.option("--save", "raw", type=click.Path(path_type=Path), metavar="FILE.json", help="Write every measurement here, after each depth.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw speed against depth.")
@threads_option
@gpu_layers_option
@verbose_option
@json_option
def bench_command(
    model: Path,
    depths: tuple[int, ...] | None,
    kv_types: tuple[str, ...],
    dense_kv: str | None,
    budgets: tuple[str, ...],
    tests: tuple[str, ...],
    repeat: int,
    passes: int,
    n_gen: int,
    fa: str,
    raw: Path | None,
    picture: Path | None,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure MODEL with its budgets against llama.cpp's stock attention, in alternation, in one run.

    The contexts are filled once, from the smallest depth to the largest, and measured at each. The dense side is the better
    of flash attention on and off; attention shows the milliseconds a token in attention, dense > TCA, and what TCA's kernels
    reach there. Rows are printed as they are found; Ctrl-C ends the run and keeps them.

    \b
    Example:
      tca-gguf bench model.gguf --depths 4096,16384
      tca-gguf bench model.gguf --depths 512,2K,8K,32K --tests whole,decode --save raw.json --plot speed.png
      tca-gguf bench model.gguf --depths 16K --kv-type f16,q8_0 --dense-kv f16 --budgets file,dense,0.25 --json
    """
    settings = Settings(depths or (), kv_types, repeat, n_gen, tests, fa, threads or 0, gpu_layers, budgets, dense_kv, passes)
    for target in (raw, picture):
        if target is not None:
            check_target(target, 1 << 20)  # before the minutes of measuring
    console = out()
    table = Table(console, settings)

    def on_depth(result: Result) -> None:
        if raw is not None:
            save(result, raw)
        if not as_json:
            with report.hidden():
                table.update(result)

    with status_line() as report:
        result = run(model, settings, report, on_depth, verbose)
    if raw is not None:
        save(result, raw)  # the compactions come last
    if picture is not None and result.rows:
        plot([result.as_json()], picture)
    if as_json:
        emit_json(result.as_json())
    elif result.rows:
        machine = result.hardware
        for text in [f"{model.name}: {machine['cpu']}, {machine['threads']} threads, {machine['os']}", *conclusions(result), *table.left_out()]:
            console.print(text, style="dim", soft_wrap=True)
    if result.interrupted:
        raise click.Abort
