"""The prompt of a chat: messages as the model's chat handler writes them."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..llama import DeltaMemLlama
from ..runtime.chat_format import PromptCatcher, caught_prompt
from .history import Message
from .lengths import Lengths, PromptTooLong


class Prompts:
    """Prompts for a model.

    Attributes:
        lengths: of texts.
    """

    def __init__(self, llm: DeltaMemLlama) -> None:
        self._llm = llm
        self.lengths = Lengths(llm)

    def text(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The prompt of a chat as its template writes it, for `complete`, which adds a token that begins a text itself
        where the model wants one. The text of its tokens may have other spaces. Options as `chat`.
        """
        heard = _Heard(self._llm, lambda text: False)
        self._caught(heard, messages, options)
        text = heard.text.decode(errors="replace")
        begins = self._llm.detokenize(self._llm.tokenize(b"", add_bos=True), special=True).decode(errors="replace")
        return text.removeprefix(begins)

    def rendered(self, messages: Sequence[Message], options: Mapping[str, Any]) -> PromptCatcher:
        """The prompt of a chat, in tokens, and what ends its answer. Raises PromptTooLong."""
        n, n_ctx = len(messages), self._llm.n_ctx()
        if n > n_ctx:  # a template may leave messages out, but a turn hashes them all while everybody waits
            raise PromptTooLong(f"the chat has {n} messages, the context holds {n_ctx} tokens: send fewer")
        heard = _Heard(self._llm, self._may_fit)
        caught = self._caught(heard, messages, options)
        self.require_fit(heard.text)
        return caught

    def _caught(self, heard: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> PromptCatcher:
        asked = {name: options[name] for name in ("tools", "tool_choice") if options.get(name) is not None}
        if any(message.get("tool_calls") for message in messages) and self._writes_arguments:
            messages = [_with_objects(message) for message in messages]
        return caught_prompt(heard, messages, **asked, **(options.get("template") or {}))

    @functools.cached_property
    def _writes_arguments(self) -> bool:
        """Whether the template writes the arguments of a call as JSON by itself. It would quote, or refuse, a text that
        is JSON already, as answers and clients have it.
        """

        def rendered(arguments: Any) -> str | None:
            # Mistral's templates ask for such an id
            call = {"id": "abcdefgh9", "type": "function", "function": {"name": "f", "arguments": arguments}}
            heard = _Heard(self._llm, lambda text: False)
            with contextlib.suppress(InputError):
                said = {"role": "assistant", "content": "", "tool_calls": [call]}
                caught_prompt(heard, [{"role": "user", "content": "a"}, said])
                return heard.text.decode(errors="replace")
            return None

        as_text, as_object, quoted = rendered('{"probe": 1}'), rendered({"probe": 1}), '\\"probe\\"'
        if as_object is None or quoted in as_object:
            return False
        return as_text is None or quoted in as_text

    def _may_fit(self, text: bytes) -> bool:
        """Whether a text is worth tokenizing."""
        return self.lengths.at_least(text) < self._llm.n_ctx()

    def require_fit(self, text: bytes) -> None:
        """Raises PromptTooLong for a text that cannot fit."""
        if not self._may_fit(text):
            raise too_long(f"at least {self.lengths.at_least(text)}", self._llm.n_ctx())


class _Heard:
    """The model, as chat handlers use it.

    Args:
        tokenizes: which texts are tokenized; of others there are no tokens.

    Attributes:
        text: the latest that was to be tokenized.
    """

    def __init__(self, llm: DeltaMemLlama, tokenizes: Callable[[bytes], bool]) -> None:
        self._llm, self._tokenizes, self.text = llm, tokenizes, b""

    def tokenize(self, text: bytes, *arguments: Any, **options: Any) -> list[int]:
        self.text = text
        return self._llm.tokenize(text, *arguments, **options) if self._tokenizes(text) else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _with_objects(message: Message) -> Message:
    """A message whose calls have their arguments as objects, if they are whole."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call["function"])
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(function.get("arguments") or "")
            function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def too_long(n: object, n_ctx: int) -> PromptTooLong:
    """The error for a prompt of n tokens."""
    return PromptTooLong(f"the prompt has {n} tokens, the context holds {n_ctx}: send less, or serve a larger one")
