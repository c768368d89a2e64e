"""The picture of an evaluation: score against the bytes of the cache, and where in the text facts are lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tca_gguf.errors import TcaError

if TYPE_CHECKING:
    from .run import Result

DEPTHS = 8  # rows of a heat map
PER_ROW = 4


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


def plot(result: Result, path: Path) -> None:
    """Writes one panel a suite and length, then one heat map for each suite with depths, policy and kept fraction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["suite"], r["length"]) for r in result.rows))
    deep = [a for a in result.answers if a.get("depth") is not None]
    maps = list(dict.fromkeys((a["suite"], a["policy"], a["keep"]) for a in deep))
    n = len(panels) + len(maps)
    n_rows = -(-n // PER_ROW)
    figure = Figure(figsize=(4.2 * min(n, PER_ROW), 3.4 * n_rows))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(n_rows, min(n, PER_ROW), squeeze=False).flat)
    policies = list(dict.fromkeys(r["policy"] for r in result.rows))
    for ax, (suite, length) in zip(axes, panels, strict=False):
        rows = [r for r in result.rows if (r["suite"], r["length"]) == (suite, length)]
        _scores(ax, suite, rows, policies)
        ax.set(title=f"{suite}, {length} tokens", xlabel="KV bytes, share of dense f16")
    for ax, key in zip(axes[len(panels) :], maps, strict=False):
        chosen = [a for a in deep if (a["suite"], a["policy"], a["keep"]) == key]
        lengths = sorted({a["length"] for a in chosen})
        image = ax.imshow(depth_map(chosen, lengths), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        ax.set(title=f"{key[0]}, {key[1]}" + ("" if key[1].startswith("dense") else f" {key[2]:.2f}"), xlabel="length", ylabel="depth of the fact")
        ax.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        ax.set_yticks(range(DEPTHS), [f"{100 * (i + 0.5) / DEPTHS:.0f}%" for i in range(DEPTHS)])
        figure.colorbar(image, ax=ax, label="right")
    for ax in axes[n:]:
        ax.remove()
    for ax in axes[:n]:
        ax.title.set_fontsize(9)
    figure.suptitle(str(result.settings["model"]), fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TcaError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _scores(ax: Any, suite: str, rows: list[dict[str, Any]], policies: list[str]) -> None:
    value, interval = ("mean_kl", "mean_kl_ci") if suite == "kld" else ("tca", "tca_ci")
    for policy in policies:
        mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["kv_bytes"])
        if not mine:
            continue
        x, y = [r["kv_bytes"] / r["kv_bytes_dense"] for r in mine], [r[value] for r in mine]
        spans = [r[interval] or (v, v) for r, v in zip(mine, y, strict=True)]
        errors = [[max(0.0, v - low) for v, (low, _) in zip(y, spans, strict=True)], [max(0.0, high - v) for v, (_, high) in zip(y, spans, strict=True)]]
        ax.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=policy, color=f"C{policies.index(policy) % 10}")
    if suite == "kld":
        ax.set(yscale="log", ylabel="mean KL to dense, nats")
    else:
        ax.axhline(rows[0]["dense"], linestyle="--", color="grey", label="dense f16")
        ax.set(ylim=(-0.03, 1.03), ylabel="right answers")
    ax.legend(fontsize=7)
