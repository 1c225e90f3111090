"""Exchanged values of hand-written conversations (recipes/swap.py): the same in every place, and no word else."""

import random

import pytest

from conversations import messages
from swap import SORTS, Swap

ITS, GOING = "It's ", "You're going to "
SAID = messages(
    [
        ("we leave on friday at 6:40, Ximo drives, flat 12, bus no 305. Ximo's van is green", "Have a good trip."),
        ("my 3rd trip to Lisbon. the first was in 1997, with two friends", "Enjoy it."),
    ]
)
ASKS = [
    messages([pair])
    for pair in (
        ("what's the driver's name", "His name is Ximo."),
        ("Where do I go?", "You're going to Lisbon."),
        ("When do we leave?", "You leave on Friday at 6:40."),
        ("which bus", "It's 305."),
        ("Whose van is it?", "It's Ximo's van, a green one."),
        ("In which year was the first?", "It was in 1997."),
    )
]
NAMES = [messages([("What's her name?", f"Her name is {name}.")]) for name in ("Oda", "Thandiwe", "Kwabena")]
NAMES += [messages([("Where do I live?", f"You live in {name}.")]) for name in ("Derby", "Uppsala")]


@pytest.fixture
def exchanged():
    def exchange(seed):
        said, asks = Swap([*NAMES, *ASKS], random.Random(seed))(SAID, ASKS)
        return said[0]["content"], said[2]["content"], [ask[-1]["content"] for ask in asks]

    return exchange


@pytest.mark.parametrize("seed", range(40))
def test_an_answer_holds_what_the_person_says(exchanged, seed):
    first, second, (name, place, when, bus, van, year) = exchanged(seed)
    driver = name.removeprefix("His name is ").removesuffix(".")
    day, time = when.removeprefix("You leave on ").removesuffix(".").split(" at ")
    colour = van.split(" a ")[1].split(" ")[0]
    assert f"on {day.lower()} at {time}, {driver} drives" in first
    assert f"bus no {bus.removeprefix(ITS)} {driver}'s van is {colour}" in first
    assert f"to {place.removeprefix(GOING)} the first was in {year[-5:-1]}," in second
    assert driver in van
    assert day in SORTS[0]


def test_every_sort_of_value_is_exchanged(exchanged):
    drawn = [exchanged(seed) for seed in range(40)]
    for place in range(len(ASKS)):
        assert len({answers[place] for _, _, answers in drawn}) > 5


def test_other_words_and_ordinals_stay(exchanged):
    for seed in range(40):
        _, second, _ = exchanged(seed)
        assert second.startswith("my 3rd trip to ")
        assert second.endswith(" friends")


def test_the_same_seed_draws_the_same(exchanged):
    assert exchanged(5) == exchanged(5)
