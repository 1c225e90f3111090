"""Which messages of a request the memory of its session has read already.

An OpenAI client sends its whole history each time. It may also leave out the oldest messages, go on with an earlier
chat or begin another one. So the server remembers which messages stood next to each other when the memory read them.
A message that stands after the same one as then is known, and is not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, shown, shown_value
from ..runtime.history import before_content

Message = Mapping[str, Any]
_ROLES = {"developer": "system", "function": "tool"}  # as templates name them


def content_of(message: Message) -> str:
    """The text of a message; content may come in parts. Raises InputError for what is no text."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError("a message has content that is no text: this model reads text only")
            parts.append(part["text"])
        return "".join(parts)
    raise InputError(f"the content of a message is text, not {type(content).__name__}")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with their content as one text. Raises InputError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is a list of at least one message")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError('a message is an object with "role" and "content"')
        if "content" not in message and message["role"] != "assistant":  # an assistant may call functions only
            raise InputError(f'a message of the role {shown(message["role"])} has no "content": it would say nothing')
        role = _ROLES.get(message["role"], message["role"])
        one = {**message, "role": role, "content": content_of(message)}
        called = one.pop("function_call", None)  # what `tool_calls` replaced
        if called is not None and not one.get("tool_calls"):
            one["tool_calls"] = [{"type": "function", "function": _checked_function("function_call", called)}]
        calls = one.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise InputError(f"tool_calls of a message is a list, not {shown_value(calls)}")
        if calls:
            one["tool_calls"] = [_checked_call(call) for call in calls]
        checked.append(one)
    return checked


def _checked_call(call: Any) -> dict[str, Any]:
    function = _checked_function("tool_calls", call.get("function") if isinstance(call, Mapping) else None)
    return {**call, "function": function}


def _checked_function(name: str, function: Any) -> dict[str, Any]:
    """A function that a message calls. Its arguments are text, as in answers."""
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f'{name} of a message: a call has a function, {{"name": …, "arguments": …}}')
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return dict(function)
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}


def digests(messages: Sequence[Message]) -> list[str]:
    """One for each message, of it and the one before it."""
    said = [_canonical(message) for message in messages]
    return [
        hashlib.blake2b(f"{before}\n{this}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        for before, this in zip(["", *said], said)
    ]


def n_system(messages: Sequence[Message]) -> int:
    """Number of system messages that a chat begins with."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def first_digest(messages: Sequence[Message]) -> str:
    """What tells one chat from another: its first message that is no system prompt."""
    n = n_system(messages)
    return digests(messages[n : n + 1])[0] if n < len(messages) else ""


def known_messages(messages: Sequence[Message], known: Collection[str]) -> list[bool]:
    """Which messages were read already. `known`: digests of all that the memory has read.

    The first message that is no system prompt has lost the one before it where the oldest were left out: it is known if
    the one after it is.
    """
    marks = [digest in known for digest in digests(messages)]
    n = n_system(messages)
    if n + 1 < len(messages) and marks[n + 1]:
        marks[n] = True
    return marks


def fewer_runs(marks: Sequence[bool], n: int) -> list[bool]:
    """Marks of known messages with at most n runs of them, the longest. Messages of other runs are read as if they were
    new: to find where a run begins and ends, the chat is rendered from its beginning, four times a run.
    """
    runs, at = [], 0
    for mark, run in itertools.groupby(marks):
        end = at + len(list(run))
        if mark:
            runs.append(range(at, end))
        at = end
    kept = {i for run in sorted(runs, key=len, reverse=True)[:n] for i in run}
    return [i in kept for i in range(len(marks))]


def known_tokens(
    prompt: Sequence[int],
    messages: Sequence[Message],
    marks: Sequence[bool],
    begins: Callable[[int], int],
) -> npt.NDArray[np.bool_]:
    """Which tokens of a prompt belong to known messages, [n].

    Args:
        marks: which messages are known.
        begins: where the content of a message begins, in tokens.
    """
    known = np.zeros(len(prompt), dtype=np.bool_)
    start = 0
    for i, mark in enumerate(marks):
        is_last = i + 1 == len(marks)
        if is_last or marks[i + 1] != mark:
            end = len(prompt) if is_last else begins(i + 1)
            known[start:end] = mark
            start = end
    return known


def begins(render: Callable[[Sequence[Message]], Sequence[int]], messages: Sequence[Message], i: int) -> int:
    """Where the content of message `i` begins, in tokens: up to there two contents have the same rendering."""
    # some templates refuse the result of a call that does not say of which
    message = {name: messages[i][name] for name in ("role", "name", "tool_call_id") if name in messages[i]}
    return len(before_content(render, messages[:i], message))


def _canonical(message: Message) -> str:
    functions = [call.get("function", {}) for call in message.get("tool_calls") or ()]
    calls = [[function.get("name"), _arguments(function.get("arguments"))] for function in functions]
    return json.dumps([message["role"], content_of(message).strip(), calls], ensure_ascii=False)


def _arguments(text: str | None) -> str | None:
    """The arguments of a call in one spelling: clients that read them write them with other spaces."""
    with contextlib.suppress(ValueError, RecursionError):  # a call that was cut, or has none
        return json.dumps(json.loads(text or ""), ensure_ascii=False)
    return text
