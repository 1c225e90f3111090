"""The lock of a context, and of a text: only one thread at a time may use llama.cpp's objects."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import InputError

_F = TypeVar("_F", bound=Callable[..., Any])
_RLock: Any = type(threading.RLock())  # its name differs between releases of Python

_PATIENCE = 60  # seconds that a fork waits for another thread's decode: a callback may hang


class FairLock(_RLock):  # type: ignore[misc]
    """A reentrant lock that no thread waits for forever.

    Python's own lock goes to the quickest thread. That is the one that has just released it and wants it again: a reply
    would keep every other one waiting. Here the waiting thread is next.

    Only `__enter__` is written here. Python's own `__exit__` releases the lock: a Ctrl-C cannot interrupt that.

    Args:
        before: a lock that is taken after this one. A thread that holds it already might wait for this one forever:
            if another thread has this one, it gets an InputError instead.

    A fork waits for the locks before which there is none to take, those of contexts. In the child no lock belongs to a
    thread that is not there.

    Attributes:
        is_lost: in a child, whether the fork waited for it in vain: what it guards is half done.
    """

    def __init__(self, before: FairLock | None = None) -> None:
        self._next = threading.Lock()  # held by the thread that is next
        self._before = before
        self.is_lost = False
        _locks.add(self)
        if before is None:
            _of_contexts.add(self)

    def __enter__(self) -> bool:
        n = self._count()
        try:
            if n > 0:
                return self.acquire()  # type: ignore[no-any-return]
            if self._before is not None and self._before._is_owned():
                if not self.acquire(blocking=False):
                    raise InputError("a callback used a text that another thread uses: use it outside of the callback")
                return True
            with self._next:
                return self.acquire()  # type: ignore[no-any-return]
        except BaseException:
            if self._count() > n:  # interrupted just after taking it
                self.release()
            raise

    def take(self, seconds: float) -> bool:
        """As `__enter__`, but waits only so long. Returns whether this thread has it."""
        if self._count() > 0:
            return self.acquire()  # type: ignore[no-any-return]
        if not self._next.acquire(timeout=seconds):
            return False
        try:
            return self.acquire(timeout=seconds)  # type: ignore[no-any-return]
        finally:
            self._next.release()

    def renew(self) -> None:
        """Takes it away from any other thread, none of which is there after a fork."""
        self._next = threading.Lock()
        if self._is_owned():
            return
        if self.acquire(blocking=False):
            self.release()
        else:
            self._at_fork_reinit()
            self.is_lost = True

    def _count(self) -> int:
        """How often this thread holds it. Python 3.10 tells only whether it does."""
        return int(self._recursion_count() if hasattr(self, "_recursion_count") else self._is_owned())


_locks: weakref.WeakSet[FairLock] = weakref.WeakSet()
_of_contexts: weakref.WeakSet[FairLock] = weakref.WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    _forking.held = []
    for lock in sorted(_of_contexts, key=id):
        if lock.take(_PATIENCE):
            _forking.held.append(lock)


def _after_fork() -> None:
    while _forking.held:
        _forking.held.pop().release()


def _after_fork_in_child() -> None:
    _after_fork()
    for lock in _locks:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def holding(name: str) -> Callable[[_F], _F]:
    """Decorator: the method holds the lock `self.name`; the name may contain dots."""
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
    """Holds several locks. It takes them always in the same order, so that no two threads wait for each other."""
    with contextlib.ExitStack() as stack:
        for lock in sorted(set(locks), key=id):
            stack.enter_context(lock)
        yield
