"""What the turns of a service share: the model, the store, and the sessions that are ready in memory."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import AdapterError, ModelError
from ..llama import DeltaMemLlama
from ..runtime.history import n_common
from . import session as sessions
from .database import N_CONNECTIONS
from .holds import Held, Holds
from .outbox import Outbox
from .prompts import Prompts
from .records import NOTHING, Record, SessionLimit, StoreAway, now
from .session import Live
from .store import Store
from .worker import ModelLost, QueueFull, Worker

T = TypeVar("T")


class Shared:
    """Arguments are those of `AsyncDeltaMem`.

    Attributes:
        about, adapter: of the memory files of this model and its adapter.
        live: sessions that are ready in memory, by owner and name, the latest last.
        n_evicted: how many left for others.
        turns: those that run.
    """

    def __init__(
        self,
        llm: DeltaMemLlama,
        store: Store,
        *,
        n_queue: int,
        n_live: int,
        n_sessions: int,
        turn_timeout: float,
        lease: float,
        store_timeout: float,
    ) -> None:
        self.llm, self.store = llm, store
        self._n_sessions, self._store_timeout = n_sessions, store_timeout
        self._storing = concurrent.futures.ThreadPoolExecutor(N_CONNECTIONS, "deltamem-store")
        self.holds = Holds(store, self.in_store, turn_timeout, lease)
        self.about = sessions.about_memories(llm) if llm.memory.attached else {}
        self.adapter = self.about.get("adapter", "")
        self.has_memory = llm.memory.attached
        self.prompts = Prompts(llm)
        self.outbox = Outbox()
        self.worker = Worker(llm, n_queue, self.outbox.send)
        self._n_live = max(n_live, 2 * self.worker.n_slots)
        self.live: collections.OrderedDict[tuple[str, str], Live] = collections.OrderedDict()
        self._nameless: list[tuple[str, Live]] = []  # texts of no session, with their owner, the latest last
        self.n_evicted = 0
        self.turns: set[asyncio.Task[Any]] = set()
        with llm._engine.slots.lock:
            llm._engine.slots.leave(llm._text)  # which nobody uses: forks take free slots only
        self.worker.start()

    async def aclose(self, seconds: float) -> None:
        """As `AsyncDeltaMem.aclose`."""
        await asyncio.to_thread(self.worker.stop, seconds)
        if self.turns:
            await asyncio.wait(self.turns, timeout=max(seconds, 10))
        self.holds.close()
        await asyncio.to_thread(self._storing.shutdown)
        self.store.close()
        if self.worker.lost is None:
            self.llm.close()

    async def in_store(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Calls a method of the store in a thread: as many as it has connections, so that none waits for one."""
        call = functools.partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._storing, call)

    async def in_worker(self, function: Any) -> Any:
        """Calls a function in the thread of the worker, which alone touches texts."""
        return await asyncio.wrap_future(self.worker.call(function))

    def require_memory(self, name: str) -> None:
        """Raises AdapterError if no adapter is attached."""
        if not self.has_memory:
            raise AdapterError(
                f"session {name}: no adapter is attached, so there is no memory: serve one by --deltamem"
            )

    def require_queue(self, owner: str, name: str) -> None:
        """Raises QueueFull if as many turns wait for a session as may wait for a slot."""
        n = self.holds.n_turns(owner, name)
        if n >= self.worker.n_queue + self.worker.n_slots:
            raise QueueFull(f"session {name}: {n} turns run or wait already: try again later")

    async def record(self, held: Held, *, begins: bool = True) -> Record:
        """The session as the store has it; else a new one, which `begins` or is only read. Raises SessionLimit for one
        too many.
        """
        record = await self.in_store(self.store.get, held.owner, held.name)
        if record is None:
            if begins:
                await self.require_room(held)
            record = Record(held.owner, held.name, adapter=self.adapter)
        return record

    async def require_room(self, held: Held) -> None:
        """Says that a session begins. Raises SessionLimit if its owner has as many as it may have, with those that
        begin beside it.
        """
        others = self.holds.begin(held)
        n = await self.in_store(self.store.count, held.owner, without=others)  # one may be committed meanwhile
        if n + len(others) >= self._n_sessions:
            raise SessionLimit(
                f"session {held.name}: {self._n_sessions} sessions are there already, or begin: delete one first"
            )

    async def commit(self, record: Record, held: Held | None = None) -> Record:
        """Commits a session that was changed otherwise than by a turn."""
        committed = await self.in_store(self.store.commit, record, holder=self.holds.holder(held))
        if held is not None:
            self.holds.gave_back(held)
        await self.forget(record.owner, record.name)
        return committed

    async def commit_turn(self, record: Record, before: Record | None, held: Held) -> Record:
        """Commits a turn, which was decoded already, and ends its lease. Waits for a database that went away."""
        at, end = now(), time.monotonic() + self._store_timeout
        holder, held.ended = self.holds.holder(held), time.time()
        while True:
            try:
                committed = await self.in_store(self.store.commit, record, before, holder=holder, at=at)
            except StoreAway:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.2)
            else:
                self.holds.gave_back(held)
                return committed

    async def forget(self, owner: str, name: str) -> None:
        """Keeps a session no longer ready: its text may be anywhere, or not that of the store."""
        live = self.live.pop((owner, name), None)
        if live is not None:
            await self.in_worker(lambda: self.leave(live))

    def leave(self, live: Live) -> None:
        """Takes a text out of its slot. In the thread of the worker."""
        slots = self.llm._engine.slots
        with slots.lock:
            slots.leave(live.text)

    async def session(self, held: Held, *, begins: bool) -> Live | Record:
        """The session as the store has it: ready in memory; else its record, which the worker makes ready when the turn
        begins, because it may be in the middle of a step now. `begins`: as `record`, which raises SessionLimit.
        """
        key = held.owner, held.name
        live = self.live.get(key)
        known = None if live is None or live.record is None else live.record.identity
        there = held.identity
        if known is not None and there is None:  # no lease told it
            there = await self.in_store(self.store.identity, *key)
        if live is not None and known == there:
            if begins and there == NOTHING:  # no turn of it has counted yet
                await self.require_room(held)
            self.live.move_to_end(key)
            return live
        record = await self.record(held, begins=begins)
        if live is not None:
            del self.live[key]
            self.worker.call(functools.partial(self.leave, live))
        sessions.check_adapter(record, self.adapter)
        return record

    def begun_as(self, record: Record, origin: Record) -> Live | Record:
        """A new session that goes on from where another one is, in its text unless that is in use."""
        sessions.check_adapter(origin, self.adapter)
        new = dataclasses.replace(origin, name=record.name, version=0, created=record.created)
        key = origin.owner, origin.name
        live = self.live.get(key)
        if self.holds.n_turns(*key) or live is None or live.record is None or live.record.identity != origin.identity:
            return new
        del self.live[key]
        live.record = new
        self.live[new.owner, new.name] = live
        return live

    def keep(self, key: tuple[str, str], live: Live) -> None:
        """Keeps a session ready, in place of the one that was used longest ago."""
        self.live[key] = live
        while len(self.live) > self._n_live:
            idle = next((key for key in self.live if not self.holds.n_turns(*key)), None)
            if idle is None:
                break
            self.n_evicted += 1
            with contextlib.suppress(ModelError, ModelLost):  # the server is stopping
                self.worker.call(functools.partial(self.leave, self.live.pop(idle)))

    def nameless_text(self, owner: str, prompt: Sequence[int]) -> Live:
        """A text that begins as the prompt, of an earlier request of this owner without a session; or a new one. Its
        memory is that of its tokens alone, so the request gets what it would get from an empty memory.
        """
        found, longest = -1, 8
        for i, (of, live) in enumerate(self._nameless):
            n = n_common(live.text.tokens, prompt) if of == owner else 0
            if n > longest:
                found, longest = i, n
        if found < 0:
            return Live(None, sessions.new_text(self.llm))
        live, fork = self._nameless[found][1], None
        if 2 * longest < live.text.n_tokens:  # of another chat with the same system prompt, which would lose its text
            fork = live.text.fork()
        if fork is not None and fork.slot is not None:  # one was free, and has a copy of the KV cache
            live = Live(None, fork)
        else:
            del self._nameless[found]
        live.text.n_tokens = min(longest, live.text.n_tokens)
        return live

    def keep_nameless(self, owner: str, live: Live) -> None:
        """Keeps a text of no session for the next request that begins as it does. In the thread of the worker."""
        self._nameless.append((owner, live))
        while len(self._nameless) > self.worker.n_slots:
            self.leave(self._nameless.pop(0)[1])
