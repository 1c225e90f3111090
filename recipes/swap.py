"""Puts other names, numbers, days, months and colours into a conversation, the same in every place.

A conversation written by hand is used several times in training. With its values exchanged it asks for what the
person said this time, not for what the trainer has seen before. Grammar and questions stay as they were written.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable

Messages = list[dict[str, str]]

# Words of one sort; one of them takes the place of another.
SORTS = [
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    ["January", "February", "March", "April", "June", "July", "August", "September", "October", "November", "December"],
    [
        "red",
        "blue",
        "green",
        "yellow",
        "purple",
        "orange",
        "brown",
        "pink",
        "grey",
        "black",
        "white",
        "silver",
        "turquoise",
        "maroon",
        "teal",
        "beige",
        "navy",
    ],
    ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
]
NO_NAMES = {"You", "Your", "The", "She", "His", "Her", "They", *SORTS[0], *SORTS[1]}
TYPED = "\u2019s"  # an apostrophe as keyboards of phones write it
WORD = re.compile(r"[A-Za-z][A-Za-z'\u2019]*|\d+:\d\d|\d+")
OF_PERSON = re.compile(r"\b(who|whom|whose|name|named|called)\b", re.IGNORECASE)
OF_PLACE = re.compile(r"\b(where|city|town|village|country|street)\b", re.IGNORECASE)


def reworded(messages: Messages, word: re.Pattern[str], other: Callable[[re.Match[str]], str]) -> Messages:
    """The messages with something other in place of each word."""
    return [{**m, "content": word.sub(other, m["content"])} for m in messages]


class Swap:
    """Exchanges the values of conversations. Names come from all of them, by what a question asks for."""

    def __init__(self, asks: Iterable[Messages], draw: random.Random):
        self.random = draw
        names: dict[str, set[str]] = {"person": set(), "place": set()}
        for ask in asks:
            for name, kind in _names(ask):
                names[kind].add(name)
        self.names = {kind: sorted(found) for kind, found in names.items()}

    def __call__(self, said: Messages, asks: list[Messages]) -> tuple[Messages, list[Messages]]:
        text = " ".join(message["content"] for message in said if message["role"] == "user")
        words = list(dict.fromkeys(WORD.findall(text)))
        new = self._sorts(words) | self._numbers(words, text) | self._people(words, asks)

        def other(found: re.Match[str]) -> str:
            word = found.group()
            stem, end = (word[:-2], word[-2:]) if word[-2:] in ("'s", TYPED) else (word, "")
            return new.get(word, new[stem] + end if stem in new else word)

        return reworded(said, WORD, other), [reworded(ask, WORD, other) for ask in asks]

    def _people(self, words: list[str], asks: list[Messages]) -> dict[str, str]:
        """New names of the people and places that an answer holds."""
        draw, new = self.random, {}
        for name, kind in (found for ask in asks for found in _names(ask)):
            if name in words and name not in new and draw.random() < 0.7:
                new[name] = self.name(kind)
        return new

    def name(self, kind: str) -> str:
        """The name of a person or a place: one of the conversations', or one that nobody has."""
        first, second = self.random.choice(self.names[kind]), self.random.choice(self.names[kind])
        return first if self.random.random() < 0.5 else self._joined(first, second)

    def filled(self, pattern: str) -> str:
        """A pattern with names: {n} and {m} of persons, {p} of a place."""
        return pattern.format(n=self.name("person"), m=self.name("person"), p=self.name("place"))

    def _joined(self, first: str, second: str) -> str:
        """The beginning of one name and the end of another."""
        cut = max(2, len(first) // 2 + self.random.choice((-1, 0, 1)))
        return first[:cut] + second[max(1, len(second) // 2 + self.random.choice((-1, 0, 1))) :].lower()

    def _sorts(self, words: list[str]) -> dict[str, str]:
        new: dict[str, str] = {}
        lower = {word.lower() for word in words}
        for sort in SORTS:
            present = [word for word in sort if word.lower() in lower]
            if present and self.random.random() < 0.6:
                for old, other in zip(present, self.random.sample(sort, len(present)), strict=True):
                    new |= {form(old): form(other) for form in (str, str.lower, str.capitalize)}
        return new

    def _numbers(self, words: list[str], text: str) -> dict[str, str]:
        draw = self.random
        if draw.random() > 0.7:
            return {}
        new = {}
        for word in words:
            if not word[0].isdigit() or re.search(rf"(?<!\d){word}(st|nd|rd|th)\b", text):
                continue
            if ":" in word:
                is_morning = int(word.split(":")[0]) < 13
                hour = draw.randrange(1, 13) if is_morning else draw.randrange(13, 24)
                new[word] = f"{hour}:{draw.choice((draw.randrange(0, 60, 15), draw.randrange(60))):02}"
            elif len(word) == 4 and word[:2] in ("19", "20"):
                new[word] = str(draw.randrange(1930, 2025))
            elif len(word) < 9:
                first = "0" if word[0] == "0" else str(draw.randrange(1, 10))
                digits = (c if c == "0" and draw.random() < 0.5 else str(draw.randrange(10)) for c in word[1:])
                new[word] = first + "".join(digits)
        return new


def _names(ask: Messages) -> list[tuple[str, str]]:
    """The words of an answer that look like names, each with what the question asks for."""
    question, answer = ask[0]["content"], ask[-1]["content"]
    kind = "person" if OF_PERSON.search(question) else "place" if OF_PLACE.search(question) else None
    words = WORD.findall(answer)
    if kind is None:
        return []
    inner = words[1:] if len(words) > 2 else words  # the first word of a sentence has a capital anyway
    return [(w, kind) for w in inner if w[0].isupper() and len(w) > 2 and w.isalpha() and w not in NO_NAMES]
