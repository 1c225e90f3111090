"""The engine: the one object that decodes.

A request says which tokens to decode after a text, and what to do with the logits. The engine puts the requests that a
caller waits for into one batch: first one token of each that generates, then pieces of prompts in the remaining room.
Requests join and leave between two decodes.

The engine has no thread of its own. A thread that waits for a request takes the lock and checks whether it is ready. If
not, it decodes one batch for all requests that are waited for. So the requests of several threads are decoded together,
and a stream that nobody consumes stands still.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NotFiniteError
from .history import Piece, Position, Tokens
from .interrupt import uninterrupted
from .request import Request
from .slots import Job, Slots
from .text import Text


class _Decode(Request):
    """Tokens to decode once; `then` uses the logits."""

    def __init__(self, text: Text, then: Callable[[], object] | None) -> None:
        super().__init__(text)
        self._then = then

    def sampled(self, row: int) -> None:
        if self._then is not None:
            try:
                self._then()
            except BaseException:
                self._planned = None  # so that `end` takes the tokens back
                raise


class Engine:
    """Decodes the requests for the texts of one context.

    Args:
        slots: of the context.

    Attributes:
        lock: that of the slots. It is held for one decode and the use of its logits.
        patience: how long a decode waits for the requests of the one before: seconds at most, and share of its time.
        computes: called in each step when llama.cpp begins to compute. What it wakes up runs beside that, instead of
            between two steps.
        stepped: called after each step (one decode, with what is planned before and sampled after it) with its seconds.
    """

    patience = (0.005, 0.25)

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.lock = slots.lock
        self._wanted: dict[Request, int] = {}  # requests that a thread waits for, and the thread, in order of arrival
        self._n_steps = 0
        self._patience = 0.0
        self._thread: int | None = None  # the last that waited
        self._is_shared = False  # whether several threads have waited
        # Notified when a thread begins to wait, or has what it waited for. A thread that has the lock never takes this:
        # the garbage collector may end a stream, which takes the lock, in a thread that has this.
        self._came = threading.Condition()
        # texts whose callers should come back: thread, and time of leaving
        self._left: weakref.WeakKeyDictionary[Text, tuple[int, float]] = weakref.WeakKeyDictionary()
        self._slow: weakref.WeakSet[Text] = weakref.WeakSet()  # texts whose callers came back late
        self.computes: Callable[[], object] = lambda: None
        self.stepped: Callable[[float], object] = lambda seconds: None
        _engines.add(self)

    def forked(self) -> None:
        """Forgets other threads, none of which is there after a fork."""
        thread = threading.get_ident()
        self._came = threading.Condition()
        self._left.clear()
        self._wanted = {request: of for request, of in self._wanted.items() if of == thread}
        self.slots.forked()

    @property
    def is_idle(self) -> bool:
        """Whether no other thread decodes, waits for a decode or calls the model now."""
        return not self._wanted and self.slots.is_idle

    def text(self, home: int | None = None) -> Text:
        """A text of this context."""
        return Text(self.slots, self.decode, home)

    #
    # requests
    #

    def decode(
        self,
        text: Text,
        tokens: Tokens,
        segments: npt.NDArray[np.int32] | None = None,
        *,
        keep_at: Collection[int] = (),
        then: Callable[[], object] | None = None,
        drafted: bool = False,
        generates: bool = False,
        goes_on: bool = False,
        calls_back: bool = False,
        undo: Position | None = None,
    ) -> Position:
        """Decodes tokens after a text: one ingest. Returns the record that a failure would have taken the text back to.

        Args:
            text: the text.
            tokens: token ids; none: only what the KV cache lacks, or what the memory has still to read.
            segments: as `DeltaMemLlama.eval`.
            keep_at: as `Request.ask`.
            then: uses the logits; called before others may decode.
            drafted: the tokens are guesses: a checkpoint after each.
            generates, goes_on, calls_back: as `Request`.
            undo: as `Request`. None: the record before the tokens.

        If it fails (InputError, DecodeError, NotFiniteError, or what `then` raises), or is interrupted, the text is as
        it was.
        """
        request = _Decode(text, then)
        request.drafted, request.generates = drafted, generates
        request.goes_on, request.calls_back = goes_on, calls_back
        request.ask(tokens, segments, keep_at)
        if undo is not None:
            request.undo = undo._replace(epoch=text.position.epoch)
        try:
            self.wait([request])
        except BaseException:
            with self.lock:
                request.give_up()
            raise
        request.check()
        return request.undo or request.before or text.position

    def wait(self, requests: Sequence[Request], until: Callable[[], bool] = lambda: False) -> None:
        """Decodes until one of the requests has something for the caller, or `until` says that the caller has something
        else to do. Raises ModelError after close.
        """
        thread, alone = threading.get_ident(), self.lock._is_owned()
        self._is_shared = self._is_shared or self._thread not in (None, thread)
        self._thread = thread
        try:
            for request in requests:
                self._wanted[request] = thread
                if self._left or self._slow:
                    self._comes_back(request.text)
            self._announce()
            is_given = False
            while not is_given:
                if self._left:
                    self._gather(requests, thread)
                did_decode = True
                with self.lock:
                    is_given = until() or any(request.is_given for request in requests)
                    if not is_given:
                        self.slots.require_open()
                        did_decode = self._step(requests, thread, alone)
                        is_given = until() or any(request.is_given for request in requests)
                self._announce()
                if not did_decode and not is_given:
                    time.sleep(0.0005)  # the slots belong to requests that another thread has to decode
        finally:
            for request in requests:
                self._wanted.pop(request, None)

    def drop(self, request: Request) -> None:
        """Ends a request now."""
        with self.lock:
            request.end()

    #
    # one decode
    #

    def _step(self, own: Sequence[Request], thread: int, alone: bool) -> bool:
        """Decodes one batch for the requests that are waited for. False if there is nothing to decode."""
        if alone:  # a callback within a step, or a call that keeps the lock until it is done: the others wait
            return self._decode_batch([request for request in own if not request.is_over], [])
        wanted = [(request, of) for request, of in tuple(self._wanted.items()) if not request.is_over]
        staying = [request.text for request, _ in wanted if request.text.slot is not None]
        return self._decode_batch(
            [request for request, of in wanted if not request.calls_back or of == thread], staying
        )

    def _decode_batch(self, wanted: Sequence[Request], staying: list[Text]) -> bool:
        begin = time.perf_counter()
        planned = self._plan(wanted, staying)
        planned.sort(key=lambda request: -1 if request.only_sampled else request.n_served)
        self._n_steps += 1
        room = self.slots.n_batch
        batch: list[tuple[Request, Piece, Job]] = []
        for request in planned:
            if room > 0:
                piece, job = request.piece(room)
                room -= len(piece.tokens)
                batch.append((request, piece, job))
                request.n_served = self._n_steps
        if not batch:
            return False
        with uninterrupted():  # else a token that is decoded, or what the next decode was told, might get lost
            self._decode_planned(batch)
        self.stepped(time.perf_counter() - begin)
        return True

    def _decode_planned(self, batch: Sequence[tuple[Request, Piece, Job]]) -> None:
        begin = time.perf_counter()
        try:
            results = self.slots.decode([job for _, _, job in batch], self.computes)
        except Exception as error:
            for request, _, _ in batch:
                request.end(error)
            return
        self._patience = min(self.patience[0], self.patience[1] * (time.perf_counter() - begin))

        n_decodes = self.slots.n_decodes
        for (request, piece, _), result in zip(batch, results):
            if result.fault is None:
                request.did_decode(piece, result)
        decoded = [
            (request, result.row)
            for (request, _, _), result in zip(batch, results)
            if result.fault is None and request.is_decoded
        ]
        # A callback may decode, and then the logits of those after it are gone: they are decoded again, and come first.
        decoded.sort(key=lambda pair: (pair[0].calls_back, pair[0].n_sampled))
        for request, row in decoded:
            if self.slots.n_decodes == n_decodes:
                _try(request, request.sampled, row)
                request.is_sampled, request.n_sampled = True, self._n_steps
        if any(result.fault for result in results):
            self.slots.empty_kv(by_failure=True)
        for (request, _, _), result in zip(batch, results):
            if result.fault is not None:
                request.end(NotFiniteError(result.fault))
        for request, _ in decoded:
            self._go_on(request)

    def _plan(self, wanted: Sequence[Request], staying: list[Text]) -> list[Request]:
        """The requests that have a slot and something to decode."""
        planned = []
        for request in wanted:
            if request.is_cancelled:
                request.end()
            else:
                self._go_on(request)  # the thread that decoded it may have been interrupted before this
            if request.is_over:
                continue
            if _try(request, request.plan, staying):
                if request.is_decoded:  # nothing was to be decoded
                    request.is_over = True
                    continue
                planned.append(request)
                if request.text not in staying:
                    staying.append(request.text)
        return planned

    def _go_on(self, request: Request) -> None:
        """Asks a request what follows once all its tokens are decoded."""
        if request.is_over or not request.is_sampled:
            return
        asked = request.tokens
        _try(request, request.follow)
        if request.is_over:
            return
        if request.tokens is asked:
            request.is_over = True
        else:
            request.generates = True
        if request.goes_on and request.is_given and self._is_shared and request in self._wanted:
            self._left[request.text] = self._wanted[request], time.perf_counter()

    #
    # common batches
    #

    def _comes_back(self, text: Text) -> None:
        """A thread waits for a request of this text again: notes whether it came in time."""
        _, since = self._left.pop(text, (0, None))
        if since is None or time.perf_counter() - since <= self._patience:
            self._slow.discard(text)
        else:
            self._slow.add(text)

    def _gather(self, own: Sequence[Request], thread: int) -> None:
        """Gives other threads that just got a token a moment to ask for the next. Otherwise each would decode alone,
        one after the other. It does not wait for those that were late the last time.
        """
        if self.lock._is_owned():
            return
        end = time.perf_counter() + self._patience
        with self._came:
            while True:
                absent = [text for text in self._texts_of_others(thread) if text not in self._slow]
                left = end - time.perf_counter()
                if not absent or any(request.is_given for request in own):
                    return
                if left <= 0:
                    break
                self._came.wait(left)
            for text in absent:
                self._slow.add(text)
                self._left.pop(text, None)

    def _texts_of_others(self, thread: int) -> list[Text]:
        """Texts whose callers, other threads than this one, should come back."""
        texts = (ref() for ref in self._left.keyrefs())  # a copy: others change it meanwhile
        left = ((text, self._left.get(text)) for text in texts if text is not None)
        return [text for text, of in left if of is not None and of[0] != thread]

    def _announce(self) -> None:
        """Tells the threads in `_gather` that a thread came, or has something."""
        if len(self._wanted) > 1 and not self.lock._is_owned():
            with self._came:
                self._came.notify_all()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in _engines:
        engine.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _try(request: Request, act: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `act`. If it raises, this request ends and others go on. What interrupts the thread passes through."""
    try:
        return act(*arguments)
    except Exception as error:
        request.end(error)
        return None
