"""The HTTP application: endpoints and answers (docs/reference/server.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Send

from ..errors import DeltaMemError, InputError, shown
from ..formats.memory_file import MemorySnapshot
from .embeddings import Embedder
from .guards import BodyLimit, Logged, Private
from .history import checked_messages
from .keys import Keys
from .logs import log
from .metrics import Metrics
from .openai import Chat, Completion, field_of, flag, to_json
from .records import Record, told
from .refusals import Loading, RateLimited, answer_error, error_body, status_of
from .responses import Reply
from .service import Answer, AsyncDeltaMem, checked_name
from .worker import ModelLost

GRACE = 20  # seconds that answers have to end when the server is told to; then they are cut
LAST = 10  # seconds until those that were cut are committed and sent; then their requests are cancelled


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


_MAX_DEPTH = 200  # of a body
_MAX_TOKENS = 1 << 17  # of a text to tokenize, unless the context holds more


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
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
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

    async def close(self) -> None:
        """Ends what runs, and commits it."""
        self.metrics.close()
        if self._service is not None:
            await self._service.aclose()
        if self.embedder is not None and self.lost is None:
            self.embedder.close()

    def owner(self, request: Request) -> str:
        """Who asks. Raises HTTPException 401 without a key, RateLimited."""
        owner = self.settings.keys.owner(_header(request, "authorization"))
        if owner is None:
            raise HTTPException(401, "this server needs an API key: send Authorization: Bearer KEY")
        self.count(owner)
        return owner

    def count(self, owner: str) -> None:
        """Counts a request. Raises RateLimited."""
        n = self.settings.per_minute
        if n and not self._limiter.hit(limit := RateLimitItemPerMinute(n), owner):
            error = RateLimited(f"more than {n} requests in a minute: try again later")
            error.seconds = max(1, math.ceil(self._limiter.get_window_stats(limit, owner).reset_time - time.time()))
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


def application(settings: Settings) -> FastAPI:
    """The application, for uvicorn."""
    server = Server(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(server.load())
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        yield
        if server.lost is None:  # whoever loads it does not come back otherwise
            await asyncio.wait([loading])
        await server.close()

    # no redirects from /v1/memories/ to /v1/memories: behind a proxy that ends TLS they would lead to http://
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.server = server
    app.add_middleware(BodyLimit, n_max=settings.max_body)
    if settings.is_private:
        app.add_middleware(Private, origins=settings.origins)
    app.add_middleware(Logged, metrics=server.metrics)
    if settings.origins:  # around all others, whose errors a page is to read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.include_router(_watching(server))
    app.include_router(_answering(server))
    app.include_router(_answering(server), prefix="/sessions/{session}")
    app.include_router(_remembering(server))
    app.include_router(_remembering(server), prefix="/sessions/{session}")
    for kind in (DeltaMemError, HTTPException):
        app.add_exception_handler(kind, answer_error)
    if settings.page is not None:
        settings.page(app, server)
    return app


#
# endpoints
#


def _watching(server: Server) -> APIRouter:
    router, settings = APIRouter(), server.settings

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """Whether requests are to come here."""
        status = await server.life()
        if status == "ok" and server.is_draining:
            status = "draining"
        elif status == "ok" and not await server.reaches_store():
            status = "store unavailable"
        return _health(server, status)

    @router.api_route("/health/live", methods=["GET", "HEAD"])
    async def live() -> Response:
        """Whether it lives: a new process would do no better without the database, or without an RPC server."""
        if server.lost is not None:
            return _health(server, "ok")
        return _health(server, await server.life())

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        server.owner(request)
        text = await server.metrics.scraped()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    entry = {
        "id": settings.model,
        "object": "model",
        "created": 0,
        "owned_by": "deltamem",
        "base": settings.base,
        "adapter": settings.adapter or None,
    }

    @router.get("/v1/models")
    @router.get("/sessions/{session}/v1/models")
    async def models(request: Request) -> Any:
        server.owner(request)
        return {"object": "list", "data": [entry]}

    @router.get("/v1/models/{id:path}")
    @router.get("/sessions/{session}/v1/models/{id:path}")
    async def model(request: Request, id: str) -> Any:
        server.owner(request)
        if id != settings.model:
            raise HTTPException(404, f"there is no model {shown(id)}: the one here is {settings.model}")
        return entry

    return router


def _health(server: Server, status: str) -> Response:
    body = {"status": status}
    if server.failure is not None:
        body["message"] = told(server.failure)
    return JSONResponse(body, 200 if status == "ok" else 503)


def _answering(server: Server) -> APIRouter:
    router, settings = APIRouter(), server.settings

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        owner, body = server.owner(request), await _body(request)
        asked = await asyncio.to_thread(Chat, body, settings.model)  # a schema takes its time
        session, write = _session(request, body)
        answer = server.service.chat(asked.messages, session=session, owner=owner, write=write, **asked.options)
        return await _respond(server, request, asked, answer)

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        owner, body = server.owner(request), await _body(request)
        asked = await asyncio.to_thread(Reply, body, settings.model)
        session, write = _session(request, body)
        answer = await asked.answer(server.service, session, owner, write)
        return await _respond(server, request, asked, answer)

    @router.delete("/v1/responses/{id}")
    async def delete_response(request: Request, id: str) -> Any:
        owner = server.owner(request)
        await server.service.delete(Reply.checked_id(id), owner)
        return {"id": id, "object": "response", "deleted": True}

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        owner, body = server.owner(request), await _body(request)
        asked = Completion(body, settings.model)
        session, write = _session(request, body)
        answer = server.service.complete(asked.prompt, session=session, owner=owner, write=write, **asked.options)
        return await _respond(server, request, asked, answer)

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Any:
        owner, body = server.owner(request), await _body(request)
        server.service  # noqa: B018 - raises while loading
        assert server.embedder is not None  # loaded with the service
        session, _ = _session(request, body)
        embedding = asyncio.create_task(server.embedder.embeddings(body, settings.model, session, owner))
        try:
            await _ended_or_gone(request, embedding)
            if not embedding.done():
                raise ClientDisconnect
            return embedding.result()
        finally:
            embedding.cancel()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        server.owner(request)
        body, llm = await _body(request), server.service.llm
        text = field_of(body, "content", "")
        if not isinstance(text, str):
            raise InputError("content is a text")
        data, options = text.encode("utf-8", "surrogatepass"), {"add_bos": flag(body, "add_special")}
        options["special"] = flag(body, "parse_special", default=True)

        def tokenized() -> Any:
            n = server.service.lengths.at_least(data)
            if n > max(_MAX_TOKENS, llm.n_ctx()):
                raise InputError(f"content has at least {n} tokens: send parts of it")
            return llm.tokenize(data, **options)

        tokens = await asyncio.to_thread(tokenized)
        if flag(body, "with_pieces"):
            return {"tokens": [{"id": token, "piece": _piece(llm, token)} for token in tokens]}
        return {"tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        server.owner(request)
        body, llm = await _body(request), server.service.llm
        tokens = llm._checked_tokens(field_of(body, "tokens", ())).tolist()
        data = await asyncio.to_thread(llm.detokenize, tokens, special=True)
        return {"content": data.decode(errors="replace")}

    @router.post("/apply-template")
    async def apply_template(request: Request) -> Any:
        server.owner(request)
        body, service = await _body(request), server.service

        def prompt() -> str:
            asked = Chat(body, settings.model)
            return service.prompt_text(checked_messages(asked.messages), asked.options)

        return {"prompt": await asyncio.to_thread(prompt)}

    return router


def _remembering(server: Server) -> APIRouter:
    router = APIRouter(prefix="/v1/memories")

    @router.get("")
    async def listed(request: Request) -> Any:
        owner = server.owner(request)
        return {"object": "list", "data": [about(record) for record in await server.service.list(owner)]}

    @router.get("/{id}")
    async def metadata(request: Request, id: str) -> Any:
        owner, service = server.owner(request), server.service
        record = await service.get(id, owner)
        snapshot = await service.snapshot_of(record)
        layers = [
            {"layer": layer, "norm": [float(x) for x in norms], "singular_values": values.tolist()}
            for layer, norms, values in zip(snapshot.layers, snapshot.norms, snapshot.singular_values)
        ]
        return {
            **about(record),
            "shape": list(snapshot.state.shape),
            "metadata": dict(snapshot.metadata),
            "layers": layers,
        }

    @router.get("/{id}/file")
    async def take_file(request: Request, id: str) -> Response:
        snapshot = await server.service.snapshot(id, server.owner(request))
        name = {"Content-Disposition": 'attachment; filename="session.memory"'}
        return Response(snapshot.to_bytes(), media_type="application/octet-stream", headers=name)

    @router.put("/{id}/file")
    async def bring_file(request: Request, id: str) -> Any:
        owner, data = server.owner(request), await request.body()
        snapshot = await asyncio.to_thread(MemorySnapshot.from_bytes, data)
        return about(await server.service.replace(id, snapshot, owner))

    @router.post("/{id}/fork")
    async def fork(request: Request, id: str) -> Any:
        owner, body = server.owner(request), await _body(request)
        return about(await server.service.fork(id, checked_name(body.get("id", "")), owner))

    @router.post("/{id}/reset")
    async def reset(request: Request, id: str) -> Any:
        return about(await server.service.reset(id, server.owner(request)))

    @router.post("/{id}/undo")
    async def undo(request: Request, id: str) -> Any:
        return about(await server.service.undo(id, server.owner(request)))

    @router.delete("/{id}")
    async def delete(request: Request, id: str) -> Any:
        await server.service.delete(id, server.owner(request))
        return {"id": id, "object": "memory", "deleted": True}

    return router


def about(record: Record) -> dict[str, Any]:
    """A session as the API shows it."""
    return {
        "id": record.name,
        "object": "memory",
        "created": record.created.isoformat(timespec="seconds") + "Z",
        "updated": record.updated.isoformat(timespec="seconds") + "Z",
        "version": record.version,
        "turns": record.turns,
        "tokens": record.tokens,
        "bytes": record.size,
    }


#
# answers
#


async def _respond(server: Server, request: Request, asked: Chat | Completion | Reply, answer: Answer) -> Response:
    if isinstance(asked, Chat):
        answer.to_message = asked.message
    if asked.stream:
        starting = asyncio.create_task(answer.start())  # what is wrong with the request has a status of its own
        try:
            await _ended_or_gone(request, starting)
            if not starting.done():
                answer.cancel()
                raise ClientDisconnect
            starting.result()
        finally:
            starting.cancel()
        return _EventStream(_events(server, asked, answer), server.settings.heartbeat)
    scored: list[Any] = []

    async def read() -> None:
        async for piece in answer:
            scored.extend(piece.scored)

    answer.streams = "n_top" in asked.options
    reading = asyncio.create_task(read())
    try:
        await _ended_or_gone(request, reading)
        if not reading.done():
            answer.cancel()
        await reading
    finally:
        if not reading.done():
            answer.cancel()
    server.metrics.answered(answer)
    return JSONResponse(asked.whole(answer, scored))


async def _ended_or_gone(request: Request, task: asyncio.Task[Any]) -> None:
    """Returns when a task has ended, or the client has gone away."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(left())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events, and a comment now and then, so that nobody between takes a silent connection for a dead one.

    Args:
        events: they are closed as soon as the client has gone away.
        heartbeat: seconds between comments.
    """

    def __init__(self, events: AsyncIterator[bytes], heartbeat: float) -> None:
        # nginx passes on what comes, and nobody keeps it
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.heartbeat = heartbeat

    async def stream_response(self, send: Send) -> None:
        """As Starlette's, which calls it."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(self.heartbeat)
                await send({"type": "http.response.body", "body": b": there\n\n", "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        beating = asyncio.create_task(beat())
        try:
            async with contextlib.aclosing(self.body_iterator) as events:  # type: ignore[type-var]
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            beating.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(server: Server, asked: Chat | Completion | Reply, answer: Answer) -> AsyncIterator[bytes]:
    pieces = aiter(answer)
    try:
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for chunk in asked.chunks(answer, pieces):
                yield _event(chunk, asked.name_of(chunk) if isinstance(asked, Reply) else "")
    except DeltaMemError as error:
        log.warning("a stream ends with an error: %s", error)
        server.metrics.errors.labels(status_of(error)[2]).inc()
        yield _event(to_json(error_body(error)))
    finally:
        answer.when_over(server.metrics.answered)  # the client may have left before
    yield _event("[DONE]")


def _event(line: str, name: str = "") -> bytes:
    """A server-sent event. JSON has no line breaks, so nothing has to look for them."""
    data = b"data: %s\n\n" % line.encode()
    return b"event: %s\n%s" % (name.encode(), data) if name else data


async def _body(request: Request) -> dict[str, Any]:
    try:
        data = await request.body()
        body = json.loads(data, parse_constant=_no_number)
    except ValueError as error:
        raise InputError(f"the body is no JSON: {error}") from None
    except RecursionError:
        raise InputError(f"the body is nested deeper than {_MAX_DEPTH} levels") from None
    if not isinstance(body, dict):
        raise InputError("the body is a JSON object")
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:  # otherwise it cannot be
        _check_depth(body)
    return body


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(body: Any) -> None:
    """Raises InputError for a body that is nested deeper than what reads it can go."""
    level = [body]
    for _ in range(_MAX_DEPTH):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for some in values for value in some if isinstance(value, (dict, list))]
        if not level:
            return
    raise InputError(f"the body is nested deeper than {_MAX_DEPTH} levels")


def _session(request: Request, body: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Which session a request belongs to, and whether it writes: by the path, the header, or the body."""
    memory = body.get("memory")
    if memory is not None and not isinstance(memory, Mapping):
        raise InputError('memory is {"session": id, "write": true or false}')
    memory = memory or {}
    session = request.path_params.get("session") or _header(request, "x-memory-session") or memory.get("session")
    write = field_of(memory, "write", True)
    if not isinstance(write, bool):
        raise InputError(f"memory.write is true or false, not {shown(repr(write))}")
    return (None if session is None else checked_name(session)), write


def _header(request: Request, name: str) -> str | None:
    """A header in UTF-8, as clients send it. Starlette takes its bytes for Latin-1."""
    value = request.headers.get(name)
    return None if value is None else value.encode("latin-1").decode("utf-8", "surrogateescape")


def _piece(llm: Any, token: int) -> Any:
    data = llm.detokenize([token], special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
