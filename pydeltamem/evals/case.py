"""One question of an evaluation, and the conversation that it is about."""

from __future__ import annotations

from dataclasses import dataclass

from .scoring import is_right
from .world import Turn


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        task: what it asks for (recall.py).
        kind: group of the task's questions that are counted together.
        turns: the conversation. Questions about the same one share its memory.
        question: as the user asks it.
        values: any of these is right. None at all: nothing was told, and the answer must say so.
        rivals: values that a right answer must not name too.
        replies: whether the assistant, too, said what is asked for.
        size: facts told, or tokens since they were told; 0 where the task has no sizes.
    """

    task: str
    kind: str
    turns: tuple[Turn, ...]
    question: str
    values: tuple[str, ...]
    rivals: frozenset[str] = frozenset()
    replies: bool = False
    size: int = 0

    def is_right(self, answer: str) -> bool:
        return is_right(answer, self.values, self.rivals)
