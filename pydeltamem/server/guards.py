"""What every request passes before its endpoint: its id and line in the log, which pages it may come from, its size."""

from __future__ import annotations

import ipaddress
import time
import uuid
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .logs import log, request_id
from .metrics import Metrics
from .refusals import BodyTooLarge, refuse


class Logged:
    """Gives each request an id, answers what nobody expected, and logs a line when its answer is over."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id = given if 0 < len(given) <= 64 and given.isprintable() else uuid.uuid4().hex
        request_id.set(id)
        begin, status = time.monotonic(), 0

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode("latin-1"))]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except ClientDisconnect:  # before its body was whole
            status = 499  # as nginx counts it
        except Exception as error:
            if status:  # the answer has begun
                raise
            await refuse(error, scope, receive, answer)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(status)).inc()
            if endpoint not in ("/health", "/health/live", "/metrics", "/slots", "other") and not endpoint.startswith(
                "/_nicegui"
            ):
                seconds = time.monotonic() - begin
                log.info(
                    "request",
                    extra={
                        "method": scope["method"],
                        "endpoint": endpoint,
                        "status": status,
                        "milliseconds": round(1000 * seconds),
                    },
                )


class Private:
    """Refuses what pages of other sites send. Where no key is asked for, a page that somebody here visits could write
    into memories: browsers send a POST of text without asking first, and its name may lead to this machine.
    """

    def __init__(self, app: Any, origins: Collection[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or self._may(Headers(scope=scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = HTTPException(403, "without keys, only programs and pages of this machine may use the server")
            await refuse(error, scope, receive, send)

    def _may(self, headers: Headers) -> bool:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            is_own = origin is None or origin in self.origins or urlsplit(origin).netloc == host
            return is_own and is_loopback(urlsplit(f"//{host}").hostname or "")
        except ValueError:  # no address
            return False


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class BodyLimit:
    """Refuses bodies of more than `n_max` bytes, whatever their headers say."""

    def __init__(self, app: Any, n_max: int) -> None:
        self.app, self.n_max = app, n_max

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        n, error = 0, BodyTooLarge(f"the body of a request has at most {self.n_max} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.n_max:
            await refuse(error, scope, receive, send)
            return

        async def limited() -> Any:
            nonlocal n
            message = await receive()
            n += len(message.get("body", b""))
            if n > self.n_max:
                raise error
            return message

        await self.app(scope, limited, send)
