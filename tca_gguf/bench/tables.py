"""Markdown tables of what `bench --save` wrote, one section a file: python -m tca_gguf.bench.tables RAW.json [RAW.json ...]"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tca_gguf.errors import TcaError

from .cases import words
from .plot import label_of, read

Raw = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def speeds(result: Raw) -> list[str]:
    """Tokens/s of every case side by side, and how many times the faster dense one each TCA case reaches."""
    labels = list(dict.fromkeys(map(label_of, result["samples"])))
    ragged = [label for label in labels if label.startswith("TCA")]
    rows = []
    for test, depth in dict.fromkeys((s["test"], s["depth"]) for s in result["samples"]):
        mine = {label_of(s): s for s in result["samples"] if (s["test"], s["depth"]) == (test, depth)}
        rates = {label: statistics.median(s["tps"]) for label, s in mine.items()}
        rows.append([test, f"{depth:,}", *(f"{rates[label]:.1f}" if label in rates else "" for label in labels)])
        ratios = {(r["kv_type"], r["budgets"]): r["ratio"] for r in result["rows"] if (r["test"], r["depth"]) == (test, depth)}
        rows[-1] += [f"{ratios[mine[label]['kv_type'], mine[label]['budgets']]:.2f}x" for label in ragged]
    return table(["test", "tokens", *labels, *(f"{label}: ratio" for label in ragged)], rows)


def attention(result: Raw) -> list[str]:
    """Attention of every case: time, bytes and speed, and the share of the limits that were measured in the same run."""
    machine, rows = result["hardware"], []
    for s in result["samples"]:
        a = s["attention"]
        if a is None:
            continue
        decode = s["test"] == "decode"
        speed, limit = (a["gbps"], machine["read_gbps"]) if decode else (a["gflops"], machine["fma_gflops"])
        reached = f"{a['gbps']:.1f} GB/s" if decode else f"{a['gflops']:.0f} GFLOP/s"
        size = f"{a['bytes'] / 1e6:.1f}" if decode else ""
        select = "" if s["budgets"] is None else f"{a['select_share']:.1%}"
        rows.append([s["test"], f"{s['depth']:,}", label_of(s), f"{a['ms']:.3f}", size, reached, f"{speed / limit:.0%}", select])
    return table(["test", "tokens", "case", "ms a token in attention", "MB read a token", "reached", "of the limit", "selection, of the pass"], rows)


def lines(result: Raw) -> list[str]:
    """Slopes of decode, where TCA overtakes, and the longest token around a compaction."""
    rows = []
    for e in result["summary"]:
        slopes = [f"{e[name]:.3f}" if e.get(name) is not None else "" for name in ("dense_ms_per_1k", "tca_ms_per_1k", "slope_ratio")]
        start = f"{e['tca_faster_from']:,}" if e["tca_faster_from"] is not None else "not measured"
        rows.append([e["test"], e["kv_type"], words(e["budgets"]), *slopes, start])
    found = table(["test", "KV", "budgets", "dense ms a token per 1K depth", "TCA", "ratio", "TCA faster from"], rows)
    stalls = [[c["kv_type"], words(c["budgets"]), f"{c['tokens']:,}", f"{c['median_ms']:.1f}", f"{c['longest_ms']:.1f}", f"{c['ratio']:.2f}"]
              for c in result["compaction"]]  # fmt: skip
    return found + table(["KV", "budgets", "compaction at", "median token, ms", "longest, ms", "ratio"], stalls)


def section(name: str, result: Raw) -> Iterator[str]:
    machine, settings = result["hardware"], result["settings"]
    spread = max(((max(s["tps"]) - min(s["tps"])) / statistics.median(s["tps"]) for s in result["samples"]), default=0.0)
    yield f"### {name}"
    yield (f"{settings['model']}, {machine['cpu']}, {machine['threads']} threads, {machine['build']['simd']}; measured limits "
           f"{machine['read_gbps']:.1f} GB/s, {machine['fma_gflops']:.0f} GFLOP/s; largest spread of one series {spread:.0%}"
           + ("; interrupted" if result["interrupted"] else ""))  # fmt: skip
    yield ""
    for part in (speeds, attention, lines):
        yield from part(result)


@click.command("tables")
@click.argument("raw", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(raw: tuple[Path, ...]) -> None:
    """Print what bench --save wrote as Markdown tables."""
    try:
        for path in raw:
            click.echo("\n".join(section(path.stem, read(path))))
    except TcaError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
