"""A model that reads conversations and answers the questions of an evaluation."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from ..conversation import Conversation, say_together
from ..errors import InputError
from ..formats.memory_file import MemorySnapshot
from ..llama import DeltaMemLlama
from ..runtime.chat_format import chat_prompt, has_template
from ..runtime.cpus import usable
from ..runtime.history import before_content, n_common
from .world import Turn

MAX_ANSWER = 32  # tokens
PARALLEL = 8  # texts of a context by default
AT_ONCE = 64  # questions that begin together if each has its own text

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """Questions that a model is asked one by one, each after the same text: it does not see the others.

    memory: each question has a copy of it; None: no memory. turns: the visible text, which does not write it.
    """

    memory: MemorySnapshot | None
    turns: tuple[Turn, ...]
    questions: tuple[str, ...]


class Reader(Protocol):
    """A model with a memory that reads conversations and answers."""

    @property
    def n_ctx(self) -> int: ...

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        """Tokens of turns in a text, without the beginning that all texts share."""

    def pieces(self) -> list[str]:
        """The text of each token of the vocabulary; "" if it alone is no text."""

    def n_tokens_of(self, text: str) -> int:
        """Tokens of a part of a text."""

    def attach(self, adapter: str | os.PathLike[str] | None) -> None:
        """Attaches an adapter; None: leaves the model without a memory."""

    def read(self, turns: Sequence[Turn]) -> MemorySnapshot:
        """The memory that the turns write into an empty one: one ingest, each message a segment."""

    def answer(self, asked: Sequence[Asked]) -> list[list[str]]:
        """The greedy answers to questions, in their order."""


class NativeReader:
    """A Reader of a DeltaMemLlama. Close it at the end.

    Args:
        model: GGUF of a model with a chat template, or its name.
        adapter: attached at the start; None: none.
        n_ctx: tokens of a text; 0: as many as the model was trained on.
        threads: of decodes and prompts; None: half of the CPUs that the process may use.
        parallel: texts that the context holds, which are decoded together.
        answer_writes: whether a question and its answer write the question's copy of the memory, as in a chat and in
            training.
        rehearses: whether the memory reads each conversation twice (`Memory.rehearse`).
        unpack: which weights are multiplied in BF16, as `DeltaMemLlama` takes it.
        defer_replies: as `DeltaMemLlama` takes it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        n_ctx: int = 0,
        threads: int | None = None,
        parallel: int = PARALLEL,
        answer_writes: bool = True,
        rehearses: bool = False,
        unpack: str = "none",
        defer_replies: bool = False,
    ):
        options = {"deltamem_path": adapter, "defer_replies": defer_replies, "unpack": unpack}
        self.llm = opened(model, n_ctx, threads, parallel, **options)
        self._parallel = parallel
        self._answer_writes, self.rehearses = answer_writes, rehearses
        self._opening = len(self.prompt([], ""))
        self._n_tokens: dict[Turn, int] = {}

    @property
    def n_ctx(self) -> int:
        return self.llm.n_ctx()

    def close(self) -> None:
        self.llm.close()

    def attach(self, adapter: str | os.PathLike[str] | None) -> None:
        attach(self.llm, adapter)

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        for turn in turns:
            if turn not in self._n_tokens:
                self._n_tokens[turn] = len(self.prompt([turn], "")) - self._opening
        return sum(self._n_tokens[turn] for turn in turns)

    def pieces(self) -> list[str]:
        return [self.llm.detokenize([token]).decode("utf-8", "ignore") for token in range(self.llm.n_vocab())]

    def n_tokens_of(self, text: str) -> int:
        return len(self.llm.tokenize(text.encode(), add_bos=False, special=False))

    def prompt(self, turns: Sequence[Turn], question: str) -> list[int]:
        """The tokens of turns and a question, up to where its answer begins."""
        return chat_prompt(self.llm, [*messages_of(turns), {"role": "user", "content": question}])

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
        """What a text of these messages, at least one, begins with, whatever follows."""
        follows = {"role": "assistant" if messages[-1]["role"] == "user" else "user"}
        render = functools.partial(chat_prompt, self.llm)
        longer = render([*messages, {**follows, "content": "?"}])
        ended = longer[: n_common(render(messages), longer)]
        if len(ended) > len(before_content(render, messages[:-1], messages[-1])):
            return ended
        return before_content(render, messages, follows)  # the template formats the end of a text differently

    def read(self, turns: Sequence[Turn]) -> MemorySnapshot:
        llm = self.llm
        llm.reset()
        llm.memory.reset()
        if turns:
            tokens, segments = self.tokens(turns)
            llm.eval(tokens, segments if llm.memory.by_segment else None)
            if self.rehearses:
                llm.memory.rehearse()
        return llm.memory.copy()

    def answer(self, asked: Sequence[Asked]) -> list[list[str]]:
        answers = [[""] * len(item.questions) for item in asked]
        for together in _groups(asked, self._parallel):
            with ExitStack() as stack:
                places: dict[Conversation, tuple[int, int]] = {}
                for i, which in together:
                    for k, conversation in zip(which, self._conversations(asked[i], len(which))):
                        places[stack.enter_context(conversation)] = i, k
                questions = {conversation: asked[i].questions[k] for conversation, (i, k) in places.items()}
                said = say_together(questions, n_predict=MAX_ANSWER, temp=0.0)
                for conversation, (i, k) in places.items():
                    answers[i][k] = said[conversation].strip()
        return answers

    def _conversations(self, asked: Asked, count: int) -> Iterator[Conversation]:
        """So many that go on from the visible text; several share what was read of it."""
        first = Conversation(self.llm)
        if asked.memory is not None:
            first.memory.restore(asked.memory)
            first.memory.write = False
        first.messages += messages_of(asked.turns)
        if asked.turns and (count > 1 or asked.memory is not None):
            latest = first.messages.pop()
            first.add(latest["role"], latest["content"])
        if asked.memory is not None:
            first.memory.write = self._answer_writes
        yield first
        for _ in range(count - 1):
            yield first.fork()


