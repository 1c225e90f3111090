"""Accuracy as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .methods import PLAIN
from .report import name_of
from .statistics import Row

# Tasks whose kinds are sizes, and their meaning
SIZES = {"recall": "facts told", "distance": "tokens of small talk after four facts"}


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy, with its interval. Lines by the number of facts, and by distance; points for all other kinds."""
    sized = [task for task in SIZES if len({row.size for row in rows if row.task == task}) > 1]
    others = [row for row in rows if row.task not in sized]
    kinds = list(dict.fromkeys((row.task, row.kind) for row in others))
    widths = [4.0] * len(sized) + [max(4.0, 0.9 * len(kinds))] * bool(kinds)
    figure = matplotlib_figure()(figsize=(sum(widths) + 2, 4.5), layout="constrained")
    panels = list(figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0])
    methods = list(dict.fromkeys(row.method for row in rows))
    for axes, task in zip(panels, sized):
        for method in methods:
            points = sorted(
                (row for row in rows if row.method == method and row.task == task), key=lambda row: row.size
            )
            _draw(axes, [row.size for row in points], points, method, "--" if method in PLAIN else "-")
        ticks = sorted({row.size for row in rows if row.task == task})
        least = next(filter(None, ticks))
        axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)  # as "log" from there on; 0 has a place too
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel(SIZES[task])
    if kinds:
        axes = panels[-1]
        for i, method in enumerate(methods):
            points = [row for row in others if row.method == method]
            shift = (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
            _draw(axes, [kinds.index((row.task, row.kind)) + shift for row in points], points, method, "none")
        axes.set_xticks(range(len(kinds)), [name_of(*kind) for kind in kinds], rotation=30, ha="right")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="answers that are right", ylim=(-0.02, 1.02))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def _draw(axes: Any, x: Sequence[float], points: Sequence[Row], label: str, style: str) -> None:
    marker = "s" if label in PLAIN else "o"
    errors = [[row.accuracy - row.low for row in points], [row.high - row.accuracy for row in points]]
    y = [row.accuracy for row in points]
    axes.errorbar(x, y, errors, label=label, linestyle=style, marker=marker, markersize=3, capsize=2)


def matplotlib_figure() -> Any:
    """matplotlib's Figure. Raises InputError if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'pydeltamem[eval]'") from None
    return Figure
