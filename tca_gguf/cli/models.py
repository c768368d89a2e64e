"""models: which architectures are served. docs/models.md is made from the same (docs.py)."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tca_gguf import native

from .common import emit_json, json_option

# Shown on a real model, too; the other served ones on random weights (tests/integration/test_archs.py).
REAL = {"llama": "SmolLM2-135M", "qwen2": "Qwen2.5-Coder-0.5B", "gemma3": "Gemma 3 270M"}
KINDS = {"kv": "full", "iswa": "full and sliding", "hybrid": "full and recurrent", "latent": "latent"}


def describe() -> list[dict[str, Any]]:
    """The JSON shape of `models --json`, one entry an architecture of llama.cpp."""
    return [{"architecture": arch.name, "served": arch.served, "layers": [KINDS[kind] for kind in arch.inputs], "remark": arch.remark,
             "real_model": REAL.get(arch.name)} for arch in native.architectures()]  # fmt: skip


@click.command("models")
@json_option
def models_command(as_json: bool) -> None:
    """Show which architectures the ragged cache serves, and why not the others.

    The architecture of a file is its key general.architecture; `inspect` shows it. Budgets of an architecture that is not served are
    refused when they are made and when the model is loaded.

    \b
    Example:
      tca-gguf models
      tca-gguf models --json
    """
    rows = describe()
    if as_json:
        emit_json({"architectures": rows})
        return
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("architecture", "served", "layers", "remark"):
        table.add_column(title)
    for row in sorted(rows, key=lambda row: (not row["served"], row["architecture"])):
        table.add_row(row["architecture"], "yes" if row["served"] else "no", ", ".join(row["layers"]), row["remark"])
    console.print(table)
    console.print(f"{sum(row['served'] for row in rows)} of {len(rows)} architectures are served")


def document() -> str:
    """docs/models.md"""
    rows = sorted(describe(), key=lambda row: row["architecture"])
    served, refused = [row for row in rows if row["served"]], [row for row in rows if not row["served"]]
    parts = [
        "# Models",
        "<!-- made by python -m tca_gguf.cli.docs models; edit native/llama/tca-archs.cpp, not this file -->",
        f"What the runtime serves, from its own table: {len(served)} of llama.cpp's {len(rows)} architectures. `tca-gguf models` prints it, "
        "`tca-gguf inspect MODEL` shows a file's architecture.",
        "Layers with full attention are in the ragged store. Those that slide over a window and those that are recurrent stay as llama.cpp "
        "has them, so a model with few layers of full attention gains less, and has fewer heads to choose among.",
        "Every served architecture is run on random weights (`pytest tests/integration/test_archs.py`): without budgets bit for bit the stock "
        "cache; with dense budgets its logits; the same kept positions whatever the micro-batch, and those of the plain reference; a planted "
        "key that stays and one that does not; RoPE undone as the graph applies it; tails, state, two sequences, q8_0. \"Real model\" names "
        "one that was measured, too ([quality](quality.md)).",
        "## Served",
        "| `general.architecture` | layers | remark | real model |\n|---|---|---|---|\n"
        + "\n".join(f"| {r['architecture']} | {', '.join(r['layers'])} | {r['remark']} | {r['real_model'] or ''} |" for r in served),
        "## Refused",
        "Budgets of these are refused at load, with the reason.",
        "| `general.architecture` | reason |\n|---|---|\n" + "\n".join(f"| {r['architecture']} | {r['remark']} |" for r in refused),
    ]
    return "\n\n".join(parts) + "\n"
