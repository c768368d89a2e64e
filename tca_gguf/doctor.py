"""What is here and whether it fits: the build, the Python layer, the machine, a model, its budgets and the cache it would get."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import dropin, gguf_file, kv, llama, native
from .bench.machine import hardware
from .budgets import Budgets
from .errors import TcaError
from .gguf_file import ModelShape

RESERVE = 300 << 20  # bytes beside weights and cache: the compute buffers of a small model, Python
DEFAULT_CTX = 8192  # as chat's


@dataclass(frozen=True)
class Check:
    """ok None: nothing to judge, for information. fix: the command or change that mends it, "" where nothing is wrong."""

    name: str
    ok: bool | None
    text: str
    fix: str = ""


@dataclass
class Report:
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, ok: bool | None, text: str, fix: str = "") -> None:
        self.checks.append(Check(name, ok, text, fix))

    @property
    def well(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"well": self.well, "checks": [asdict(check) for check in self.checks], **self.figures}


def available_memory() -> int:
    """Bytes that a process may still take: what the system has left, or its control group allows; 0 if nobody says."""
    free = 0
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
        if limit != "max":
            free = min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def devices() -> list[dict[str, Any]]:
    """The devices that this build can use: {"name", "description", "free", "total", "gpu"}; bytes."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    ggml = ctypes.CDLL(str(llama.lib_dir() / f"libggml.{suffix}"))
    found = []
    for name, result in (("count", ctypes.c_size_t), ("get", ctypes.c_void_p), ("name", ctypes.c_char_p), ("description", ctypes.c_char_p), ("type", ctypes.c_int)):
        getattr(ggml, f"ggml_backend_dev_{name}").restype = result
    for i in range(ggml.ggml_backend_dev_count()):
        device = ctypes.c_void_p(ggml.ggml_backend_dev_get(ctypes.c_size_t(i)))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append({"name": ggml.ggml_backend_dev_name(device).decode(), "description": ggml.ggml_backend_dev_description(device).decode(),
                      "free": free.value, "total": total.value, "gpu": ggml.ggml_backend_dev_type(device) in (1, 2)})  # fmt: skip
    return found


def gpus_of_the_machine() -> list[str]:
    """NVIDIA GPUs by name, whether this build can use them or not."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def examine(model: Path | None = None, n_ctx: int | None = None, kv_type: str = "f16") -> Report:
    """Everything that can be said without running a model. n_ctx: of the cache, None for chat's; 0 as the model was trained."""
    report = Report()
    _build(report)
    _machine(report)
    if model is not None:
        _model(report, model, n_ctx, kv_type)
    return report


def _build(report: Report) -> None:
    try:
        info = native.build_info()
    except TcaError as error:
        report.add("build", False, "the native part cannot be loaded", str(error))
        return
    report.figures["build"] = info
    report.add("build", True, f"tca-gguf {info['version']} on {info['upstream']}, {info['simd']}{', CUDA' if info['cuda'] else ''}")
    try:
        layer = llama.layer_spec(llama.installed(), llama.pinned_version(), llama.package_dir() / "_layer")
        own = "our copy" if "_layer" in Path(layer.origin or "").parts else f"installed in {Path(layer.origin or '').parent}"
        report.add("Python layer", True, f"llama-cpp-python {llama.pinned_version()}, {own}")
        state = dropin.state()
        report.add("import llama_cpp", None, "programs of this environment run on tca-gguf" if state.ours else
                   "only after import tca_gguf, or by: tca-gguf exec python app.py; for always: tca-gguf activate")  # fmt: skip
    except TcaError as error:
        what, _, fix = str(error).partition("; run: ")
        report.add("Python layer", False, what, fix or str(error))
    programs = sorted(path.name for path in (llama.package_dir() / "bin").glob("llama-*"))
    report.add("programs", bool(programs) or None, ", ".join(programs) or "none of llama.cpp's programs were built")


def _machine(report: Report) -> None:
    machine = hardware()
    free = available_memory()
    report.figures |= {"memory_bytes": machine["memory_bytes"], "memory_available": free}
    report.add("processor", True, f"{machine['cpu']}, {machine['cores']} threads")
    report.add("memory", None, f"{_gb(machine['memory_bytes'])}, {_gb(free)} available")
    usable = [device for device in devices() if device["gpu"]] if report.checks[0].ok else []
    report.figures["devices"] = usable
    for device in usable:
        report.add("GPU", True, f"{device['description']}, {_gb(device['free'])} of {_gb(device['total'])} free; use it with --gpu-layers -1")
    names = gpus_of_the_machine()
    if names and not usable:
        report.add("GPU", False, f"{', '.join(names)}, but this build has no CUDA", 'CMAKE_ARGS="-DGGML_CUDA=ON" pip install . (in the checkout of tca-gguf)')
    elif not usable:
        report.add("GPU", None, "none that this build can use")


