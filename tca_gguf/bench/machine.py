"""The machine and the build, for a result that stands on its own."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
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


class Limits:
    """What attention is held against: bytes read and f32 operations a second, as all threads reach them
    (native/cpu/tca-limits.cpp). Measured beside the tests, again and again: on a shared host memory is faster at some times than
    at others, and a kernel must not be compared with the limit of another moment."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.read: list[float] = []
        self.fma: list[float] = []

    def measure(self) -> dict[str, Any]:
        """Measures once more; medians, and every figure of the memory."""
        bandwidth, flops = native.machine_limits(self.n_threads)
        self.read.append(round(bandwidth / 1e9, 2))
        self.fma.append(round(flops / 1e9, 1))
        return {
            "threads": self.n_threads,
            "read_gbps": statistics.median(self.read),
            "fma_gflops": statistics.median(self.fma),
            "read_gbps_all": list(self.read),
        }
