"""A state as a heat map in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from rich.text import Text


def picture(state: npt.NDArray[np.float32], largest: float, coloured: bool, title: str) -> Text:
    """A state as a heat map. In colour a line of half blocks shows two rows; else two characters show a value."""
    scaled = state / largest if largest else state
    text = Text(f"{title}\n", no_wrap=True)
    if not coloured:
        for row in scaled:
            text.append("".join(map(_shade, row)) + "\n")
        return text
    for top, bottom in _pairs(scaled):
        for x, y in zip(top, bottom):
            text.append("▀", style=f"{_colour(x)} on {_colour(y)}")
        text.append("\n")
    return text


def _shade(x: float) -> str:
    shade = " ░▒▓█"[min(4, round(abs(float(x)) * 4))]
    return ("-" if x < 0 and shade != " " else " ") + shade


def _pairs(rows: npt.NDArray[np.float32]) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    if len(rows) % 2:
        rows = np.concatenate([rows, np.zeros_like(rows[:1])])
    return zip(rows[::2], rows[1::2])


def _colour(x: float) -> str:
    fade = 255 - round(min(1.0, abs(float(x))) ** 0.5 * 255)
    return f"#ff{fade:02x}{fade:02x}" if x > 0 else f"#{fade:02x}{fade:02x}ff"
