"""Documents to train on (recipes/documents.py, compared.py): right answers, the later of two facts, no text twice."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import documents
from compared import NATIONS
from conversations import messages
from documents import Documents
from swap import Swap

RECIPES = Path(documents.__file__).parent
WRITTEN = [{"title": "a note", "text": "Oda keeps a heron.", "questions": [["What does Oda keep?", "a heron"],
                                                                         ["How old is Oda?", "not said"]]}]  # fmt: skip
PARAGRAPHS = [
    {
        "question": f"who is number {i}",
        "answers": [f"Name {i}"],
        "ctxs": [{"title": f"T{i}", "text": f"It is Name {i}."}],
    }
    for i in range(documents.HELD_OUT + 40)
]
ARTICLES = [
    {
        "context": "Ferns are old. " * 80 + "Moss came later. " + "Trees are tall. " * 80,
        "qa": [["What is next?", ["Moss"]]],
    }
]
HOPS = [{"question": "Which is older, A or B?", "answer": "A", "supporting_facts": [["A", 0], ["B", 0]],
         "context": [["A", ["A is old."]], ["B", ["B is new."]], ["C", ["C is C."]]]}]  # fmt: skip
NAMES = [messages([("What's her name?", f"Her name is {name}.")]) for name in ("Oda", "Thandiwe", "Kwabena")]
NAMES += [messages([("Where do I live?", f"You live in {name}.")]) for name in ("Derby", "Uppsala")]


def drawn(seed, n, weights=None, monkeypatch=None):
    if weights:
        monkeypatch.setattr(documents, "WEIGHTS", weights)
    draw = random.Random(seed)
    made = Documents(WRITTEN, PARAGRAPHS, ARTICLES, HOPS, Swap(NAMES, draw), draw)
    return [found for found in (made.draw() for _ in range(n)) if found]


def test_the_same_seed_draws_the_same():
    assert drawn(1, 50) == drawn(1, 50) != drawn(2, 50)


@pytest.mark.parametrize("kind", ["passages", "article", "two_hops", "written"])
def test_the_text_holds_the_answers(kind, monkeypatch):
    found = drawn(3, 60, {kind: 1.0}, monkeypatch)
    assert len(found) > 30
    for said, asks in found:
        text = said[0]["content"].lower()
        for _, answer in asks:
            words = answer["content"].rstrip(".").lower()
            assert words in text or answer["content"] in documents.UNKNOWN


def test_no_paragraph_that_is_held_out(monkeypatch):
    text = json.dumps(drawn(4, 200, {"passages": 1.0}, monkeypatch))
    held_out = {f"Name {i}." for i in range(40, 40 + documents.HELD_OUT)}
    assert not held_out & set(re.findall(r"Name \d+\.", text))


def test_a_later_fact_replaces_an_earlier_one(monkeypatch):
    n_replaced = 0
    for said, asks in drawn(5, 200, {"facts": 1.0}, monkeypatch):
        lines = said[0]["content"].splitlines()
        for question, answer in asks:
            asked = re.search(r"What is the capital of ([^?]+)\?", question["content"])
            values = [line.split(" has ")[1] for line in lines if asked and f". {asked[1]} has " in line]
            values = [value.removesuffix(" as its capital.") for value in values if value.endswith("capital.")]
            if values:
                assert answer["content"].rstrip(".").lower() == values[-1].lower()
                n_replaced += len(set(values)) > 1
    assert n_replaced > 5


SAID = {  # what is said of a thing, and which of its questions it decides
    "species": (r"has (\d+) species", r"species"),
    "founded": (r"founded in (?:the year )?(\d+)", r"founded (?:first|earlier|later|more|before|after)|was founded$"),
    "nation": (r"is an? (\w+) (?:magazine|band|film|company)", "|".join(["nationality", *NATIONS])),
}


def test_two_things_are_compared(monkeypatch):
    """By a number or by a word: what is asked for, yes or no, and the one of two; neither place is right more often."""
    monkeypatch.setattr(documents, "FORMS", ["{q}"])
    kinds, n_first, n_choices = Counter(), 0, 0
    for said, asks in drawn(6, 900, {"compared": 1.0}, monkeypatch):
        passages = dict(line.split(": ", 1) for line in said[0]["content"].splitlines() if ": " in line)
        for question, answer in asks:
            text, right = question["content"], answer["content"].rstrip(".")
            for said_of, asked in SAID.values():
                values = {name: found[1] for name, about in passages.items() if (found := re.search(said_of, about))}
                named = [name for name in values if re.search(rf"\b{name}\b", text)]
                here = [name for name in named if not any(name in other != name for other in named)]
                here.sort(key=text.index)
                if len(here) != 2 or not re.search(asked, text):
                    continue
                a, c = here
                kind, expected = compared(text, a, c, values[a], values[c])
                assert right.lower() == expected.lower(), text
                kinds[kind] += 1
                if expected in here:
                    n_choices += 1
                    n_first += expected == a
    assert min(kinds[kind] for kind in ("order", "is order", "same", "which", "both")) > 30, kinds
    assert 0.4 < n_first / n_choices < 0.6


def compared(text, a, c, of_a, of_c):
    """The kind of a question and its answer, by the words of both."""
    if of_a.isdigit():
        is_less = int(of_a) < int(of_c)
        wants_less = bool(re.search("first|earlier|before|fewer", text))
        if re.search("Was|Does", text):
            return "is order", "yes" if is_less == wants_less else "no"
        return "order", a if is_less == wants_less else c
    if "What nationality are" in text or "of what nationality" in text:
        assert of_a == of_c
        return "both", of_a
    if text.startswith("Are"):
        return "same", "yes" if of_a == of_c else "no"
    assert of_a != of_c
    return "which", a if re.search(rf"\b{of_a}\b", text.replace(a, "").replace(c, "")) else c


def test_written_documents():
    with gzip.open(RECIPES / "documents" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        written = [json.loads(line) for line in file]
    texts = [one["text"] for one in written]
    assert len(set(texts)) == len(texts)
    evaluated = (RECIPES.parent / "pydeltamem" / "evals" / "natural.jsonl").read_text(encoding="utf-8")
    for one in written:
        assert one["title"] and one["questions"]
        for question, answer in one["questions"]:
            assert question and answer and json.dumps(question, ensure_ascii=False) not in evaluated
    held = [(answer.lower() in one["text"].lower()) for one in written for _, answer in one["questions"]]
    assert sum(held) > len(held) / 2  # the others put two sentences together, or were not said
