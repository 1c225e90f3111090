"""Numbers of memories: norms, singular values and effective ranks of one, and the distance of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MemoryFileError, shown
from .memory_file import MemorySnapshot, owner


def describe_memory(snapshot: MemorySnapshot) -> dict[str, Any]:
    """What a memory holds, as values that JSON can hold. Per layer and head: norm, singular values, effective rank."""
    return {
        "metadata": dict(snapshot.metadata),
        "shape": list(snapshot.state.shape),
        "layers": [
            {
                "layer": layer,
                "norms": norms.tolist(),
                "singular_values": values.tolist(),
                "effective_ranks": [effective_rank(row) for row in values],
            }
            for layer, norms, values in zip(snapshot.layers, snapshot.norms, snapshot.singular_values)
        ],
    }


def effective_rank(singular_values: npt.NDArray[np.floating]) -> float:
    """How many directions a state uses: e to the entropy of the singular values' shares, 1 to r; 0 for an empty state.

    Roy and Vetterli, The effective rank, 2007.
    """
    values = singular_values[singular_values > 0].astype(np.float64)
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def compare_memories(a_name: str, a: MemorySnapshot, b_name: str, b: MemorySnapshot) -> dict[str, Any]:
    """The distance of two memories, in all and per layer: |A|, |B|, |A - B|, its ratio to the larger norm, and the
    cosine between them. Raises MemoryFileError if they belong to different adapters.
    """
    mine, theirs = a.metadata, b.metadata
    if any(mine.get(key, "") != theirs.get(key, "") for key in ("adapter", "architecture")):
        raise MemoryFileError(
            f"{b_name}: the memory of another adapter, {owner(theirs)}; that of {a_name} is {owner(mine)}"
        )
    if mine.get("layers", "") != theirs.get("layers", "") or a.state.shape != b.state.shape:
        raise MemoryFileError(
            f"{b_name}: holds layers {shown(theirs.get('layers', ''))} of shape {b.state.shape}; "
            f"{a_name} holds layers {shown(mine.get('layers', ''))} of shape {a.state.shape}"
        )
    return {
        "a": a_name,
        "b": b_name,
        "identical": a.state.tobytes() == b.state.tobytes(),
        "total": _apart(a.state, b.state),
        "layers": [{"layer": layer, **_apart(x, y)} for layer, x, y in zip(a.layers, a.state, b.state)],
    }


def _apart(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> dict[str, float]:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm_a, norm_b, difference = (float(np.linalg.norm(values)) for values in (x, y, x - y))
    larger = max(norm_a, norm_b)
    cosine = float(x @ y) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return {
        "norm_a": norm_a,
        "norm_b": norm_b,
        "difference": difference,
        "relative": difference / larger if larger else 0.0,
        "cosine": min(1.0, max(-1.0, cosine)),  # rounding may exceed the limits
    }
