"""`AsyncDeltaMem`: sessions and turns for asyncio programs. The HTTP application stands on it."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..conversation import PromptCatcher, caught_prompt
from ..errors import DeltaMemError, InputError, ModelError
from ..formats.memory_file import MemorySnapshot
from ..llama import DeltaMemLlama
from ..runtime.completion import biased
from ..runtime.generation import Generation
from ..runtime.history import n_common
from ..runtime.stream import checked_grammar
from . import session as sessions
from .database import N_CONNECTIONS
from .history import Message, checked_messages, digests
from .holds import Held, Holds
from .lengths import Lengths, PromptTooLong
from .options import DEFAULTS, checked, of_sampler
from .records import NOTHING, Conflict, Identity, Record, StoreAway, StoreError, now
from .session import Begun, Live
from .store import Store
from .worker import ModelLost, QueueFull, Worker, taken

T = TypeVar("T")

NAME = re.compile(r"(?!\.\.?$)[\w.@:+=-]{1,128}")  # . and .. would not survive in the path of a URL


class SessionUnknown(DeltaMemError):
    """There is no such session."""


class SessionLimit(DeltaMemError):
    """The owner has as many sessions as it may have."""


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a turn did to its session.

    Attributes:
        session: its name; None: the memory was the request's own.
        identity: which commit of the session it left.
        tokens_written: tokens ever written into the memory.
    """

    session: str | None
    identity: Identity
    tokens_written: int

    @property
    def version(self) -> int:
        """Of the session, which counts commits."""
        return self.identity.version


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of an answer: text, and its tokens if log probabilities were asked for."""

    text: str
    scored: Sequence[Any] = ()


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece("".join(piece.text for piece in pieces), [each for piece in pieces for each in piece.scored])


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

    Methods raise InputError, SessionBusy, SessionUnknown, SessionLimit, QueueFull, StoreError, DecodeError and
    NotFiniteError; ModelError after `cut` and `aclose`.
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
        self.llm = llm
        self.store = Store.temporary() if store is None else store
        self.n_sessions = n_sessions
        self.store_timeout = store_timeout
        self._storing = concurrent.futures.ThreadPoolExecutor(N_CONNECTIONS, "deltamem-store")
        self._holds = Holds(self.store, self._in_store, turn_timeout, lease)
        self.about = sessions.about_memories(llm) if llm.memory.attached else {}
        self.adapter = self.about.get("adapter", "")
        self.has_memory = llm.memory.attached
        self.lengths = Lengths(llm)
        self._outbox = _Outbox()
        self.worker = Worker(llm, n_queue, self._outbox.send)
        self._n_live = max(n_live, 2 * self.worker.n_slots)
        self._live: collections.OrderedDict[tuple[str, str], Live] = collections.OrderedDict()
        self._nameless: list[tuple[str, Live]] = []  # texts of no session, with their owner, the latest last
        self.n_evicted = 0
        self._turns: set[asyncio.Task[Any]] = set()
        self.worker.start()

    async def __aenter__(self) -> AsyncDeltaMem:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def lose(self, error: ModelLost) -> None:
        """Fails what is decoded: the model is lost. What was decoded already is committed. Any thread may call this."""
        self.worker.lose(error)

    def cut(self) -> None:
        """Ends the answers that run, as after `max_tokens`. Those without a token, and all that come, raise ModelError.
        Any thread may call this.
        """
        self.worker.cut()

    async def aclose(self, seconds: float = 30) -> None:
        """Ends what runs, commits it, and closes store and model."""
        await asyncio.to_thread(self.worker.stop, seconds)
        if self._turns:
            await asyncio.wait(self._turns, timeout=max(seconds, 10))
        self._holds.close()
        await asyncio.to_thread(self._storing.shutdown)
        self.store.close()
        if self.worker.lost is None:
            self.llm.close()

    def n_turns(self, name: str, owner: str = "") -> int:
        """Turns of a session that run, or wait for another one."""
        return self._holds.n_turns(owner, name)

    @property
    def n_ready(self) -> int:
        """Sessions that are ready in memory."""
        return len(self._live)

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
        answer = Answer(self, checked_messages(messages), None, session, owner, write, checked(options))
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
        return Answer(self, None, prompt, session, owner, write, checked(options))

    #
    # sessions
    #

    async def list(self, owner: str = "") -> list[Record]:
        """The sessions of an owner, the latest first, without their memories."""
        return await self._in_store(self.store.list, owner)

    async def get(self, name: str, owner: str = "") -> Record:
        """A session as it was committed."""
        record = await self._in_store(self.store.get, owner, checked_name(name))
        if record is None:
            raise SessionUnknown(f"there is no session {name}")
        return record

    async def snapshot(self, name: str, owner: str = "") -> MemorySnapshot:
        """The memory of a session, as a memory file holds it."""
        return await self.snapshot_of(await self.get(name, owner))

    async def snapshot_of(self, record: Record) -> MemorySnapshot:
        """The memory of a session that `get` returned."""
        return await asyncio.to_thread(sessions.snapshot_of, record, self.about, self.llm._engine.slots.shape)

    async def replace(self, name: str, snapshot: MemorySnapshot, owner: str = "") -> Record:
        """Replaces the memory of a session, or makes one. Its text and turns are forgotten."""
        async with self._holds.held(owner, checked_name(name)) as held:
            record = await self._in_store(self._record, owner, name)
            new = await self._in_worker(lambda: sessions.with_memory(self.llm, record, snapshot))
            return await self._commit(new, held)

    async def fork(self, name: str, new: str, owner: str = "") -> Record:
        """A second session that goes on from here. Raises Conflict if the name is taken."""
        record = await self.get(name, owner)
        async with self._holds.held(owner, checked_name(new)) as held:  # a turn may be beginning a session of this name
            await self._in_store(self._require_room, owner, new)
            return await self._commit(dataclasses.replace(record, name=new, version=0, created=now()), held)

    async def reset(self, name: str, owner: str = "") -> Record:
        """Empties the memory, and forgets text and turns."""
        async with self._holds.held(owner, checked_name(name)) as held:
            record = await self.get(name, owner)
            empty = Record(owner, record.name, record.version, record.created, adapter=self.adapter)
            return await self._commit(empty, held)

    async def undo(self, name: str, owner: str = "", *, seen: Identity | None = None) -> Record:
        """Takes the latest turn back: text and memory are as before it. `seen`: as in `chat`."""
        async with self._holds.held(owner, checked_name(name)) as held:
            record = _as_seen(await self.get(name, owner), seen)
            return await self._commit(await asyncio.to_thread(sessions.taken_back, record), held)

    async def forget_text(self, name: str, owner: str = "", *, seen: Identity | None = None) -> Record:
        """Forgets the text and keeps the memory. The latest turns can no longer be gone back to, but undone. `seen`: as
        in `chat`.
        """
        async with self._holds.held(owner, checked_name(name)) as held:
            record = _as_seen(await self.get(name, owner), seen)
            return await self._commit(dataclasses.replace(record, text=b"", chat=""), held)

    async def rename(self, name: str, new: str, owner: str = "") -> None:
        """Gives a session another name. Raises Conflict if it is taken."""
        if checked_name(new) == name:
            await self.get(name, owner)
            return
        first, second = sorted((checked_name(name), new))  # who gives them each other's names waits for nobody
        async with self._holds.held(owner, first), self._holds.held(owner, second):
            if not await self._in_store(self.store.rename, owner, name, new):
                raise SessionUnknown(f"there is no session {name}")
            await self._forget(owner, name)

    async def delete(self, name: str, owner: str = "") -> None:
        """Deletes a session."""
        async with self._holds.held(owner, checked_name(name)):
            if not await self._in_store(self.store.delete, owner, name):
                raise SessionUnknown(f"there is no session {name}")
            await self._forget(owner, name)

    async def can_decode(self, seconds: float = 5) -> bool:
        """Whether a token can be decoded: one is, unless others are. A full queue says nothing, as long as it moves."""
        worker, end, probe = self.worker, time.monotonic() + seconds, None
        try:
            while worker.is_alive() and time.monotonic() < end:
                since = worker.busy_since  # None between two steps
                if worker.n_active and since is not None and time.monotonic() - since < 60:
                    return True
                if probe is None:
                    answer = Answer(self, None, "a", None, "\0health", False, {**DEFAULTS, "max_tokens": 0})
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
            await self._in_store(self.store.ping)
        except StoreError:
            return False
        return True

    #
    # within
    #

    async def _in_store(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Calls a method of the store in a thread: as many as it has connections, so that none waits for one."""
        call = functools.partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._storing, call)

    async def _in_worker(self, function: Any) -> Any:
        return await asyncio.wrap_future(self.worker.call(function))

    def _record(self, owner: str, name: str) -> Record:
        """The session as the store has it; else a new one. Raises SessionLimit for one too many."""
        record = self.store.get(owner, name)
        if record is None:
            self._require_room(owner, name)
            record = Record(owner, name, adapter=self.adapter)
        return record

    def _require_room(self, owner: str, name: str) -> None:
        if self.store.count(owner) >= self.n_sessions:
            raise SessionLimit(f"session {name}: {self.n_sessions} sessions are there already: delete one first")

    async def _commit(self, record: Record, held: Held | None = None) -> Record:
        """Commits a session that was changed otherwise than by a turn."""
        committed = await self._in_store(self.store.commit, record, holder=self._holds.holder(held))
        if held is not None:
            self._holds.gave_back(held)
        await self._forget(record.owner, record.name)
        return committed

    async def _commit_turn(self, record: Record, before: Record | None, held: Held) -> Record:
        """Commits a turn, which was decoded already, and ends its lease. Waits for a database that went away."""
        at, end = now(), time.monotonic() + self.store_timeout
        holder, held.ended = self._holds.holder(held), time.time()
        while True:
            try:
                committed = await self._in_store(self.store.commit, record, before, holder=holder, at=at)
            except StoreAway:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.2)
            else:
                self._holds.gave_back(held)
                return committed

    async def _forget(self, owner: str, name: str) -> None:
        live = self._live.pop((owner, name), None)
        if live is not None:
            await self._in_worker(lambda: self._leave(live))

    def _leave(self, live: Live) -> None:
        slots = self.llm._engine.slots
        with slots.lock:
            slots.leave(live.text)

    async def _session(self, held: Held) -> Live | Record:
        """The session as the store has it: ready in memory; else its record, which the worker makes ready when the turn
        begins, because it may be in the middle of a step now.
        """
        key = held.owner, held.name
        live = self._live.get(key)
        known = None if live is None or live.record is None else live.record.identity
        is_current = known is not None and known == held.identity
        record = None if is_current else await self._in_store(self._newer, held, known)
        if live is not None and record is None:
            self._live.move_to_end(key)
            return live
        if live is not None:
            del self._live[key]
            self.worker.call(functools.partial(self._leave, live))
        assert record is not None  # nothing is known
        sessions.check_adapter(record, self.adapter)
        return record

    def _begun_as(self, record: Record, origin: Record) -> Live | Record:
        """A new session that goes on from where another one is, in its text unless that is in use."""
        sessions.check_adapter(origin, self.adapter)
        new = dataclasses.replace(origin, name=record.name, version=0, created=record.created)
        key = origin.owner, origin.name
        live = self._live.get(key)
        if self._holds.n_turns(*key) or live is None or live.record is None or live.record.identity != origin.identity:
            return new
        del self._live[key]
        live.record = new
        self._live[new.owner, new.name] = live
        return live

    def _newer(self, held: Held, known: Identity | None) -> Record | None:
        """The session if the store has another commit of it than this one. Raises SessionLimit for one too many."""
        owner, name = held.owner, held.name
        if known is not None and held.identity is None and known == self.store.identity(owner, name):
            return None
        return self._record(owner, name)

    def _keep(self, key: tuple[str, str], live: Live) -> None:
        """Keeps a session ready, in place of the one that was used longest ago."""
        self._live[key] = live
        while len(self._live) > self._n_live:
            idle = next((key for key in self._live if not self._holds.n_turns(*key)), None)
            if idle is None:
                break
            self.n_evicted += 1
            with contextlib.suppress(ModelError, ModelLost):  # the server is stopping
                self.worker.call(functools.partial(self._leave, self._live.pop(idle)))

    def _nameless_text(self, owner: str, prompt: Sequence[int]) -> Live:
        """A text that begins as the prompt, of an earlier request of this owner without a session; or a new one. Its
        memory is that of its tokens alone, so the request gets what it would get from an empty memory.
        """
        found, longest = -1, 8
        for i, (of, live) in enumerate(self._nameless):
            n = n_common(live.text.tokens, prompt) if of == owner else 0
            if n > longest:
                found, longest = i, n
        if found >= 0:
            live = self._nameless.pop(found)[1]
            live.text.n_tokens = min(longest, live.text.n_tokens)
            return live
        return Live(None, sessions.new_text(self.llm))

    def _keep_nameless(self, owner: str, live: Live) -> None:
        self._nameless.append((owner, live))
        while len(self._nameless) > self.worker.n_slots:
            self._leave(self._nameless.pop(0)[1])

    def prompt_text(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The prompt of a chat as its template writes it, for `complete`, which adds a token that begins a text itself
        where the model wants one. The text of its tokens may have other spaces. Options as `chat`.
        """
        heard = _Heard(self.llm, lambda text: False)
        self._caught(heard, messages, options)
        text = heard.text.decode(errors="replace")
        begins = self.llm.detokenize(self.llm.tokenize(b"", add_bos=True), special=True).decode(errors="replace")
        return text.removeprefix(begins)

    def _rendered(self, messages: Sequence[Message], options: Mapping[str, Any]) -> PromptCatcher:
        """The prompt of a chat, in tokens, and what ends its answer. Raises PromptTooLong."""
        heard = _Heard(self.llm, self._may_fit)
        caught = self._caught(heard, messages, options)
        self._require_fit(heard.text)
        return caught

    def _caught(self, heard: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> PromptCatcher:
        names = ("tools", "tool_choice", "response_format")
        asked = {name: options[name] for name in names if options.get(name) is not None}
        return caught_prompt(heard, messages, **asked, **(options.get("template") or {}))

    def _may_fit(self, text: bytes) -> bool:
        """Whether a text is worth tokenizing."""
        return self.lengths.at_least(text) < self.llm.n_ctx()

    def _require_fit(self, text: bytes) -> None:
        if not self._may_fit(text):
            raise _too_long(f"at least {self.lengths.at_least(text)}", self.llm.n_ctx())


class Answer:
    """A turn: iterate over its pieces. Afterwards its attributes say what it was.

    Leaving the iteration early (`break`, a cancelled task) cuts the answer: what was said so far counts.

    Attributes:
        finish_reason: "stop"; "length" for an answer that was cut, too.
        n_prompt, n_cached, n_generated: tokens of the prompt, those that did not have to be decoded, and of the answer.
        content: the whole answer.
        counts: whether it was a turn: an answer that is empty or fails is none.
        committed: what the turn did to its session; None before its end, or if nothing was to be committed.
    """

    def __init__(
        self,
        service: AsyncDeltaMem,
        messages: list[dict[str, Any]] | None,
        prompt: str | Sequence[int] | None,
        session: str | None,
        owner: str,
        write: bool,
        options: dict[str, Any],
    ) -> None:
        if session is not None:
            checked_name(session)
        if session is not None and not service.has_memory:
            raise InputError(
                f"session {session}: no adapter is attached, so there is no memory: serve one by --deltamem"
            )
        self.service, self.messages, self.prompt = service, messages, prompt
        self.session, self.owner, self.write, self.options = session, owner, write, options
        self.finish_reason: str | None = None
        self.n_prompt = self.n_cached = self.n_generated = 0
        self.content = ""
        self.counts = False
        self.committed: Committed | None = None
        self.cancelled = False
        # as `AsyncDeltaMem.chat`
        self.origin: Record | None = None
        self.seen: Identity | None = None
        self.replaces_last = False
        # the answer as the message that the caller sends back with the next turn
        self.to_message: Callable[[str], Message] = lambda content: {"role": "assistant", "content": content}
        self.begun_at = self.first_at = self.ended_at = 0.0  # by time.monotonic: asked, first token, end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stored: Record | None = None  # the session, if it is not ready in memory
        self._live: Live | None = None
        self._used: Live | None = None  # what it is decoded in
        self._begun: Begun | None = None
        self._tokens: list[int] = []
        self._record: Record | None = None
        self._news: list[Piece] = []  # nobody has taken them yet
        self._came: asyncio.Future[None] | None = None  # done when there are some, or the end
        self._task: asyncio.Task[None] | None = None
        self.streams = True  # False: the pieces come at the end, which is faster
        self.commit_seconds = 0.0

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    @property
    def state(self) -> npt.NDArray[np.float32] | None:
        """The memory as it is now, in the middle of the turn, [L, H, r, r]; None before it began. Any thread may ask;
        nobody may change it.
        """
        checkpoint = None if self._used is None else self._used.text.position.checkpoint
        return None if checkpoint is None else checkpoint.state

    async def whole(self) -> str:
        """The whole answer."""
        self.streams = self.options.get("n_top") is not None
        return "".join([piece.text async for piece in self])

    def cancel(self) -> None:
        """Cuts the answer at the next step. Any thread may call this."""
        self.cancelled = True
        self.service.worker.drop(self)

    def when_over(self, then: Callable[[Answer], object]) -> None:
        """Has a function called with this answer when its turn is over: at once, if it is or was never begun."""
        if self._task is None or self._task.done():
            then(self)
        else:
            self._task.add_done_callback(lambda _: then(self))

    async def start(self) -> None:
        """Begins the turn. Returns once the worker has it; raises what is wrong with the request before."""
        if self._task is None:
            loop = self._loop = asyncio.get_running_loop()
            self.begun_at = time.monotonic()
            self._started = loop.create_future()
            # the turn goes on to its commit even if whoever waits for it goes away
            self._task = asyncio.create_task(self._run())
            self.service._turns.add(self._task)
            self._task.add_done_callback(self._done)
        await asyncio.shield(self._started)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.service._turns.discard(task)
        error = None if task.cancelled() else task.exception()
        if not self._started.done():
            self._started.set_exception(error or asyncio.CancelledError())
            self._started.exception()  # somebody may have gone away
        self._wake()

    async def _pieces(self) -> AsyncIterator[Piece]:
        try:
            await self.start()
            assert self._task is not None  # it was started
            while self._news or not self._task.done():
                if not self._news:
                    self._came = asyncio.get_running_loop().create_future()
                    await self._came
                    continue
                news, self._news = self._news, []
                yield news[0] if len(news) == 1 else _joined(news)
            await self._task
        finally:
            if self._task is not None and not self._task.done():
                self.cancel()

    async def _run(self) -> None:
        service = self.service
        await asyncio.to_thread(self._render)
        if self.session is None:
            await self._decode()
            return
        async with service._holds.held(self.owner, self.session) as held:
            found = await service._session(held)
            stored = found.record if isinstance(found, Live) else found
            assert stored is not None  # of a session
            _as_seen(stored, self.seen)
            if self.origin is not None and isinstance(found, Record) and found.version == 0:
                found = service._begun_as(found, self.origin)
            takes_back = self.replaces_last and not _goes_back(stored, self.messages or ())
            if takes_back:  # the store keeps the turn until the commit
                found = await asyncio.to_thread(sessions.taken_back, stored)
                await service._forget(self.owner, self.session)
            self._live, self._stored = (found, None) if isinstance(found, Live) else (None, found)
            try:
                await self._decode()
            except BaseException:
                if self._used is not None or self.origin is not None:  # the text may be anywhere
                    await service._forget(self.owner, self.session)
                raise
            if self._record is None:
                record = self._stored if self._live is None else self._live.record
                assert record is not None  # of a session
                if takes_back:
                    await service._forget(self.owner, self.session)
                    record = stored
                self.committed = Committed(self.session, record.identity, record.tokens)
                return
            assert self._live is not None and self._begun is not None  # it was decoded
            begin = time.monotonic()
            try:
                before = self._live.record if self.origin is None and not takes_back else None
                committed = await service._commit_turn(self._record, before, held)
                self.commit_seconds = time.monotonic() - begin
            except BaseException:  # the text is ahead of the store
                await service._forget(self.owner, self.session)
                raise
            self._live.record, self._live.turns, self._live.chat = committed, committed.history, self._begun.chat
            self.committed = Committed(self.session, committed.identity, committed.tokens)

    async def _decode(self) -> None:
        self._over = asyncio.get_running_loop().create_future()
        self.service.worker.submit(self)
        if not self._started.done():
            self._started.set_result(None)
        await self._over
        self.ended_at = time.monotonic()

    #
    # in other threads
    #

    def _render(self) -> None:
        """Messages or text to tokens, and everything else that needs no text. In any thread."""
        llm, options = self.service.llm, self.options
        self._stop = list(options.get("stop") or ())
        self._criteria = None
        sampling = of_sampler(options)
        if self.messages is not None:
            caught = self.service._rendered(self.messages, options)
            self._tokens, self._criteria = list(caught.prompt), caught.stopping_criteria
            self._stop += [stop for stop in caught.stop if stop]
            if caught.grammar is not None:
                sampling["grammar"] = caught.grammar
        elif isinstance(self.prompt, str):
            text = self.prompt.encode("utf-8", "surrogatepass")
            self.service._require_fit(text)
            self._tokens = llm.tokenize(text, add_bos=True, special=True)
        else:
            self._tokens = llm._checked_tokens(self.prompt or ()).tolist()
        if sampling.get("grammar") is not None:
            sampling["grammar"] = checked_grammar(llm, sampling["grammar"])
        self._tokens = self._tokens or [llm.token_bos()]
        n, n_ctx = len(self._tokens), llm.n_ctx()
        self.n_prompt = n
        if n >= n_ctx:
            raise _too_long(n, n_ctx)
        processors = []
        if options.get("logit_bias"):
            processors.append(biased(options["logit_bias"], llm.n_vocab()))
        seed = options.get("seed")
        seed = random.getrandbits(31) if seed is None or seed < 0 else seed
        self._make_sampler = functools.partial(
            llm._seeded_sampler, seed, logits_processor=processors or None, **sampling
        )
        self._calls_back = bool(processors)

    def begin(self) -> Generation:
        """As Job."""
        service, llm, tokens, options = self.service, self.service.llm, self._tokens, self.options
        with llm._engine.lock:
            sampler = self._make_sampler()
        if self._stored is not None:
            key = self._stored.owner, self._stored.name
            self._live, self._stored = sessions.live_session(llm, self._stored), None
            self._soon(service._keep, key, self._live)
        elif self._live is None:
            self._live = (
                service._nameless_text(self.owner, tokens) if self.write else Live(None, sessions.new_text(llm))
            )
        self._used = live = self._live
        if live.record is not None and not self.write:  # reads the memory of the session, and is forgotten afterwards
            self._used = live = Live(live.record, live.text.fork(), live.chat, live.turns)
        text = live.text
        text.write, self._before = self.write, text.position
        if live.record is None:
            self.n_cached = n = min(n_common(text.tokens, tokens), len(tokens) - 1)
            text.n_tokens = n
            new, known = tokens[n:], None
        else:
            if self.messages is None:
                begun = sessions.begin_raw(live, tokens)
            else:
                begun = sessions.begin_chat(live, self.messages, tokens, self._render_again)
            self._begun = begun
            new, known, self.n_cached = begun.tokens, begun.known, begun.n_past
        generation = Generation(text)
        n_predict = options.get("max_tokens")
        generation.prepare(
            llm._ctx,
            llm._model.vocab,
            sampler,
            n_predict=-1 if n_predict is None else n_predict,
            stop=self._stop,
            criteria=self._criteria,
            n_top=options.get("n_top"),
        )
        generation.calls_back = self._calls_back
        segments = np.zeros(len(new), dtype=np.int32) if text.slots.writes_by_segment else None
        generation.ask(new, segments, known=known)
        return generation

    def _render_again(self, messages: Sequence[Message]) -> list[int]:
        return list(self.service._rendered(messages, self.options).prompt)

    def news(self, generation: Generation) -> None:
        """As Job."""
        if self.first_at == 0 and generation.is_sampled_once:
            self.first_at = time.monotonic()
        if self.streams or generation.is_over:
            self._put(Piece(*taken(generation)))

    def end(self, generation: Generation | None, error: BaseException | None) -> None:
        """As Job."""
        try:
            if self._used is not None:
                self._close(self._used, generation, error)
        except Exception as failure:
            error = error or failure
        self._soon(self._settle, error)

    def fail(self, error: BaseException) -> None:
        """As Job."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # that loop is gone
                self._loop.call_soon_threadsafe(self._settle, error)  # nobody sends what is in the outbox

    def _settle(self, error: BaseException | None) -> None:
        if not self._over.done():
            if error is None:
                self._over.set_result(None)
            else:
                self._over.set_exception(error)

    def _close(self, live: Live, generation: Generation | None, error: BaseException | None) -> None:
        service = self.service
        if generation is not None and error is None:
            if generation.finish_reason is None and generation.n_tokens > 0:  # cut
                rest = generation.rest()
                generation.content += rest
                self._put(Piece(rest))
            self.content, self.n_generated = generation.content, generation.n_tokens
            self.finish_reason = generation.finish_reason or "length"
            self.counts = bool(self.content)
        if live.record is None and self.counts:
            self.committed = Committed(None, NOTHING, live.text.position.n_written)
        if live.record is None and self.counts and self.write:
            service._keep_nameless(self.owner, live)
        elif live.record is None or not self.write:
            service._leave(live)
        elif self.counts:
            assert self._begun is not None  # it was decoded
            reply = None if self.messages is None else self.to_message(self.content)
            self._record = sessions.finished(live, self._begun, service.about, self.messages or (), reply)
        elif not live.text.restore(self._before):
            service._leave(live)
            live.text = sessions.live_session(service.llm, live.record).text

    def _put(self, piece: Piece) -> None:
        if piece.text or piece.scored:
            self._soon(self._add, piece)

    def _add(self, piece: Piece) -> None:
        self._news.append(piece)
        self._wake()

    def _wake(self) -> None:
        came, self._came = self._came, None
        if came is not None and not came.done():
            came.set_result(None)

    def _soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Calls a function in the caller's loop, unless that is gone."""
        if self._loop is not None:
            self.service._outbox.put(self._loop, function, *arguments)


class _Outbox:
    """What the worker's thread has for event loops. Sent together, it wakes each loop once."""

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


class _Heard:
    """The model, as chat handlers use it.

    Args:
        tokenizes: which texts are tokenized; of others there are no tokens.

    Attributes:
        text: the latest that was to be tokenized.
    """

    def __init__(self, llm: DeltaMemLlama, tokenizes: Callable[[bytes], bool]) -> None:
        self._llm, self._tokenizes, self.text = llm, tokenizes, b""

    def tokenize(self, text: bytes, *arguments: Any, **options: Any) -> list[int]:
        self.text = text
        return self._llm.tokenize(text, *arguments, **options) if self._tokenizes(text) else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _too_long(n: object, n_ctx: int) -> PromptTooLong:
    return PromptTooLong(f"the prompt has {n} tokens, the context holds {n_ctx}: send less, or serve a larger one")


def _as_seen(record: Record, seen: Identity | None) -> Record:
    """The session, if it is at the commit that was seen. Raises Conflict."""
    if seen is not None and record.identity != seen:
        raise Conflict(
            f"session {record.name}: version {seen.version} was seen, but it is at {record.version} now, or was made "
            "again: look at it again"
        )
    return record


def _goes_back(record: Record, messages: Sequence[Message]) -> bool:
    """Whether messages alone say that the latest turn is replaced: there are others before it in the text."""
    mine = [turn for turn in record.history if turn.chat == record.chat]
    before = [digest for turn in mine[:-1] for digest in turn.digests]
    return bool(before) and digests(messages)[: len(before)] == before


def checked_name(name: str) -> str:
    """The name of a session. Raises InputError if it cannot be one."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"{str(name)[:40]!r} cannot be the name of a session: letters, digits and . _ - @ : + =, at most 128"
        )
    return name
