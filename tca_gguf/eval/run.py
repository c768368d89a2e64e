"""A whole evaluation: the file's budgets and the asked-for policies through the asked-for suites, in one loaded model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tca_gguf import calib, gguf_file, logs, native
from tca_gguf.atomic import replace_text
from tca_gguf.bench import hardware
from tca_gguf.budgets import Budgets
from tca_gguf.calib.runtime import Model, Session
from tca_gguf.errors import TcaError
from tca_gguf.gguf_file import ModelShape
from tca_gguf.llama import load
from tca_gguf.loading import check_model, default_threads

from .lab import Lab, Progress, Settings, check_lengths
from .policies import CALIBRATED, UNIFORM_METRIC, layout_of, make_policies
from .suites import SUITES
from .texts import read_text


@dataclass
class Result:
    """rows: one for each suite, length and policy. answers: everything that was asked and said.

    errors: what could not be measured, a line each. interrupted: Ctrl-C came after some rows; the others are missing.
    """

    hardware: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"hardware": self.hardware, "rows": self.rows, "settings": self.settings, "answers": self.answers, "errors": self.errors}

    def save(self, path: Path) -> None:
        """At every moment the old or the new text is there: a run that is killed leaves the rows it had."""
        replace_text(path, json.dumps(self.as_json(), ensure_ascii=False))

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `save` wrote. Raises TcaError."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(raw["hardware"], raw["settings"], raw["rows"], raw["answers"], raw.get("errors", []))
        except OSError as error:
            raise TcaError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise TcaError(f"{path} is not what eval --save writes") from None


def run(
    path: str | os.PathLike[str],
    settings: Settings,
    progress: Progress = lambda done, total, label: None,
    verbose: bool = False,
    on_row: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Evaluates a model file. progress(done, total, label): in tokens. on_row(result): after each row.

    Raises TcaError, but once there is a row only notes what fails and goes on with the rest.
    """
    path = Path(path)
    unknown = [name for name in settings.suites if name not in SUITES]
    if unknown:
        raise TcaError(f"unknown suite {unknown[0]!r}; there are: {', '.join(SUITES)}")
    enabled = check_model(path)
    shape, own = gguf_file.read_model(path)
    if own is not None and not enabled:
        own = None
    check_lengths(path, shape, settings.lengths)
    source = read_text(settings.text)
    log = logs.take_over(load(), verbose)
    names, keeps = policy_names(settings)
    policies = make_policies(names, keeps, settings.kv_type, shape, own, calibrator(path, settings, own, progress) if settings.keeps else None,
                             lambda: full_layers(path, own))  # fmt: skip
    if settings.kv_type != "f16" and not any(policy.budgets is not None for policy in policies):
        raise TcaError("--kv-type belongs to the policies that evict; name a dense one as dense-q8_0 or dense-q4_0")

    result = Result(hardware(), {"model": path.name, **asdict(settings)})
    result.settings["n_threads"] = settings.n_threads or default_threads()
    try:
        with Model(path, n_gpu_layers=settings.n_gpu_layers) as model:
            lab = Lab(model, shape, layout_of(own), full_layers(model, own), policies, settings, source, progress, log,
                      answers=result.answers, errors=result.errors)  # fmt: skip
            chosen = [(suite, settings.samples or suite.samples) for suite in map(SUITES.__getitem__, settings.suites)]
            lab.total = sum(suite.cost(n, samples) for suite, samples in chosen for n in settings.lengths) * (1 + len(policies))
            for suite, samples in chosen:
                with lab.attempt(suite.name):
                    for row in suite.run(lab, samples):
                        result.rows.append(row)
                        on_row(result)
    except KeyboardInterrupt:
        if not result.rows:
            raise
        result.interrupted = True
    except TcaError as error:
        raise TcaError(log.explain(error)) from None
    if result.errors and not result.rows:
        raise TcaError("; ".join(result.errors))
    return result


def full_layers(model: Model | Path, own: Budgets | None) -> list[int]:
    """The layers with full attention; those whose attention slides never have a budget."""
    if own is not None:
        return own.stored_layers()
    with Session(model, 32, overrides={"tca.enabled": False}) as session:
        return list(session.shape.stored)


def policy_names(settings: Settings) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(names of policies, kept fractions; none for the file's own) that the settings mean."""
    if settings.keeps and settings.uniform is not None:
        raise TcaError("--keep and --uniform exclude each other: --keep calibrates, and gives uniform policies the same fractions")
    uniform = settings.uniform is not None
    names = settings.policies or ((UNIFORM_METRIC,) if uniform else (CALIBRATED,))
    return names, (settings.uniform,) if settings.uniform is not None else settings.keeps


def calibrator(path: Path, settings: Settings, own: Budgets | None, progress: Progress) -> Callable[[str, float], Budgets]:
    """calibrate(metric, keep) that measures once for each metric."""
    measured: dict[str, calib.Measurement] = {}

    def calibrate(metric: str, keep: float) -> Budgets:
        if metric not in measured:
            measured[metric] = calib.measure(path, metric=metric, layout=layout_of(own), n_threads=settings.n_threads or None,
                                             n_gpu_layers=settings.n_gpu_layers,
                                             progress=lambda done, total, label: progress(done, total, f"calibrating, {label}"))  # fmt: skip
        return calib.choose_budgets(measured[metric], keep)

    return calibrate
