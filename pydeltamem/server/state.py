"""The state of a running server: what its owner chose, its model, who asks, and whether it is well."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from ..runtime.chat_format import has_template
from .bodies import header_of
from .embeddings import Embedder
from .keys import Keys
from .logs import log
from .metrics import Metrics
from .refusals import Loading, RateLimited
from .service import AsyncDeltaMem
from .worker import ModelLost


@dataclass
class Settings:
    """What the owner of a server chooses.

    Attributes:
        load: makes the service; called in a thread while the server listens already.
        keys: who may use it.
        model: the name of the model in answers.
        base, adapter: names for /v1/models.
        max_body: bytes of a request.
        per_minute: requests a minute of one key; 0: any number.
        origins: of pages that may use it (CORS).
        is_private: only programs and pages of this machine may use it; of `origins` besides.
        heartbeat: seconds after which a stream that says nothing sends a comment.
        page: mounts the page on the application; None: no page.
        failed: is called if the service cannot be made.
    """

    load: Callable[[], AsyncDeltaMem]
    keys: Keys = field(default_factory=Keys)
    model: str = "deltamem"
    base: str = ""
    adapter: str = ""
    max_body: int = 8 << 20
    per_minute: int = 0
    origins: tuple[str, ...] = ()
    is_private: bool = False
    heartbeat: float = 5
    page: Callable[[FastAPI, Server], None] | None = None
    failed: Callable[[], None] = lambda: None


class Server:
    """The state of a running application.

    Attributes:
        service: None while the model is loaded.
        failure: why it could not be loaded.
        lost: why the model is gone, in the middle of its work.
        is_draining: it will end soon, and answers meanwhile; the balancer is to send no more.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._service: AsyncDeltaMem | None = None
        self.failure: BaseException | None = None
        self.lost: ModelLost | None = None
        self.is_draining = False
        self.metrics = Metrics(lambda: self._service)
        self.embedder: Embedder | None = None
        self._rate = _Rate(settings.per_minute)
        self._can_decode, self._reaches_store = _Once(seconds=1), _Once()

    @property
    def is_loaded(self) -> bool:
        """Whether the model was loaded."""
        return self._service is not None

    @property
    def service(self) -> AsyncDeltaMem:
        """Raises Loading before it is there, ModelLost afterwards."""
        if self.lost is not None:
            raise self.lost
        if self._service is None:
            raise Loading("the model is being loaded: try again in a moment")
        return self._service

    async def load(self) -> None:
        try:
            self._service = await asyncio.to_thread(self.settings.load)
            self.embedder = Embedder(self._service)
            self.metrics.watch(self._service)
        except BaseException as error:
            self.failure = error
            log.error("the model cannot be loaded: %s", error)
            self.settings.failed()
            raise
        if not has_template(self._service.llm):
            log.warning("the model has no chat template: messages stand in Llama 2's form, so answers may be poor")
        log.info("ready")

    def lose(self, reason: str) -> None:
        """llama.cpp gave the model up: requests fail, and the server ends. Any thread may call this."""
        log.error("the model is lost: %s", reason)
        self.lost = ModelLost("the connection to an RPC server is lost: try again in a moment")
        if self._service is not None:
            self._service.lose(self.lost)
        self.settings.failed()

    def cut(self) -> None:
        """Ends the answers that run: what was said so far counts. Any thread may call this."""
        if self._service is not None:
            self._service.cut()
        if self.embedder is not None:
            self.embedder.cut()

    async def close(self) -> None:
        """Ends what runs, and commits it."""
        self.metrics.close()
        if self.embedder is not None and self.lost is None:
            await asyncio.to_thread(self.embedder.close)
        if self._service is not None:
            await self._service.aclose()

    def owner(self, request: Request) -> str:
        """Who asks. Raises HTTPException 401 without a key, RateLimited."""
        owner = self.settings.keys.owner(header_of(request, "authorization"))
        if owner is None:
            raise HTTPException(401, "this server needs an API key: send Authorization: Bearer KEY")
        self.count(owner)
        return owner

    def count(self, owner: str) -> None:
        """Counts a request. Raises RateLimited."""
        seconds = self._rate.counted(owner)
        if seconds > 0:
            error = RateLimited(f"more than {self.settings.per_minute} requests in a minute: try again later")
            error.seconds = math.ceil(seconds)
            raise error

    async def life(self) -> str:
        """ "ok" if a token can be decoded, otherwise what is wrong."""
        if self.failure is not None:
            return "failed"
        try:
            is_healthy = await self.is_healthy()
        except Loading:
            return "loading model"
        except ModelLost:
            is_healthy = False
        if self.lost is not None:
            return "rpc server away"
        return "ok" if is_healthy else "stuck"

    async def is_healthy(self) -> bool:
        """Whether a token can be decoded."""
        return await self._can_decode(self.service.can_decode)

    async def reaches_store(self) -> bool:
        """Whether the store answers."""
        return await self._reaches_store(self.service.reaches_store)


class _Rate:
    """Counts the requests of each owner within the latest minute, by a clock that nobody sets.

    Args:
        n: how many an owner may send; 0: any number.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)  # of those that were let in

    def counted(self, owner: str) -> float:
        """Counts a request and returns 0, or the seconds until one is let in again."""
        if not self._n:
            return 0
        times, now = self._times[owner], time.monotonic()
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) == self._n:
            return times[0] + 60 - now
        times.append(now)
        return 0


class _Once:
    """An answer that all get who ask while it is on its way: nobody needs a key to ask, and each question takes a slot,
    or a connection to the store.

    Args:
        seconds: for which it is good afterwards.
    """

    def __init__(self, seconds: float = 0) -> None:
        self._seconds, self._until = seconds, 0.0  # by time.monotonic
        self._asked: asyncio.Task[bool] | None = None

    async def __call__(self, ask: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        if self._asked is None or (self._asked.done() and time.monotonic() >= self._until):
            self._asked = asyncio.create_task(self._ask(ask))
        return await asyncio.shield(self._asked)

    async def _ask(self, ask: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        try:
            return await ask()
        finally:
            self._until = time.monotonic() + self._seconds
