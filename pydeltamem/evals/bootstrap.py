"""Means of scores and their ratios, with 95 % intervals of a paired bootstrap.

A resample draws whole contexts with all their questions, the same for all methods: questions about one context are not
independent. Of fewer than MIN_CONTEXTS contexts it draws single questions.

Percentiles of resamples of ten contexts would hold 90 % instead of 95: their variance lacks the factor n / (n - 1), and
with few contexts it is itself uncertain. So outer percentiles are taken, as far as Student's t asks for (Hesterberg,
The American Statistician, 2015: the expanded percentile interval).

Resamples of one context or question are all the same, and so are those of scores that are all alike, and the ratios of
two methods that are right about the same questions. They would make a wild guess look certain. Of one context or
question the interval is that of what its scores, from 0 to 1, may be; of several, it allows for as many others as may
be among so many of which none was found (`unseen`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

MIN_CONTEXTS = 10
RESAMPLES = 2000
CONFIDENCE = 1.96  # standard deviations of a normal distribution

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; high may be infinite for a ratio."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a table shows a ratio."""
        high = f"{self.high:.2f}" if math.isfinite(self.high) else "∞"
        return f"{self.value:.2f} ({self.low:.2f}–{high})"


class Sample:
    """The scores of questions that all methods answered.

    Args:
        scores: by method, for each question the values of a metric: one, or several that count each.
        contexts: what each question is about; None: something of its own.
        seed: of the resamples.
    """

    def __init__(self, scores: Mapping[str, Sequence[Sequence[float]]], contexts: Sequence[Hashable], seed: int = 0):
        self.n, self._scores = len(contexts), scores
        place: dict[object, int] = {}
        of_question = [place.setdefault(i if about is None else about, len(place)) for i, about in enumerate(contexts)]
        self.by_context = MIN_CONTEXTS <= len(place) < self.n
        if not self.by_context:
            of_question, place = list(range(self.n)), {i: i for i in range(self.n)}
        self.n_drawn = len(place)
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
        """Wilson's interval where questions are right or wrong and drawn one by one."""
        values = [value for of in self._scores[method] for value in of]
        if not self.by_context and len(values) == self.n and set(values) <= {0.0, 1.0}:
            return Estimate(*wilson(round(sum(values)), self.n))
        means = self.means(method)
        value = float(means[0])
        if not _alike(means):
            return Estimate(value, *map(float, np.quantile(means[1:], percentiles(self.n_drawn))))
        if self.n_drawn == 1 and 0 < value < 1:  # which may have come from anywhere
            return Estimate(value, 0.0, 1.0)
        others = unseen(self.n_drawn)  # which may score 0, or 1
        return Estimate(value, value * (1 - others), value + (1 - value) * others)


def ratio(above: Array, below: Array, n_drawn: int) -> Estimate | None:
    """Of two arrays of means over resamples of `n_drawn` each; None if the second is 0. Where the first is 0 in all of
    them, the highest is that of `unseen` over the second. Where all resamples have one ratio, as of methods that are
    right about the same questions, `unseen` ones may be right by one method and wrong by the other.
    """
    if below[0] <= 0:
        return None
    value = float(above[0] / below[0])
    if n_drawn == 1:
        return Estimate(value, 0.0, math.inf)
    highest = above if above.any() else np.full_like(above, unseen(n_drawn))
    with np.errstate(all="ignore"):
        lows, highs = above[1:] / below[1:], highest[1:] / below[1:]  # x / 0 is infinite, 0 / 0 says nothing
    lows, highs = (drawn[~np.isnan(drawn)] for drawn in (lows, highs))
    if value > 0 and _alike(lows):
        left = max(0.0, 1 - unseen(n_drawn) / float(min(above[0], below[0])))
        return Estimate(value, value * left, value / left if left else math.inf)
    low, high = (np.quantile(drawn, at, method="nearest") for drawn, at in zip((lows, highs), percentiles(n_drawn)))
    return Estimate(value, float(low), float(high))


def _alike(values: Array) -> bool:
    """Whether these are one value, apart from rounding."""
    return bool(np.allclose(values, values[0], rtol=1e-9, atol=0))


def percentiles(n_drawn: int) -> tuple[float, float]:
    """Where a 95 % interval ends among resamples of `n_drawn`."""
    n, z = max(n_drawn, 2), CONFIDENCE
    free = n - 1
    # Student's t by its expansion around the normal distribution (Abramowitz and Stegun, 26.7.5)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    outside = NormalDist().cdf(-t * math.sqrt(n / free))
    return outside, 1 - outside


def unseen(n: int) -> float:
    """The largest share that those may have of which there is none among n: the end of Wilson's interval."""
    return wilson(0, n)[2]


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson, 1927)."""
    p, z = right / n, CONFIDENCE
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return p, max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not leave out the share
