"""Documents to train on (recipes/documents.py): answers that the text holds, the later of two facts, no text twice."""

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
