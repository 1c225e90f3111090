"""The thread that decodes for all requests.

It puts what is asked for into common batches (`Engine.wait`). Requests join and leave between two decodes. At most as
many go on as there are slots; the others wait, and owners take turns.

It passes the pieces of one step on when the model begins to compute the next. Whoever takes them then needs Python's
lock while this thread does not.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import DeltaMemError, ModelError
from ..llama import DeltaMemLlama
from ..runtime.generation import Generation


class QueueFull(DeltaMemError):
    """Too many requests wait for a slot."""


class ModelLost(DeltaMemError):
    """llama.cpp gave the model up in the middle of its work, as it does when it loses an RPC server."""


class Job(Protocol):
    """A request for the worker, which calls all of this in its thread.

    Attributes:
        owner: whose request it is; owners take turns.
        cancelled: the caller no longer wants it. Any thread may set this.
    """

    owner: str
    cancelled: bool

    def begin(self) -> Generation:
        """Prepares what the engine decodes. May raise DeltaMemError."""

    def news(self, generation: Generation) -> None:
        """Takes the pieces that are there. It may be called often: in each step."""

    def end(self, generation: Generation | None, error: BaseException | None) -> None:
        """It is over, or never began."""

    def fail(self, error: BaseException) -> None:
        """It is over, and the thread of the worker with it: texts are not to be touched. Any thread may call this."""


class Worker(threading.Thread):
    """Decodes until `stop`.

    Args:
        llm: the model. While this thread runs, only `call` and jobs may touch its texts.
        n_queue: how many jobs may wait for a slot.
        post: called after calls of jobs: sends what they have for other threads.

    Attributes:
        n_active: jobs that have a slot.
        n_waiting: jobs that wait for one.
        busy_since: when the present decode began, by `time.monotonic`; None between two.
        lost: why this thread will never go on.
    """

    def __init__(self, llm: DeltaMemLlama, n_queue: int = 64, post: Callable[[], object] = lambda: None) -> None:
        super().__init__(name="deltamem-decode", daemon=True)
        self.llm = llm
        self.n_slots = llm._engine.slots.n_seq_max
        self.n_queue = n_queue
        self._post = post
        self.busy_since: float | None = None
        self._came = threading.Condition()
        self._queues: collections.OrderedDict[str, collections.deque[Job]] = collections.OrderedDict()
        self._calls: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = collections.deque()
        self._active: list[tuple[Job, Generation]] = []
        self._open: set[Job | concurrent.futures.Future[Any]] = set()  # what somebody waits for
        self._is_stopping = self._cuts = False
        self.lost: ModelLost | None = None

    @property
    def n_active(self) -> int:
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        return sum(map(len, tuple(self._queues.values())))

    #
    # for any thread
    #

    def submit(self, job: Job) -> None:
        """Enters a job. Raises QueueFull, and ModelError after `cut` and `stop`."""
        with self._came:
            self._require_life()
            if self._cuts:
                raise _stopping()
            if self.n_waiting + self.n_active >= self.n_queue + self.n_slots:
                raise QueueFull(f"{self.n_waiting} requests wait already: try again later")
            self._queues.setdefault(job.owner, collections.deque()).append(job)
            self._open.add(job)
            self._came.notify()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Calls a function in this thread, between two decodes."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._came:
            self._require_life()
            self._calls.append((function, future))
            self._open.add(future)
            self._came.notify()
        future.add_done_callback(self._open.discard)
        return future

    def _require_life(self) -> None:
        if self.lost is not None:
            raise self.lost
        if self._is_stopping or not self.is_alive():
            raise _stopping()

    def drop(self, job: Job) -> None:
        """A job was cancelled: if it waits for a slot, it ends now."""
        with self._came:
            queue = self._queues.get(job.owner)
            if queue is not None and job in queue:
                queue.remove(job)
                self._calls.append((lambda: self._end(job, None, None), concurrent.futures.Future()))
            self._came.notify()

    def lose(self, error: ModelLost) -> None:
        """Fails everything: llama.cpp does not come back from what it does for this thread."""
        with self._came:
            self.lost = error
            left = list(self._open)
            self._open.clear()
        for each in left:
            if not isinstance(each, concurrent.futures.Future):
                each.fail(error)
                continue
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it is done
                each.set_exception(error)

    def cut(self) -> None:
        """Ends the jobs that run at the next step, and fails those without a token yet. It takes no more, but calls.
        Any thread may call this.
        """
        with self._came:
            self._cuts = True
            self._came.notify()

    def stop(self, seconds: float = 30) -> None:
        """Takes no more jobs, and ends when those that run are over. After `seconds` they are cut."""
        if self.lost is not None:
            return
        with self._came:
            self._is_stopping = True
            self._came.notify()
        self.join(seconds)
        if self.is_alive():
            self.cut()
            self.join(5)

    #
    # its thread
    #

    def run(self) -> None:
        self.llm._engine.computes = self._pass_on
        while True:
            self._post()
            with self._came:
                while not (self._calls or self._active or self._is_stopping or self.n_waiting):
                    self._came.wait()
                calls = list(self._calls)
                self._calls.clear()
            for function, future in calls:
                _run(function, future)
            if self.lost is not None:
                return
            self._admit()
            if self._active:
                self._step()
            elif self._is_stopping and not self._calls and not self.n_waiting:
                self._post()
                return

    def _admit(self) -> None:
        while len(self._active) < self.n_slots:
            job = self._next()
            if job is None:
                return
            if job.cancelled or self._cuts:
                self._end(job, None, None)
                continue
            try:
                generation = job.begin()
            except Exception as error:
                self._end(job, None, error)
            else:
                self._active.append((job, generation))

    def _end(self, job: Job, generation: Generation | None, error: BaseException | None) -> None:
        has_said = generation is not None and (generation.finish_reason is not None or generation.n_tokens > 0)
        if error is None and self._cuts and not has_said and not job.cancelled:
            error = _stopping()
        job.end(generation, error)
        self._open.discard(job)

    def _next(self) -> Job | None:
        """The oldest job of the owner that was served longest ago."""
        with self._came:
            for owner in list(self._queues):
                queue = self._queues.pop(owner)
                if queue:
                    job = queue.popleft()
                    if queue:
                        self._queues[owner] = queue  # at the end
                    return job
        return None

    def _step(self) -> None:
        for job, generation in self._active:
            if job.cancelled or self._cuts:
                generation.cancel()
        error: BaseException | None = None
        self.busy_since = time.monotonic()
        try:
            self.llm._engine.wait([generation for _, generation in self._active], self._has_more)
        except Exception as failure:  # the model was closed
            error = failure
        self.busy_since = None
        still = []
        for job, generation in self._active:
            job.news(generation)
            if generation.is_over or error is not None:
                self._end(job, generation, generation.error or error)
            else:
                still.append((job, generation))
        self._active = still

    def _pass_on(self) -> None:
        for job, generation in self._active:
            job.news(generation)
        self._post()

    def _has_more(self) -> bool:
        """Whether there is something to do before the next decode."""
        if self._calls or (len(self._active) < self.n_slots and self._queues):
            return True
        self.busy_since = time.monotonic()
        return any((job.cancelled or self._cuts) and not generation.is_cancelled for job, generation in self._active)


def _stopping() -> ModelError:
    return ModelError("the server is stopping")


def _run(function: Callable[[], Any], future: concurrent.futures.Future[Any]) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # `lose` was first
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


def taken(generation: Generation) -> tuple[str, Sequence[Any]]:
    """The text and the scored tokens that nobody has taken yet."""
    pieces, generation.pieces = generation.pieces, []
    scored, generation.scored = generation.scored, []
    return "".join(pieces), scored
