"""What the worker's thread has for event loops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any


class Outbox:
    """Calls of functions in event loops. Sent together, they wake each loop once."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.AbstractEventLoop, list[Callable[[], object]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
        """Has a function called in a loop, after the next `send`, in the order of the calls of `put`."""
        self._calls.setdefault(loop, []).append(functools.partial(function, *arguments))

    def send(self) -> None:
        """Sends what there is. A loop that is gone gets nothing."""
        while self._calls:
            loop, calls = self._calls.popitem()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_call_all, calls)


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
