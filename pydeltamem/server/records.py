"""What a store keeps of a session, and what may go wrong with it."""

from __future__ import annotations

import datetime
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import DeltaMemError, InputError, shown_value

_MOST = 128  # characters of a name
_LONG = 4 * _MOST  # more than one is ever written in
_NAME = re.compile(r"(?!\.\.?$)[\w.@:+=-]+")  # . and .. would not survive in the path of a URL


class StoreError(DeltaMemError):
    """The store cannot be reached, is full, or is of another format."""


class StoreAway(StoreError):
    """The database cannot be reached now, and will be asked again."""


class SessionDamaged(StoreError):
    """What the store has of a session cannot be read."""


def told(error: object) -> str:
    """An error as clients may read it: where the store is, the log tells."""
    if isinstance(error, StoreAway):
        return "the store cannot be reached: try again in a moment"
    if isinstance(error, StoreError) and not isinstance(error, SessionDamaged):
        return "the store fails: the log of the server says why"
    return str(error)


class Conflict(DeltaMemError):
    """Another process has changed or holds the session."""


class SessionUnknown(DeltaMemError):
    """There is no such session."""


class SessionLimit(DeltaMemError):
    """The owner has as many sessions as it may have."""


class Identity(NamedTuple):
    """Which commit of which session: one that is deleted and made again counts from 1 again, but was made at another
    time, to the microsecond.
    """

    version: int  # 0: never committed
    created: datetime.datetime | None


NOTHING = Identity(0, None)  # of a session that was never committed


@dataclass(frozen=True)
class Turn:
    """One turn, and how to take it back.

    Attributes:
        number: from 1.
        chat: which chat of the session it belongs to: another text has another one.
        position: tokens of the text before it; -1: the text has others now.
        tokens: tokens ever written before it.
        state: the memory before it; None: no longer kept.
        digests: of its messages, as `history.digests`.
        messages: themselves, if the store keeps them.
    """

    number: int
    chat: str
    position: int
    tokens: int
    state: bytes | None
    digests: tuple[str, ...]
    messages: tuple[dict[str, Any], ...] | None = None
    created: datetime.datetime = field(default_factory=lambda: now())


@dataclass(frozen=True)
class Record:
    """A session as it was committed.

    Attributes:
        version: counts commits; 0: never committed.
        turns: number of turns.
        tokens: tokens ever written into the memory.
        adapter: names the adapter that the memory belongs to.
        memory: a memory file; empty: nothing was written.
        text: what is known of the text; empty: nothing.
        chat: as `Turn.chat`, of the present text.
        history: its turns, ascending.
    """

    owner: str
    name: str
    version: int = 0
    created: datetime.datetime = field(default_factory=lambda: now())
    updated: datetime.datetime = field(default_factory=lambda: now())
    turns: int = 0
    tokens: int = 0
    adapter: str = ""
    memory: bytes = b""
    text: bytes = b""
    chat: str = ""
    history: tuple[Turn, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the memory."""
        return len(self.memory)

    @property
    def identity(self) -> Identity:
        """Which commit it is."""
        return Identity(self.version, self.created) if self.version else NOTHING


@dataclass(frozen=True)
class Listed(Record):
    """A record without its memory, which knows how large that is."""

    listed_size: int = 0

    @property
    def size(self) -> int:
        return self.listed_size


def now() -> datetime.datetime:
    """The present time, UTC, without a time zone, as databases keep it."""
    return datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)


def as_seen(record: Record, seen: Identity | None) -> Record:
    """The session, if it is at the commit that was seen. Raises Conflict."""
    if seen is not None and record.identity != seen:
        raise Conflict(
            f"session {record.name}: version {seen.version} was seen, but it is at {record.version} now, or was made "
            "again: look at it again"
        )
    return record


def checked_name(name: str) -> str:
    """The name of a session, in Unicode's composed form (NFC): an é is one character in some programs, and two in
    others. Raises InputError if it cannot be one.
    """
    # not of a long one: to put many accents of one letter in order takes a time that grows with their square
    composed = unicodedata.normalize("NFC", name) if isinstance(name, str) and len(name) <= _LONG else ""
    # marks belong to a letter before them: vowels of Hindi and Thai, and accents that no letter has been composed with
    letters = "".join(each for each in composed if not _is_mark(each))
    if not _NAME.fullmatch(letters) or len(composed) > _MOST or composed[0] != letters[0]:
        raise InputError(
            f"{shown_value(name)} cannot be the name of a session: letters, digits and . _ - @ : + =, at most {_MOST}"
        )
    return composed


def name_like(text: str) -> str:
    """What is nearest to a text among the names of sessions; it may be empty, or none for another reason."""
    composed = unicodedata.normalize("NFC", text[:_LONG])
    kept = "".join(each if _NAME.fullmatch(f"a{each}") or _is_mark(each) else " " for each in composed)
    return "-".join(kept.split()).strip("-")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
