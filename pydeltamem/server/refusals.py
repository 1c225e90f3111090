"""Errors as OpenAI's API words them (docs/reference/server.md)."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from ..errors import (
    AdapterError,
    DecodeError,
    DeltaMemError,
    InputError,
    MemoryFileError,
    ModelError,
    NotFiniteError,
    shown,
)
from .holds import SessionBusy
from .lengths import PromptTooLong
from .logs import log
from .records import Conflict, SessionLimit, SessionUnknown, StoreError, told
from .worker import ModelLost, QueueFull


class Loading(DeltaMemError):
    """The model is still being loaded."""


class BodyTooLarge(DeltaMemError):
    """The body of a request is too large."""


class RateLimited(DeltaMemError):
    """A key has sent too many requests.

    Attributes:
        seconds: until it may send another.
    """

    seconds = 1


# exception: status, type and code of OpenAI's error
_ERRORS: tuple[tuple[type[Exception], tuple[int, str, str]], ...] = (
    (Loading, (503, "unavailable_error", "loading")),
    (BodyTooLarge, (413, "invalid_request_error", "body_too_large")),
    (RateLimited, (429, "rate_limit_error", "rate_limited")),
    (QueueFull, (429, "rate_limit_error", "queue_full")),
    (SessionBusy, (409, "conflict_error", "session_busy")),
    (Conflict, (409, "conflict_error", "session_changed")),
    (SessionUnknown, (404, "not_found_error", "session_not_found")),
    (SessionLimit, (400, "invalid_request_error", "too_many_sessions")),
    (StoreError, (503, "unavailable_error", "store_unavailable")),
    (ModelLost, (503, "unavailable_error", "rpc_unavailable")),
    (MemoryFileError, (400, "invalid_request_error", "memory_file")),
    (AdapterError, (400, "invalid_request_error", "no_adapter")),
    (PromptTooLong, (400, "invalid_request_error", "context_length_exceeded")),
    (InputError, (400, "invalid_request_error", "invalid_value")),
    (NotFiniteError, (500, "server_error", "not_finite")),
    (DecodeError, (500, "server_error", "decode_failed")),
    (ModelError, (503, "unavailable_error", "stopping")),
)


_PATH = re.compile(r"(/sessions/[^/]+)?(?:/v1)*(.*)", re.DOTALL)  # what stands before /v1, and behind it
# what clients read in place of errors that name files of the server; the log has these
_TOLD = {
    "not_finite": "the memory, or what is computed with it, is no longer finite: the log of the server says more",
    "stopping": "the server is stopping",
}


def status_of(error: Exception) -> tuple[int, str, str]:
    """Its status, type and code."""
    if isinstance(error, HTTPException):
        kinds = {
            401: ("authentication_error", "invalid_api_key"),
            403: ("permission_error", "origin_not_allowed"),
            404: ("not_found_error", "not_found"),
        }
        return (error.status_code, *kinds.get(error.status_code, ("invalid_request_error", "invalid_request")))
    return next((status for kind, status in _ERRORS if isinstance(error, kind)), (500, "server_error", "internal"))


def error_body(error: Exception) -> dict[str, Any]:
    """The body of an answer that says it."""
    status, kind, code = status_of(error)
    if isinstance(error, HTTPException):
        message = str(error.detail)
    elif status == 500 and code == "internal":
        message = "an error of the server: see its log"
    elif code in _TOLD:
        message = _TOLD[code]
    else:
        message = told(error).encode("utf-8", "backslashreplace").decode()  # JSON may have half a character
    return {"error": {"message": message, "type": kind, "code": code}}


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to a request that fails, which is counted, and logged if the server is to blame."""
    status, _, code = status_of(error)
    request.app.state.server.metrics.errors.labels(code).inc()
    if code == "internal":
        log.error("an error of the server", exc_info=error)
    elif status >= 500:
        log.error("%s", error)
    body, headers = error_body(error), dict(getattr(error, "headers", None) or {})  # which methods there are
    if isinstance(error, HTTPException) and error.detail == HTTPStatus(status).phrase:  # the router's own
        message = f"{request.method} {shown(request.url.path)}: there is no such endpoint"
        body["error"]["message"] = message + _meant(request)
    if status in (429, 503):
        headers["Retry-After"] = str(getattr(error, "seconds", 1))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers)


def _meant(request: Request) -> str:
    """The endpoint that is there with /v1, or without it, as text to end a sentence with; empty if there is none."""
    before, path = _PATH.fullmatch(request.url.path).groups(default="")  # type: ignore[union-attr]
    for version in ("/v1", ""):
        scope = {**request.scope, "path": f"{before}{version}{path}"}
        routes = (route for route in request.app.routes if not isinstance(route, Mount))  # the page takes any path
        if any(route.matches(scope)[0] is Match.FULL for route in routes):
            return f": did you mean {shown(scope['path'])}?"
    return ""


async def refuse(error: Exception, scope: Any, receive: Any, send: Any) -> None:
    """Answers a request with an error outside its endpoint."""
    await (await answer_error(Request(scope), error))(scope, receive, send)
