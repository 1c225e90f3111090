"""Dated chats to train on (recipes/chats.py): joined in order, dates that the heads hold, nothing of LoCoMo's."""

import gzip
import json
import os
import random
import re
from datetime import datetime
from pathlib import Path

import chats
from chats import Chats, chat_of
from conftest import ROOT

WRITTEN = ROOT / "recipes" / "documents" / "train.jsonl.gz"
ONE = {
    "title": "a conversation of Oda and Bram, neighbours",
    "text": "[9:51 pm on 28 February, 2012]\nOda: I keep a heron since 2010.\n[6:00 am on 29 February, 2012]\n"
    "Bram: Oda, mine is a bittern.",
    "questions": [["What does Oda keep?", "a heron"], ["since when does oda keep it", "2010"]],
}
TWO = {
    "title": "a conversation of Ilse and Kofi",
    "text": "[1:00 pm on 3 January, 2020]\nIlse: My canoe leaks.\nKofi: Mine sank.",
    "questions": [["What does Ilse's boat do?", "leaks"], ["Whose boat sank?", "Kofi"]],
}
LOCOMO_PEOPLE = {
    "Andrew", "Audrey", "Calvin", "Caroline", "Dave", "Deborah", "Evan", "Gina", "James", "Joanna", "John", "Jolene",
    "Jon", "Maria", "Melanie", "Nate", "Sam", "Tim",
}  # fmt: skip
SAID_IN_LOCOMO = "I ran a charity race for mental health last Saturday"
HEAD = re.compile(r"^\[.* on (\d+ [A-Z][a-z]+, \d{4})\]$", re.MULTILINE)
DAY = re.compile(r"^(\d+ [A-Z][a-z]+),? (\d{4})$")


def days(text):
    return [datetime.strptime(day, "%d %B, %Y") for day in HEAD.findall(text)]


def drawn(n, records=(ONE, TWO)):
    made = Chats(records, random.Random(3))
    return [made.draw() for _ in range(n)]


def test_what_is_a_chat():
    assert chat_of(ONE).people == ("Oda", "Bram")
    assert chat_of(ONE).text() == ONE["text"]
    assert chat_of({**ONE, "text": ONE["text"] + "\nand a line of nobody"}) is None
    assert chat_of({**ONE, "text": ONE["text"] + "\nEva: I am a third."}) is None
    assert chat_of({**ONE, "text": "\n".join(reversed(ONE["text"].split("\n")))}) is None
    assert chat_of({"title": "a note", "text": "Oda keeps a heron.", "questions": []}) is None


def test_later_moves_every_year_and_29_february():
    later = chat_of(ONE).later(3)
    assert days(later.text()) == [datetime(2015, 2, 28), datetime(2015, 2, 28)]
    assert "since 2013" in later.text() and ("since when does oda keep it", "2013") in later.asked


def test_other_people_take_both_names():
    other = chat_of(ONE).of(("Ilse", "Kofi"))
    assert "Kofi: Ilse, mine is a bittern." in other.text()
    assert [q for q, _ in other.asked] == ["What does Ilse keep?", "since when does ilse keep it"]


def test_joined_chats_are_of_one_pair_and_go_on_in_time(monkeypatch):
    monkeypatch.setattr(chats, "JOINED", (2,))
    for title, text, _ in drawn(50):
        people = re.fullmatch(r"a conversation of (\w+) and (\w+)", title).groups()
        assert set(re.findall(r"^(\w+): ", text, re.MULTILINE)) == set(people)
        dates = days(text)
        assert len(dates) == 3 and dates == sorted(dates)
        assert dates[-1].year <= max(chats.LAST_YEARS) + 1


def test_a_date_that_is_asked_for_is_the_head_of_what_was_said():
    checked = 0
    for _, text, asked in drawn(200):
        for question, answer in asked:
            if (day := DAY.match(answer)) and "heron" in question:
                head = text[: text.index("heron")]
                assert days(head)[-1] == datetime.strptime(f"{day[1]} {day[2]}", "%d %B %Y")
                checked += 1
    assert checked > 20


def test_the_same_seed_draws_the_same():
    assert drawn(20) == drawn(20)


def test_written_documents_take_no_person_of_locomo():
    people = {person for chat in map(chat_of, written()) if chat for person in chat.people}
    assert len(people) > 500 and not people & LOCOMO_PEOPLE


def test_written_documents_take_no_date_or_sentence_of_locomo():
    """Where its file is: those who write documents have read LoCoMo, and some remembered it."""
    path = Path(os.environ.get("DELTAMEM_DATA") or ROOT.parent / "shared" / "data") / "locomo10.json"
    said, times = set(sevens(SAID_IN_LOCOMO)), {"1:56 pm on 8 May, 2023"}
    for record in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
        for name, value in record["conversation"].items():
            if name.endswith("date_time"):
                times.add(value.strip())
            elif isinstance(value, list):
                said |= {words for turn in value for words in sevens(turn["text"])}
    for record in written():
        assert not times & set(re.findall(r"^\[(.* on .*)\]$", record["text"], re.MULTILINE)), record["title"]
        assert len(sevens(record["text"]) & said) < 2, record["title"]


def written():
    with gzip.open(WRITTEN, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sevens(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 7]) for i in range(len(words) - 6)}
