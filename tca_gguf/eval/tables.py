"""Markdown tables and the picture of what `eval --save` wrote, several files as one result:

    python -m tca_gguf.eval.tables RAW.json [RAW.json ...] [--pivot] [--merge ALL.json] [--plot PICTURE.png]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tca_gguf.bench.tables import table
from tca_gguf.errors import TcaError

from .plot import check_plot, name_of, plot, series_of
from .run import Result

Row = Mapping[str, Any]


def merge(results: Sequence[Result]) -> Result:
    """All rows and answers in order; settings and hardware of the first, with the suites, lengths and policies of all."""
    first = results[0]
    settings = dict(first.settings)
    for name in ("suites", "lengths", "policies"):
        settings[name] = list(dict.fromkeys(value for r in results for value in r.settings.get(name, ())))
    return Result(first.hardware, settings, *([x for r in results for x in getattr(r, name)] for name in ("rows", "answers", "errors")))


def span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.0%}-{interval[1]:.0%})"


def kept(row: Row) -> str:
    return "-" if row["kept"] is None else f"{row['kept']:.3f}"


def full(rows: Sequence[Row]) -> list[str]:
    """One line a row: scores first, then divergences."""
    scores = [[f"`{r['suite']}`", f"{r['length']:,}", name_of(r["policy"], r["keep"]), f"{r['kv_bytes'] / r['kv_bytes_dense']:.1%}", f"{r['dense_correct']} of {r['answers']}",
               str(r["tca_correct"]), kept(r) + span(r["kept_ci"])] for r in rows if "mean_kl" not in r]  # fmt: skip
    divergences = [[f"{r['length']:,}", name_of(r["policy"], r["keep"]), f"{r['kv_bytes'] / r['kv_bytes_dense']:.1%}",
                    f"{r['mean_kl']:.4f} ({r['mean_kl_ci'][0]:.4f}-{r['mean_kl_ci'][1]:.4f})", of_uniform(r), f"{r['kl_99']:.3f}", f"{r['top1']:.1%}",
                    f"{r['ppl_tca']:.3f}, {r['ppl_dense']:.3f}"] for r in rows if "mean_kl" in r]  # fmt: skip
    return (table(["suite", "length", "policy", "KV bytes", "dense right", "right", "kept (95%)"], scores)
            + table(["window", "policy", "KV bytes", "mean KL (95%)", "of uniform", "99% KL", "top-1", "perplexity, dense"], divergences))  # fmt: skip


def pivot(rows: Sequence[Row]) -> list[str]:
    """A line a policy, a column for each suite and length: kept, or the divergence, at all kept fractions from the largest down."""
    columns = list(dict.fromkeys((r["suite"], r["length"]) for r in rows))
    head = ["policy"]
    for suite, length in columns:
        mine = [r for r in rows if (r["suite"], r["length"]) == (suite, length)]
        head.append(f"`{suite}` {length:,}" + ("" if "mean_kl" in mine[0] else f", dense {mine[0]['dense_correct']} of {mine[0]['answers']}"))
    lines = []
    for policy in dict.fromkeys(series_of(r["policy"]) for r in rows):
        cells = []
        for column in columns:
            mine = sorted((r for r in rows if (r["suite"], r["length"]) == column and series_of(r["policy"]) == policy), key=lambda r: -r["keep"])
            cells.append(" / ".join(f"{r['mean_kl']:.4f}" if "mean_kl" in r else f"{r['tca_correct']} ({kept(r)})" for r in mine))
        lines.append([policy, *cells])
    return table(head, lines)


def of_uniform(row: Row) -> str:
    uniform = row["mean_kl_uniform"]
    return "" if not uniform else f"{row['mean_kl'] / uniform:.2f}"


@click.command("tables")
@click.argument("raw", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pivot", "as_pivot", is_flag=True, help="A line a policy, a column for each suite and length, in place of a line a row.")
@click.option("--merge", "merged", type=click.Path(path_type=Path), metavar="FILE.json", help="Also write all files as one.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Also draw all files as one.")
def main(raw: tuple[Path, ...], as_pivot: bool, merged: Path | None, picture: Path | None) -> None:
    """Print what eval --save wrote as Markdown tables."""
    try:
        if picture is not None:
            check_plot(picture)
        result = merge([Result.read(path) for path in raw])
        click.echo("\n".join((pivot if as_pivot else full)(result.rows)))
        if merged is not None:
            result.save(merged)
        if picture is not None:
            plot(result, picture)
    except TcaError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
