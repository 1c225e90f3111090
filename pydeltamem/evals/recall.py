"""What a model with a memory still knows once the text is gone: the questions of `deltamem eval recall`.

Facts, pairings and phrasings are those that no memory was trained on (world.py). How they are asked is in methods.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .reader import Reader
from .world import Fact, Part, Turn, World, is_recalled

# What each task asks for: see Case
TASKS = ("recall", "overwrite", "distance", "new_values", "visible", "knowledge")
MEMORY_HEAVY = ("recall", "overwrite", "distance")  # what is asked for may have left the window
NO_MEMORY = ("visible", "knowledge")


@dataclass(frozen=True)
class Case:
    """One question.

    recall: any of several facts. overwrite: one that replaced another. distance: behind small talk. new_values: values
    that no memory was trained on. visible: told in the last turn, so that a window shows it. knowledge: what the model
    knows by itself.
    """

    task: str
    facts: int
    distance: int
    turns: tuple[Turn, ...]
    question: str
    fact: Fact | None  # None: `answer` must come
    answer: str = ""

    def is_right(self, answer: str) -> bool:
        return is_recalled(answer, self.fact) if self.fact else self.answer in re.findall(r"\w+", answer)


def make_cases(
    tasks: Sequence[str],
    n: int,
    facts: Sequence[int],
    distances: Sequence[int],
    seed: int,
    reader: Reader,
) -> Iterator[Case]:
    for task in tasks:
        part: Part = "new_value" if task == "new_values" else "new_pair"
        world = World(1_000 * seed + TASKS.index(task), part, phrasings="new")
        sizes = {"recall": facts, "new_values": (1, 4), "distance": distances}.get(task, (4,))
        for size in sizes:
            n_fact = 4 if task == "distance" else size
            for _ in range(n):
                told = world.facts(n_fact)
                while task == "overwrite" and not any(map(world.others, told)):
                    told = world.facts(n_fact)
                turns = [world.tell(fact) for fact in told]
                asked = world.random.choice(
                    [i for i, fact in enumerate(told) if task != "overwrite" or world.others(fact)]
                )
                if task == "overwrite":
                    told[asked] = world.another(told[asked])
                    turns.append(world.update(told[asked]))
                    place = world.random.randint(asked + 1, len(turns) - 1)
                    turns.insert(place, turns.pop())
                elif task == "visible":
                    turns.append(turns.pop(asked))
                while task == "distance" and reader.n_tokens(turns[n_fact:]) < size:
                    turns.append(world.chatter())
                distance = size if task == "distance" else 0
                if task == "knowledge":
                    question, answer = world.knowledge()
                    word = answer.removeprefix("That is ").rstrip(".")
                    yield Case(task, n_fact, distance, tuple(turns), question, None, word)
                else:
                    yield Case(task, n_fact, distance, tuple(turns), world.ask(told[asked])[0], told[asked])
