"""The CPUs of this machine: their name, how many this process may use, and how many threads are the default."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

MAX_THREADS = 512  # GGML_MAX_N_THREADS: ggml has arrays of this length


def usable() -> int:
    """CPUs that this process may run on: taskset, a container or a job scheduler may allow only some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> tuple[int, int]:
    """Threads for a reply, and for prompts: half of the usable CPUs, and all of them."""
    n_cpus = min(usable(), MAX_THREADS)  # llama_cpp also counts CPUs that the process may not use
    return max(n_cpus // 2, 1), n_cpus


def cpu_name() -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
