"""The machine and the build, for a result that stands on its own."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

from tca_gguf import native
from tca_gguf.loading import default_threads


def hardware() -> dict[str, Any]:
    """Processor, memory, system and build."""
    cpu, memory = platform.processor() or platform.machine(), 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": default_threads(),
        "memory_bytes": memory,
        "os": platform.platform(),
        "python": platform.python_version(),
        "build": native.build_info(),
    }


def limits(n_threads: int) -> dict[str, Any]:
    """What attention is held against: bytes read and f32 operations a second, measured here and now (native/cpu/tca-limits.cpp)."""
    bandwidth, flops = native.machine_limits(n_threads)
    return {"threads": n_threads, "read_gbps": round(bandwidth / 1e9, 2), "fma_gflops": round(flops / 1e9, 1)}
