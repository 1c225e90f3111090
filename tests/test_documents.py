"""Documents to train on (recipes/documents.py, compared.py): right answers, the later of two facts, no text twice."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
import documents
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


def test_two_things_are_compared(monkeypatch):
    """By their numbers: the larger one is named, by its name or by yes and no; neither place is right more often."""
    found, n_first = [], 0
    for said, asks in drawn(6, 900, {"compared": 1.0}, monkeypatch):
        species = {name: int(n) for name, n in re.findall(r"(\w+): .* has (\d+) species\.", said[0]["content"])}
        for question, answer in asks:
            words = re.findall(r"\w+", question["content"])
            two = [word for word in words if word in species]
            if len(two) < 2 or not {"more", "fewer"} & set(words):
                continue
            is_more = species[two[0]] > species[two[1]]
            if "Which" in words:
                expected = two[not is_more]
                n_first += is_more
            else:
                expected = "yes" if is_more == ("more" in words) else "no"
            assert answer["content"].rstrip(".").lower() == expected.lower()
            found.append(expected)
    n = len(found) - found.count("yes") - found.count("no")
    assert n > 40 and found.count("yes") > 40 and found.count("no") > 40
    assert 0.35 < n_first / n < 0.65


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
