"""The lock of a context, and of a text: llama.cpp's objects are for one thread at a time."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import InputError

_F = TypeVar("_F", bound=Callable[..., Any])
_RLock: Any = type(threading.RLock())


class FairLock(_RLock):  # type: ignore[misc] # of another name in other releases of Python
    """A reentrant lock for which nobody waits for ever.

    Python's own goes to whoever is quickest. That is the thread that has just let go of it, if it wants it again: a
    reply would keep every other one waiting. Here whoever waits is next.

    Only what it takes to begin is written here. Python's own `__exit__` lets go of it: no Ctrl-C falls into that.

    Args:
        before: a lock that is taken after this one. Who has it already cannot wait for this one, maybe for ever, and is
            refused with InputError if another thread has this one.
    """

    def __init__(self, before: FairLock | None = None) -> None:
        self._next = threading.Lock()  # whoever is next has it
        self._before = before

    def __enter__(self) -> bool:
        if self._is_owned():
            return self.acquire()  # type: ignore[no-any-return]
        if self._before is not None and self._before._is_owned():
            if not self.acquire(blocking=False):
                raise InputError("a callback used a text that another thread is using: use it outside of the callback")
            return True
        try:
            with self._next:
                return self.acquire()  # type: ignore[no-any-return]
        except BaseException:
            if self._is_owned():  # interrupted as soon as it was ours
                self.release()
            raise


def holding(name: str) -> Callable[[_F], _F]:
    """A method that holds the lock `self.name`, which may have dots in it."""
    *path, last = name.split(".")

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def held(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = self
            for part in path:
                owner = getattr(owner, part)
            with getattr(owner, last):
                return method(self, *args, **kwargs)

        return held  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def all_of(locks: Iterable[FairLock]) -> Iterator[None]:
    """Holds several locks, always taken in the same order, so that no two threads wait for each other."""
    with contextlib.ExitStack() as stack:
        for lock in sorted(set(locks), key=id):
            stack.enter_context(lock)
        yield
