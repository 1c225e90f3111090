"""The small world: every phrase can be filled in, held-out values stay out, and words decide if an answer is right."""

from __future__ import annotations

import re

import pytest

from pydeltamem.evals.scoring import is_right
from pydeltamem.evals.world import FACTS, Fact, World, rivals
from pydeltamem.evals.world_phrases import ATTRIBUTES, CHATTER, VALUES


def test_phrases_are_whole():
    for attribute, (kind, statements, updates, questions, answers) in ATTRIBUTES.items():
        assert kind in VALUES, attribute
        assert len(statements) >= 4 and len(questions) >= 4 and updates and answers
        assert all(text.count("{v}") == 1 for text in (*statements, *updates, *answers)), attribute
        assert all("{" not in text and text.endswith("?") for text in questions), attribute
    for user, assistant in CHATTER:
        kinds = set(re.findall(r"{(\w+)}", user))
        assert set(re.findall(r"{(\w+)}", assistant)) <= kinds <= set(VALUES)


def test_values_are_words():
    for kind, values in VALUES.items():
        assert len(set(values)) == len(values), kind
        assert all(re.fullmatch(r"\w+", value) for value in values), kind


def test_parts_divide_the_facts():
    for attribute, values in FACTS["any"].items():
        parts = [FACTS[part].get(attribute, []) for part in ("seen", "new_pair", "new_value")]
        assert sorted(value for part in parts for value in part) == sorted(values)
    new = {(ATTRIBUTES[a][0], v) for a, values in FACTS["new_value"].items() for v in values}
    seen = {(ATTRIBUTES[a][0], v) for a, values in FACTS["seen"].items() for v in values}
    pairs = {(ATTRIBUTES[a][0], v) for a, values in FACTS["new_pair"].items() for v in values}
    assert not new & seen, "a value that no memory was trained on must not be among those it is trained on"
    assert len(pairs - seen) < 0.2 * len(pairs)  # nearly every value of a new pair occurs with another attribute


@pytest.mark.parametrize(("part", "phrasings"), [("seen", "seen"), ("new_pair", "new"), ("any", "any")])
def test_draws_stay_within_part_and_phrasings(part, phrasings):
    world = World(3, part, phrasings)
    for _ in range(300):
        facts = world.facts(5)
        assert len({fact.attribute for fact in facts}) == 5
        for fact in facts:
            assert part == "any" or fact.part == part
            _, statements, updates, questions, _ = ATTRIBUTES[fact.attribute]
            told, asked = world.tell(fact)[0], world.ask(fact)[0]
            changed = world.update(fact)[0]
            if phrasings != "any" and " an " not in told:  # the article of a phrase follows its value
                assert (statements[-1].format(v=fact.value).lower() in told.lower()) == (phrasings == "new"), told
                assert (questions[-1].lower() in asked.lower()) == (phrasings == "new"), asked
            if phrasings != "any" and " an " not in changed:
                assert (updates[-1].format(v=fact.value).lower() in changed.lower()) == (phrasings == "new"), changed


def test_no_memory_is_trained_on_new_values():
    """As recipes/conversations.py draws: neither facts nor small talk name them."""
    world = World(3, "seen", "seen")
    held_out = {v for a, values in FACTS["new_value"].items() for v in values}
    held_out -= {v for part in ("seen", "new_pair") for values in FACTS[part].values() for v in values}  # mate, number
    said = " ".join(" ".join(world.chatter()) for _ in range(5000))
    assert held_out and not held_out & set(re.findall(r"\w+", said))
    everything = World(3)
    said = " ".join(" ".join(everything.chatter()) for _ in range(5000))
    assert held_out & set(re.findall(r"\w+", said))


def test_the_same_seed_draws_the_same():
    def draw(seed):
        world = World(seed)
        return [(world.tell(f), world.ask(f), world.update(world.another(f))) for f in world.facts(8)], world.chatter()

    assert draw(1) == draw(1) != draw(2)


def test_another_value_replaces():
    world = World(1)
    for fact in world.facts(20):
        other = world.another(fact)
        assert other.attribute == fact.attribute and other.value != fact.value and other.value in world.others(fact)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("You live in Lima.", True),
        ("Lima", True),
        ("You live in Rome.", False),
        ("You live in Lima or Rome.", False),
        ("I do not know that yet.", False),
        ("You live in Limasol.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_names_the_value_alone(answer, right):
    assert is_right(answer, ["Lima"], rivals(Fact("home", "Lima"))) is right


def test_nobody_is_asked_what_was_told_as_unknown():
    world = World(2)
    for _ in range(50):
        known = world.facts(6)
        question, answer = world.ask_unknown(known)
        assert not any(q.lower() in question.lower() for fact in known for q in ATTRIBUTES[fact.attribute][3])
        assert "not" in answer
