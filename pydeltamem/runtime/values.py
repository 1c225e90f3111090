"""Checks of values that callers give. They raise InputError, which calls a value by its name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

from ..errors import InputError, shown


def whole(value: Any, name: str) -> int:
    """A whole number; NumPy's counts too."""
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is a whole number, not {value!r}") from None


def number(value: Any, name: str) -> float:
    """A number; NumPy's counts too."""
    if not isinstance(value, Real) or value != value:  # no NaN
        raise InputError(f"{name} is a number, not {value!r}")
    return float(value)


def stop_strings(value: Any) -> list[str]:
    """The strings that end a text: none, one or several."""
    stop = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise InputError(f"stop is text, or a list of texts, not {value!r}")
    return list(stop)


def functions(value: Any, name: str) -> list[Callable[..., Any]]:
    """Functions to call one after the other: none, one or several. llama_cpp's lists of them are functions, too."""
    given = [] if value is None else [value] if callable(value) else value
    if not isinstance(given, (list, tuple)) or not all(map(callable, given)):
        raise InputError(f"{name} is a function, or a list of functions, not {shown(repr(value))}")
    return list(given)
