"""How often each method is right, with intervals, and what a memory gains over the other methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .recall import MEMORY_HEAVY, NO_MEMORY, TASKS, Case

CONFIDENCE = 1.96  # standard deviations of the interval of an accuracy


@dataclass(frozen=True)
class Row:
    """How often one method was right in one kind of case; low and high: 95 % interval."""

    method: str
    task: str
    facts: int
    distance: int
    n: int
    accuracy: float
    low: float
    high: float


def table_of(cases: Sequence[Case], answers: dict[str, list[str]]) -> list[Row]:
    rows = []
    for method, given in answers.items():
        right: dict[tuple[str, int, int], list[bool]] = {}
        for case, answer in zip(cases, given):
            right.setdefault((case.task, case.facts, case.distance), []).append(case.is_right(answer))
        rows += [Row(method, *kind, len(all_), *wilson(sum(all_), len(all_))) for kind, all_ in right.items()]
    return rows


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson, 1927)."""
    p, z = right / n, CONFIDENCE
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def ratios_of(rows: Sequence[Row], memories: Sequence[str]) -> dict[str, float | str]:
    """The paper's three ratios, with equal windows, of the best memory; and what the memory costs where none is needed.

    average: of all tasks, over the backbone with the window. other: over the best other method with that window.
    memory_heavy: on tasks whose answer may be outside of the window. no_memory: on visible facts and knowledge.
    Ratios of tasks that were not asked are missing.
    """
    methods = {row.method for row in rows}
    found: dict[str, float | str] = {}

    def mean(method: str, tasks: Sequence[str]) -> float | None:
        means = []
        for task in tasks:
            values = [row.accuracy for row in rows if row.method == method and row.task == task]
            means += [sum(values) / len(values)] if values else []
        return sum(means) / len(means) if means else None

    candidates = [name for name in (f"{memory}+window" for memory in memories) if name in methods]
    if not candidates or "window" not in methods:
        return found
    best = max(candidates, key=lambda name: mean(name, TASKS) or 0.0)
    others = [name for name in ("window", "bm25") if name in methods]
    found["best"] = best
    comparisons = {
        "average": (TASKS, ["window"]),
        "other": (TASKS, others),
        "memory_heavy": (MEMORY_HEAVY, ["window"]),
        "no_memory": (NO_MEMORY, ["window"]),
    }
    for name, (tasks, against) in comparisons.items():
        base = max((mean(method, tasks) or 0.0 for method in against), default=0.0)
        if base > 0:
            found[name] = (mean(best, tasks) or 0.0) / base
    return found
