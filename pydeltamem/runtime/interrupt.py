"""Ctrl-C between two steps instead of within one.

Python raises KeyboardInterrupt wherever the main thread happens to be: after a decode but before its record, or in a
callback of llama.cpp, where Python drops exceptions.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it the first Ctrl-C waits for the end; a second one does not, because a callback may hang.

    Only the main thread is ever interrupted. A handler that is not Python's stays as it is.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    pressed: list[Any] = []

    def press(signum: int, frame: Any) -> None:
        pressed.append(frame)
        if len(pressed) > 1:
            handler(signum, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if len(pressed) == 1:
        handler(signal.SIGINT, pressed[0])


def interruptible(pieces: Iterator[str]) -> Iterator[str]:
    """Yields from a stream. After the first piece, Ctrl-C raises KeyboardInterrupt only between two pieces.

    Elsewhere it could interrupt a callback of llama.cpp (--ignore-eos has one), where Python drops exceptions.
    """
    pressed = False

    def press(signum: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True

    before = None
    try:
        for piece in pieces:
            if before is None:
                before = signal.signal(signal.SIGINT, press)
            yield piece
            if pressed:
                raise KeyboardInterrupt
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
