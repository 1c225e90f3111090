"""The memory as the page draws it: two heat maps, of all layers and of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from nicegui import ui

from . import page_memory


class Maps:
    """The heat maps of a tab.

    Attributes:
        state: what they show, [L, H, r, r]; None: nothing yet.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self._layer: int | None = None  # whose states are shown; None: of the layer that changed most
        nothing = np.zeros((1, 1, 1, 1), dtype=np.float32)
        self._all = ui.echart(
            page_memory.layers_chart(nothing[0], [0]), on_point_click=lambda event: self._pick(event.value[1])
        ).classes("map")
        self._all.props("role=img")
        self._choice = ui.select({-1: ""}, value=-1, label="States of", on_change=lambda event: self._pick(event.value))
        self._choice.props("dense options-dense").classes("full")
        self._one = ui.echart(page_memory.state_chart(nothing[0])).classes("map square")
        self._one.props('role=img aria-label="States of the chosen layer"')

    def draw(self, state: Any, layers: Sequence[int]) -> None:
        """Draws a memory. `layers`: those of the model that it belongs to."""
        self.state = state
        layers = list(layers)
        values = page_memory.singular_values(state)
        options = {-1: "the strongest layer"} | {i: f"layer {layer}" for i, layer in enumerate(layers)}
        if self._choice.options != options:
            self._choice.set_options(options, value=-1)
        self._all.style(f"height: {min(420, 40 + max(9, min(28, 400 // len(layers))) * len(layers))}px")
        self._all.props(f'aria-label="{page_memory.described(values, layers)}"')
        _redraw(self._all, page_memory.layers_chart(values, layers))
        self._draw_layer()

    def _draw_layer(self) -> None:
        layer = int((self.state**2).sum((1, 2, 3)).argmax()) if self._layer is None else self._layer
        wide = math.ceil(math.sqrt(self.state.shape[1]))
        self._one.style(f"height: {30 + 300 * math.ceil(self.state.shape[1] / wide) // wide}px")
        _redraw(self._one, page_memory.state_chart(self.state[layer]))

    def _pick(self, layer: int) -> None:
        self._layer = layer if layer >= 0 else None
        self._choice.value = layer
        if self.state is not None:
            self._draw_layer()


def _redraw(chart: ui.echart, options: dict[str, Any]) -> None:
    chart.options.clear()
    chart.options.update(options)
    chart.update()
