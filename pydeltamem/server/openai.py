"""Requests and answers as OpenAI's API words them. Nothing here knows HTTP."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..errors import InputError, shown_value
from ..runtime.grammar import grammar_of_format, grammar_of_schema
from ..runtime.logprobs import listed
from .answer import Answer, Piece
from .options import FIELDS, checked_n_top, checked_template, checked_whole
from .tools import Tools

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")  # a token that is a part of a character


def options_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an answer. Parameters that are not known here are ignored, as clients send many. Raises InputError
    for what cannot be done.
    """
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise InputError(f"{name}: one answer a request, not {shown_value(body[name])}")
    options = {name: body[name] for name in FIELDS if body.get(name) is not None}
    for name in ("max_completion_tokens", "n_predict"):
        if body.get(name) is not None:
            options["max_tokens"] = checked_whole(name, body[name], -1)
    if options.get("max_tokens") == -1:  # as llama-server
        del options["max_tokens"]
    if body.get("chat_template_kwargs") is not None:
        options["template"] = checked_template("chat_template_kwargs", body["chat_template_kwargs"])
    return options


class Chat:
    """One request of /v1/chat/completions.

    Args:
        body: the request. Raises InputError if it does not fit.
        model: the name to answer with.
    """

    object = "chat.completion"

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.options = options_of(body)
        self.messages = body.get("messages")
        self.stream = flag(body, "stream")
        self.with_usage = _with_usage(body)
        self.logprobs = flag(body, "logprobs")
        if self.logprobs:
            self.options["n_top"] = checked_n_top("top_logprobs", body.get("top_logprobs")) or 0
        elif body.get("top_logprobs"):
            raise InputError("top_logprobs: comes with logprobs: send that as true, too")
        self.tools = Tools(body)
        self.options.update(self.tools.options)
        if self.tools.forced is not None:
            refuse_grammar(self.options)
        elif self.tools.grammar is not None:
            hold_to(self.options, self.tools.grammar)
        else:
            hold_to(self.options, _grammar_of(body))

    #
    # the answer
    #

    def message(self, content: str) -> dict[str, Any]:
        """The answer as a message of a chat, with the functions that it calls."""
        return self.tools.message(self.id, content)

    def whole(self, answer: Answer, scored: Sequence[Any]) -> dict[str, Any]:
        """The response."""
        message = self.message(answer.content)
        reason = self._reason(answer, has_calls="tool_calls" in message)
        choice = {
            "index": 0,
            "message": self.tools.in_answer(message),
            "finish_reason": reason,
            "logprobs": self._logprobs(scored),
        }
        return {**self._about(), "choices": [choice], "usage": usage(answer), **memory(answer)}

    async def chunks(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The response in pieces, as JSON; the one with finish_reason comes once the turn is committed."""
        tools, is_forced = self.tools, self.tools.forced is not None
        yield to_json(self._chunk({"role": "assistant", "content": None if is_forced else ""}))
        held, plain = "", _Template(self._chunk({"content": _Template.MARK}))
        scored: list[Any] = []  # tokens whose text has not been sent yet
        has_calls = is_forced
        if is_forced:
            yield to_json(self._chunk(tools.delta(0, tools.forced_call(self.id, ""))))
        async for piece in pieces:
            scored += piece.scored
            if is_forced:
                text = piece.text
                if text:
                    yield to_json(self._chunk(tools.delta(0, {"function": {"arguments": text}}), scored=scored))
            else:
                text = held + piece.text
                at = tools.where_begin(text)
                text, held = text[:at], text[at:]  # a call is passed on as a whole
                if text and self.logprobs:
                    yield to_json(self._chunk({"content": text}, scored=scored))
                elif text:
                    yield plain.with_text(text)
            if text:
                scored = []
        if held:
            message = self.message(held)
            if message["content"]:
                yield to_json(self._chunk({"content": message["content"]}, scored=scored))
                scored = []
            for i, call in enumerate(message.get("tool_calls", ())):
                yield to_json(self._chunk(tools.delta(i, call), scored=scored))
                has_calls, scored = True, []
        if scored:  # of a stop string, or of half a character
            yield to_json(self._chunk({}, scored=scored))
        yield to_json({**self._chunk({}, self._reason(answer, has_calls=has_calls)), **memory(answer)})
        if self.with_usage:
            yield to_json({**self._about(".chunk"), "choices": [], "usage": usage(answer)})

    def _reason(self, answer: Answer, *, has_calls: bool) -> str | None:
        """Why the answer ends. One that was cut may end in the middle of a call."""
        if not has_calls or answer.finish_reason == "length":
            return answer.finish_reason
        return self.tools.reason

    def _about(self, suffix: str = "") -> dict[str, Any]:
        return {"id": self.id, "object": self.object + suffix, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, scored: Sequence[Any] = ()) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": self._logprobs(scored)}
        return {**self._about(".chunk"), "choices": [choice]}

    def _logprobs(self, scored: Sequence[Any]) -> Any:
        if not self.logprobs:
            return None
        return {"content": likelihoods(scored, self.options["n_top"]), "refusal": None}


class Completion:
    """One request of /v1/completions."""

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        self.id, self.created, self.model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.options = options_of(body)
        self.options.setdefault("max_tokens", 16)
        prompt = field_of(body, "prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
        ):
            raise InputError("prompt is a text, or a list of token ids; one a request")
        self.prompt: str | list[int] = prompt
        self.echo, self.stream = flag(body, "echo"), flag(body, "stream")
        self.with_usage = _with_usage(body)
        self.n_top = checked_n_top("logprobs", body.get("logprobs"))
        if self.n_top is not None:
            self.options["n_top"] = self.n_top
        hold_to(self.options, _grammar_of(body))
        if body.get("suffix"):
            raise InputError("suffix: this server continues texts, and does not fill gaps")
        if self.echo and (self.n_top is not None or not isinstance(prompt, str)):
            raise InputError("echo: goes with a prompt that is text, and without logprobs")

    def whole(self, answer: Answer, scored: Sequence[Any]) -> dict[str, Any]:
        """The response."""
        text = (str(self.prompt) if self.echo else "") + answer.content
        return {**self._choice(text, answer.finish_reason, scored), "usage": usage(answer), **memory(answer)}

    async def chunks(self, answer: Answer, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The response in pieces, as JSON."""
        if self.echo:
            yield to_json(self._choice(str(self.prompt)))
        plain = _Template(self._choice(_Template.MARK))
        async for piece in pieces:
            if self.n_top is None:
                yield plain.with_text(piece.text)
            else:
                yield to_json(self._choice(piece.text, None, piece.scored))
        yield to_json({**self._choice("", answer.finish_reason), **memory(answer)})
        if self.with_usage:
            yield to_json({**self._about(), "choices": [], "usage": usage(answer)})

    def _about(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(self, text: str, reason: str | None = None, scored: Sequence[Any] = ()) -> dict[str, Any]:
        logprobs = None if self.n_top is None else listed(scored)
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {**self._about(), "choices": [choice]}


class _Template:
    """JSON that differs in one text only. An object for each piece of a stream costs more than all else of the piece.

    Args:
        value: has MARK in place of the text, and nowhere else.
    """

    MARK = uuid.uuid4().hex

    def __init__(self, value: Any) -> None:
        self._before, self._after = to_json(value).split(to_json(self.MARK))

    def with_text(self, text: str) -> str:
        """The JSON with this text."""
        return f"{self._before}{to_json(text)}{self._after}"


def likelihoods(scored: Sequence[Any], n_top: int) -> list[dict[str, Any]]:
    """Log probabilities of tokens, each with the likeliest in its place."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        part = _BYTES.fullmatch(token)
        data = bytes.fromhex(part[1].replace("\\x", "")) if part else token.encode()
        return {"token": token, "logprob": logprob, "bytes": list(data)}

    return [
        {
            **entry(each.token, each.logprob),
            "top_logprobs": [entry(*top) for top in list(each.top.items())[:n_top]],
        }
        for each in scored
    ]


def usage(answer: Answer) -> dict[str, Any]:
    n_prompt, n = answer.n_prompt, answer.n_generated
    cached = {"cached_tokens": answer.n_cached}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n,
        "total_tokens": n_prompt + n,
        "prompt_tokens_details": cached,
    }


def memory(answer: Answer) -> dict[str, Any]:
    """What the turn did to its session."""
    done = answer.committed
    if done is None:
        return {}
    return {"memory": {"session": done.session, "version": done.version, "tokens_written": done.tokens_written}}


def _with_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise InputError('stream_options is {"include_usage": true or false}')
    return flag(options, "include_usage")


def _grammar_of(body: Mapping[str, Any]) -> Any:
    """Of the response format that a body asks for, in OpenAI's words or in llama-server's; None for any text."""
    if body.get("json_schema") is None:
        return grammar_of_format(body.get("response_format"))
    if body.get("response_format") is not None:
        raise InputError("json_schema: there is a response_format already: send one of them")
    return grammar_of_schema(body["json_schema"], "json_schema")


def hold_to(options: dict[str, Any], grammar: Any) -> None:
    """Has an answer follow the grammar of a schema, if there is one."""
    if grammar is not None:
        refuse_grammar(options)
        options["grammar"] = grammar


def refuse_grammar(options: Mapping[str, Any]) -> None:
    """Raises InputError if an answer that is held to a schema was to follow a grammar too."""
    if options.get("grammar"):
        raise InputError("grammar: the answer is held to a JSON schema already: send one of them")


def field_of(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of a body; null is as absent."""
    value = body.get(name)
    return default if value is None else value


def flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = field_of(body, name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is true or false, not {shown_value(value)}")
    return value
