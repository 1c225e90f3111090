"""How often each method is right, and what a memory gains over the other methods, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .case import Case
from .methods import VISIBLE
from .recall import MEMORY_HEAVY, NO_MEMORY

CONFIDENCE = 1.96  # standard deviations of the interval of an accuracy
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """How often one method was right in one kind of case; low and high: 95 % interval (Wilson)."""

    method: str
    task: str
    kind: str
    size: int
    n: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """One accuracy over another; low and high: 95 % interval (bootstrap), high may be infinite."""

    ratio: float
    low: float
    high: float


def right_of(cases: Sequence[Case], answers: Mapping[str, Sequence[str]]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which answers of each method are right, [cases]."""
    return {
        method: np.array([case.is_right(answer) for case, answer in zip(cases, given)], dtype=np.bool_)
        for method, given in answers.items()
    }


def table_of(cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]]) -> list[Row]:
    rows = []
    for method, good in right.items():
        for (task, kind), these in _cells(cases).items():
            n, size = len(these), cases[these[0]].size
            rows.append(Row(method, task, kind, size, n, *wilson(int(good[these].sum()), n)))
    return rows


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson, 1927)."""
    p, z = right / n, CONFIDENCE
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return p, max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not leave out the share


def ratios_of(
    cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]], memories: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Ratio]]:
    """What each memory gains when text is visible too.

    average: memory and window over the window alone, all tasks. other: over the best other method with that window.
    memory_heavy: over the window, on tasks whose answer may be outside of it. no_memory: on those that need none.
    full: memory and the whole text over the whole text, all tasks.

    A task counts once, its kinds alike. Intervals are of a paired bootstrap: it resamples whole conversations, the same
    for all methods. A ratio is missing if its methods or tasks were not asked, or if it divides by 0.
    """
    tasks = tuple(dict.fromkeys(case.task for case in cases))
    means = _Means(cases, right, seed)
    _, window, full = VISIBLE
    ratios: dict[str, dict[str, Ratio]] = {}
    for memory in memories:
        compared = {
            "average": (memory + window, ("window",), tasks),
            "other": (memory + window, ("window", "bm25"), tasks),
            "memory_heavy": (memory + window, ("window",), tuple(t for t in tasks if t in MEMORY_HEAVY)),
            "no_memory": (memory + window, ("window",), tuple(t for t in tasks if t in NO_MEMORY)),
            "full": (memory + full, ("full",), tasks),
        }
        for name, (method, others, of_tasks) in compared.items():
            others = tuple(other for other in others if other in right)
            if method in right and others and of_tasks:
                over = np.max([means.of(other, of_tasks) for other in others], axis=0)
                if over[0] > 0:
                    found = means.of(method, of_tasks)
                    with np.errstate(all="ignore"):
                        drawn = found[1:] / over[1:]  # x / 0 is infinite, 0 / 0 says nothing
                    low, high = np.quantile(drawn[~np.isnan(drawn)], (0.025, 0.975), method="nearest")
                    ratios.setdefault(memory, {})[name] = Ratio(float(found[0] / over[0]), float(low), float(high))
    return ratios


class _Means:
    """Mean accuracies: of the cases first, then of each resample."""

    def __init__(self, cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]], seed: int):
        self.right, self.cells = right, _cells(cases)
        self.weights = np.ones((1 + RESAMPLES, len(cases)), dtype=np.float32)  # how often a case was drawn
        random = np.random.default_rng(seed)
        for task in dict.fromkeys(case.task for case in cases):
            these = [i for i, case in enumerate(cases) if case.task == task]
            place: dict[object, int] = {}
            of_case = [place.setdefault(cases[i].turns, len(place)) for i in these]
            drawn = random.multinomial(len(place), np.full(len(place), 1 / len(place)), RESAMPLES)
            self.weights[1:, these] = drawn[:, of_case]

    def of(self, method: str, tasks: Sequence[str]) -> npt.NDArray[np.float64]:
        """[1 + RESAMPLES]"""
        by_task = []
        for task in tasks:
            kinds = []
            for (of_task, _), these in self.cells.items():
                if of_task == task:
                    weights = self.weights[:, these]
                    n = weights.sum(1, dtype=np.float64)
                    kinds.append(np.where(n > 0, weights @ self.right[method][these].astype(np.float32), np.nan) / n)
            with np.errstate(all="ignore"):
                by_task.append(np.nanmean(kinds, axis=0))
        return np.asarray(np.mean(by_task, axis=0), dtype=np.float64)


def _cells(cases: Sequence[Case]) -> dict[tuple[str, str], list[int]]:
    """The cases of each kind."""
    cells: dict[tuple[str, str], list[int]] = {}
    for i, case in enumerate(cases):
        cells.setdefault((case.task, case.kind), []).append(i)
    return cells
