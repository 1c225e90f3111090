"""Functions that an answer may call: what a request says of them, and the calls in the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, shown, shown_value
from ..runtime.grammar import grammar_of_schema

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)
_MARK = "<tool_call>"


class Tools:
    """Those of one request.

    Args:
        body: the request. Raises InputError if it does not fit.

    Attributes:
        is_old: whether the request has the fields that `tools` and `tool_choice` replaced, and so has the answer.
        options: of the answer. With "none" the functions stay in its prompt: without them it would be another text.
        may_call: whether the answer may call any.
        forced: the function that the answer calls, of which it has only the arguments; None: any, or none.
        grammar: of an answer that calls any of several; None otherwise.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        tools: Any = body.get("tools")
        choice, name_tools, name_choice = body.get("tool_choice"), "tools", "tool_choice"
        self.is_old = not tools and body.get("functions") is not None
        if self.is_old:
            tools, choice, name_tools, name_choice = (
                body["functions"], body.get("function_call"), "functions", "function_call",
            )  # fmt: skip
            if isinstance(tools, list):
                tools = [{"type": "function", "function": function} for function in tools]
            choice = {"type": "function", "function": choice} if isinstance(choice, Mapping) else choice
        self.options: dict[str, Any] = {}
        self.forced: str | None = None
        self.grammar: Any = None
        self.may_call = False
        names = self._checked(tools, name_tools) if tools else []
        if not names and choice not in (None, "auto", "none"):
            raise InputError(f"{name_choice}: there is no function to call: send {name_tools}, too")
        if not names:
            return
        self.options["tools"] = tools
        self.may_call = choice != "none"
        if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
            name = choice["function"].get("name")
            if name not in names:
                raise InputError(f"{name_choice}: {shown(name)} is none of {shown(', '.join(names))}")
            self.forced = name
        elif choice == "required" and len(names) == 1:
            self.forced = names[0]
        elif choice == "required":
            self.grammar = grammar_of_schema({"oneOf": [_call_schema(tool["function"]) for tool in tools]}, name_tools)
        elif choice not in (None, "auto", "none"):
            raise InputError(f'{name_choice} is "none", "auto", "required" or a function, not {shown_value(choice)}')
        if self.forced is not None:
            self.options["tool_choice"] = {"type": "function", "function": {"name": self.forced}}

    def _checked(self, tools: Any, name_tools: str) -> list[str]:
        """The names of the functions, to each of which it gives parameters."""
        entry = '{"name": …}' if self.is_old else '{"type": "function", "function": {"name": …}}'
        what, names = f"{name_tools} is a list of {entry}", []
        for tool in tools if isinstance(tools, list) else ():
            function = tool.get("function") if isinstance(tool, Mapping) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(function, dict) or not isinstance(name, str) or not name.isprintable():
                raise InputError(what)
            if function.get("parameters") is None:
                function["parameters"] = {"type": "object", "properties": {}}
            grammar_of_schema(function["parameters"], f"{name_tools}: {shown(name)}")
            names.append(name)
        if not names:
            raise InputError(what)
        return names

    def message(self, id: str, content: str) -> dict[str, Any]:
        """An answer as a message of a chat, with the functions that it calls. `id`: of the answer."""
        calls: list[dict[str, Any]] = []
        if self.forced is not None:
            calls = [self.forced_call(id, content)]
        elif self.grammar is not None:
            calls = _called(id, [content])
        elif self.may_call:
            calls = _called(id, _CALL.findall(content))
            calls = calls[:1] if self.is_old else calls
            content = _CALL.sub("", content) if calls else content
        if not calls:
            return {"role": "assistant", "content": content}
        is_all = self.forced is not None or self.grammar is not None or not content.strip()
        return {"role": "assistant", "content": None if is_all else content.strip(), "tool_calls": calls}

    def forced_call(self, id: str, arguments: str) -> dict[str, Any]:
        """The call of the forced function."""
        return _call(id, 0, str(self.forced), arguments)

    def in_answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as the response has it, in the fields of the request."""
        if self.is_old and "tool_calls" in message:
            message["function_call"] = message.pop("tool_calls")[0]["function"]
        return message

    def delta(self, i: int, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call, or more of its arguments, in a stream."""
        return {"function_call": call["function"]} if self.is_old else {"tool_calls": [{"index": i, **call}]}

    @property
    def reason(self) -> str:
        """Why an answer ends that calls a function."""
        return "function_call" if self.is_old else "tool_calls"

    def where_begin(self, text: str) -> int:
        """Where in a text its first call begins, or one that its end may begin; its length if there is none."""
        if self.grammar is not None:
            return 0
        if not self.may_call:
            return len(text)
        if _MARK in text:
            return text.index(_MARK)
        return len(text) - max((n for n in range(1, len(_MARK)) if text.endswith(_MARK[:n])), default=0)


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
        "required": ["name", "arguments"],
    }


def _call(id: str, i: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{id[-24:]}_{i}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _called(id: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The calls in an answer; none if one of them cannot be read."""
    calls = []
    for i, text in enumerate(texts):
        try:
            call = json.loads(text)
            given = call.get("arguments", call.get("parameters", {}))
            arguments, name = json.dumps(given, ensure_ascii=False, allow_nan=False), str(call["name"])
            name.encode()
        except (ValueError, KeyError, AttributeError, RecursionError):
            return []
        # half a character stays escaped, as the model wrote it: an answer cannot be sent with it
        calls.append(_call(id, i, name, arguments.encode("utf-8", "backslashreplace").decode()))
    return calls
