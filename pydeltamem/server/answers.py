"""How an answer is sent: as a whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Send

from ..errors import DeltaMemError
from .answer import Answer
from .logs import log
from .openai import Chat, Completion, to_json
from .refusals import error_body, status_of
from .responses import Reply
from .state import Server


async def respond(server: Server, request: Request, asked: Chat | Completion | Reply, answer: Answer) -> Response:
    """Answers a request, by a stream or at its end. Whoever goes away cuts the answer."""
    if isinstance(asked, Chat):
        answer.to_message = asked.message
    if asked.stream:
        starting = asyncio.create_task(answer.start())  # what is wrong with the request has a status of its own
        try:
            await ended_or_gone(request, starting)
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
        await ended_or_gone(request, reading)
        if not reading.done():
            answer.cancel()
        await reading
    finally:
        if not reading.done():
            answer.cancel()
    server.metrics.answered(answer)
    if not scored:
        return JSONResponse(asked.whole(answer, scored))
    # the likeliest tokens of a long answer are megabytes
    return await asyncio.to_thread(lambda: JSONResponse(asked.whole(answer, scored)))


async def respond_list(data: Iterable[Any], **others: Any) -> Response:
    """Answers with a list of any length: its elements, in `data`, are written one by one in a thread. Where all are
    written at once, in C, everybody waits.
    """

    def written() -> str:
        elements = ",".join(to_json(each) for each in data)
        return f'{to_json({"object": "list", **others})[:-1]},"data":[{elements}]}}'

    return Response(await asyncio.to_thread(written), media_type="application/json")


async def ended_or_gone(request: Request, task: asyncio.Task[Any]) -> None:
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
