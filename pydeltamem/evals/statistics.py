"""How often each method is right, and what a memory gains over the other methods, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .bootstrap import RESAMPLES, Estimate, Sample, ratio
from .case import Case
from .methods import VISIBLE
from .recall import CORPORA, MEMORY_HEAVY, NO_MEMORY

TOLD = "all told"  # kinds of questions together


@dataclass(frozen=True)
class Row:
    """How often one method was right in one kind of case; low and high: 95 % interval, as `Sample.mean` has it."""

    method: str
    task: str
    kind: str
    size: int
    n: int
    accuracy: float
    low: float
    high: float


def right_of(cases: Sequence[Case], answers: Mapping[str, Sequence[str]]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which answers of each method are right, [cases]."""
    return {
        method: np.array([case.is_right(answer) for case, answer in zip(cases, given)], dtype=np.bool_)
        for method, given in answers.items()
    }


def table_of(cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]]) -> list[Row]:
    """A row for each kind of question and method; of conversations of people also one of all that was told."""
    cells = _cells(cases)
    for task in dict.fromkeys(case.task for case in cases if case.task in CORPORA):
        told = [i for i, case in enumerate(cases) if case.task == task and case.values]
        if len({cases[i].kind for i in told}) > 1:
            cells[task, TOLD] = told
    rows = []
    for (task, kind), these in cells.items():
        scores = {method: [[float(good[i])] for i in these] for method, good in right.items()}
        sample = Sample(scores, [cases[i].turns if task in CORPORA else None for i in these])
        for method in right:
            mean = sample.mean(method)
            rows.append(Row(method, task, kind, cases[these[0]].size, len(these), mean.value, mean.low, mean.high))
    return rows


def ratios_of(
    cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]], memories: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """What each memory gains when text is visible too.

    average: memory and window over the window alone, all tasks. other: over the best other method with that window.
    memory_heavy: over the window, on tasks whose answer may be outside of it. no_memory: on those that need none.
    full: memory and the whole text over the whole text, all tasks.

    A task counts once, its kinds alike. Intervals are of a paired bootstrap: it resamples whole conversations, the same
    for all methods. A ratio is missing if its methods or tasks were not asked, or if it divides by 0.
    """
    tasks = tuple(dict.fromkeys(case.task for case in cases))
    means = _Means(cases, right)
    _, window, full = VISIBLE
    ratios: dict[str, dict[str, Estimate]] = {}
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
                found = ratio(means.of(method, of_tasks), over, min(means.n_drawn[task] for task in of_tasks))
                if found is not None:
                    ratios.setdefault(memory, {})[name] = found
    return ratios


class _Means:
    """Mean accuracies: of the cases first, then of each resample."""

    def __init__(self, cases: Sequence[Case], right: Mapping[str, npt.NDArray[np.bool_]]):
        self.right, self.cells = right, _cells(cases)
        self.weights = np.ones((1 + RESAMPLES, len(cases)), dtype=np.float32)  # how often a case was drawn
        self.n_drawn: dict[str, int] = {}  # conversations of each task
        random = np.random.default_rng(0)
        for task in dict.fromkeys(case.task for case in cases):
            these = [i for i, case in enumerate(cases) if case.task == task]
            place: dict[object, int] = {}
            of_case = [place.setdefault(cases[i].turns, len(place)) for i in these]
            self.n_drawn[task] = len(place)
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
