"""What the page shows of a session: its messages, and which of them are in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .history import digests
from .records import NOTHING, Identity, Record, Turn

NOTE = "note"  # the role of a line that nobody said

FORGOTTEN = "The text is forgotten. From here on the memory alone answers."
MEMORY_ONLY = "Only the memory of this session is kept, not what was said."


@dataclass
class Talk:
    """The messages of a session, as one tab knows them.

    Attributes:
        past: messages that are no longer in the text, and notes.
        messages: the present text, which is sent with the next turn.
        seen: which commit of the session this shows.
    """

    past: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    seen: Identity = NOTHING

    @classmethod
    def of(cls, record: Record) -> Talk:
        """What the store has kept of a session."""
        talk = cls(seen=record.identity)
        if any(turn.messages is None for turn in record.history) or (record.tokens and not record.history):
            talk.note(MEMORY_ONLY)
            return talk
        present = [turn for turn in record.history if record.chat and turn.chat == record.chat]
        before = record.history[: len(record.history) - len(present)]
        talk.past = _messages(before)
        if before:
            talk.note(FORGOTTEN)
        talk.messages = _messages(present)
        if digests(talk.messages) != [digest for turn in present for digest in turn.digests]:
            # the chat began with messages that the memory knew already, so it cannot be gone on with from these
            talk.past, talk.messages = talk.past + talk.messages, []
            talk.note(FORGOTTEN)
        return talk

    def copy(self) -> Talk:
        """The same, to go on otherwise."""
        return Talk(list(self.past), list(self.messages), self.seen)

    def note(self, text: str) -> None:
        """Adds a line that nobody said."""
        self.past.append({"role": NOTE, "content": text})

    def forget_text(self) -> None:
        """The text is gone; what was said stays in sight."""
        self.past += self.messages
        self.messages = []
        self.note(FORGOTTEN)

    @property
    def last(self) -> tuple[str, str] | None:
        """The latest turn, if it is in the text and of the usual form: what was said, and the answer."""
        if [message["role"] for message in self.messages[-2:]] != ["user", "assistant"]:
            return None
        return self.messages[-2]["content"], self.messages[-1]["content"]

    def undo(self) -> None:
        """Takes the latest turn out."""
        messages = self.messages or self.past
        i = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if i is not None:
            notes = [message for message in messages[i:] if message["role"] == NOTE]
            messages[i:] = notes


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [dict(message) for turn in turns for message in turn.messages or ()]
