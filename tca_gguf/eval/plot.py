"""The picture of an evaluation: score against the bytes of the cache, and where in the text facts are lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tca_gguf.errors import TcaError

if TYPE_CHECKING:
    from .run import Result

DEPTHS = 8  # rows of a heat map
PER_ROW, MAPS_PER_ROW = 4, 7
MARKERS = "osv^D"  # each for ten lines


def check_plot(path: Path) -> None:
    """Raises TcaError if `plot` cannot write there or matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise TcaError("--plot needs matplotlib; run: pip install 'tca-gguf[plot]'") from None
    if path.suffix.lower().lstrip(".") not in FigureCanvasAgg.get_supported_filetypes() or not path.absolute().parent.is_dir():
        raise TcaError(f"{path} cannot be written; give the name of a .png file in a folder that exists")


def depth_map(answers: list[dict[str, Any]], lengths: list[int]) -> np.ndarray:
    """float64 [DEPTHS, len(lengths)]: share of right answers by depth of the fact; NaN where nothing was asked."""
    hits, asked = np.zeros((DEPTHS, len(lengths))), np.zeros((DEPTHS, len(lengths)))
    for answer in answers:
        cell = min(int(answer["depth"] * DEPTHS), DEPTHS - 1), lengths.index(answer["length"])
        hits[cell] += all(answer["right"])
        asked[cell] += 1
    return np.where(asked > 0, hits / np.maximum(asked, 1), np.nan)


def series_of(policy: str) -> str:
    """Budgets of files that are named for their fraction, NAME-0.39 and NAME-0.25, make one line."""
    return re.sub(r"-0\.\d+$", "", policy)


def name_of(policy: str, keep: float) -> str:
    """The policy, with its kept fraction where the name does not tell."""
    return policy if series_of(policy) != policy or policy.startswith("dense") else f"{policy} {keep:.2f}"


def plot(result: Result, path: Path) -> None:
    """Writes one panel a suite and length, and below them a heat map for each suite with depths, policy and kept fraction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["suite"], r["length"]) for r in result.rows))
    deep = [a for a in result.answers if a.get("depth") is not None]
    maps = list(dict.fromkeys((a["suite"], a["policy"], a["keep"]) for a in deep))
    heights = [0.4 + 2.7 * -(-len(panels) // PER_ROW), 0.3 + 1.9 * -(-len(maps) // MAPS_PER_ROW)]
    heights = heights if maps else heights[:1]
    columns = PER_ROW if maps else min(len(panels), PER_ROW)
    figure = Figure(figsize=(3.6 * max(2, columns), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(str(result.settings["model"]), fontsize=11)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    draw_panels(parts[0, 0], result.rows, panels, columns)
    if maps:
        draw_maps(parts[1, 0], deep, maps)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TcaError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def grid(figure: Any, n: int, columns: int) -> list[Any]:
    """``n`` axes, row by row."""
    axes = list(figure.subplots(-(-n // columns), columns, squeeze=False).flat)
    for ax in axes[n:]:
        ax.remove()
    return axes[:n]


def draw_panels(figure: Any, rows: list[dict[str, Any]], panels: list[tuple[str, int]], columns: int) -> None:
    """Score, or KL, against the bytes of the cache, a line a policy; one legend for all."""
    series = list(dict.fromkeys(series_of(r["policy"]) for r in rows))
    handles: dict[str, Any] = {}
    for ax, (suite, length) in zip(grid(figure, len(panels), columns), panels, strict=True):
        shown = [r for r in rows if (r["suite"], r["length"]) == (suite, length)]
        value, interval = ("mean_kl", "mean_kl_ci") if suite == "kld" else ("tca", "tca_ci")
        for name in series:
            mine = sorted((r for r in shown if series_of(r["policy"]) == name), key=lambda r: r["kv_bytes"])
            if not mine:
                continue
            x, y = [r["kv_bytes"] / r["kv_bytes_dense"] for r in mine], [r[value] for r in mine]
            spans = [r[interval] or (v, v) for r, v in zip(mine, y, strict=True)]
            at = series.index(name)
            style = {"color": f"C{at % 10}", "marker": MARKERS[at // 10 % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
            (handles[name],) = ax.plot(x, y, label=name, **style)
            # intervals of many policies hide one another: thin
            ax.vlines(x, [low for low, _ in spans], [high for _, high in spans], color=style["color"], linewidth=0.6, alpha=0.5)
        if suite == "kld":
            ax.set(yscale="log", ylabel="mean KL to dense, nats")
        else:
            handles["dense f16"] = ax.axhline(shown[0]["dense"], linestyle="--", linewidth=1, color="grey", label="dense f16")
            ax.set(ylim=(-0.03, 1.03), ylabel="right answers")
        ax.set(xlabel="KV bytes, share of dense f16")
        ax.set_title(f"{suite}, {length} tokens", fontsize=9)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=min(len(handles), 6), fontsize=8, frameon=False)


def draw_maps(figure: Any, deep: list[dict[str, Any]], maps: list[tuple[str, str, float]]) -> None:
    """Where in the text facts are lost: depth against length, share of right answers; one colour bar for all."""
    axes = grid(figure, len(maps), MAPS_PER_ROW)
    for i, (ax, key) in enumerate(zip(axes, maps, strict=True)):
        chosen = [a for a in deep if (a["suite"], a["policy"], a["keep"]) == key]
        lengths = sorted({a["length"] for a in chosen})
        image = ax.imshow(depth_map(chosen, lengths), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        suite, policy, keep = key
        ax.set_title(f"{suite}\n{name_of(policy, keep)}", fontsize=7)
        ax.set_xticks(range(len(lengths)), [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths], fontsize=7)
        ax.set_yticks(range(0, DEPTHS, 2), [f"{100 * (row + 0.5) / DEPTHS:.0f}%" for row in range(0, DEPTHS, 2)], fontsize=7)
        if i % MAPS_PER_ROW == 0:
            ax.set_ylabel("depth of the fact", fontsize=7)
    figure.colorbar(image, ax=axes, label="right", shrink=0.8, aspect=30)
