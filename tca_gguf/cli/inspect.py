"""inspect: what budgets a file carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tca_gguf import gguf_file, kv
from tca_gguf.budgets import Budgets
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape

from .common import emit_json, json_option, model_argument, out, size, tokens_short

# a bound over 100% says nothing: an output can be wrong by its whole length and still keep it
BOUND_TITLE = "at most that error, % (>100: no promise)"
CONTEXTS = (8192, 32768, 131072)
# dark blue to yellow, even in lightness steps: readable without colour vision too
RAMP = ("#0d0887", "#46039f", "#7201a8", "#9c179e", "#bd3786", "#d8576b", "#ed7953", "#fb9f3a", "#fdca26", "#f0f921")


def describe(budgets: Budgets, shape: ModelShape) -> dict[str, Any]:
    """The JSON shape of `inspect --json`. error and bound are null in files that do not say; bytes are for f16."""
    fractions = budgets.head_kept_fraction()
    errors = budgets.calibration.errors if budgets.calibration else None
    bounds = budgets.calibration.bounds if budgets.calibration else None
    kv_bytes = {}
    for n_ctx in CONTEXTS:
        size_of = kv.predicted(shape, budgets, n_ctx)
        kv_bytes[str(n_ctx)] = {"dense": size_of.stock, "tca": size_of.allocated}
    return {
        "kept_fraction": float(budgets.kept_fraction),
        "block_size": budgets.block_size,
        "group_size": budgets.group_size,
        "window": budgets.window,
        "sinks": budgets.sinks,
        "metric": budgets.metric,
        "heads": [
            {
                "layer": layer,
                "head": head,
                "kept_fraction": float(fractions[layer, head]),
                "error": float(errors[layer, head]) if errors is not None else None,
                "bound": float(bounds[layer, head]) if bounds is not None else None,
            }
            for layer in budgets.stored_layers()
            for head in range(shape.n_head_kv)
        ],
        "kv_bytes": kv_bytes,
        "n_ctx_train": shape.n_ctx_train or None,
    }


def heat_map(values: np.ndarray, layers: list[int], title: str, top: float, width: int) -> list[Text]:
    """Lines of a layer x head map of shares: each cell a colour from 0 to ``top`` and, where ``width`` allows, per cent."""
    n_head = values.shape[1]
    cell = next((c for c in (5, 2) if 8 + n_head * c + 7 <= width), 1)

    def label(value: float) -> str:
        if value > 1:
            return ">100"
        return f"{value * 100:.0f}" if value > 0.0995 or value == 0 else f"{value * 100:.1f}"

    heads = "".join(f"{head:^{cell}}" for head in range(n_head)) if cell == 5 else " " * (n_head * cell)
    lines = [Text(title, style="bold"), Text(f"{'layer':>7} {heads}{'mean':>7}", style="dim")]
    for layer in layers:
        row = values[layer]
        line = Text(f"{layer:>7} ", style="dim")
        for value in row:
            step = min(int(value / top * len(RAMP)), len(RAMP) - 1)
            line.append(f"{label(float(value)) if cell == 5 else '':^{cell}}", f"not dim {'black' if step >= 6 else 'white'} on {RAMP[step]}")
        line.append(f"{label(float(row.mean())):>7}")
        lines.append(line)
    return lines


def side_by_side(left: list[Text], right: list[Text], width: int) -> list[Text]:
    """Two equally long maps beside each other, or one under the other where they do not fit."""
    column = max(len(line) for line in left) + 4
    if column + max(len(line) for line in right) > width:
        return [*left, Text(), *right]
    return [one + Text(" " * (column - len(one))) + two for one, two in zip(left, right, strict=True)]


def show(console: Console, budgets: Budgets, shape: ModelShape, info: dict[str, Any]) -> None:
    console.print(f"[bold]{escape(shape.name)}[/bold]  {escape(shape.arch)}, {shape.n_layer} layers, {shape.n_head} heads over {shape.n_head_kv} KV heads")
    state = "" if budgets.enabled else "  [red]switched off (tca.enabled is false)[/red]"
    console.print(
        f"block {budgets.block_size}, group {budgets.group_size}, window {budgets.window}, sinks {budgets.sinks}, "
        f"metric {budgets.metric}; [bold]{budgets.kept_fraction:.1%}[/bold] kept{state}"
    )
    calibration = budgets.calibration
    if calibration is not None:
        console.print(
            f"calibrated on {calibration.tokens} tokens (sha256 {calibration.text_sha256[:12]}, seed {calibration.seed}), "
            f"target {calibration.target:.0%}"
        )
    console.print()
    layers = budgets.stored_layers()
    if len(layers) < shape.n_layer:
        console.print(f"{len(layers)} of {shape.n_layer} layers have full attention and a budget; the others stay as llama.cpp has them")
    lines = heat_map(budgets.head_kept_fraction(), layers, "kept, % of a head's evicted region", 1.0, console.width)
    if calibration is not None:
        top = max(float(calibration.errors.max()), 1e-9)
        errors = heat_map(calibration.errors, layers, "error of the attention output, %", top, console.width)
        lines = side_by_side(lines, errors, console.width)
        if calibration.bounds is not None:
            top = min(max(float(calibration.bounds.max()), 1e-9), 1.0)
            lines = side_by_side(lines, heat_map(calibration.bounds, layers, BOUND_TITLE, top, console.width), console.width)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    console.print()
    console.print("KV cache, f16", style="bold")
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("context", "dense", "TCA", "share"):
        table.add_column(name, justify="right")
    for n_ctx, row in info["kv_bytes"].items():
        table.add_row(tokens_short(int(n_ctx)), size(row["dense"]), size(row["tca"]), f"{row['tca'] / row['dense']:.0%}")
    console.print(table)
    if any(int(n_ctx) > shape.n_ctx_train > 0 for n_ctx in info["kv_bytes"]):
        console.print(f"the model was trained for {tokens_short(shape.n_ctx_train)}; longer contexts are beyond that", style="dim")


def plot(budgets: Budgets, shape: ModelShape, path: Path) -> None:
    """Writes the heat maps as a picture. Raises TcaError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TcaError("--plot needs matplotlib; run: pip install 'tca-gguf[plot]'") from None
    panels = [("kept share of the evicted region", budgets.head_kept_fraction(), 1.0)]
    if budgets.calibration is not None:
        errors = budgets.calibration.errors
        panels.append(("relative error of the attention output", errors, max(float(errors.max()), 1e-9)))
    figure = Figure(figsize=(1.2 + len(panels) * max(3.2, 0.35 * shape.n_head_kv + 2), max(3.5, 0.22 * shape.n_layer + 1.6)))
    FigureCanvasAgg(figure)
    for axes, (title, values, top) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        image = axes.imshow(values, aspect="auto", cmap="plasma", vmin=0, vmax=top, interpolation="nearest")
        axes.set(title=title, xlabel="KV head", ylabel="layer")
        axes.set_xticks(range(0, shape.n_head_kv, max(1, shape.n_head_kv // 16)))
        axes.set_yticks(range(0, shape.n_layer, 2 if shape.n_layer > 16 else 1))
        axes.title.set_fontsize(10)
        if shape.n_head_kv <= 16:
            for (layer, head), value in np.ndenumerate(values):
                colour = "black" if value > 0.6 * top else "white"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{shape.name}: {budgets.kept_fraction:.1%} kept", fontsize=12)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise TcaError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


@click.command("inspect")
@model_argument
@click.option("--plot", "picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Also write the heat maps as a picture.")
@json_option
def inspect_command(model: Path, picture: Path | None, as_json: bool) -> None:
    """Show the head budgets of MODEL: a heat map of layers and heads, errors, and predicted KV memory.

    \b
    Example:
      tca-gguf inspect model.gguf
      tca-gguf inspect model.gguf --plot budgets.png
    """
    reader = gguf_file.open_header(model)  # once: a vocabulary takes its time
    shape, budgets = gguf_file.read_model(model, reader)
    if budgets is None:
        raise TcaError(f"{model} has no budgets; write some with: embed-budgets {model}")
    source = gguf_file.source_of(model, reader) or model
    info = describe(budgets, shape) | {"source": str(source)}
    if picture is not None:
        plot(budgets, shape, picture)
    if as_json:
        emit_json(info)
        return
    show(out(), budgets, shape, info)
    if source != model:
        click.echo(f"budgets from {source}")
    if picture is not None:
        click.echo(f"picture written to {picture}")
