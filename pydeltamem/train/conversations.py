"""The lines of a training file as tokens: conversations, documents with questions, plain text.

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
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..errors import InputError, ModelError

TEXT_ANSWER = 64  # how many of the last tokens of a plain text the model has to predict; at most half of it
READ = "I have read it."  # what the assistant says to a document

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: what is decoded first, and what is asked once its text is gone."""

    earlier: list[int]
    segments: list[int]  # for each of those tokens the message that it belongs to
    asks: list[tuple[list[int], list[int], list[int]]]  # visible tail and question, their segments, answer
    continued: list[list[int]]  # for each ask the question as it follows earlier turns whose text stays
    visible: bool = False  # whether the text stays
    ask_writes: bool = True  # whether questions and answers write
    rehearsed: bool = False  # whether the text is read and written a second time before it goes
    keep: bool = False  # whether the answers are the frozen model's, whose distribution is to stay


class Conversations:
    """The lines of a training file. Each is loaded when it is needed; only the offsets are kept.

    Args:
        path: the file.
        tokenizer: of transformers, with a chat template.
        tail: messages before a question that stay visible.
        max_tokens: how many of the last tokens of the earlier turns are decoded.
        teacher: whether a question may lack its answer, which is then an empty list of tokens.

    Raises InputError, naming file and line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any,
        tail: int = 0,
        max_tokens: int = 1024,
        teacher: bool = False,
    ):
        self.path, self.tokenizer, self.tail, self.max_tokens = Path(path), tokenizer, tail, max_tokens
        self.teacher = teacher
        self._offsets: list[int] = []
        self.checksum = 0
        self.sizes: list[int] = []  # bytes of each line, about in proportion to its tokens
        try:
            with open(self.path, "rb") as file:
                offset = 0
                for line in file:
                    if line.strip():
                        self._offsets.append(offset)
                        self.sizes.append(len(line))
                    offset += len(line)
                    self.checksum = zlib.crc32(line, self.checksum)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not self._offsets:
            raise InputError(f"{self.path}: holds no conversation")
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(f"{tokenizer.name_or_path}: its tokenizer has no chat template, which conversations need")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> Example:
        with open(self.path, "rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        try:
            record = json.loads(line)
            if "text" in record:
                return self._of_text(i, _string(record, "text"))
            messages, asks = _of_document(record) if "document" in record else _of_messages(record)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{self.path}: conversation {i + 1} is no valid training line: {error!r}") from error
        visible = record.get("visible") is True
        if not (messages or visible) or not asks or not all(map(self._is_ask, asks)):
            raise InputError(
                f"{self.path}: conversation {i + 1} must have earlier messages and end with the assistant's answer"
            )
        n_earlier = max(1, len(messages) - self.tail)  # the tail is written once, where it is visible
        whole = [messages[n_earlier:] + ask for ask in asks]
        if any(len(ask) == 1 and ask[0]["role"] == "assistant" for ask in whole):
            raise InputError(f"{self.path}: conversation {i + 1} has an answer without a question before it")
        ids, segments = self._segmented(messages[:n_earlier])
        return Example(
            ids[-self.max_tokens :],
            segments[-self.max_tokens :],
            [self._ask(ask) for ask in whole],
            [self._continued(messages[:n_earlier], ids, ask) for ask in whole],
            visible,
            keep=record.get("keep") is True,
        )

    def refuse_packed_only(self) -> None:
        """Raises InputError if a line needs the packed form of a step."""
        with open(self.path, "rb") as file:
            for i, offset in enumerate(self._offsets):
                file.seek(offset)
                try:
                    record = json.loads(file.readline())
                except ValueError:
                    continue  # refused when it is drawn
                for flag in ("visible", "keep"):
                    if isinstance(record, dict) and "text" not in record and record.get(flag) is True:
                        said = f'conversation {i + 1} has "{flag}": true, which needs the packed form of a step'
                        raise InputError(f"{self.path}: {said}")

    def _is_ask(self, ask: Messages) -> bool:
        return bool(ask) and (ask[-1]["role"] == "assistant" or (self.teacher and ask[-1]["role"] == "user"))

    def _of_text(self, i: int, text: str) -> Example:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_tokens]
        if len(ids) < 4:
            raise InputError(f"{self.path}: the text of line {i + 1} is too short: it has {len(ids)} tokens")
        n = min(TEXT_ANSWER, len(ids) // 2)
        earlier, first, answer = ids[:-n], ids[-n : 1 - n], ids[1 - n :]
        return Example(earlier, [0] * len(earlier), [(first, [0], answer)], [first])

    def _segmented(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Tokens, and for each token the message that it belongs to."""
        ids: list[int] = []
        segments: list[int] = []
        for i in range(len(messages)):
            longer = self._tokens(messages[: i + 1])
            segments += [i] * (len(longer) - len(ids))
            ids = longer
        return ids, segments[: len(ids)]

    def _ask(self, messages: Messages) -> tuple[list[int], list[int], list[int]]:
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        question = self._tokens(before, add_generation_prompt=True)
        _, segments = self._segmented(before)
        segments += segments[-1:] * (len(question) - len(segments))
        answer: list[int] = []
        if before is not messages:
            whole = self._tokens(messages)
            if whole[: len(question)] != question:
                raise ModelError(
                    f"{self.tokenizer.name_or_path}: its chat template formats a prompt differently from a"
                    " conversation that goes on"
                )
            answer = whole[len(question) :]
        return question, segments[: len(question)], answer

    def _continued(self, earlier: Messages, ids: list[int], messages: Messages) -> list[int]:
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        whole = self._tokens(earlier + before, add_generation_prompt=True)
        n = len(ids) if whole[: len(ids)] == ids else 0  # 0: the template formats the end of a text differently
        return whole[n:]

    def _tokens(self, messages: Messages, **options: Any) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: its chat template refuses a conversation: {error}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _messages(given: Any) -> Messages:
    return [{name: _string(m, name) for name in ("role", "content")} for m in given]


def _string(record: Any, name: str) -> str:
    """A field of a line. Raises TypeError if it is no string."""
    value = record[name]
    if not isinstance(value, str):
        raise TypeError(f'"{name}" is {value!r}, no string')
    return value


def _of_messages(record: dict[str, Any]) -> tuple[Messages, list[Messages]]:
    messages = _messages(record["messages"])
    if "asks" in record:
        return messages, [_messages(ask) for ask in record["asks"]]
    n_answer = 2 if len(messages) > 1 and messages[-2]["role"] == "user" else 1
    return messages[:-n_answer], [messages[-n_answer:]]  # the question is the user's last message


def _of_document(record: dict[str, Any]) -> tuple[Messages, list[Messages]]:
    messages = [{"role": "user", "content": _string(record, "document")}, {"role": "assistant", "content": READ}]
    asks = []
    for item in record["questions"]:
        ask = [{"role": "user", "content": _string(item, "question")}]
        if item.get("answer") is not None:
            ask.append({"role": "assistant", "content": _string(item, "answer")})
        asks.append(ask)
    return messages, asks
