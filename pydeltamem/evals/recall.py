"""What a model with a memory still knows once the text is gone: the questions of `deltamem eval recall`.

No adapter was trained on these facts, pairings and phrasings. methods.py asks the questions, scoring.py judges the
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from . import corpora, words
from .case import Case
from .reader import Reader
from .world import FACTS, Fact, Part, Turn, World, rivals

# Of the small world (world.py). recall: any of several facts. overwrite: one that replaced another. distance: after
# small talk. new_values: values that no adapter was trained on. visible: told in the last turn, so that a window shows
# it. knowledge: what the model knows by itself.
WORLD = ("recall", "overwrite", "distance", "new_values", "visible", "knowledge")
# Words that nobody can guess (words.py).
WORDS = "words"
# Conversations of people (corpora.py), in the language of any model.
CORPORA = tuple(corpora.CORPORA)
TASKS = (*WORLD, WORDS, *CORPORA)
ALIASES = {"world": ("recall", "overwrite")}
FOR_ANY_MODEL = ("world", *CORPORA)

MEMORY_HEAVY = ("recall", "overwrite", "distance", *CORPORA)  # what is asked for may have left the window
NO_MEMORY = ("visible", "knowledge")
MOST_FACTS = len(FACTS["new_pair"])  # of one person


def make_cases(
    tasks: Sequence[str],
    n: int,
    facts: Sequence[int],
    distances: Sequence[int],
    seed: int,
    reader: Reader,
    data: Path | None = None,
) -> Iterator[Case]:
    """The questions of tasks, `n` of each kind at most; the same seed, the same questions.

    Args:
        facts, distances: how many are told, and how many tokens of small talk follow.
        reader: counts tokens.
        data: the folder of what others published (corpora.py).

    Raises InputError if a file that a task needs is missing or damaged.
    """
    for task in tasks:
        if task in WORLD:
            yield from _world_cases(task, n, facts, distances, seed, reader)
        elif task == WORDS:
            yield from words.cases(n, seed, reader)
        else:
            yield from corpora.cases(task, n, seed, reader, data)


def _world_cases(
    task: str, n: int, facts: Sequence[int], distances: Sequence[int], seed: int, reader: Reader
) -> Iterator[Case]:
    part: Part = "new_value" if task == "new_values" else "new_pair"
    world = World(1_000 * seed + WORLD.index(task), part, phrasings="new")
    sizes = {"recall": facts, "new_values": (1, 4), "distance": distances}.get(task, (4,))
    for size in sizes:
        n_fact = 4 if task == "distance" else size
        kind = f"{size} tokens" if task == "distance" else f"{n_fact} fact{'s' if n_fact > 1 else ''}"
        for _ in range(n):
            told = world.facts(n_fact)
            while task == "overwrite" and not any(map(world.others, told)):
                told = world.facts(n_fact)
            turns = [world.tell(fact) for fact in told]
            asked = world.random.choice([i for i, fact in enumerate(told) if task != "overwrite" or world.others(fact)])
            if task == "overwrite":
                told[asked] = world.another(told[asked])
                turns.append(world.update(told[asked]))
                place = world.random.randint(asked + 1, len(turns) - 1)
                turns.insert(place, turns.pop())
            elif task == "visible":
                turns.append(turns.pop(asked))
            while task == "distance" and reader.n_tokens(turns[n_fact:]) < size:
                turns.append(world.chatter())
            if task == "knowledge":
                question, answer = world.knowledge()
                word = answer.removeprefix("That is ").rstrip(".")
                yield Case(task, kind, tuple(turns), question, (word,), size=size)
            else:
                yield _case(task, kind, turns, world, told[asked], size)


def _case(task: str, kind: str, turns: Sequence[Turn], world: World, fact: Fact, size: int) -> Case:
    return Case(task, kind, tuple(turns), world.ask(fact)[0], (fact.value,), rivals(fact), size=size)
