"""Writes conversations of the small world for `deltamem train`: facts, some replaced later, small talk, questions.

    python recipes/conversations.py build/default/train.jsonl --count 40000 --seed 1

Uses only facts and phrasings that no evaluation asks for (pydeltamem/evals/world.py: part and phrasings "seen").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pydeltamem.evals.world import Turn, World
from pydeltamem.formats.atomic import replacing
from pydeltamem.formats.kinds import CONVERSATIONS

N_FACTS = (1, 1, 2, 2, 3, 4, 4, 6, 8, 12)
N_ASKS = 4


def conversation(world: World) -> tuple[list[Turn], list[Turn]]:
    """What is said before the text goes, and what is asked afterwards, one question at a time."""
    draw = world.random
    facts = world.facts(draw.choice(N_FACTS))
    said = [[world.tell(fact)] for fact in facts]
    for i, fact in enumerate(facts):
        if draw.random() < 0.2:
            facts[i] = world.another(fact)
            said[i].append(world.update(facts[i]) if draw.random() < 0.5 else world.tell(facts[i]))
    said += [[world.chatter()] for _ in range(draw.choice((0, 0, 1, 2, 4, 8)))]
    order = [i for i, turns in enumerate(said) for _ in turns]
    draw.shuffle(order)
    turns = [said[i].pop(0) for i in order]  # an update comes after what it replaces
    if draw.random() < 0.2 and len(turns) > 1:  # two things in one message
        first, second = turns.pop(), turns.pop()
        turns.append((f"{second[0]} {first[0]}", first[1]))

    asks = []
    for _ in range(N_ASKS):
        kind = draw.random()
        if kind < 0.82:
            asks.append(world.ask(draw.choice(facts)))
        elif kind < 0.9:
            asks.append(world.ask_unknown(facts))
        else:
            asks.append(world.knowledge() if kind < 0.95 else world.chatter())
    return turns, asks


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    world = World(args.seed, part="seen", phrasings="seen")
    with replacing(args.out, CONVERSATIONS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for _ in range(args.count):
            turns, asks = conversation(world)
            json.dump({"messages": messages(turns), "asks": [messages([ask]) for ask in asks]}, file)
            file.write("\n")


if __name__ == "__main__":
    main()
