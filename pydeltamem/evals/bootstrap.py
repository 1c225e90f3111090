"""Means of scores and their ratios, with 95 % intervals of a paired bootstrap.

A resample draws whole contexts with all their questions, the same for all methods: questions about one context are not
independent. Of fewer than MIN_CONTEXTS contexts it draws single questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .statistics import RESAMPLES, wilson

MIN_CONTEXTS = 10
INTERVAL = (0.025, 0.975)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; high may be infinite for a ratio."""

    value: float
    low: float
    high: float


class Sample:
    """The scores of questions that all methods answered.

    Args:
        scores: by method, for each question the values of a metric: one, or several that count each.
        contexts: what each question is about; None: something of its own.
        seed: of the resamples.
    """

    def __init__(self, scores: Mapping[str, Sequence[Sequence[float]]], contexts: Sequence[str | None], seed: int = 0):
        self.n, self._scores = len(contexts), scores
        place: dict[object, int] = {}
        of_question = [place.setdefault(i if about is None else about, len(place)) for i, about in enumerate(contexts)]
        self.by_context = MIN_CONTEXTS <= len(place) < self.n
        if not self.by_context:
            of_question, place = list(range(self.n)), {i: i for i in range(self.n)}
        self._n_drawn = len(place)
        drawn = np.random.default_rng(seed).multinomial(
            len(place), np.full(max(1, len(place)), 1 / max(1, len(place))), RESAMPLES
        )
        self._weights = np.ones((1 + RESAMPLES, self.n))
        self._weights[1:] = drawn[:, of_question]

    def means(self, method: str) -> Array:
        """The mean, then that of each resample, [1 + RESAMPLES]."""
        values = self._scores[method]
        sums, counts = np.array([sum(of) for of in values]), np.array([len(of) for of in values], dtype=float)
        return np.asarray(self._weights @ sums / (self._weights @ counts))

    def mean(self, method: str) -> Estimate:
        """Wilson's interval where questions are right or wrong and drawn one by one, and of contexts where all scores
        are 0, or all 1: resamples do not differ then.
        """
        values = [value for of in self._scores[method] for value in of]
        is_share = len(values) == self.n and set(values) <= {0.0, 1.0}
        if (is_share and not self.by_context) or set(values) in ({0.0}, {1.0}):
            return Estimate(*wilson(round(sum(values) / len(values) * self._n_drawn), self._n_drawn))
        means = self.means(method)
        return Estimate(float(means[0]), *map(float, np.quantile(means[1:], INTERVAL)))


def ratio(above: Array, below: Array) -> Estimate | None:
    """Of two arrays of means; None if the second is 0."""
    if below[0] <= 0:
        return None
    with np.errstate(all="ignore"):
        drawn = above[1:] / below[1:]
    low, high = np.quantile(drawn[~np.isnan(drawn)], INTERVAL, method="nearest")
    return Estimate(float(above[0] / below[0]), float(low), float(high))