def opened(
    model: str | os.PathLike[str], n_ctx: int, threads: int | None, parallel: int, **kwargs: Any
) -> DeltaMemLlama:
    """A model that questions are asked of, for so many texts at once, with the same threads for all decodes.

    threads: None: half of the CPUs that the process may use. Raises as `DeltaMemLlama`, and InputError if the model has
    no chat template: llama_cpp would take Llama 2's for it.
    """
    threads = threads or max(usable() // 2, 1)
    llm = DeltaMemLlama(model, n_ctx=n_ctx, n_seq_max=parallel, n_threads=threads, n_threads_batch=threads, **kwargs)
    if not has_template(llm):
        llm.close()
        raise InputError(
            f"{llm.model_path}: has no chat template, by which questions are asked: name a model that has one"
        )
    return llm


def attach(llm: DeltaMemLlama, adapter: str | os.PathLike[str] | None) -> None:
    """Attaches an adapter; None: leaves the model without a memory."""
    if adapter is not None:
        llm.memory.attach(adapter)
    elif llm.memory.attached:
        llm.memory.detach()


def messages_of(turns: Iterable[Turn]) -> Messages:
    return [{"role": role, "content": content} for turn in turns for role, content in zip(("user", "assistant"), turn)]


def _groups(asked: Sequence[Asked], parallel: int) -> Iterator[list[tuple[int, range]]]:
    """Questions that are asked together: of each item the place of it, and which of its questions.

    Where several follow one text, there are no more than the context holds, so that the text is decoded once. The
    others take their turns in any number.
    """
    alone = [(i, range(k, k + 1)) for i, item in enumerate(asked) if not item.turns for k in range(len(item.questions))]
    alone += [(i, range(1)) for i, item in enumerate(asked) if item.turns and len(item.questions) == 1]
    for start in range(0, len(alone), AT_ONCE):
        yield alone[start : start + AT_ONCE]
    group: list[tuple[int, range]] = []
    for i, item in enumerate(asked):
        n = len(item.questions) if item.turns else 0
        for start in range(0, n if n > 1 else 0, parallel):
            which = range(start, min(start + parallel, n))
            if sum(len(of) for _, of in group) + len(which) > parallel:
                yield group
                group = []
            group.append((i, which))
    if group:
        yield group
