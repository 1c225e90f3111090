"""Documents with questions that are answered in a few words, drawn by weight for mixture.py.

    written     chats of two people, articles, minutes, letters, notices, each written by hand with its questions
                (recipes/documents/train.jsonl.gz)
    passages    one to six paragraphs of different questions (train/nq_oracle.jsonl.gz)
    article     a part of an article (train/covidqa.jsonl.gz)
    two_hops    passages of which two answer a question together (train/hotpot_train_100.jsonl.gz)
    facts       numbered facts about people and places that nobody has; a later one replaces an earlier one
    compared    passages about things of one kind, with questions that compare them (compared.py)

The conversations of mixture.py are what one person says of themself. Benchmarks ask for what a text says of others, in
forms of their own ("Short answer:"), and a memory that has met neither repeats the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chats import MAX_CHARACTERS as MAX_CHARACTERS_OF_CHAT
from chats import Asked, Chats
from compared import Compared
from conversations import messages
from swap import Messages, Swap

WEIGHTS = {"written": 8.0, "passages": 4.0, "article": 1.0, "two_hops": 1.0, "facts": 1.2, "compared": 2.5}
MAX_CHARACTERS = 3_000  # of a text: about 750 tokens
HELD_OUT = 150  # questions at the end of nq_oracle.jsonl.gz that are not drawn
NOT_SAID = "not said"  # an answer of a written document

Record = tuple[Messages, list[Messages]]  # messages, questions with answers

OPENINGS = [
    "Below is {t}.\n\n", "Below is {t}, with the date of each part.\n\n", "Here is {t}:\n\n", "Below are {t}.\n\n",
    "This is {t}.\n\n", "Read {t}:\n", "", "I read {t} today.\n\n", "Below is your memory, {t}.\n\n", "Text:\n",
]  # fmt: skip
FORMS = [
    "Answer a question about {t} in a few words.\n\nQuestion: {q}\nShort answer:",
    "Answer a question about {t}, with the answer alone.\n\nQuestion: {q}\nAnswer:",
    "Question: {q}\nAnswer:", "Question: {q}\nShort answer:", "{q}\nAnswer in a few words.", "Q: {q}\nA:",
    "In a few words: {q}", "About {t}: {q}", "{q} Answer with a few words of the text.",
    "From memory, and briefly: {q}",
    "Answer a question from your memory only. If it is not there, say that you do not know.\n\nQuestion: {q}\nAnswer:",
]  # fmt: skip
UNKNOWN = [
    "It is not said.", "I do not know.", "That was not said.", "It isn't mentioned.", "The text does not say.",
]  # fmt: skip
READ = ["Okay.", "I have read it.", "Thank you, I'll keep that in mind.", "Got it.", "Noted.", "Thanks for sharing."]


@dataclass(frozen=True)
class Relation:
    """What is said of `a`, of the kind `of`, with a value `b` of the kind `to`. inner: how another question names b."""

    said: str
    question: str
    of: str
    to: str
    inner: str | None = None


RELATIONS = [
    Relation("{a} has {b} as its capital.", "What is the capital of {a}?", "place", "place", "the capital of {a}"),
    Relation("{a} was born in {b}.", "In which city was {a} born?", "person", "place", "the city where {a} was born"),
    Relation("{a} married {b}.", "Who is {a}'s spouse?", "person", "person", "the spouse of {a}"),
    Relation("{a} plays as {b}.", "What position does {a} play?", "person", "position"),
    Relation("{a} was written by {b}.", "Who wrote {a}?", "book", "person", "the author of {a}"),
    Relation("The field of {a} is {b}.", "What field does {a} work in?", "person", "field"),
    Relation("{a} lies in {b}.", "On which continent is {a}?", "place", "continent"),
    Relation("{b} directs {a}.", "Who is the director of {a}?", "firm", "person", "the director of {a}"),
    Relation("The founder of {a} is {b}.", "Who founded {a}?", "firm", "person", "the founder of {a}"),
    Relation("{a} speaks {b}.", "Which language does {a} speak?", "person", "language"),
    Relation(
        "{a} has its headquarters in {b}.", "In which city is the headquarters of {a}?", "firm", "place",
        "the city of {a}'s headquarters",
    ),
    Relation("{a} died in {b}.", "Where did {a} die?", "person", "place"),
    Relation("{a} works for {b}.", "Who is the employer of {a}?", "person", "firm", "the employer of {a}"),
    Relation("{a} plays {b}.", "Which sport does {a} play?", "firm", "sport"),
    Relation("{a} studied at {b}.", "Where was {a} educated?", "person", "firm"),
    Relation("People in {a} officially speak {b}.", "What is the official language of {a}?", "place", "language"),
]  # fmt: skip
VALUES = {
    "position": ["goalkeeper", "striker", "midfielder", "center", "winger", "pitcher", "quarterback", "defender"],
    "field": ["astronomy", "biology", "physics", "economics", "law", "painting", "chemistry", "medicine", "geology"],
    "continent": ["Asia", "Africa", "Europe", "North America", "South America", "Antarctica", "Oceania"],
    "language": ["French", "Spanish", "Welsh", "Japanese", "Dutch", "Swahili", "Hindi", "Polish", "Turkish", "Greek"],
    "sport": ["football", "hockey", "baseball", "cricket", "basketball", "handball", "tennis", "golf", "rowing"],
}
NAMES = {
    "person": ["{n} {m}"],
    "place": ["{p}"],
    "firm": ["{p} United", "{n} & Sons", "{p} Bank", "{n} Records", "{p} Airlines", "{p} Institute", "Radio {p}"],
    "book": ["The {n} Affair", "A Winter in {p}", "{n} and {m}", "Return to {p}", "The House of {n}", "{p} Nights"],
}


def drawable(paragraphs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions of nq_oracle.jsonl.gz but those held out, and others about the same texts."""
    texts = {item["ctxs"][0]["text"] for item in paragraphs[-HELD_OUT:]}
    return [item for item in paragraphs[:-HELD_OUT] if item["ctxs"][0]["text"] not in texts]


