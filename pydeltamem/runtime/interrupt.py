"""Ctrl-C between two steps instead of within one.

Python raises KeyboardInterrupt wherever the main thread happens to be: after a decode but before its record, or in a
callback of llama.cpp (its log, for one), where Python drops exceptions.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[Any]]:
    """Within it the first Ctrl-C waits for the end, however that comes; a second one does not, because a callback may
    hang. Yields a list that is empty until then.

    Only the main thread is ever interrupted. A handler that is not Python's stays as it is.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    pressed: list[Any] = []
    if not callable(handler):
        yield pressed
        return

    def press(signum: int, frame: Any) -> None:
        pressed.append(frame)
        if len(pressed) > 1:
            handler(signum, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    except KeyboardInterrupt:  # of the second one
        pressed.clear()
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            frame = pressed[0]
            pressed.clear()  # frames hold the model
            handler(signal.SIGINT, frame)


def interruptible(pieces: Iterator[str]) -> Iterator[str]:
    """Yields from a stream. After the first piece, Ctrl-C raises KeyboardInterrupt only between two pieces. A second
    one does not wait: a model may go on with tokens that have no text.

    Elsewhere it could interrupt a callback of llama.cpp (--ignore-eos has one), where Python drops exceptions.
    """
    pressed = False
    before: Any = None

    def press(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed and callable(before):
            before(signum, frame)
        pressed = True

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
