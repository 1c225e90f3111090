"""The machine that a benchmark runs on: its CPU, and what a process takes of its RAM."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
from pathlib import Path


def cpu_name() -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def resident() -> dict[str, int]:
    """Resident bytes of this process: peak; where the system tells also now, and the part that no file backs."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon"}
    found = {key: re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for key, name in names.items()}
    return {key: int(match[1]) * 1024 for key, match in found.items() if match}
