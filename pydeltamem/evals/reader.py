"""A model that reads conversations and answers questions: how the methods of an evaluation ask it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from ..conversation import Conversation, chat_prompt, say_together
from ..formats.memory_file import MemorySnapshot
from ..llama import DeltaMemLlama
from ..runtime.cpus import usable
from ..runtime.history import n_common
from .world import Turn

MAX_ANSWER = 32  # tokens
PARALLEL = 8  # texts of a context, unless it is said otherwise
AT_ONCE = 64  # conversations that are begun together, of those that are asked one question

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """Questions that a model is asked one by one, each with the same before it: the other questions are not.

    memory: what it reads, and does not write; None: it has none. turns: the text that it sees.
    """

    memory: MemorySnapshot | None
    turns: tuple[Turn, ...]
    questions: tuple[str, ...]


class Reader(Protocol):
    """A model with a memory that reads conversations and answers."""

    @property
    def n_ctx(self) -> int: ...

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        """Of turns in a text, without what begins every text."""

    def attach(self, adapter: str | os.PathLike[str] | None) -> None:
        """From here on the model has this memory, or none."""

    def read(self, turns: Sequence[Turn]) -> MemorySnapshot:
        """What an empty memory holds after it has read the turns, one ingest, each message a segment."""

    def answer(self, asked: Sequence[Asked]) -> list[list[str]]:
        """The greedy answers to questions, in their order."""


class NativeReader:
    """A DeltaMemLlama, which is to be closed.

    Args:
        model: GGUF of a model with a chat template, or its name.
        adapter: what is attached first.
        n_ctx: tokens of a text; 0: as many as the model was trained on.
        threads: of decodes and prompts; None: half of the CPUs that the process may use.
        parallel: texts that the context holds, which are decoded together.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        n_ctx: int = 0,
        threads: int | None = None,
        parallel: int = PARALLEL,
    ):
        threads = threads or max(usable() // 2, 1)
        self.llm = DeltaMemLlama(
            model, deltamem_path=adapter, n_ctx=n_ctx, n_seq_max=parallel, n_threads=threads, n_threads_batch=threads
        )
        self._parallel = parallel
        self._opening = len(self.prompt([], ""))
        self._n_tokens: dict[Turn, int] = {}

    @property
    def n_ctx(self) -> int:
        return self.llm.n_ctx()

    def close(self) -> None:
        self.llm.close()

    def attach(self, adapter: str | os.PathLike[str] | None) -> None:
        if adapter is not None:
            self.llm.memory.attach(adapter)
        elif self.llm.memory.attached:
            self.llm.memory.detach()

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        for turn in turns:
            if turn not in self._n_tokens:
                self._n_tokens[turn] = len(self.prompt([turn], "")) - self._opening
        return sum(self._n_tokens[turn] for turn in turns)

    def prompt(self, turns: Sequence[Turn], question: str) -> list[int]:
        """The tokens of turns and a question, up to where its answer begins."""
        return chat_prompt(self.llm, [*messages_of(turns), {"role": "user", "content": question}])[0]

    def tokens(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """The tokens of turns, up to where another message begins, and of each the message that it belongs to."""
        messages = messages_of(turns)
        whole = self._ended(messages)
        segments: list[int] = []
        if self.llm.memory.by_segment:
            for i in range(1, len(messages)):
                n = n_common(whole, self._ended(messages[:i]))
                segments += [i - 1] * (n - len(segments))
        return whole, segments + [len(messages) - 1] * (len(whole) - len(segments))

    def _ended(self, messages: Messages) -> list[int]:
        """What a text of these messages begins with, whatever follows."""
        if not messages:
            return []
        follows = "assistant" if messages[-1]["role"] == "user" else "user"
        longer = chat_prompt(self.llm, [*messages, {"role": follows, "content": "?"}])[0]
        return longer[: n_common(chat_prompt(self.llm, messages)[0], longer)]

    def read(self, turns: Sequence[Turn]) -> MemorySnapshot:
        llm = self.llm
        llm.reset()
        llm.memory.reset()
        if turns:
            tokens, segments = self.tokens(turns)
            llm.eval(tokens, segments if llm.memory.by_segment else None)
        return llm.memory.copy()

    def answer(self, asked: Sequence[Asked]) -> list[list[str]]:
        answers: list[list[str]] = [[] for _ in asked]
        for together in _groups(asked, self._parallel):
            with ExitStack() as stack:
                conversations = [(i, stack.enter_context(self._conversation(asked[i]))) for i in together]
                for turn in range(max(len(asked[i].questions) for i in together)):
                    going_on = [(i, of) for i, of in conversations if turn < len(asked[i].questions)]
                    if turn > 0:
                        for _, conversation in going_on:
                            conversation.undo()  # the question before, and its answer
                    questions = {of: asked[i].questions[turn] for i, of in going_on}
                    said = say_together(questions, n_predict=MAX_ANSWER, temp=0.0)
                    for i, conversation in going_on:
                        answers[i].append(said[conversation].strip())
        return answers

    def _conversation(self, asked: Asked) -> Conversation:
        conversation = Conversation(self.llm)
        conversation.messages += messages_of(asked.turns)
        if asked.memory is not None:
            conversation.memory.restore(asked.memory)
            conversation.memory.write = False
        return conversation


def messages_of(turns: Iterable[Turn]) -> Messages:
    return [{"role": role, "content": content} for turn in turns for role, content in zip(("user", "assistant"), turn)]


def _groups(asked: Sequence[Asked], parallel: int) -> list[list[int]]:
    """Those that are asked together: no more than the context holds where a text is to stay for the next question."""
    one = [i for i, item in enumerate(asked) if len(item.questions) == 1]
    several = sorted((i for i in range(len(asked)) if i not in set(one)), key=lambda i: len(asked[i].questions))
    groups = [one[i : i + AT_ONCE] for i in range(0, len(one), AT_ONCE)]
    return groups + [several[i : i + parallel] for i in range(0, len(several), parallel)]
