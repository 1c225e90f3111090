"""A model that reads conversations and answers questions: how the methods of an evaluation ask it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import ModelError
from ..llama import DeltaMemLlama
from ..runtime.cpus import usable
from .world import Turn

MAX_ANSWER = 16  # tokens


class Reader(Protocol):
    """A model with a memory that reads conversations and answers."""

    def n_tokens(self, turns: Sequence[Turn]) -> int: ...

    def begin(self, write: bool) -> None:
        """No text, an empty memory."""

    def read(self, turns: Sequence[Turn]) -> None:
        """Reads turns as one ingest, each message a segment."""

    def forget_text(self) -> None: ...

    def answer(self, question: str) -> str:
        """Reads the question, answers greedily; what it answers it has read too."""


class NativeReader:
    """A DeltaMemLlama."""

    def __init__(
        self, model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, threads: int | None = None
    ):
        threads = threads or max(usable() // 2, 1)
        self.llm: DeltaMemLlama = DeltaMemLlama(
            model_path=os.fspath(model), deltamem_path=adapter, n_ctx=0, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self._role = {role: self._tokens(f"<|{role}|>") for role in ("user", "assistant")}
        if any(len(tokens) != 1 for tokens in self._role.values()):
            raise ModelError(
                f"{model}: has no tokens <|user|> and <|assistant|>: only models of the small world can be asked of it"
            )
        self._tokens_of: dict[tuple[str, str], list[int]] = {}

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        return sum(len(self._message(role, text)) for turn in turns for role, text in zip(self._role, turn))

    def begin(self, write: bool) -> None:
        self.llm.reset()
        if self.llm.memory.attached:
            self.llm.memory.reset()
            self.llm.memory.write = write

    def read(self, turns: Sequence[Turn]) -> None:
        messages = [self._message(role, text) for turn in turns for role, text in zip(self._role, turn)]
        self._eval(messages)

    def forget_text(self) -> None:
        self.llm.reset()

    def answer(self, question: str) -> str:
        self._eval([self._message("user", question) + self._role["assistant"]])
        end, given = self.llm.token_eos(), []
        while len(given) < MAX_ANSWER:
            token = int(np.argmax(self.llm.logits))
            self.llm.eval([token])
            if token == end:
                break
            given.append(token)
        return self.llm.detokenize(given).decode("utf-8", errors="replace").strip()

    def _eval(self, messages: list[list[int]]) -> None:
        if not messages:
            return
        tokens = [token for message in messages for token in message]
        segments = [i for i, message in enumerate(messages) for _ in message]
        self.llm.eval(tokens, segments if self.llm.memory.by_segment else None)

    def _message(self, role: str, text: str) -> list[int]:
        if (role, text) not in self._tokens_of:
            self._tokens_of[role, text] = self._tokens(f"<|{role}|>{text}<|end|>")
        return self._tokens_of[role, text]

    def _tokens(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)
