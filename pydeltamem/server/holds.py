"""One turn of a session at a time: locks within this process, and leases among those that share a store."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from ..errors import DeltaMemError
from .logs import log
from .records import Identity, StoreError
from .store import Store


class SessionBusy(DeltaMemError):
    """Another turn of this session is running and did not end in time."""


@dataclasses.dataclass(eq=False)
class Held:
    """A session in use by this process, and which commit of it the store has, where a lease told it."""

    owner: str
    name: str
    identity: Identity | None
    ended: float | None = None  # its use, before the commit

    @property
    def shown(self) -> dict[str, Any]:
        """For the log: when, to the microsecond."""
        return {"session": self.name, "time": self.ended or time.time()}


class _Lock:
    """A lock, and how many hold it or wait for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.n = 0


class Holds:
    """Who uses which session.

    Args:
        store: where sessions are.
        in_store: calls a method of it in a thread.
        timeout: seconds that a turn waits for another one of its session.
        lease: seconds after which another process may take over a session of a process that was killed.
    """

    def __init__(
        self, store: Store, in_store: Callable[..., Coroutine[Any, Any, Any]], timeout: float, lease: float
    ) -> None:
        self._store, self._in_store, self._timeout, self._seconds = store, in_store, timeout, lease
        self._me = uuid.uuid4().hex
        self._locks: dict[tuple[str, str], _Lock] = {}
        self._beginning: set[tuple[str, str]] = set()
        self._leased: set[Held] = set()
        self._prolonging: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Prolongs no more leases."""
        if self._prolonging is not None:
            self._prolonging.cancel()

    def n_turns(self, owner: str, name: str) -> int:
        """How many hold a session in this process, or wait for it."""
        lock = self._locks.get((owner, name))
        return 0 if lock is None else lock.n

    def begin(self, held: Held) -> list[str]:
        """Says that a session begins in its hold. Returns the names of others of its owner that do: the store may not
        know them yet.
        """
        others = [name for owner, name in self._beginning if owner == held.owner and name != held.name]
        self._beginning.add((held.owner, held.name))
        return others

    def holder(self, held: Held | None) -> str:
        """Whose lease ends with a commit."""
        return self._me if held is not None and held in self._leased else ""

    def gave_back(self, held: Held) -> None:
        """A commit ended the lease."""
        if held in self._leased:
            self._leased.discard(held)
            log.debug("a session is given back", extra=held.shown)

    @contextlib.asynccontextmanager
    async def held(self, owner: str, name: str) -> AsyncIterator[Held]:
        """One at a time for a session, in this process and among others. Raises SessionBusy."""
        key = owner, name
        entry = self._locks.setdefault(key, _Lock())
        entry.n += 1
        try:
            try:
                await asyncio.wait_for(entry.lock.acquire(), self._timeout)
            except (TimeoutError, asyncio.TimeoutError):
                raise SessionBusy(f"session {name}: another turn is running and did not end in time") from None
            try:
                held = await self._lease(owner, name)
                try:
                    yield held
                finally:
                    await self._release(held)
            finally:
                self._beginning.discard(key)
                entry.lock.release()
        finally:
            entry.n -= 1
            if entry.n == 0:
                self._locks.pop(key, None)

    async def _lease(self, owner: str, name: str) -> Held:
        """Holds a session among processes. Raises SessionBusy."""
        if self._store.is_local:
            return Held(owner, name, None)
        end = time.monotonic() + self._timeout
        while True:
            identity = await self._in_store(self._store.lease, owner, name, self._me, self._seconds)
            if identity is not None:
                break
            if time.monotonic() > end:
                raise SessionBusy(f"session {name}: another process runs a turn that did not end in time")
            await asyncio.sleep(0.1)
        held = Held(owner, name, identity)
        self._leased.add(held)
        if self._prolonging is None:
            self._prolonging = asyncio.create_task(self._prolong())
        log.debug("a session is held", extra=held.shown)
        return held

    async def _prolong(self) -> None:
        """Prolongs the leases of turns that go on. One that expires meanwhile loses nothing but its turn: its commit
        finds another version, if another process made one.
        """
        while True:
            await asyncio.sleep(self._seconds / 3)
            if self._leased:
                held = [(each.owner, each.name) for each in self._leased]
                try:
                    await self._in_store(self._store.prolong, self._me, self._seconds, held)
                except StoreError:
                    pass  # the next one may reach it
                except Exception:  # else no lease would be prolonged any more
                    log.exception("leases cannot be prolonged")

    async def _release(self, held: Held) -> None:
        if held not in self._leased:
            return  # its commit gave it back
        self.gave_back(held)
        with contextlib.suppress(StoreError):  # it expires by itself
            await self._in_store(self._store.release, held.owner, held.name, self._me)
