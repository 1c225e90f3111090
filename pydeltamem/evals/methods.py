"""Ways to remember: what a model has when it is asked.

Every question is asked of the same conversation in the same words. What differs is what the model has:

    none      nothing                               window        the last turns that fit into the window
    bm25      the turns that a search finds         full          the whole text
    msw       its memory, named so                  msw+window    its memory and the last turns
                                                    msw+full      its memory and the whole text

Methods without a memory are the frozen model. The whole conversation has written a memory; visible text does not write
it again. A question and its answer write a copy, which is thrown away, unless the reader is told otherwise. A turn that
is longer than the window is split into sentences.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .case import Case
from .reader import Asked, Reader
from .search import relevance
from .world import Turn

PLAIN = ("none", "window", "bm25", "full")  # methods without a memory
VISIBLE = ("", "+window", "+full")  # text that a memory has besides
STEP = 64  # cases between two updates of the progress


def names_of(memories: Iterable[str]) -> list[str]:
    """All methods, for memories of these names."""
    return [*PLAIN, *(name + visible for name in memories for visible in VISIBLE)]


def chosen(memories: Iterable[str], only: Sequence[str] | None = None) -> list[str]:
    """The chosen methods, in the order of all. Raises InputError if a name is unknown."""
    methods = names_of(memories)
    for name in only or ():
        if name not in methods:
            raise InputError(f"--methods: there is no method {name}: {', '.join(methods)}")
    return [name for name in methods if not only or name in only]


#
# what fits into a window
#


@dataclass(frozen=True)
class Piece:
    """A turn, or a sentence of one that is longer than the window."""

    turn: int
    user: str
    assistant: str


def pieces_of(turns: Sequence[Turn], window: int, reader: Reader) -> list[Piece]:
    pieces = []
    for i, (user, assistant) in enumerate(turns):
        fits = reader.n_tokens([(user, assistant)]) <= window
        parts = [user] if fits else re.split(r"(?<=[.!?])\s+", user)
        pieces += [Piece(i, part, assistant) for part in parts]
    return pieces


def shown(pieces: Iterable[Piece]) -> tuple[Turn, ...]:
    """Joins the pieces of each turn."""
    turns: dict[int, Turn] = {}
    for piece in pieces:
        before = turns.get(piece.turn)
        turns[piece.turn] = (f"{before[0]} {piece.user}" if before else piece.user, piece.assistant)
    return tuple(turns.values())


def last_turns(turns: Sequence[Turn], window: int, reader: Reader) -> tuple[Turn, ...]:
    """As many of the last turns as fit into the window."""
    kept: list[Piece] = []
    for piece in reversed(pieces_of(turns, window, reader)):
        if reader.n_tokens(shown([piece, *kept])) > window:
            break
        kept.insert(0, piece)
    return shown(kept)


def found_turns(
    turns: Sequence[Turn], question: str, window: int, reader: Reader, replies: bool = False
) -> tuple[Turn, ...]:
    """The turns that BM25 finds most relevant to the question, as many as fit into the window, in their order.

    Searches what the user said, with `replies` also what the assistant said, without stop words. Of equally relevant
    turns it takes the newer one.
    """
    pieces = pieces_of(turns, window, reader)
    kept: list[int] = []
    scores = relevance([f"{piece.user} {piece.assistant}" if replies else piece.user for piece in pieces], question)
    for i in sorted(range(len(pieces)), key=lambda i: (-scores[i], -i)):
        if reader.n_tokens(shown(pieces[j] for j in sorted((*kept, i)))) <= window:
            kept.append(i)
    return shown(pieces[i] for i in sorted(kept))


#
# asking
#


def answer_all(
    cases: Sequence[Case],
    reader: Reader,
    memories: Mapping[str, str | os.PathLike[str]],
    window: int,
    only: Sequence[str] | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> dict[str, list[str]]:
    """Every method's answer to every case.

    Args:
        reader: the model, which is left without a memory.
        memories: adapters by name.
        window: tokens.
        only: the methods; None: all of them.
        progress: called with the number of new answers.

    Raises InputError if there is no such method.
    """
    methods = chosen(memories, only)
    answers = {name: [""] * len(cases) for name in methods}
    by_text: dict[tuple[Turn, ...], list[int]] = {}
    for i, case in enumerate(cases):
        by_text.setdefault(case.turns, []).append(i)

    def ask(names: Sequence[str], has_memory: bool) -> None:
        for some in _steps(list(by_text.values())):
            snapshots = [reader.read(cases[group[0]].turns) if has_memory else None for group in some]
            for name in names:
                asked: list[tuple[Asked, list[int]]] = []
                for group, memory in zip(some, snapshots):
                    by_visible: dict[tuple[Turn, ...], list[int]] = {}
                    for i in group:
                        by_visible.setdefault(_visible(name, cases[i], window, reader), []).append(i)
                    asked += [
                        (Asked(memory, turns, tuple(cases[i].question for i in those)), those)
                        for turns, those in by_visible.items()
                    ]
                for (_, those), given in zip(asked, reader.answer([item for item, _ in asked])):
                    for i, answer in zip(those, given):
                        answers[name][i] = answer
                progress(sum(map(len, some)))

    reader.attach(None)
    if plain := [name for name in methods if name in PLAIN]:
        ask(plain, has_memory=False)
    for memory, adapter in memories.items():
        if names := [memory + visible for visible in VISIBLE if memory + visible in methods]:
            reader.attach(adapter)
            ask(names, has_memory=True)
    reader.attach(None)
    return answers


def _visible(method: str, case: Case, window: int, reader: Reader) -> tuple[Turn, ...]:
    """The text that a method shows."""
    what = method.rpartition("+")[2]
    if what == "full":
        return case.turns
    if what == "window":
        return last_turns(case.turns, window, reader)
    if method == "bm25":
        return found_turns(case.turns, case.question, window, reader, case.replies)
    return ()


def _steps(groups: Sequence[list[int]]) -> Iterable[list[list[int]]]:
    """Groups of cases, in steps of about STEP cases."""
    some: list[list[int]] = []
    for group in groups:
        some.append(group)
        if sum(map(len, some)) >= STEP:
            yield some
            some = []
    if some:
        yield some
