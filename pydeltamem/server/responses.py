"""Requests and answers of OpenAI's /v1/responses: each answer is a checkpoint to go on from.

An answer that is kept is a session, whose name is the id of the answer. Whoever goes on from it begins another session
as that one was, so an id never means anything else than at first, and going on twice from one gives two.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..errors import InputError, shown, shown_value
from ..runtime.grammar import grammar_of_format
from . import history
from .answer import Answer, Piece
from .openai import flag, hold_to, likelihoods, memory, options_of, to_json
from .options import checked_n_top, checked_whole
from .records import Record, SessionUnknown
from .service import AsyncDeltaMem

_PREFIX = "resp_"
_LOGPROBS = "message.output_text.logprobs"  # of `include`
_MAX_REPEATED = 1 << 18  # bytes of a field that each event of a stream may have again
_REFUSED = ("tools", "conversation", "background", "prompt")


class Reply:
    """One request of /v1/responses.

    Args:
        body: the request. Raises InputError if it does not fit.
        model: the name to answer with.
    """

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        self.id, self.message_id = f"{_PREFIX}{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self.model = int(time.time()), model
        for name in _REFUSED:
            if body.get(name):
                elsewhere = ": they are at /v1/chat/completions" if name == "tools" else ""
                raise InputError(f"{name}: /v1/responses does not have this here{elsewhere}")
        self.messages = _messages(body.get("input"))
        self.instructions = body.get("instructions")
        if self.instructions is not None and not isinstance(self.instructions, str):
            raise InputError(f"instructions is a text, not {shown_value(self.instructions)}")
        self.previous = body.get("previous_response_id")
        if self.previous is not None:
            self.checked_id(self.previous)
        self.max_tokens = checked_whole("max_output_tokens", body.get("max_output_tokens"), 1)
        self.options = options_of({**body, "max_completion_tokens": self.max_tokens})
        text = body.get("text") or {}
        if not isinstance(text, Mapping):
            raise InputError('text is {"format": {"type": …}}')
        self.format = text.get("format") or {"type": "text"}
        hold_to(self.options, grammar_of_format(self.format, "text.format"))
        self.metadata = body.get("metadata") or {}
        if not isinstance(self.metadata, Mapping):
            raise InputError(f"metadata is an object, not {shown_value(self.metadata)}")
        for name, repeated in (("text.format", self.format), ("metadata", self.metadata)):  # by the answer
            try:
                n = len(json.dumps(repeated, ensure_ascii=False, allow_nan=False).encode())
            except ValueError as error:
                raise InputError(f"{name}: cannot be written as JSON: {shown(error)}") from None
            if n > _MAX_REPEATED:
                raise InputError(f"{name}: has {n:,} bytes, at most {_MAX_REPEATED:,} are repeated in the answer")
        include = body.get("include") or []
        if not isinstance(include, list):
            raise InputError(f"include is a list of texts, not {shown_value(include)}")
        self.n_top = checked_n_top("top_logprobs", body.get("top_logprobs")) or 0
        if _LOGPROBS in include:
            self.options["n_top"] = self.n_top
        self.stream = flag(body, "stream")
        self.keeps = body.get("store") is None or flag(body, "store")

    @staticmethod
    def checked_id(id: Any) -> str:
        """The id of an answer. Raises SessionUnknown for what cannot be one."""
        if not isinstance(id, str) or not id.startswith(_PREFIX):
            raise SessionUnknown(f"there is no response {shown_value(id)}")
        return id

    async def answer(self, service: AsyncDeltaMem, session: str | None, owner: str, write: bool) -> Answer:
        """The turn. `session`, `write`: as the request says besides."""
        messages, origin = self.messages, None
        if self.previous is not None:
            if session is not None:
                raise InputError("previous_response_id: it says which memory to go on with: send no session")
            origin = await self._origin(service, owner)
            before = _said(origin)
            if self.instructions is not None:  # in place of those before
                before = before[history.n_system(before) :]
            messages = [*before, *messages]
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        self.keeps = self.keeps and write and session is None and service.has_memory and service.store.keep_messages
        if self.keeps:
            session = self.id
        elif origin is not None:
            session, write, origin = origin.name, False, None
        options = {"session": session, "owner": owner, "write": write, "origin": origin, **self.options}
        return await asyncio.to_thread(service.chat, messages, **options)  # many messages take their time

    async def _origin(self, service: AsyncDeltaMem, owner: str) -> Record:
        try:
            return await service.get(str(self.previous), owner)
        except SessionUnknown:
            kept = "" if service.store.keep_messages else ": this server keeps none; --keep-messages does"
            raise SessionUnknown(f"previous_response_id: there is no response {self.previous}{kept}") from None

    #
    # the answer
    #

    def whole(self, answer: Answer, scored: Sequence[Any]) -> dict[str, Any]:
        """The response."""
        return self._response(_status(answer), answer, self._logprobs(scored))

    async def chunks(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The events of a stream, as JSON; the last one comes once the turn is committed."""
        number = itertools.count()

        def event(kind: str, **fields: Any) -> str:
            return to_json({"type": f"response.{kind}", "sequence_number": next(number), **fields})

        item = {"output_index": 0}
        part = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        yield event("created", response=self._response("in_progress"))
        yield event("in_progress", response=self._response("in_progress"))
        yield event("output_item.added", **item, item=self._message("in_progress"))
        yield event("content_part.added", **part, part=self._text(""))
        scored: list[Any] = []
        n_sent = 0  # of them
        async for piece in pieces:
            scored += piece.scored
            if piece.text:  # not of half a character
                yield event("output_text.delta", **part, delta=piece.text, logprobs=self._logprobs(scored[n_sent:]))
                n_sent = len(scored)
        status, content = _status(answer), answer.content
        logprobs = await asyncio.to_thread(self._logprobs, scored)
        yield event("output_text.done", **part, text=content, logprobs=logprobs)
        yield event("content_part.done", **part, part=self._text(content, logprobs))
        yield event("output_item.done", **item, item=self._message(status, content, logprobs))
        yield event(status, response=self._response(status, answer, logprobs))

    @staticmethod
    def name_of(event: str) -> str:
        """What kind of event JSON of `chunks` is: it begins with that."""
        return event[len('{"type":"') : event.index('",')]

    def _logprobs(self, scored: Sequence[Any]) -> list[dict[str, Any]]:
        return likelihoods(scored, self.n_top)

    def _text(self, text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _message(self, status: str, content: str | None = None, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        parts = [] if content is None else [self._text(content, logprobs)]
        return {"id": self.message_id, "type": "message", "status": status, "role": "assistant", "content": parts}

    def _response(self, status: str, answer: Answer | None = None, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        """The response as it is now; with the answer once that is complete."""
        response = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_tokens,
            "metadata": dict(self.metadata),
            "model": self.model,
            "output": [] if answer is None else [self._message(status, answer.content, logprobs)],
            "parallel_tool_calls": False,
            "previous_response_id": self.previous,
            "store": self.keeps and (answer is None or answer.counts),
            "temperature": self.options.get("temperature"),
            "text": {"format": dict(self.format)},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": self.n_top,
            "top_p": self.options.get("top_p"),
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
        }
        return response if answer is None else {**response, **memory(answer)}


def _status(answer: Answer) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


def _usage(answer: Answer) -> dict[str, Any]:
    n_prompt, n = answer.n_prompt, answer.n_generated
    return {
        "input_tokens": n_prompt,
        "input_tokens_details": {"cached_tokens": answer.n_cached},
        "output_tokens": n,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n_prompt + n,
    }


def _said(record: Record) -> list[dict[str, Any]]:
    """The messages of the session's present chat. Raises InputError if they were not kept."""
    said: list[dict[str, Any]] = []
    for turn in record.history:
        if turn.chat == record.chat:
            if turn.messages is None:
                raise InputError(
                    f"previous_response_id: the messages of {record.name} were not kept: send them as input"
                )
            said += map(dict, turn.messages)
    return said


def _messages(given: Any) -> list[dict[str, Any]]:
    """The input as messages of a chat. Raises InputError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InputError("input is a text, or a list of at least one message")
    messages = []
    for item in given:
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind != "message":
            raise InputError(f"input: an item is a message, not {shown_value(kind)}")
        message = {name: item[name] for name in ("role", "content") if name in item}
        if isinstance(message.get("content"), list):
            message["content"] = [_part(part) for part in message["content"]]
        messages.append(message)
    return messages


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("input_text", "output_text") or not isinstance(part.get("text"), str):
        raise InputError(f"input: this model reads text only, not {shown_value(kind)}")
    return {"type": "text", "text": part["text"]}
