"""SIGTERM and SIGHUP while files are being made: what was begun is removed before the process ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Within it SIGTERM, and SIGHUP of a terminal that closes, raise SystemExit, so that temporary files and programs
    that were started go too.

    Only in the main thread, and only those signals that nobody handles or ignores already. Not for long calls of native
    code: they would delay the end.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if is_main and hasattr(signal, name)]
    ends = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    try:
        for number in ends:
            signal.signal(number, end)
        yield
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
