"""The HTTP application: its endpoints (docs/reference/server.md), and what all requests pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from ..errors import DeltaMemError, shown
from .answer import Answer
from .answers import ended_or_gone, respond, respond_list
from .bodies import body_of, session_of
from .guards import BodyLimit, Logged, Private
from .llama_server import converting, describing
from .memories import remembering
from .openai import Chat, Completion
from .records import told
from .refusals import answer_error
from .responses import Reply
from .state import Server, Settings

GRACE = 20  # seconds that answers have to end when the server is told to; then they are cut
LAST = 10  # seconds until those that were cut are committed and sent; then their requests are cancelled


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
    app.include_router(describing(server))
    for router in (_answering(server), converting(server), remembering(server)):
        app.include_router(router)
        app.include_router(router, prefix="/sessions/{session}")
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


def _turn(request: Request, body: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Whose turn a request is, as arguments of a service. Raises InputError."""
    session, write = session_of(request, body)
    return {"session": session, "owner": owner, "write": write}


def _answering(server: Server) -> APIRouter:
    router, settings = APIRouter(), server.settings

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        owner, body = server.owner(request), await body_of(request)

        def ask() -> tuple[Chat, Answer]:
            asked = Chat(body, settings.model)
            return asked, server.service.chat(asked.messages, **_turn(request, body, owner), **asked.options)

        return await respond(server, request, *await asyncio.to_thread(ask))  # a schema and messages take their time

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        owner, body = server.owner(request), await body_of(request)
        asked = await asyncio.to_thread(Reply, body, settings.model)
        session, write = session_of(request, body)
        answer = await asked.answer(server.service, session, owner, write)
        return await respond(server, request, asked, answer)

    @router.delete("/v1/responses/{id}")
    async def delete_response(request: Request, id: str) -> Any:
        owner = server.owner(request)
        await server.service.delete(Reply.checked_id(id), owner)
        return {"id": id, "object": "response", "deleted": True}

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        owner, body = server.owner(request), await body_of(request)

        def ask() -> tuple[Completion, Answer]:
            asked = Completion(body, settings.model)
            return asked, server.service.complete(asked.prompt, **_turn(request, body, owner), **asked.options)

        return await respond(server, request, *await asyncio.to_thread(ask))

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        owner, body = server.owner(request), await body_of(request)
        server.service  # noqa: B018 - raises while loading
        assert server.embedder is not None  # loaded with the service
        session, _ = session_of(request, body)
        embedding = asyncio.create_task(server.embedder.embeddings(body, settings.model, session, owner))
        try:
            await ended_or_gone(request, embedding)
            if not embedding.done():
                raise ClientDisconnect
            return await respond_list(**embedding.result())
        finally:
            embedding.cancel()

    return router
