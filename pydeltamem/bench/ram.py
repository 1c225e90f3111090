"""What a process takes of the RAM."""

from __future__ import annotations

import re
import sys
from pathlib import Path


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
