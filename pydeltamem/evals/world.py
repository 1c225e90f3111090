"""A small world of everyday facts, and conversations in it: what the default model is trained on and measured with.

    world = World(seed=1)
    facts = world.facts(4)                          # four facts of one person
    [world.tell(fact) for fact in facts]            # turns (user, assistant)
    world.ask(facts[0])                             # ("Where do I live?", "You live in Lima.")

Which facts a memory has been trained on (`Part`) depends on the fact alone, so that training and measuring agree.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

from .world_phrases import (
    ACKNOWLEDGEMENTS,
    ATTRIBUTES,
    CHATTER,
    ECHOES,
    KNOWLEDGE,
    QUESTION_OPENINGS,
    STATEMENT_OPENINGS,
    UNKNOWN,
    VALUES,
)

# seen: trained on; new_pair: this attribute never had this value in an adapter's training, others may have had it;
# new_value: no adapter was trained on this value in any place. The backbone was trained on all.
Part = Literal["seen", "new_pair", "new_value", "any"]
Turn = tuple[str, str]  # what the user says, what the assistant answers


@dataclass(frozen=True)
class Fact:
    attribute: str
    value: str

    @property
    def part(self) -> Part:
        if _is_new(ATTRIBUTES[self.attribute][0], self.value):
            return "new_value"
        return "new_pair" if zlib.crc32(f"{self.attribute}={self.value}".encode()) % 6 == 0 else "seen"


def _is_new(kind: str, value: str) -> bool:
    """Whether no adapter is trained on this value."""
    return zlib.crc32(f"{kind}:{value}".encode()) % 8 == 0


def _facts() -> dict[Part, dict[str, list[str]]]:
    parts: dict[Part, dict[str, list[str]]] = {"seen": {}, "new_pair": {}, "new_value": {}, "any": {}}
    for attribute, (kind, *_) in ATTRIBUTES.items():
        for value in VALUES[kind]:
            for part in (Fact(attribute, value).part, "any"):
                parts[part].setdefault(attribute, []).append(value)
    return parts


FACTS = _facts()


class World:
    """Draws facts and phrases them.

    Args:
        seed: the same seed, the same draws.
        part: which facts may be drawn. Small talk has no held-out values, unless part is "any".
        phrasings: "seen" leaves out the phrasings that are held out, "new" takes only those, "any" takes all.
    """

    def __init__(self, seed: int, part: Part = "any", phrasings: Literal["seen", "new", "any"] = "any"):
        self.random = random.Random(seed)
        self.part = part
        self.phrasings = phrasings

    def facts(self, count: int) -> list[Fact]:
        """Facts of different attributes."""
        attributes = self.random.sample(sorted(FACTS[self.part]), count)
        return [Fact(attribute, self.random.choice(FACTS[self.part][attribute])) for attribute in attributes]

    def others(self, fact: Fact) -> list[str]:
        """The other values that the attribute may have."""
        return [value for value in FACTS[self.part][fact.attribute] if value != fact.value]

    def another(self, fact: Fact) -> Fact:
        """The same attribute with another value; there must be one."""
        return Fact(fact.attribute, self.random.choice(self.others(fact)))

    def tell(self, fact: Fact) -> Turn:
        return self._say(self._phrase(ATTRIBUTES[fact.attribute][1]), fact), self._acknowledge(fact)

    def update(self, fact: Fact) -> Turn:
        """Tells a fact that replaces one told before."""
        return self._say(self._phrase(ATTRIBUTES[fact.attribute][2]), fact), self._acknowledge(fact)

    def ask(self, fact: Fact) -> Turn:
        question = self._phrase(ATTRIBUTES[fact.attribute][3])
        answer = self.random.choice(ATTRIBUTES[fact.attribute][4])
        return self._open(question), answer.format(v=fact.value)

    def ask_unknown(self, known: list[Fact]) -> Turn:
        """A question to which the facts hold no answer."""
        told = {fact.attribute for fact in known}
        attribute = self.random.choice([attribute for attribute in ATTRIBUTES if attribute not in told])
        return self._open(self._phrase(ATTRIBUTES[attribute][3])), self.random.choice(UNKNOWN)

    def chatter(self) -> Turn:
        """Small talk: no fact about the user."""
        user, assistant = self.random.choice(CHATTER)
        values = {kind: self.random.choice(self._values(kind)) for kind in re.findall(r"{(\w+)}", user)}
        return _article(user.format(**values)), _article(assistant.format(**values))

    def knowledge(self) -> Turn:
        """A question that needs no memory."""
        question, answer = self.random.choice(KNOWLEDGE)
        return self._open(question), f"That is {answer}."

    def _values(self, kind: str) -> list[str]:
        return VALUES[kind] if self.part == "any" else [v for v in VALUES[kind] if not _is_new(kind, v)]

    def _phrase(self, phrases: list[str]) -> str:
        if self.phrasings == "new":
            return phrases[-1]
        return self.random.choice(phrases if self.phrasings == "any" else phrases[:-1])

    def _say(self, phrase: str, fact: Fact) -> str:
        opening = self.random.choice(STATEMENT_OPENINGS)
        if opening and not phrase.startswith(("I ", "{v}")):
            phrase = phrase[0].lower() + phrase[1:]
        return _article(opening + phrase.format(v=fact.value))

    def _open(self, question: str) -> str:
        opening = self.random.choice(QUESTION_OPENINGS)
        if opening.endswith((", ", ": ")):
            question = question[0].lower() + question[1:]
        return opening + question

    def _acknowledge(self, fact: Fact) -> str:
        if self.random.random() < 0.2:
            return self.random.choice(ECHOES).format(v=fact.value)
        return self.random.choice(ACKNOWLEDGEMENTS)


def _article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def rivals(fact: Fact) -> frozenset[str]:
    """The other values of the same kind as the fact's."""
    return frozenset(VALUES[ATTRIBUTES[fact.attribute][0]]) - {fact.value}
