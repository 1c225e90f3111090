"""Accuracy as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .methods import PLAIN
from .statistics import Row


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy by the number of facts and by distance, a line for each method, with its interval."""
    figure = matplotlib_figure()(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, task, key in zip(panels, ("recall", "distance"), ("facts", "distance")):
        for method in dict.fromkeys(row.method for row in rows):
            points = sorted((getattr(row, key), row) for row in rows if row.method == method and row.task == task)
            if points:
                x, found = zip(*points)
                low = [row.accuracy - row.low for row in found]
                high = [row.high - row.accuracy for row in found]
                style = "--" if method in PLAIN else "-"
                axes.errorbar(x, [row.accuracy for row in found], [low, high], label=method, linestyle=style, capsize=2)
        ticks = sorted({getattr(row, key) for row in rows if row.task == task})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="facts told", ylabel="answers that are right", ylim=(-0.02, 1.02))
    panels[1].set(xlabel="tokens of small talk after four facts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def matplotlib_figure() -> Any:
    """Its class. Raises InputError if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'pydeltamem[eval]'") from None
    return Figure