def _model(report: Report, model: Path, n_ctx: int | None, kv_type: str) -> None:
    try:
        shape = gguf_file.model_shape(model)
        parts = gguf_file.split_parts(model)
        weights = sum(part.stat().st_size for part in parts)
    except TcaError as error:
        report.add("model", False, str(error), "give the path of a complete GGUF file")
        return
    trained = f", trained for {shape.n_ctx_train:,} tokens" if shape.n_ctx_train else ""
    report.add("model", True, f"{shape.name}, {shape.arch}, {_gb(weights)}{f' in {len(parts)} parts' if len(parts) > 1 else ''}{trained}")
    budgets = _budgets(report, model)
    tokens = n_ctx or (shape.n_ctx_train if n_ctx == 0 else min(DEFAULT_CTX, shape.n_ctx_train or DEFAULT_CTX)) or DEFAULT_CTX
    _cache(report, shape, budgets, tokens, kv_type, weights)


def _budgets(report: Report, model: Path) -> Budgets | None:
    try:
        source = gguf_file.source_of(model)
        budgets = gguf_file.read_budgets(model) if source is not None else None
    except TcaError as error:
        report.add("budgets", False, str(error), f"tca-gguf embed-budgets {model}")
        return None
    if budgets is None:
        report.add("budgets", False, "none: the cache is llama.cpp's own", f"tca-gguf embed-budgets {model}")
    elif not budgets.enabled:
        report.add("budgets", False, f"in {source}, switched off (tca.enabled is false)", f"tca-gguf embed-budgets {model}")
        return None
    else:
        report.add("budgets", True, f"{budgets.kept_fraction:.0%} kept, metric {budgets.metric}, {'in the file' if source == model else f'from {source}'}")
    return budgets


def _cache(report: Report, shape: ModelShape, budgets: Budgets | None, n_ctx: int, kv_type: str, weights: int) -> None:
    def of(tokens: int, kind: str) -> int:
        # without budgets it is not known which layers have sliding windows: as if none had
        return kv.predicted(shape, budgets, tokens, kind).allocated if budgets else kv.stock(shape, range(shape.n_layer), tokens, kind)

    try:
        size = of(n_ctx, kv_type)
    except TcaError as error:
        report.add("cache", False, str(error), "--kv-type f16")
        return
    report.figures["cache"] = {"n_ctx": kv.context_size(n_ctx), "kv_type": kv_type, "bytes": size,
                               "bytes_dense": kv.predicted(shape, budgets, n_ctx, kv_type).stock if budgets else size}  # fmt: skip
    text = f"{kv.context_size(n_ctx):,} tokens, {kv_type}: {_mb(size)}"
    if budgets:
        text += f" in place of {_mb(report.figures['cache']['bytes_dense'])}"
    if shape.n_ctx_train and n_ctx > shape.n_ctx_train:
        report.add("cache", False, f"{text}; more than the {shape.n_ctx_train:,} tokens that the model was trained for", f"-c {shape.n_ctx_train}")
    else:
        report.add("cache", True, text)
    free = available_memory()
    if not free:
        return
    # the weights are mapped from the file, but a model whose pages do not stay in memory is read from the disk at every token
    needed = weights + size + RESERVE
    if needed <= free:
        report.add("it fits", True, f"weights, cache and buffers take about {_gb(needed)} of {_gb(free)}")
        return
    fitting = next((n for n in (131072, 65536, 32768, 16384, 8192, 4096, 2048) if n < n_ctx and weights + of(n, kv_type) + RESERVE <= free), None)
    fix = f"-c {fitting}" if fitting else "a smaller quantization of the model"
    with contextlib.suppress(TcaError):  # heads of a size that q8_0 does not fit
        if kv_type == "f16" and weights + of(n_ctx, "q8_0") + RESERVE <= free:
            fix = f"--kv-type q8_0, or {fix}"
    report.add("it fits", False, f"weights, cache and buffers need about {_gb(needed)}, {_gb(free)} are available", fix)


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
