"""The lines of a training file (lines.py) as tokens."""

from __future__ import annotations

import os
import weakref
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, ModelError, shown
from .lines import Line, Messages, line_of

TEXT_ANSWER = 64  # last tokens of a plain text, at most half of it: the first is shown, the others are to be predicted
TEXT_LEAST = 4  # tokens of a plain text
LONGEST_TOKEN = 256  # characters: a longer text than TEXT_LEAST of them is long enough


class Ask(NamedTuple):
    """A question about a conversation, as tokens."""

    question: list[int]  # after the messages that stay visible
    segments: list[int]  # for each of those tokens the message that it belongs to
    answer: list[int]  # empty: a teacher is to write it


class _Place(NamedTuple):
    """Where a line of the file is."""

    number: int  # from 1
    offset: int
    checksum: int


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: what is decoded first, and what is asked once its text is gone."""

    earlier: list[int]
    segments: list[int]  # for each of those tokens the message that it belongs to
    asks: list[Ask]
    continued: list[list[int]]  # for each ask the question as it follows earlier turns whose text stays
    visible: bool = False  # whether the text stays
    ask_writes: bool = True  # whether questions and answers write
    turns: tuple[int, ...] = ()  # where turns after the first begin, if writes are deferred: each reads those before it
    rehearsed: bool = False  # whether the text is decoded and written once more before it goes
    keep: bool = False  # whether the answers are the frozen model's, whose distribution is to stay


class Conversations:
    """The lines of a training file. All are checked at once, but only their places are kept: each is made tokens when
    it is needed, and at once if it is the first with its order of roles, which is what a chat template refuses. The
    file stays open: another one in its place changes nothing. One that is written over is noticed.

    Args:
        path: the file.
        tokenizer: of transformers, with a chat template if there are messages.
        tail: messages before a question that stay visible.
        max_tokens: how many of the last tokens of the earlier turns are decoded.
        teacher: whether a question may lack its answer, which is then an empty list of tokens.

    Raises InputError, naming file and line; ModelError if the chat template refuses it, or there is none.
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
        self._places: list[_Place] = []
        self._packed_only = ""  # the first line that needs the packed form of a step, and why
        self.checksum = 0
        self.sizes: list[int] = []  # bytes of each line, about in proportion to its tokens
        orders = set()
        offset = 0
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed with this object
            weakref.finalize(self, self._file.close)
            if not self._file.seekable():
                raise InputError(f"{self.path}: is a pipe, of which no line can be read twice: name a file")
            for number, line in enumerate(self._file, 1):
                if line.strip():
                    self._places.append(_Place(number, offset, zlib.crc32(line)))
                    self.sizes.append(len(line))
                    parsed = self._parsed(number, line)
                    if (order := _order(parsed)) not in orders or _may_be_short(parsed):
                        orders.add(order)
                        self._example(number, parsed)
                    for flag in ("visible", "keep"):
                        if getattr(parsed, flag):
                            self._packed_only = self._packed_only or f'line {number} has "{flag}": true'
                offset += len(line)
                self.checksum = zlib.crc32(line, self.checksum)
        except OSError as error:
            raise self._unreadable(error) from error
        if not self._places:
            raise InputError(f"{self.path}: holds no conversation")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Example:
        place = self._places[i]
        try:
            self._file.seek(place.offset)
            line = self._file.readline()
        except OSError as error:
            raise self._unreadable(error) from error
        if zlib.crc32(line) != place.checksum:
            raise InputError(f"{self.path}: line {place.number} was changed during the run: begin a new one")
        return self._example(place.number, self._parsed(place.number, line))

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be read: {error.strerror}")

    def _example(self, number: int, line: Line) -> Example:
        """A line as tokens. Raises InputError or ModelError, naming it."""
        try:
            return self._of_messages(line) if line.text is None else self._of_text(line.text)
        except ModelError as error:
            raise ModelError(f"{self.path}: line {number}: {error}") from error
        except ValueError as error:
            raise InputError(f"{self.path}: line {number}: {error}") from error

    def refuse_packed_only(self) -> None:
        """Raises InputError if a line needs the packed form of a step."""
        if self._packed_only:
            raise InputError(f"{self.path}: {self._packed_only}, which needs the packed form of a step")

    def _parsed(self, number: int, line: bytes) -> Line:
        """Raises InputError if it is no line to train on."""
        try:
            parsed = line_of(line)
            if parsed.text is None:
                self._check(parsed)
        except ValueError as error:
            raise InputError(f"{self.path}: line {number}: {error}") from error
        return parsed

    def _check(self, line: Line) -> None:
        if not (line.messages or line.visible):
            raise ValueError('there are no earlier messages, and no "visible": true')
        if not line.asks:
            raise ValueError("nothing is asked")
        for ask in line.asks:
            last = ask[-1]["role"] if ask else None
            if last != "assistant" and not (self.teacher and last == "user"):
                raise ValueError("a question does not end with the assistant's answer")
            if len(ask) == 1 and last == "assistant" and self._n_earlier(line) >= len(line.messages):
                raise ValueError("an answer has no question before it")

    def _n_earlier(self, line: Line) -> int:
        """How many messages are before the tail, which is written once, where it is visible."""
        return max(1, len(line.messages) - self.tail)

    def _of_text(self, text: str) -> Example:
        ids = self._ids(text)
        if len(ids) < TEXT_LEAST:
            raise ValueError(f"the text is too short: it has {len(ids)} tokens")
        n = min(TEXT_ANSWER, len(ids) // 2)
        begins = self._begins()
        earlier = [*begins, *ids[:-n]][-self.max_tokens :]
        shown, answer = ids[-n : 1 - n], ids[1 - n :]
        question = [*begins, *shown]  # where the text before it is gone, it begins another
        return Example(earlier, [0] * len(earlier), [Ask(question, [0] * len(question), answer)], [shown])

    def _begins(self) -> list[int]:
        """The token that begins texts of this model, if it has one; a chat template writes it itself."""
        ids: list[int] = self.tokenizer("", add_special_tokens=True)["input_ids"]
        return [token for token in ids[:1] if token == getattr(self.tokenizer, "bos_token_id", None)]

    def _of_messages(self, line: Line) -> Example:
        n_earlier = self._n_earlier(line)
        earlier, tail = line.messages[:n_earlier], line.messages[n_earlier:]
        asks = [tail + ask for ask in line.asks]
        ids, segments = self._segmented(earlier)
        asked = [self._ask(_with_system(line.messages, ask)) for ask in asks]
        wholes = [self._text([*earlier, *_prompting(ask)], add_generation_prompt=True) for ask in asks]
        beginning = self._text(earlier) if earlier else ""
        after = (self._after(beginning, ids, whole) for whole in wholes)
        continued = [tokens for tokens in after if tokens is not None]
        if len(continued) < len(wholes):  # the template formats the end of a text differently
            ids, segments = self._segmented(earlier, self._followed(earlier, asks, wholes))
            continued = [self._ids(whole)[len(ids) :] for whole in wholes]
        if not (ids or line.visible):
            raise ValueError("the chat template makes no token of the earlier messages")
        if not (all(continued) and (line.visible or all(ask.question for ask in asked))):
            raise ValueError("the chat template makes no token of a question")
        if not all(ask.answer for messages, ask in zip(asks, asked) if messages[-1]["role"] == "assistant"):
            raise ValueError("the chat template makes no token of an answer")
        kept, segments = ids[-self.max_tokens :], segments[-self.max_tokens :]
        users = [i for i, message in enumerate(earlier) if message["role"] == "user"][1:]
        turns = tuple(sorted({n for i in users if 0 < (n := bisect_left(segments, i)) < len(kept)}))
        return Example(kept, segments, asked, continued, line.visible, keep=line.keep, turns=turns)

    def _segmented(self, messages: Messages, ids: list[int] | None = None) -> tuple[list[int], list[int]]:
        """Tokens, and for each token the message that it belongs to. ids: of messages that others follow."""
        if ids is None:
            ids = self._ids(self._text(messages)) if messages else []
        segments: list[int] = []
        for i in range(1, len(messages)):
            segments += [i - 1] * (self._n_before(messages[:i], messages[i], ids) - len(segments))
        return ids, segments + [len(messages) - 1] * (len(ids) - len(segments))

    def _n_before(self, messages: Messages, following: dict[str, str], ids: list[int]) -> int:
        """How many tokens of a text are of its first messages. following: the message after these."""
        try:
            begun = self._ids(self._text(messages))
        except ModelError:
            return 0  # of some templates a system message alone is no conversation: it belongs to the next one
        if ids[: len(begun)] == begun:
            return len(begun)
        return n_shared([ids, *self._with_others(messages, following["role"])])

    def _followed(self, earlier: Messages, asks: list[Messages], wholes: list[str]) -> list[int]:
        """The tokens of earlier messages as they stand in each of these texts, where asks follow them."""
        role = asks[0][0]["role"]
        others = self._with_others(earlier, role) if _prompting(asks[0]) else []
        return self._ids(wholes[0])[: n_shared([*map(self._ids, wholes), *others])]

    def _with_others(self, messages: Messages, role: str) -> list[list[int]]:
        """The tokens of messages with two other ones after them, which have only their beginning in common."""
        return [self._ids(self._text([*messages, {"role": role, "content": other}])) for other in "0a"]

    def _ask(self, messages: Messages) -> Ask:
        before = _prompting(messages)
        prompt = self._text(before, add_generation_prompt=True)
        question = self._ids(prompt)
        _, segments = self._segmented(before)
        segments += (segments[-1:] or [0]) * (len(question) - len(segments))
        answer = [] if before is messages else self._after(prompt, question, self._text(messages))
        if answer is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: its chat template formats a prompt differently from a conversation"
                " that goes on"
            )
        return Ask(question, segments[: len(question)], answer)

    def _after(self, beginning: str, ids: list[int], whole: str) -> list[int] | None:
        """The tokens of a text after its beginning, of which `ids` are the tokens; None if it does not begin so."""
        tokens = self._ids(whole)
        if tokens[: len(ids)] == ids:
            return tokens[len(ids) :]
        # one token may hold the end of the beginning and what follows it, which a model cannot write
        return self._ids(whole[len(beginning) :]) if whole.startswith(beginning) else None

    def _text(self, messages: Messages, **options: Any) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(f"{self.tokenizer.name_or_path}: has no chat template, which messages need")
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program
            reason = shown(str(error).strip() or repr(error))
            raise ModelError(f"{self.tokenizer.name_or_path}: its chat template refuses it: {reason}") from error
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _prompting(messages: Messages) -> Messages:
    """What is asked, without the answer at its end."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _with_system(messages: Messages, ask: Messages) -> Messages:
    """A question in a text of its own, which begins with the conversation's system prompt, as `Conversation.clear`
    leaves it.
    """
    if messages and messages[0]["role"] == "system" != ask[0]["role"]:
        return [messages[0], *ask]
    return ask


def n_shared(lists: Sequence[Sequence[int]]) -> int:
    """Length of their common beginning."""
    return next((i for i, some in enumerate(zip(*lists)) if len(set(some)) > 1), min(map(len, lists)))


def _order(line: Line) -> tuple[Any, ...]:
    """The roles of a line's messages, in their order."""
    asks = (tuple(message["role"] for message in ask) for ask in line.asks)
    return line.text is None, line.visible, tuple(message["role"] for message in line.messages), frozenset(asks)


def _may_be_short(line: Line) -> bool:
    """Whether a part of a line may have too few tokens."""
    if line.text is not None:
        return len(line.text) < TEXT_LEAST * LONGEST_TOKEN
    return any(not message["content"].strip() for messages in (line.messages, *line.asks) for message in messages)
