"""What a request says: its body, its headers, and which session it belongs to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from ..errors import InputError, shown_value
from .openai import field_of
from .records import checked_name
from .refusals import BodyTooLarge

_MAX_DEPTH = 200  # of a body
_MAX_VALUES = 1 << 20  # of a body: a bias for each token of a large vocabulary. All wait while C decodes them, 0.6 s
_FEW = 20_000  # a body with more is checked in a thread


async def body_of(request: Request) -> dict[str, Any]:
    """The body of a request, a JSON object. Raises InputError, and BodyTooLarge."""
    data = await request.body()
    n = sum(map(data.count, b",:[{"))  # it has no more values, apart from one
    if n > _MAX_VALUES:
        raise BodyTooLarge(f"the body of a request has at most {_MAX_VALUES:,} commas, colons and opening brackets")
    return _object(data) if n <= _FEW else await asyncio.to_thread(_object, data)


def _object(data: bytes) -> dict[str, Any]:
    """As `body_of`."""
    try:
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


def session_of(request: Request, body: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Which session a request belongs to, and whether it writes: by the path, the header, or the body."""
    memory = body.get("memory")
    if memory is not None and not isinstance(memory, Mapping):
        raise InputError('memory is {"session": id, "write": true or false}')
    memory = memory or {}
    session = request.path_params.get("session") or header_of(request, "x-memory-session") or memory.get("session")
    write = field_of(memory, "write", True)
    if not isinstance(write, bool):
        raise InputError(f"memory.write is true or false, not {shown_value(write)}")
    return (None if session is None else checked_name(session)), write


def header_of(request: Request, name: str) -> str | None:
    """A header in UTF-8, as clients send it. Starlette takes its bytes for Latin-1."""
    value = request.headers.get(name)
    return None if value is None else value.encode("latin-1").decode("utf-8", "surrogateescape")
