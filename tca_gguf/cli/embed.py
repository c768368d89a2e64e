"""embed-budgets and strip-budgets."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from tca_gguf import beside as where
from tca_gguf import gguf_file, kv
from tca_gguf.budgets import Budgets
from tca_gguf.calib import DEFAULT_KEEP, DEFAULT_METRIC, DEFAULT_TOKENS
from tca_gguf.errors import TcaError

from .common import Number, emit_json, gpu_layers_option, json_option, model_argument, progress_bar, size, threads_option, verbose_option


def _read_texts(paths: tuple[Path, ...]) -> list[str] | None:
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise TcaError(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise TcaError(f"{path} cannot be read: {error.strerror}") from None
        if not texts[-1].strip():
            raise TcaError(f"{path} is empty; a calibration text needs some prose")
    return texts or None


def _summary(budgets: Budgets, model: Path, written: Path | None) -> dict:
    shape = gguf_file.model_shape(model)
    n_ctx = shape.n_ctx_train or 32768
    size_of = kv.predicted(shape, budgets, n_ctx)
    fractions = budgets.head_kept_fraction()
    calibration = budgets.calibration

    def mean(values: np.ndarray) -> float:
        return float(values[budgets.stored_layers()].mean())

    return {
        "model": str(model),
        "written": str(written) if written else None,
        "kept_fraction": round(budgets.kept_fraction, 6),
        "head_kept_fraction": {"min": float(np.nanmin(fractions)), "max": float(np.nanmax(fractions))},
        "error": mean(calibration.errors) if calibration else None,
        "bound": mean(calibration.bounds) if calibration and calibration.bounds is not None else None,
        "tokens": calibration.tokens if calibration else None,
        "text_sha256": calibration.text_sha256 if calibration else None,
        "seed": calibration.seed if calibration else None,
        "kv_bytes": {str(n_ctx): {"dense": size_of.stock, "tca": size_of.allocated}},
    }


@click.command("embed-budgets")
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here; a name that ends with .tca.gguf gets keys only.  [default: MODEL itself, or beside it]")
@click.option("--beside/--in-place", default=None, help="Write a small file of keys beside the model (MODEL.tca.gguf), or into the model.  [default: as suits the model]")
@click.option("--keep", type=Number(0.0, 1.0, above=True),
              help=f"Mean share of the evicted region's tokens that heads keep.  [default: {DEFAULT_KEEP}]")  # fmt: skip
@click.option("--max-error", type=Number(0.0, above=True),
              help="Largest relative error of any head's output, such as 0.1. Without --keep every head keeps as little as that allows.")  # fmt: skip
@click.option("--metric", default=DEFAULT_METRIC, show_default=True, metavar="NAME",
              help="How tokens are ranked: key-probe, key-diff or a baseline (docs/gguf-keys.md).")  # fmt: skip
@click.option("--cost", type=click.Choice(["layer", "head"]), default="layer", show_default=True,
              help="What budgets minimise: what each layer loses behind its output projection, or the error of each head's output.")  # fmt: skip
@click.option("--text", "texts", type=click.Path(path_type=Path), multiple=True,
              help="Calibrate on this UTF-8 text file; may be given several times.  [default: the package's own text]")  # fmt: skip
@click.option("--tokens", type=Number(1), help=f"Tokens of the calibration text to use.  [default: {DEFAULT_TOKENS}]")
@click.option("--seed", type=Number(0, 2**32 - 1), default=0, show_default=True, help="Seed of the calibration.")
@click.option("--dry-run", is_flag=True, help="Calibrate and report, but write nothing.")
@threads_option
@gpu_layers_option
@verbose_option
@json_option
def embed_budgets(
    model: Path,
    output: Path | None,
    beside: bool | None,
    keep: float | None,
    max_error: float | None,
    metric: str,
    cost: str,
    texts: tuple[Path, ...],
    tokens: int | None,
    seed: int,
    dry_run: bool,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
    as_json: bool,
) -> None:
    """Calibrate MODEL and write its head budgets into the file, or beside it.

    One forward pass over a calibration text measures how much of the context each attention head can do without. The
    budgets become tca.* keys in the GGUF metadata; the tensor data stays as it is, and a stock llama.cpp still loads
    the file. The file is replaced atomically: whatever happens, it is either the old or the new one.

    A model that is split, read-only, larger than 4 GiB or in a content-addressed store (Ollama's, Hugging Face's) is not
    touched: the budgets go into a file of some kilobytes, MODEL.tca.gguf beside it or in your own folder, which the
    runtime finds. MODEL may be a path, ollama:NAME or hf:ORG/REPO.

    \b
    Example:
      tca-gguf embed-budgets model.gguf
      tca-gguf embed-budgets model.gguf -o model-tca.gguf --keep 0.25
      tca-gguf embed-budgets ollama:llama3.2
    """
    from tca_gguf import calib, llama, logs, native

    if metric not in native.metrics():
        raise TcaError(f"--metric {metric!r} is unknown; this build knows: {', '.join(native.metrics())}")
    shape = gguf_file.model_shape(model)
    place = where.place_for(model, output, beside) if not dry_run else where.Place(model, False)
    if not dry_run:
        # whatever would stop the writing is said before the minutes of calibration
        where.check_place(model, place)
        if place.why:
            click.echo(f"note: {place.why}; the budgets go to {place.path}", err=True)
    documents = _read_texts(texts)
    logs.take_over(llama.load(), verbose)
    with progress_bar() as advance:
        budgets = calib.calibrate(
            model, keep=keep, max_error=max_error, metric=metric, cost=cost, texts=documents, tokens=tokens, seed=seed, progress=advance,
            n_threads=threads, n_gpu_layers=gpu_layers,
        )
        if not dry_run:
            if place.keys:
                gguf_file.write_keys(model, place.path, budgets)
            else:
                gguf_file.embed_budgets(model, place.path, budgets, lambda done, total: advance(done, total, "writing"))
    summary = _summary(budgets, model, None if dry_run else place.path)
    if as_json:
        emit_json(summary)
        return
    n_ctx, expected = next(iter(summary["kv_bytes"].items()))
    low, high = summary["head_kept_fraction"]["min"], summary["head_kept_fraction"]["max"]
    click.echo(
        f"{shape.name}: heads keep {summary['kept_fraction']:.1%} of the evicted region (from {low:.0%} to {high:.0%}); "
        f"KV cache of {n_ctx} tokens: {size(expected['tca'])} in place of {size(expected['dense'])}"
    )
    click.echo("dry run: nothing was written" if dry_run else f"budgets written to {place.path}")


@click.command("strip-budgets")
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here.  [default: MODEL itself, in place]")
@json_option
def strip_budgets(model: Path, output: Path | None, as_json: bool) -> None:
    """Remove the budgets from MODEL: the file becomes what it was before embed-budgets, byte for byte.

    Files of keys that belong to it, beside it or in your own folder, are deleted. With -o nothing but a copy is written.

    \b
    Example:
      tca-gguf strip-budgets model.gguf
    """
    target = output or model
    deleted = where.files_of(model) if output is None else []
    for path in deleted:
        try:
            path.unlink()
        except OSError as error:
            raise TcaError(f"{path} cannot be deleted: {error.strerror}") from None
    own = output is not None or gguf_file.own_keys(model)
    found = False
    if own:
        with progress_bar() as advance:
            found = gguf_file.strip_budgets(model, target, lambda done, total: advance(done, total, "writing"))
    if as_json:
        emit_json({"model": str(model), "written": str(target) if found or target != model else None, "stripped": found or bool(deleted),
                   "deleted": [str(path) for path in deleted]})  # fmt: skip
        return
    for path in deleted:
        click.echo(f"{path} deleted")
    if deleted and not found:
        return
    if found:
        click.echo(f"budgets removed from {target}" if target == model else f"{target} written without budgets")
    else:
        click.echo(f"{model} has no budgets" + ("" if target == model else f"; copied to {target}"))
