"""demo: see it work, with nothing at hand."""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from tca_gguf.demo import run

from .common import emit_json, json_option, out, progress_bar, size, threads_option, verbose_option


def table_of(result: dict[str, Any]) -> Table:
    """Dense and TCA as columns, with TCA relative to dense."""
    dense, tca = result["sides"]
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    table.add_column("dense", overflow="fold")
    table.add_column("TCA", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_row("KV cache", size(dense["kv_bytes"]), size(tca["kv_bytes"]), f"{tca['kv_bytes'] / dense['kv_bytes']:.0%}")
    for key, name in (("prefill_tps", "prefill, tokens/s"), ("decode_tps", "decode, tokens/s")):
        ratio = f"{tca[key] / dense[key]:.2f}x" if dense[key] else ""
        table.add_row(name, f"{dense[key]:.1f}", f"{tca[key]:.1f}", ratio)
    table.add_row("answer", escape(dense["answer"]), escape(tca["answer"]), "")
    marks = ["[green]right[/green]" if side["correct"] else "[red]wrong[/red]" for side in (dense, tca)]
    table.add_row("", *marks, "")
    return table


@click.command("demo")
@threads_option
@verbose_option
@json_option
def demo_command(threads: int | None, verbose: bool, as_json: bool) -> None:
    """Show dense attention against TCA on a small real model and a long document.

    Downloads SmolLM2-135M-Instruct (93 MB, Apache-2.0) into the user's cache folder the first time, embeds budgets in a
    copy of it, and asks both a question about a fact in the first part of a long text.

    \b
    Example:
      tca-gguf demo
    """
    with progress_bar() as advance:
        result = run(lambda text: click.echo(text, err=True), advance, threads, verbose)
    if as_json:
        emit_json(result)
        return
    console = out()
    console.print(f"\nA document of {result['sides'][0]['prompt_tokens']} tokens, then: [italic]{escape(result['question'])}[/italic]")
    console.print(table_of(result))
    console.print(f"\nTalk to it: tca-gguf chat {result['model']}", style="dim", markup=False, soft_wrap=True)
