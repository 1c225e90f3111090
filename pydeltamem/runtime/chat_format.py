"""Prompts of chats, as the model's chat handler writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError
from . import library
from .model import Model
from .tokenizer import encoded

_llama_chat_format: Any = library.llama_cpp.llama_chat_format  # mypy does not know all of it


def has_template(llm: Model) -> bool:
    """Whether the model's file or a handler says how a chat is written; else llama_cpp takes Llama 2's form."""
    return llm.chat_handler is not None or "tokenizer.chat_template" in llm.metadata


def chat_prompt(llm: Model, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens that create_chat_completion decodes for these messages. Raises InputError if its template fails."""
    return caught_prompt(llm, messages).prompt


def caught_prompt(llm: Model, messages: Sequence[Mapping[str, Any]], **options: Any) -> PromptCatcher:
    """What the model's chat handler asks for these messages: prompt, what ends the reply, and a grammar.

    Options: `tools`, `tool_choice` as create_chat_completion; others are variables of the template.
    Raises InputError if the handler refuses them.
    """
    llm._engine.slots.require_open()  # llama_cpp would follow a null pointer
    catcher, name = PromptCatcher(llm), str(llm.chat_format)
    handler = llm.chat_handler or llm._chat_handlers.get(name) or _llama_chat_format.get_chat_completion_handler(name)
    try:
        handler(llama=catcher, messages=list(messages), stream=True, **options)
    except Exception as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error
    return catcher


class PromptCatcher:
    """Stands in for the model in a chat handler, and keeps the prompt instead of decoding it."""

    def __init__(self, llm: Model) -> None:
        self._llm = llm
        self.prompt: list[int] = []
        self.stop: list[str] = []
        self.stopping_criteria: Any = None
        self.grammar: Any = None

    def create_completion(
        self,
        prompt: str | list[int],
        stop: list[str] | None = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        if isinstance(prompt, str):  # as some handlers give it
            prompt = self._llm.tokenize(encoded(prompt, "the prompt"), add_bos=True, special=True)
        self.prompt, self.stop, self.stopping_criteria, self.grammar = prompt, stop or [], stopping_criteria, grammar
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
