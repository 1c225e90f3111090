"""Dated chats of two people with questions that are answered in a few words, drawn for mixture.py.

A chat is one of those written by hand (recipes/documents/train.jsonl.gz): parts under heads such as "[9:51 pm on
31 July, 2010]". It is moved to other years. One, two or three are joined as the chat of one pair, with dates that go
on. Besides the questions written by hand it is asked when something was said: by the head of its part. A memory that
has met neither answers with a date that it likes, not with one that it read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

JOINED = (1, 1, 1, 2, 2, 3)  # how many chats are joined
LAST_YEARS = range(2010, 2027)  # in which a chat ends, each as often as the others
MAX_CHARACTERS = 6_000  # of a text: about 1,700 tokens
AS_NEAR = [
    " Say the date, as nearly as the conversation tells it.", " Say the date.",
    " Answer with a date, as exact as you can.", " Give the date or the year.",
]  # fmt: skip
SAID = [
    "When did {s} speak of {w}?", 'When did {s} write about "{w}"?', "When did {s} mention {w}?",
    "On which date did {s} talk about {w}?", "when did {s} tell {o} about {w}",
]  # fmt: skip
FIRST = ["When did {s} and {o} begin to write?", "When does the conversation of {s} and {o} begin?"]
LAST = ["When did {s} and {o} last write to each other?", "When did {s} and {o} talk for the last time?"]
YEAR = ["In which year did {s} and {o} last talk?", "Which year is it at the end of the conversation?"]

WRITER = re.compile(r"^([A-Z][^:]{0,24}): ")
HEAD = re.compile(r"^\[(.+ on )(\d{1,2} [A-Z][a-z]+, \d{4})\]$")
A_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
IS_WHEN = re.compile(r"^(when|on which da|on what da|what date|in which (month|year))", re.IGNORECASE)

Asked = list[tuple[str, str]]  # questions with answers


@dataclass(frozen=True)
class Part:
    """What was written at one time. head: the time of day, up to the date; lines: each begins with who wrote it."""

    head: str
    day: date
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    people: tuple[str, str]
    parts: tuple[Part, ...]
    asked: Asked

    def later(self, years: int) -> Chat:
        """The same, so many years later: the dates, and every year that is named."""

        def moved(text: str) -> str:
            return A_YEAR.sub(lambda year: str(int(year.group()) + years), text)

        parts = (Part(p.head, _moved(p.day, years), tuple(map(moved, p.lines))) for p in self.parts)
        return Chat(self.people, tuple(parts), [(moved(q), moved(a)) for q, a in self.asked])

    def of(self, people: tuple[str, str]) -> Chat:
        """The same of other people."""
        new = dict(zip(self.people, people)) | dict(zip(map(str.lower, self.people), map(str.lower, people)))
        name = re.compile(rf"\b({'|'.join(map(re.escape, new))})\b")

        def put(text: str) -> str:
            return name.sub(lambda found: new[found.group()], text)

        parts = (Part(p.head, p.day, tuple(map(put, p.lines))) for p in self.parts)
        return Chat(people, tuple(parts), [(put(q), put(a)) for q, a in self.asked])

    def text(self) -> str:
        return "\n".join("\n".join((f"[{p.head}{p.day.day} {p.day:%B}, {p.day.year}]", *p.lines)) for p in self.parts)


def chat_of(record: dict[str, Any]) -> Chat | None:
    """The chat that a document is; None if it has not two writers, or a line has no writer or no date."""
    parts: list[Part] = []
    writers: dict[str, None] = {}
    for line in record["text"].split("\n"):
        if head := HEAD.match(line):
            parts.append(Part(head[1], datetime.strptime(head[2], "%d %B, %Y").date(), ()))
        elif parts and (writer := WRITER.match(line)):
            writers[writer[1]] = None
            parts[-1] = Part(parts[-1].head, parts[-1].day, (*parts[-1].lines, line))
        else:
            return None
    if len(writers) != 2:
        return None
    people = next(iter(writers)), next(reversed(writers))
    days = [part.day for part in parts]
    return Chat(people, tuple(parts), [(q, a) for q, a in record["questions"]]) if days == sorted(days) else None


class Chats:
    """Draws chats as documents: title, text, questions with answers.

    Args:
        records: written documents; those that are no dated chat are left out.
    """

    def __init__(self, records: Sequence[dict[str, Any]], draw: random.Random):
        self.random = draw
        self.chats = [chat for chat in map(chat_of, records) if chat]

    def draw(self) -> tuple[str, str, Asked]:
        draw = self.random
        some = draw.sample(self.chats, min(draw.choice(JOINED), len(self.chats)))
        people = some[0].people
        parts: list[Part] = []
        asked: Asked = []
        while some:
            chat = some.pop(0).of(people if draw.random() < 0.5 or not parts else people[::-1])
            if parts:  # goes on after the last day
                years = parts[-1].day.year - chat.parts[0].day.year
                chat = chat.later(years + (_moved(chat.parts[0].day, years) <= parts[-1].day))
            else:
                longest = sum(other.parts[-1].day.year - other.parts[0].day.year + 1 for other in some)
                chat = chat.later(draw.choice(LAST_YEARS) - longest - chat.parts[-1].day.year)
            parts += chat.parts
            asked += chat.asked
        whole = Chat(people, tuple(parts), asked)
        by_hand = [(self._as_near(q), a) for q, a in asked]
        by_date = [(self._as_near(q), a) for q, a in self._dates(whole)]
        chosen = draw.sample(by_hand, min(len(by_hand), 5)) + draw.sample(by_date, min(len(by_date), 3))
        title = f"a conversation of {people[0]} and {people[1]}"
        return title, whole.text(), chosen

    def _as_near(self, question: str) -> str:
        if not IS_WHEN.match(question) or self.random.random() < 0.5:
            return question
        return question.rstrip("?") + "?" + self.random.choice((AS_NEAR[0], AS_NEAR[0], *AS_NEAR))

    def _dates(self, chat: Chat) -> Asked:
        """Questions for the day on which something was written, and for the first and the last day."""
        draw, (s, o) = self.random, chat.people
        found: Asked = []
        for question, answer in chat.asked:
            where = [(part, line) for part in chat.parts for line in part.lines if answer in line]
            if len(where) == 1 and len(answer) > 5 and not IS_WHEN.match(question):
                part, line = where[0]
                writer = s if line.startswith(f"{s}: ") else o
                asks = draw.choice(SAID).format(s=writer, o=o if writer == s else s, w=answer)
                found.append((asks, _said(part.day, draw.random)))
        for forms, part in ((FIRST, chat.parts[0]), (LAST, chat.parts[-1])):
            if draw.random() < 0.3:
                found.append((draw.choice(forms).format(s=s, o=o), _said(part.day, draw.random)))
        if draw.random() < 0.3:
            found.append((draw.choice(YEAR).format(s=s, o=o), str(chat.parts[-1].day.year)))
        return found


def _moved(day: date, years: int) -> date:
    """29 February becomes 28 February."""
    return day.replace(year=day.year + years, day=28 if (day.month, day.day) == (2, 29) else day.day)


def _said(day: date, chance: Callable[[], float]) -> str:
    return f"{day.day} {day:%B}{',' if chance() < 0.2 else ''} {day.year}"
