"""Structured logs: one JSON object a line, with the request's id and without contents."""

from __future__ import annotations

import contextvars
import logging
import sys

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("pydeltamem.server")
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


def set_up(level: str = "info") -> None:
    """Logs to standard error, as JSON. `level` is that of our own lines: the details that libraries log, such as chunks
    of a stream, hold what is said.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(_with_request)
    others = "info" if level == "debug" else level
    logging.basicConfig(level=others.upper(), handlers=[handler], force=True)
    logging.getLogger("pydeltamem").setLevel(level.upper())
    for name in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the line of a request is ours
    logging.getLogger("pydeltamem.llama_cpp").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_without_websockets)


def _without_websockets(record: logging.LogRecord) -> bool:
    """The page's address of its connection names the tab, whose storage that is."""
    return "WebSocket" not in str(record.msg) and not str(record.msg).startswith("connection ")


def _with_request(record: logging.LogRecord) -> bool:
    if request_id.get():
        record.request = request_id.get()
    record.__dict__.pop("color_message", None)  # uvicorn's, for terminals
    return True
