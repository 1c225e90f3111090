"""Invented words in hand-written conversations (recipes/invented.py): the same in every place, and no word else."""

import random
import re

import pytest

from conversations import messages
from invented import COMMON, Invented, tokens_of
from pydeltamem.models import default_files

VOCABULARY = [
    "\u0120Bio",
    "\u0120comet",
    "\u0120Lisbon",
    "\u0120tra",
    "qi",
    "adem",
    "vl",
    "\u01201",
    "X",
    "!",
    "\u0120",
]
SAID = messages([("my cello teacher Oda moves to Uppsala. My flat is for sale", "Oda will like Uppsala.")])
ASKS = [
    messages([pair])
    for pair in (
        ("Where does my teacher move?", "To Uppsala."),
        ("what do i learn", "The cello."),
        ("How old is she?", "You haven't told me."),
    )
]


@pytest.fixture
def exchanged():
    def exchange(seed, said=SAID, asks=ASKS):
        return Invented(VOCABULARY, random.Random(seed))(said, asks)

    return exchange


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_holds_what_the_person_says(exchanged, seed):
    said, asks = exchanged(seed)
    place = asks[0][-1]["content"].removeprefix("To ").removesuffix(".")
    instrument = asks[1][-1]["content"].removeprefix("The ").removesuffix(".")
    assert said[0]["content"] == f"my {instrument} teacher Oda moves to {place}. My flat is for sale"
    assert said[1]["content"] == f"Oda will like {place}."
    assert (place, instrument) != ("Uppsala", "cello")
    assert place[0].isupper() and instrument.islower()
    assert [ask[0] for ask in asks] == [ask[0] for ask in ASKS] and asks[2] == ASKS[2]


def test_words_are_made_of_whole_tokens(exchanged):
    invented = {exchanged(seed)[1][0][-1]["content"].removeprefix("To ").removesuffix(".") for seed in range(50)}
    assert len(invented) > 10
    for word in invented - {"Uppsala"}:
        assert re.fullmatch("(bio|comet|lisbon|tra)(qi|adem|vl){0,2}", word.lower())


def test_what_a_question_names_stays(exchanged):
    ask = messages([("Is Uppsala where she goes?", "Yes, to Uppsala.")])
    assert exchanged(1, asks=[ask]) is None


def test_no_common_word_is_a_value(exchanged):
    said = messages([("she was there after you", "Good.")])
    assert exchanged(1, said, [messages([("Who came last?", "After you, she was there.")])]) is None
    assert {"after", "there"} <= COMMON


def test_the_same_seed_draws_the_same(exchanged):
    assert exchanged(5) == exchanged(5)


def test_tokens_are_those_of_the_file():
    model, _ = default_files()
    assert len(tokens_of(model)) > 100
