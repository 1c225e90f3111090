"""A model that decodes the contexts of a benchmark and answers questions about them.

Questions about one context share it: it is decoded once, and each question goes on from a fork of its text and memory.
They are decoded in common batches.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..conversation import Conversation, say_together
from ..formats.memory_file import MemorySnapshot
from ..runtime.chat_format import chat_prompt
from ..runtime.history import n_common
from .reader import attach, opened

MARGIN = 16  # tokens that pieces may take together beyond what they take one by one


@dataclass(frozen=True)
class Shared:
    """What questions are asked after.

    Attributes:
        text: decoded before the questions, written if there is a memory; "": nothing.
        is_dropped: the text leaves before the questions, and the memory stays.
        writes: whether questions and answers write the memory.
        is_rehearsed: the text is decoded and written a second time before it leaves.
    """

    text: str = ""
    is_dropped: bool = False
    writes: bool = True
    is_rehearsed: bool = False


@dataclass(frozen=True)
class Ask:
    """A question: `text` follows the shared text in one message. options: of `Conversation.say`."""

    shared: Shared
    text: str
    options: Mapping[str, Any] = field(hash=False)


class Asker:
    """A model with slots for several texts. Close it at the end.

    Args:
        model: GGUF of a model with a chat template, or its name.
        lora: a LoRA adapter as GGUF.
        n_ctx: tokens of a text; 0: as many as the model was trained on.
        threads: None: half of the CPUs that the process may use.
        parallel: texts that are decoded together, a shared one among them.
        shares: whether a context that several questions have is decoded once.
        memory: what the memory of each text begins with, for the adapter that wrote it; None: with an empty one.
        **kwargs: as `DeltaMemLlama`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        lora: str | os.PathLike[str] | None = None,
        n_ctx: int = 0,
        threads: int | None = None,
        parallel: int = 8,
        shares: bool = True,
        memory: MemorySnapshot | None = None,
        **kwargs: Any,
    ):
        self.llm = opened(model, n_ctx, threads, parallel, lora_path=lora, **kwargs)
        self.parallel, self.shares, self._memory = parallel, shares, memory
        with self.llm._engine.lock:
            self.llm._engine.slots.leave(self.llm._text)  # every slot is for questions
        self._kept: tuple[Shared, Conversation] | None = None  # the shared text of the latest questions
        self.count = functools.lru_cache(maxsize=200_000)(self._count)

    @property
    def n_ctx(self) -> int:
        return self.llm.n_ctx()

    def close(self) -> None:
        self.llm.close()

    def attach(self, adapter: str | os.PathLike[str] | None) -> None:
        """Attaches an adapter; None: leaves the model without a memory."""
        self.forget()
        attach(self.llm, adapter)

    def forget(self) -> None:
        """Drops the shared text, so that what follows does not depend on what was asked before."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    def _count(self, text: str) -> int:
        return len(self.llm.tokenize(text.encode(), add_bos=False, special=False))

    def n_prompt(self, text: str) -> int:
        """Tokens of a prompt with this message."""
        return len(self._prompt(text))

    def _prompt(self, text: str) -> list[int]:
        return chat_prompt(self.llm, [{"role": "user", "content": text}])

    def say(self, text: str, n_predict: int) -> str:
        """The greedy answer to a prompt alone."""
        with Conversation(self.llm, n_predict=n_predict, temp=0.0) as alone:
            return alone.say(text)

    def answer(self, asked: Sequence[Ask]) -> list[str]:
        """The answers, in their order. At most `parallel` questions, one less if they share a text, or any number that
        have none before them.

        Questions that share a text stand side by side.
        """
        shared = asked[0].shared
        if self.shares and len(asked) > 1 and shared.text and all(ask.shared == shared for ask in asked):
            first = self._read_once(shared)
            conversations = [first.fork() for _ in asked]
        else:
            self.forget()
            conversations = [self._read(ask.shared) for ask in asked]
        try:
            for conversation, ask in zip(conversations, asked):
                conversation.options.update(ask.options)
            texts = [("" if ask.shared.is_dropped else ask.shared.text) + ask.text for ask in asked]
            said = say_together(dict(zip(conversations, texts)))
        finally:
            for conversation in conversations:
                conversation.close()
        return [said[conversation] for conversation in conversations]

    def _read_once(self, shared: Shared) -> Conversation:
        if self._kept is None or self._kept[0] != shared:
            self.forget()
            self._kept = shared, self._read(shared)
        return self._kept[1]

    def _read(self, shared: Shared) -> Conversation:
        """A conversation after the shared text, read as one ingest."""
        conversation = Conversation(self.llm)
        if self._memory is not None and self.llm.memory.attached:
            conversation.memory.restore(self._memory)
        if shared.text:
            tokens = self._begun(shared.text)
            segments = np.zeros(len(tokens), dtype=np.int32) if self.llm.memory.by_segment else None
            conversation._text.eval(tokens, segments)
            if not shared.is_dropped:  # the question is of the same message
                conversation._text.goes_on()
            if shared.is_rehearsed:
                conversation.memory.rehearse()
            if shared.is_dropped:
                conversation.clear()
        if self.llm.memory.attached:
            conversation.memory.write = shared.writes
        return conversation

    def _begun(self, text: str) -> list[int]:
        """The tokens of a message that begins so, whatever follows."""
        ways = [self._prompt(text + other) for other in "Q7"]
        return ways[0][: n_common(*ways)]
