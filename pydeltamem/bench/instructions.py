"""How many instructions a thread spends, by Linux's performance counters."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_IOC_ENABLE, _IOC_DISABLE, _IOC_RESET = 0x2400, 0x2401, 0x2403


def count_instructions(work: Callable[[], object]) -> int | None:
    """Instructions that this thread spends in work(), outside the kernel; None where they cannot be counted."""
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return None
    import fcntl

    # struct perf_event_attr, version 0: hardware event 1 (instructions), disabled, without kernel and hypervisor
    attr = struct.pack("<IIQQQQQ16x", 0, 64, 1, 0, 0, 0, 1 | 1 << 5 | 1 << 6)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    # this thread, any CPU, no group, no flags
    fd = syscall(ctypes.c_long(number), ctypes.c_char_p(attr), *map(ctypes.c_long, (0, -1, -1, 0)))
    if fd < 0:
        return None
    try:
        fcntl.ioctl(fd, _IOC_RESET, 0)
        fcntl.ioctl(fd, _IOC_ENABLE, 0)
        work()
        fcntl.ioctl(fd, _IOC_DISABLE, 0)
        return int.from_bytes(os.read(fd, 8), sys.byteorder) or None
    except OSError:
        return None
    finally:
        os.close(fd)
