"""`AsyncDeltaMem`: sessions and turns for asyncio programs. The HTTP application stands on it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..formats.memory_file import MemorySnapshot
from ..llama import DeltaMemLlama
from . import session as sessions
from .answer import Answer
from .history import Message, checked_messages
from .options import DEFAULTS, checked
from .records import Identity, Record, SessionUnknown, StoreError, as_seen, checked_name, now
from .shared import Shared
from .store import Store
from .worker import ModelLost, QueueFull


class AsyncDeltaMem:
    """Sessions on one model, for asyncio.

        async with AsyncDeltaMem(DeltaMemLlama("base.gguf", deltamem_path="adapter.gguf", n_seq_max=4)) as memory:
            async for piece in memory.chat([{"role": "user", "content": "My name is Ada."}], session="ada"):
                print(piece.text, end="")

    A session is a memory with a name, and what is known of its text. It takes a slot only for a turn. A turn counts
    when its answer is complete, or cut by the caller: then memory and text are committed together, or not at all.

    Args:
        llm: the model, which nobody else may use meanwhile. `aclose` closes it.
        store: where sessions are kept; None: a store in memory, which ends with this object.
        n_queue: how many requests may wait for a slot.
        n_live: how many sessions stay ready in memory.
        n_sessions: how many sessions an owner may have.
        turn_timeout: seconds that a turn waits for another one of its session.
        lease: seconds after which another process may take over a session of a process that was killed. A process that
            lives prolongs its leases.
        store_timeout: seconds that a turn which was decoded waits for a database that went away.

    Methods raise InputError, AdapterError, SessionBusy, SessionUnknown, SessionLimit, QueueFull, StoreError,
    DecodeError and NotFiniteError; ModelError after `cut` and `aclose`.
    """

    def __init__(
        self,
        llm: DeltaMemLlama,
        store: Store | None = None,
        *,
        n_queue: int = 64,
        n_live: int = 64,
        n_sessions: int = 100_000,
        turn_timeout: float = 10,
        lease: float = 6,
        store_timeout: float = 30,
    ) -> None:
        if not isinstance(llm, DeltaMemLlama):
            raise InputError(f"AsyncDeltaMem needs a DeltaMemLlama, not {llm!r}")
        self.llm = llm
        self.store = Store.temporary() if store is None else store
        self._shared = Shared(
            llm,
            self.store,
            n_queue=n_queue,
            n_live=n_live,
            n_sessions=n_sessions,
            turn_timeout=turn_timeout,
            lease=lease,
            store_timeout=store_timeout,
        )
        self.worker, self.lengths = self._shared.worker, self._shared.prompts.lengths
        self.has_memory, self.about, self.adapter = llm.memory.attached, self._shared.about, self._shared.adapter

    async def __aenter__(self) -> AsyncDeltaMem:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def lose(self, error: ModelLost) -> None:
        """Fails the turns that are being decoded, because the model is lost. Turns that were decoded already are
        committed. Any thread may call this.
        """
        self.worker.lose(error)

    def cut(self) -> None:
        """Ends the running answers as `max_tokens` does. Answers without a token, and all later ones, raise ModelError.
        Any thread may call this.
        """
        self.worker.cut()

    async def aclose(self, seconds: float = 30) -> None:
        """Ends what runs, commits it, and closes store and model."""
        await self._shared.aclose(seconds)

    def n_turns(self, name: str, owner: str = "") -> int:
        """Turns of a session that run, or wait for another one."""
        return self._shared.holds.n_turns(owner, checked_name(name))

    @property
    def n_ready(self) -> int:
        """Sessions that are ready in memory."""
        return len(self._shared.live)

    @property
    def n_evicted(self) -> int:
        """Sessions that left memory for others."""
        return self._shared.n_evicted

    @property
    def n_stored(self) -> int:
        """Sessions in the store, of all owners."""
        return self.store.count()

    #
    # turns
    #

    def chat(
        self,
        messages: Any,
        *,
        session: str | None = None,
        owner: str = "",
        write: bool = True,
        origin: Record | None = None,
        seen: Identity | None = None,
        replaces_last: bool = False,
        **options: Any,
    ) -> Answer:
        """The answer to messages, whose history is sent each time; only what is new is written (docs/how-to/serve.md).

        Options: `max_tokens`, `stop`, `seed`, `logit_bias`, `n_top` (log probabilities), sampling as
        `create_chat_completion`, `tools`, `tool_choice`, `response_format`, `template` (further variables of the chat
        template).

        Args:
            session: whose memory it is; None: the request's own.
            owner: sessions of one owner are invisible to others.
            write: False: the session stays as it is.
            origin: a session of the same owner, as `get` returned it. If there is no `session` yet, it begins as this
                one, which stays.
            seen: which commit of the session the caller has seen, as `Record.identity`. The turn raises Conflict if the
                store has another one now.
            replaces_last: the latest turn is taken back, in the commit of this one: if this one does not count, it
                stays. The messages are those before it and the new one.
        """
        answer = Answer(self._shared, checked_messages(messages), None, session, owner, write, checked(options))
        answer.origin, answer.seen, answer.replaces_last = origin, seen, replaces_last
        return answer

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        session: str | None = None,
        owner: str = "",
        write: bool = True,
        **options: Any,
    ) -> Answer:
        """The continuation of a text. Options as `chat`, without those of a chat."""
        return Answer(self._shared, None, prompt, session, owner, write, checked(options))

    #
    # sessions
    #

    async def list(
        self, owner: str = "", *, containing: str = "", limit: int | None = None, after: str | None = None
    ) -> list[Record]:
        """The sessions of an owner, the latest first, without their memories. `containing`: a part of their names;
        `limit`: at most this many; `after`: only those after the session of this name.
        """
        last = None if after is None else await self.get(after, owner)
        return await self._shared.in_store(self.store.list, owner, containing=containing, limit=limit, after=last)

    async def get(self, name: str, owner: str = "") -> Record:
        """A session as it was committed."""
        record = await self._shared.in_store(self.store.get, owner, checked_name(name))
        if record is None:
            raise SessionUnknown(f"there is no session {name}")
        return record

    async def snapshot(self, name: str, owner: str = "") -> MemorySnapshot:
        """The memory of a session, as a memory file holds it."""
        return await self.snapshot_of(await self.get(name, owner))

    async def snapshot_of(self, record: Record) -> MemorySnapshot:
        """The memory of a session that `get` returned."""
        return await asyncio.to_thread(sessions.snapshot_of, record, self.about, self.llm._engine.slots.shape)

    async def readable(self, name: str, owner: str = "") -> MemorySnapshot:
        """The memory of a session, for the attached adapter. Raises AdapterError if there is none, and InputError if
        the memory belongs to another one.
        """
        self._shared.require_memory(checked_name(name))
        record = await self.get(name, owner)
        sessions.check_adapter(record, self.adapter)
        return await self.snapshot_of(record)

    async def replace(self, name: str, snapshot: MemorySnapshot, owner: str = "") -> Record:
        """Replaces the memory of a session, or makes one. Its text and turns are forgotten."""
        async with self._shared.holds.held(owner, checked_name(name)) as held:
            record = await self._shared.record(held)
            new = await self._shared.in_worker(lambda: sessions.with_memory(self.llm, record, snapshot))
            return await self._shared.commit(new, held)

    async def fork(self, name: str, new: str, owner: str = "") -> Record:
        """A second session that goes on from here. Raises Conflict if the name is taken."""
        record, new = await self.get(name, owner), checked_name(new)
        async with self._shared.holds.held(owner, new) as held:  # a turn may be beginning a session of this name
            await self._shared.require_room(held)
            return await self._shared.commit(dataclasses.replace(record, name=new, version=0, created=now()), held)

    async def reset(self, name: str, owner: str = "") -> Record:
        """Empties the memory, and forgets text and turns."""
        async with self._shared.holds.held(owner, checked_name(name)) as held:
            record = await self.get(name, owner)
            empty = Record(owner, record.name, record.version, record.created, adapter=self.adapter)
            return await self._shared.commit(empty, held)

    async def undo(self, name: str, owner: str = "", *, seen: Identity | None = None) -> Record:
        """Takes the latest turn back: text and memory are as before it. `seen`: as in `chat`."""
        async with self._shared.holds.held(owner, checked_name(name)) as held:
            record = as_seen(await self.get(name, owner), seen)
            return await self._shared.commit(await asyncio.to_thread(sessions.taken_back, record), held)

    async def forget_text(self, name: str, owner: str = "", *, seen: Identity | None = None) -> Record:
        """Forgets the text and keeps the memory. Messages can no longer go back to the latest turns, but `undo` can
        take them back. `seen`: as in `chat`.
        """
        async with self._shared.holds.held(owner, checked_name(name)) as held:
            record = as_seen(await self.get(name, owner), seen)
            return await self._shared.commit(dataclasses.replace(record, text=b"", chat=""), held)

    async def rename(self, name: str, new: str, owner: str = "") -> None:
        """Gives a session another name. Raises Conflict if it is taken."""
        name, new = checked_name(name), checked_name(new)
        if new == name:
            await self.get(name, owner)
            return
        first, second = sorted((name, new))  # who gives them each other's names waits for nobody
        async with self._shared.holds.held(owner, first), self._shared.holds.held(owner, second):
            if not await self._shared.in_store(self.store.rename, owner, name, new):
                raise SessionUnknown(f"there is no session {name}")
            await self._shared.forget(owner, name)

    async def delete(self, name: str, owner: str = "") -> None:
        """Deletes a session."""
        name = checked_name(name)
        async with self._shared.holds.held(owner, name):
            if not await self._shared.in_store(self.store.delete, owner, name):
                raise SessionUnknown(f"there is no session {name}")
            await self._shared.forget(owner, name)

    async def can_decode(self, seconds: float = 5) -> bool:
        """Whether a token can be decoded: one is, unless others are. A full queue says nothing, as long as it moves."""
        worker, end, probe = self.worker, time.monotonic() + seconds, None
        try:
            while worker.is_alive() and time.monotonic() < end:
                since = worker.busy_since  # None between two steps
                if worker.n_active and since is not None and time.monotonic() - since < 60:
                    return True
                if probe is None:
                    answer = Answer(self._shared, None, "a", None, "\0health", False, {**DEFAULTS, "max_tokens": 0})
                    probe = asyncio.create_task(answer.whole())
                elif probe.done():
                    error, probe = probe.exception(), None
                    if not isinstance(error, QueueFull):
                        return error is None
                await asyncio.sleep(0.01)
        finally:
            if probe is not None:
                probe.cancel()
        return False

    async def reaches_store(self) -> bool:
        """Whether the database answers."""
        try:
            await self._shared.in_store(self.store.ping)
        except StoreError:
            return False
        return True

    def prompt_text(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """As `Prompts.text`."""
        return self._shared.prompts.text(messages, options)
