"""Times sides in turn, and computes the ratios of their times, with the interval of the median."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Protocol

CONFIDENCE = 0.95

# The sides: with the adapter and without in this process; without in two processes, over our library and over another.
ON, OFF, PLAIN, OTHER = "on", "off", "plain", "against"


class Side(Protocol):
    """What is timed: a Runner of runs.py, or a Worker of worker.py."""

    def prompt(self, n_tokens: int) -> tuple[int, int]: ...

    def decode(self, depth: int, n_tokens: int) -> tuple[int, int]: ...

    def renew(self) -> None: ...


def measure(
    sides: Mapping[str, Side],
    kind: str,
    arguments: Sequence[int],
    n_pairs: int,
    advance: Callable[[], None],
    n_renew: int = 0,
) -> dict[str, Any]:
    """Runs one test: every side once untimed, then n_pairs rounds in which each runs once, in alternating order.

    After every n_renew rounds the sides get new contexts, a worker a new process: the place of its buffers in physical
    memory makes a side some percent slower as long as they live. So rounds between two renewals depend on each other.

    Args:
        kind: "prompt" with arguments (tokens,), or "decode" with (depth, tokens).
        advance: called after every run.

    Returns n_tokens, with decode depth; of each side its tokens/s, the median; of ON and OFF what `compare` finds, and
    the graphs that the timed runs built; ratios of PLAIN and OTHER; ns, the times of each side in nanoseconds.
    """
    times: dict[str, list[int]] = {name: [] for name in sides}
    n_graphs = 0
    forth, back = list(sides), list(reversed(list(sides)))
    for i in range(n_pairs + 1):
        if n_renew and i > 1 and (i - 1) % n_renew == 0:
            in_turn = forth if (i - 1) // n_renew % 2 else back
            for name in in_turn:
                sides[name].renew()
            for name in in_turn:
                getattr(sides[name], kind)(*arguments)
        for name in forth if i % 2 else back:
            nanoseconds, built = getattr(sides[name], kind)(*arguments)
            advance()
            if i > 0:
                times[name].append(nanoseconds)
                n_graphs += built
    n_tokens = arguments[-1]
    result: dict[str, Any] = {"n_tokens": n_tokens}
    if kind == "decode":
        result["depth"] = arguments[0]
    result.update({name: n_tokens * 1e9 / median(ns) for name, ns in times.items()})
    if ON in sides:
        result.update(compare(times[ON], times[OFF], n_renew))
        result["graphs_built"] = n_graphs
    if OTHER in sides:
        pairs = ((PLAIN, OTHER), (OTHER, PLAIN))
        result["ratios"] = {f"{a}/{b}": compare(times[a], times[b], n_renew) for a, b in pairs}
    result["ns"] = times
    return result


def compare(a: Sequence[float], b: Sequence[float], n_shared: int) -> dict[str, Any]:
    """Time a ÷ time b, pair by pair: the median, and the interval of the median.

    n_shared pairs in a row share contexts, and so an error: their median counts as one value. 0: all share them, and
    the result holds for these contexts only.
    """
    ratios = [x / y for x, y in zip(a, b)]
    step = n_shared or 1
    values = [median(ratios[i : i + step]) for i in range(0, len(ratios), step)]
    low, high, confidence = median_interval(values)
    found = {"ratio": median(values), "low": low, "high": high, "confidence": confidence}
    return {**found, "pairs": len(ratios), "groups": len(values)}


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Confidence interval of the median by order statistics, which assumes nothing of the distribution.

    The number of values below the true median is binomial with p = 1/2. Returns (low, high, confidence reached): at
    least CONFIDENCE, or with fewer than six values that of the least and the greatest.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 1, 2 * 0.5**n
    while 2 * (rank + 1) <= n:
        wider = outside + 2 * math.comb(n, rank) * 0.5**n
        if wider > 1 - CONFIDENCE:
            break
        rank, outside = rank + 1, wider
    return ordered[rank - 1], ordered[n - rank], max(0.0, 1 - outside)
