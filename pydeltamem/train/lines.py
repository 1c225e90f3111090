"""A line of a training file, read from its JSON and checked.

A line is a JSON object, one of

    {"messages": [...]}                         a conversation that ends with the answer to learn
    {"messages": [...], "asks": [[...], ...]}   several questions about the same messages, each asked on its own;
                                                with "visible": true their text stays, and there may be none;
                                                with "keep": true the answers stay as the frozen model gives them
    {"document": "...", "questions": [{"question": "...", "answer": "..."}, ...]}
    {"text": "..."}                             its end is to be predicted from the memory of its beginning

where messages are {"role", "content"}. A question without an answer (an ask that ends with the user, a question
without "answer") needs a teacher, which writes the answer (objective.py). With a teacher all answers are learned from
it, "keep" or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import shown

READ = "I have read it."  # what the assistant says to a document

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Line:
    """A line of the file: a plain text, or messages and what is asked about them."""

    messages: Messages
    asks: list[Messages]
    visible: bool
    keep: bool
    text: str | None = None


def line_of(data: bytes) -> Line:
    """Reads a line. Raises ValueError, which says what is wrong with it."""
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    flags = [_member(record, name, bool, False) for name in ("visible", "keep")]
    if "text" in record:
        return Line([], [], False, False, _member(record, "text", str))
    return Line(*(_of_document(record) if "document" in record else _of_messages(record)), *flags)


_NAMES = {str: "a text", bool: "true or false", list: "a list"}


def _member(record: Any, name: str, kind: type, default: Any = None) -> Any:
    """A member of an object in a line. Raises ValueError if it is of another type, or missing and has no default."""
    if not isinstance(record, dict):
        raise ValueError(f"{shown(json.dumps(record))} is no object")
    value = record.get(name, default)
    if value is None and name not in record:
        raise ValueError(f'"{name}" is missing')
    if not isinstance(value, kind):
        raise ValueError(f'"{name}" is {shown(json.dumps(value))}, not {_NAMES[kind]}')
    if isinstance(value, str) and not _is_text(value):
        raise ValueError(f'"{name}" holds half of a character, a surrogate')
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _messages(given: list[Any]) -> Messages:
    return [{name: _member(message, name, str) for name in ("role", "content")} for message in given]


def _of_messages(record: dict[str, Any]) -> tuple[Messages, list[Messages]]:
    messages = _messages(_member(record, "messages", list))
    if "asks" in record:
        asks = _member(record, "asks", list)
        if not all(isinstance(ask, list) for ask in asks):
            raise ValueError('"asks" is no list of lists of messages')
        return messages, [_messages(ask) for ask in asks]
    n_answer = 2 if len(messages) > 1 and messages[-2]["role"] == "user" else 1
    return messages[:-n_answer], [messages[-n_answer:]]  # the question is the user's last message


def _of_document(record: dict[str, Any]) -> tuple[Messages, list[Messages]]:
    document = _member(record, "document", str)
    messages = [{"role": "user", "content": document}, {"role": "assistant", "content": READ}]
    asks = []
    for item in _member(record, "questions", list):
        ask = [{"role": "user", "content": _member(item, "question", str)}]
        if item.get("answer") is not None:
            ask.append({"role": "assistant", "content": _member(item, "answer", str)})
        asks.append(ask)
    return messages, asks
