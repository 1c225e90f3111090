"""Endpoints of sessions: /v1/memories."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..formats.memory_file import MemorySnapshot
from .answers import respond_list
from .bodies import body_of
from .options import checked_whole
from .records import Record, checked_name
from .state import Server

_MAX_LIMIT = 100_000  # of sessions in one answer
_DIGITS = re.compile("[0-9]{1,9}")


def remembering(server: Server) -> APIRouter:
    router = APIRouter(prefix="/v1/memories")

    @router.get("")
    async def listed(request: Request) -> Response:
        owner, limit = server.owner(request), _limit(request)
        after = request.query_params.get("after")
        more = None if limit is None else limit + 1
        records = await server.service.list(owner, limit=more, after=after)
        kept = records[:limit]
        return await respond_list(map(about, kept), has_more=len(kept) < len(records))

    @router.get("/{id}")
    async def metadata(request: Request, id: str) -> Any:
        owner, service = server.owner(request), server.service
        record = await service.get(id, owner)
        snapshot = await service.snapshot_of(record)
        return {
            **about(record),
            "shape": list(snapshot.state.shape),
            "metadata": dict(snapshot.metadata),
            "layers": await asyncio.to_thread(_layers, snapshot),
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
        owner, body = server.owner(request), await body_of(request)
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


def _layers(snapshot: MemorySnapshot) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "norm": norms.tolist(), "singular_values": values.tolist()}
        for layer, norms, values in zip(snapshot.layers, snapshot.norms, snapshot.singular_values)
    ]


def _limit(request: Request) -> int | None:
    """How many sessions to list at most. Raises InputError."""
    text = request.query_params.get("limit")
    return checked_whole("limit", int(text) if text and _DIGITS.fullmatch(text) else text, 1, _MAX_LIMIT)


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
