"""Speed against depth as a picture, from what `bench --save` wrote, of one run or of several parts of one:

    python -m tca_gguf.bench.plot RAW.json [RAW.json ...] -o speed.png
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tca_gguf.errors import TcaError

from .cases import FILE, TESTS, words

TITLES = {
    "prefill": "prefill: 512 more tokens at a depth",
    "decode": "decode: single tokens at a depth",
    "whole": "whole prompt of a length",
}
Series = dict[str, list[tuple[int, float]]]


def label_of(sample: Mapping[str, Any]) -> str:
    """The line a sample belongs to, as the legend calls it."""
    if sample["budgets"] is None:
        flash = {"fa=0": "off", "fa=1": "on"}[sample["config"]]
        return f"stock, flash attention {flash}" + ("" if sample["kv_type"] == "f16" else f", {sample['kv_type']}")
    return f"TCA {sample['kv_type']}" + ("" if sample["budgets"] == FILE else f", {words(sample['budgets'])}")


def series(results: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """{test: {label: [(depth, tokens/s), ...] by depth}}. The repeats of all results with the same label and depth count as one
    series, of which the median is taken. Stock comes first, then TCA."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for result in results:
        for sample in result["samples"]:
            lines = found.setdefault(sample["test"], {})
            lines.setdefault(label_of(sample), {}).setdefault(sample["depth"], []).extend(sample["tps"])
    return {
        test: {
            label: [(depth, statistics.median(found[test][label][depth])) for depth in sorted(found[test][label])]
            for label in sorted(found[test], key=lambda label: (not label.startswith("stock"), label))
        }
        for test in TESTS
        if test in found
    }


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one panel a test. Raises TcaError: no matplotlib, nothing to draw, a path that cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TcaError("--plot needs matplotlib; run: pip install 'tca-gguf[plot]'") from None
    tests = series(results)
    if not tests:
        raise TcaError("there is nothing to plot: no depth was finished")
    labels = list(dict.fromkeys(label for lines in tests.values() for label in lines))
    colour = {label: f"C{i % 10}" for i, label in enumerate(labels)}  # the same in every panel
    figure = Figure(figsize=(5.2 * len(tests), 4.2))
    FigureCanvasAgg(figure)
    for axes, (test, lines) in zip(figure.subplots(1, len(tests), squeeze=False)[0], tests.items(), strict=True):
        for label, points in lines.items():
            depths, rates = zip(*points, strict=True)
            style = "--" if label.startswith("stock") else "-"
            axes.plot(depths, rates, marker="o", markersize=4, linestyle=style, color=colour[label], label=label)
        marks = sorted({depth for points in lines.values() for depth, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(marks, [f"{d // 1024}K" if d % 1024 == 0 else str(d) for d in marks])
        axes.minorticks_off()
        axes.set(title=TITLES[test], xlabel="tokens", ylabel="tokens/s")
        axes.set_ylim(bottom=0)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    machine, settings = results[0]["hardware"], results[0]["settings"]
    figure.suptitle(f"{settings['model']}, {machine['cpu']}, {machine['threads']} threads", fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise TcaError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def read(path: Path) -> dict[str, Any]:
    """A result as `bench --save` or `bench --json` wrote it. Raises TcaError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TcaError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise TcaError(f"{path} is not JSON; give a file that bench --save wrote") from None
    if not isinstance(result, dict) or not {"hardware", "settings", "samples", "rows", "summary", "compaction"} <= result.keys():
        raise TcaError(f"{path} holds no result of bench")
    return result


@click.command("plot")
@click.argument("raw", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.png")
def main(raw: tuple[Path, ...], output: Path) -> None:
    """Draw the speed against depth from what bench --save wrote."""
    try:
        plot([read(path) for path in raw], output)
    except TcaError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