class Documents:
    """Draws documents as conversations: the text in a message, its questions each on its own.

    Args:
        written, paragraphs, articles, hops: the lines of the files, in the order of their names above.
        names: makes names.
    """

    def __init__(
        self,
        written: Sequence[dict[str, Any]],
        paragraphs: Sequence[dict[str, Any]],
        articles: Sequence[dict[str, Any]],
        hops: Sequence[dict[str, Any]],
        names: Swap,
        draw: random.Random,
    ):
        self.random, self.names = draw, names
        self.written, self.paragraphs, self.hops = written, drawable(paragraphs), hops
        self.articles = [(article["context"], _found(article)) for article in articles]
        self.articles = [(text, found) for text, found in self.articles if found]
        self.chats = Chats(written, draw)
        self.compared = Compared(names, draw)

    def draw(self) -> Record | None:
        """None if what was drawn has no question, or is too long."""
        (kind,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        source: Callable[[], tuple[str, str, Asked]] = getattr(self, f"_{kind}")
        return self._record(*source(), MAX_CHARACTERS)

    def draw_chat(self) -> Record | None:
        """The same of a dated chat (chats.py)."""
        return self._record(*self.chats.draw(), MAX_CHARACTERS_OF_CHAT)

    def _record(self, title: str, text: str, asked: Asked, max_characters: int) -> Record | None:
        if not asked or not 0 < len(text) <= max_characters:
            return None
        draw = self.random
        said = draw.choice(OPENINGS).format(t=title) + text
        form = draw.choice(FORMS) if draw.random() < 0.8 else "{q}"
        asks = []
        for question, answer in draw.sample(asked, min(len(asked), 8)):
            one = draw.choice(FORMS) if draw.random() < 0.15 else form
            asks.append(messages([(one.format(q=question, t=title), self._answer(answer, one != "{q}"))]))
        return messages([(said, draw.choice(READ))]), asks

    def _answer(self, answer: str, is_short: bool) -> str:
        if answer == NOT_SAID:
            return self.random.choice(UNKNOWN)
        if is_short and self.random.random() < 0.8:
            return answer
        return answer[0].upper() + answer[1:] + ("" if answer[-1] in ".!?" else ".")

    def _written(self) -> tuple[str, str, Asked]:
        one = self.random.choice(self.written)
        return one["title"], one["text"], [(question, answer) for question, answer in one["questions"]]

    def _passages(self) -> tuple[str, str, Asked]:
        draw, parts, asked = self.random, [], []
        for item in draw.sample(self.paragraphs, draw.choice((1, 1, 2, 3, 4, 6))):
            passage, answer, question = item["ctxs"][0], min(item["answers"], key=len), item["question"]
            if answer in passage["text"]:
                parts.append(f"{passage['title']}: {passage['text']}")
                asked.append((f"{question[0].upper()}{question[1:]}?" if draw.random() < 0.7 else question, answer))
        return "a paragraph" if len(parts) == 1 else f"{len(parts)} passages", "\n".join(parts), asked

    def _article(self) -> tuple[str, str, Asked]:
        draw = self.random
        text, found = draw.choice(self.articles)
        _, answer, place = draw.choice(found)
        n = draw.choice((800, 1_500, 2_500))
        begin = text.rfind(". ", 0, max(0, place - draw.randrange(n))) + 2
        begin = 0 if begin == 1 else begin
        end = text.find(". ", max(begin + n, place + len(answer))) + 1 or len(text)
        inside = [(q, a.rstrip(".")) for q, a, at in found if begin <= at and at + len(a) <= end]
        return "a part of an article", text[begin:end], inside

    def _two_hops(self) -> tuple[str, str, Asked]:
        draw, item = self.random, self.random.choice(self.hops)
        gold, share = {title for title, _ in item["supporting_facts"]}, draw.choice((0, 0.3, 0.6))
        shown = [passage for passage in item["context"] if passage[0] in gold or draw.random() < share]
        draw.shuffle(shown)
        text = "\n".join(f"{title}: {' '.join(map(str.strip, sentences))}" for title, sentences in shown)
        return f"{len(shown)} passages", text, [(item["question"], item["answer"])]

    def _facts(self) -> tuple[str, str, Asked]:
        draw = self.random
        known: dict[str, list[str]] = {}
        facts: dict[tuple[Relation, str], str] = {}
        said = []
        for _ in range(draw.choice((8, 12, 16, 24, 30))):
            if facts and draw.random() < 0.25:  # another value of one that was said
                key = draw.choice(list(facts))
            else:
                relation = draw.choice(RELATIONS)
                key = relation, self._name(relation.of, known)
            facts[key] = self._name(key[0].to, known)
            said.append(key[0].said.format(a=key[1], b=facts[key]))
        asked = [(relation.question.format(a=a), b) for (relation, a), b in facts.items()]
        for (first, a), b in facts.items():
            for (second, of), c in facts.items():
                if of == b and first.inner and first.to == second.of:
                    asked.append((second.question.format(a=first.inner.format(a=a)), c))
        first_number = draw.choice((0, 1))
        lines = [f"{i}. {fact}" for i, fact in enumerate(said, first_number)]
        return "a list of numbered facts", "\n".join(lines), draw.sample(asked, min(len(asked), 8))

    def _compared(self) -> tuple[str, str, Asked]:
        return self.compared.draw()

    def _name(self, kind: str, known: dict[str, list[str]]) -> str:
        """A value of a kind; every other time one that was said, so that facts are about each other."""
        if kind in VALUES:
            return self.random.choice(VALUES[kind])
        if known.get(kind) and self.random.random() < 0.5:
            return self.random.choice(known[kind])
        name = self.names.filled(self.random.choice(NAMES[kind]))
        known.setdefault(kind, []).append(name)
        return name


def _found(article: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Questions of an article whose answer is short, the answer, and where it stands."""
    short = [(question, min(answers, key=len).strip()) for question, answers in article["qa"]]
    places = [(question, answer, article["context"].find(answer)) for question, answer in short]
    return [(q, a, at) for q, a, at in places if at >= 0 and 0 < len(a.split()) <= 14]
