"""How many CPUs this process may use."""

from __future__ import annotations

import os


def usable() -> int:
    """CPUs that this process may run on: taskset, a container or a job scheduler may allow only some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
