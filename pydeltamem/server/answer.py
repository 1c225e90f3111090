"""A turn: a prompt is decoded, an answer is said, and both are committed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.completion import biased
from ..runtime.generation import Generation
from ..runtime.grammar import LlamaGrammar, checked_grammar, grammar_of_format
from ..runtime.history import n_common
from ..runtime.tokenizer import encoded
from . import session as sessions
from .history import Message, digests
from .options import of_sampler
from .prompts import too_long
from .records import NOTHING, Identity, Record, as_seen, checked_name
from .session import Begun, Live
from .shared import Shared
from .worker import taken


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
        shared: Shared,
        messages: list[dict[str, Any]] | None,
        prompt: str | Sequence[int] | None,
        session: str | None,
        owner: str,
        write: bool,
        options: dict[str, Any],
    ) -> None:
        if session is not None:
            session = checked_name(session)
            shared.require_memory(session)
        self.shared, self.messages, self.prompt = shared, messages, prompt
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
        self.shared.worker.drop(self)

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
            self.shared.turns.add(self._task)
            self._task.add_done_callback(self._done)
        await asyncio.shield(self._started)

    def _done(self, task: asyncio.Task[None]) -> None:
        self.shared.turns.discard(task)
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
        shared = self.shared
        await asyncio.to_thread(self._render)
        if self.session is None:
            await self._decode()
            return
        shared.require_queue(self.owner, self.session)
        async with shared.holds.held(self.owner, self.session) as held:
            found = await shared.session(held, begins=self.write)
            stored = found.record if isinstance(found, Live) else found
            assert stored is not None  # of a session
            as_seen(stored, self.seen)
            begins_as = self.origin if stored.version == 0 else None
            if begins_as is not None:
                await shared.forget(self.owner, self.session)  # as a turn that did not count has left it
                found = shared.begun_as(stored, begins_as)
            takes_back = self.replaces_last and not _goes_back(stored, self.messages or ())
            if takes_back:  # the store keeps the turn until the commit
                found = await asyncio.to_thread(sessions.taken_back, stored)
                await shared.forget(self.owner, self.session)
            self._live, self._stored = (found, None) if isinstance(found, Live) else (None, found)
            try:
                await self._decode()
            except BaseException:
                if self._used is not None or begins_as is not None:  # the text may be anywhere
                    await shared.forget(self.owner, self.session)
                raise
            if self._record is None:
                if takes_back or begins_as is not None:
                    await shared.forget(self.owner, self.session)
                self.committed = Committed(self.session, stored.identity, stored.tokens)
                return
            assert self._live is not None and self._begun is not None  # it was decoded
            begin = time.monotonic()
            try:
                before = self._live.record if begins_as is None and not takes_back else None
                committed = await shared.commit_turn(self._record, before, held)
                self.commit_seconds = time.monotonic() - begin
            except BaseException:  # the text is ahead of the store
                await shared.forget(self.owner, self.session)
                raise
            self._live.record, self._live.turns, self._live.chat = committed, committed.history, self._begun.chat
            self.committed = Committed(self.session, committed.identity, committed.tokens)

    async def _decode(self) -> None:
        self._over = asyncio.get_running_loop().create_future()
        self.shared.worker.submit(self)
        if not self._started.done():
            self._started.set_result(None)
        await self._over
        self.ended_at = time.monotonic()

    #
    # in other threads
    #

    def _render(self) -> None:
        """Messages or text to tokens, and everything else that needs no text. In any thread."""
        llm, options = self.shared.llm, self.options
        self._stop = list(options.get("stop") or ())
        self._criteria = None
        sampling = of_sampler(options)
        if (grammar := grammar_of_format(options.get("response_format"))) is not None:  # a schema takes its time
            sampling["grammar"] = grammar
        if self.messages is not None:
            caught = self.shared.prompts.rendered(self.messages, options)
            self._tokens, self._criteria = list(caught.prompt), caught.stopping_criteria
            self._stop += [stop for stop in caught.stop if stop]
            if caught.grammar is not None:
                sampling["grammar"] = caught.grammar
        elif isinstance(self.prompt, str):
            text = encoded(self.prompt, "the prompt")
            self.shared.prompts.require_fit(text)
            self._tokens = llm.tokenize(text, add_bos=True, special=True)
        else:
            self._tokens = llm._checked_tokens(self.prompt or ()).tolist()
        if sampling.get("grammar") is not None:
            name = "response_format" if isinstance(sampling["grammar"], LlamaGrammar) else "grammar"
            sampling["grammar"] = checked_grammar(llm, sampling["grammar"], name)
        self._tokens = self._tokens or [llm.token_bos()]
        n, n_ctx = len(self._tokens), llm.n_ctx()
        self.n_prompt = n
        if n >= n_ctx:
            raise too_long(n, n_ctx)
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
        shared, llm, tokens, options = self.shared, self.shared.llm, self._tokens, self.options
        with llm._engine.lock:
            sampler = self._make_sampler()
        if self._stored is not None:
            key = self._stored.owner, self._stored.name
            self._live, self._stored = sessions.live_session(llm, self._stored), None
            self._soon(shared.keep, key, self._live)
        elif self._live is None:
            self._live = shared.nameless_text(self.owner, tokens) if self.write else Live(None, sessions.new_text(llm))
        self._used = live = self._live
        if live.record is not None and not self.write and not _continues(live, tokens):
            self._used = live = Live(live.record, live.text.fork(), live.chat, live.turns)  # forgotten afterwards
        text = live.text
        text.write, self._before = self.write, text.position
        if live.record is None:
            text.n_tokens = n = min(n_common(text.tokens, tokens), len(tokens) - 1)
            self.n_cached = text.n_ready
            new, known = tokens[n:], None
        else:
            if self.messages is None:
                begun = sessions.begin_raw(live, tokens)
            else:
                begun = sessions.begin_chat(live, self.messages, tokens, self._render_again)
            self._begun = begun
            new, known, self.n_cached = begun.tokens, begun.known, min(begun.n_past, text.n_ready)
        generation = Generation(text)
        n_predict = options.get("max_tokens")
        generation.prepare(
            llm,
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
        return list(self.shared.prompts.rendered(messages, self.options).prompt)

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
        shared = self.shared
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
            shared.keep_nameless(self.owner, live)
        elif live.record is None or live is not self._live:
            shared.leave(live)
        elif self.counts and self.write:
            assert self._begun is not None  # it was decoded
            reply = None if self.messages is None else self.to_message(self.content)
            self._record = sessions.finished(live, self._begun, shared.about, self.messages or (), reply)
        elif not live.text.restore(self._before):
            shared.leave(live)
            live.text = sessions.live_session(shared.llm, live.record).text

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
            self.shared.outbox.put(self._loop, function, *arguments)


def _continues(live: Live, tokens: Sequence[int]) -> bool:
    """Whether a prompt goes on from the end of a text, which then only has to drop what was said: a fork would need a
    slot for itself, and without a free one decode all of the text again.
    """
    n = live.text.n_tokens
    return 0 < n < len(tokens) and n_common(live.text.tokens, tokens) == n


def _goes_back(record: Record, messages: Sequence[Message]) -> bool:
    """Whether messages alone say that the latest turn is replaced: there are others before it in the text."""
    mine = [turn for turn in record.history if turn.chat == record.chat]
    before = [digest for turn in mine[:-1] for digest in turn.digests]
    return bool(before) and digests(messages)[: len(before)] == before
