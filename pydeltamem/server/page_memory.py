"""The memory as heat maps: options of ECharts. States are [L, H, r, r], singular values [L, H, r]."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

# zero is transparent, so that the maps fit light and dark
_MORE = ["rgba(70,130,200,0.06)", "rgba(70,130,200,1)", "rgba(245,160,60,1)"]
_SIGNED = ["rgba(58,120,200,1)", "rgba(128,128,128,0.05)", "rgba(214,84,60,1)"]
_INK = "#808890"  # can be read on light and dark


def singular_values(state: Array) -> Array:
    """Singular values of each state, descending, [L, H, r]."""
    values: Array = np.linalg.svd(state.astype(np.float64), compute_uv=False)
    return values


def layers_chart(values: Array, layers: list[int]) -> dict[str, Any]:
    """Singular values: a row a layer, the first one above; the heads of a layer beside each other."""
    n_layer, n_head, rank = values.shape
    cells = [
        [h * (rank + 1) + i, y, _short(values[y, h, i])]
        for y in range(n_layer)
        for h in range(n_head)
        for i in range(rank)
    ]
    xs = [f"head {h}, singular value {i + 1}" for h in range(n_head) for i in range(rank + 1)][:-1]
    chart = _chart(cells, xs, [f"layer {layer}" for layer in layers], 0, float(values.max(initial=0)), _MORE)
    chart["yAxis"]["axisLabel"] |= {"show": True, "fontSize": 10}
    chart["grid"]["left"] = 52
    return chart


def state_chart(state: Array) -> dict[str, Any]:
    """The states of one layer, [H, r, r]: a matrix a head, rows are values and columns keys."""
    n_head, rank, _ = state.shape
    wide = math.ceil(math.sqrt(n_head))
    high = math.ceil(n_head / wide)
    cells = []
    for h in range(n_head):
        left, top = h % wide * (rank + 1), h // wide * (rank + 1)
        cells += [[left + j, top + i, _short(state[h, i, j])] for i in range(rank) for j in range(rank)]
    xs = [f"key {j}" for _ in range(wide) for j in range(rank + 1)][:-1]
    ys = [f"value {i}" for _ in range(high) for i in range(rank + 1)][:-1]
    most = float(np.abs(state).max(initial=0))
    return _chart(cells, xs, ys, -most, most, _SIGNED)


def described(values: Array, layers: list[int]) -> str:
    """The heat map of all layers in words."""
    if not values.any():
        return f"The memory is empty: {len(layers)} layers, all singular values 0."
    most = np.unravel_index(int(values.argmax()), values.shape)[0]
    return (
        f"Singular values of {len(layers)} layers; the largest is {values.max():.3g}, in layer {layers[int(most)]}; "
        f"the norm of the memory is {math.sqrt(float((values**2).sum())):.3g}."
    )


def _chart(
    cells: list[list[float]], xs: list[str], ys: list[str], low: float, high: float, colors: list[str]
) -> dict[str, Any]:
    hidden: dict[str, Any] = {
        "axisLabel": {"show": False, "color": _INK},
        "axisTick": {"show": False},
        "axisLine": {"show": False},
        "splitLine": {"show": False},
    }
    return {
        "animation": False,
        "grid": {"left": 4, "right": 4, "top": 4, "bottom": 26},
        "tooltip": {
            "confine": True,
            ":formatter": f"p => {json.dumps(ys)}[p.value[1]] + `, ${{p.name}}: ${{p.value[2]}}`",
        },
        "xAxis": {"type": "category", "data": xs, **hidden},
        "yAxis": {"type": "category", "data": ys, "inverse": True, **hidden, "axisLabel": dict(hidden["axisLabel"])},
        "visualMap": {
            "min": _short(low) if high else -float(colors is _SIGNED),
            "max": _short(high) or 1,
            "inRange": {"color": colors},
            "orient": "horizontal",
            "left": "center",
            "bottom": 0,
            "itemWidth": 8,
            "itemHeight": 90,
            "text": [f"{high:.3g}", f"{low + 0:.3g}"],  # no -0
            "textStyle": {"color": _INK, "fontSize": 11},
        },
        "series": [{"type": "heatmap", "data": cells, "progressive": 0, "itemStyle": {"borderWidth": 0}}],
    }


def _short(x: float) -> float:
    """To four digits, which is what goes over the wire."""
    return float(f"{x:.4g}")
