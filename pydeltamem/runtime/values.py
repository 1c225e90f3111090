"""Checks of values that callers give. They raise InputError, which calls a value by its name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, shown_value


def whole(value: Any, name: str) -> int:
    """A whole number; NumPy's counts too."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is a whole number, not {shown_value(value)}") from None


def number(value: Any, name: str) -> float:
    """A number; NumPy's counts too."""
    if not isinstance(value, Real) or value != value:  # no NaN
        raise InputError(f"{name} is a number, not {shown_value(value)}")
    return float(value)


def stop_strings(value: Any) -> list[str]:
    """The strings that end a text: none, one or several."""
    stop = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise InputError(f"stop is text, or a list of texts, not {shown_value(value)}")
    return list(stop)


def functions(value: Any, name: str) -> list[Callable[..., Any]]:
    """Functions to call one after the other: none, one or several. llama_cpp's lists of them are functions, too."""
    given = [] if value is None else [value] if callable(value) else value
    if not isinstance(given, (list, tuple)) or not all(map(callable, given)):
        raise InputError(f"{name} is a function, or a list of functions, not {shown_value(value)}")
    return list(given)


def token_ids(tokens: Any, n_vocab: int) -> npt.NDArray[np.integer]:
    """Tokens of a vocabulary."""
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError("tokens must be a list of token ids, whole numbers")
    if ids.size and not 0 <= ids.min() <= ids.max() < n_vocab:
        wrong = ids[(ids < 0) | (ids >= n_vocab)][0]
        raise InputError(f"{wrong} is no token id of this model: they are 0 to {n_vocab - 1}")
    return ids


def segment_ids(segments: Sequence[int], n_tokens: int) -> npt.NDArray[np.int32]:
    """The segments of so many tokens."""
    if len(segments) != n_tokens:
        raise InputError(f"{len(segments)} segment ids were given for {n_tokens} tokens")
    ids = np.asarray(segments)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"segment ids must be integers, not {ids.dtype}")
    if ids.size and (ids.min() < -1 or ids.max() > np.iinfo(np.int32).max):
        raise InputError("segment ids must be -1 or from 0 to 2147483647")
    if np.any(np.diff(ids[ids >= 0]) < 0):
        raise InputError("segment ids must not decrease from one token to the next")
    return ids.astype(np.int32)
