"""Options of an answer: which there are, what they may be, and how the sampler names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, shown_value
from ..runtime.names import nearest

# fields of a request that the sampler takes, and its names for them
_SAMPLING = {
    "temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "typical_p": "typical_p",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "repeat_penalty": "repeat_penalty", "mirostat_mode": "mirostat_mode", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta", "grammar": "grammar",
}  # fmt: skip
DEFAULTS = {"temp": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.0}
_NUMBERS = tuple(name for name in _SAMPLING if name not in ("top_k", "grammar"))
_BOUNDS = {"mirostat_mode": (0, 2), "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1)}
FIELDS = (*_SAMPLING, "max_tokens", "stop", "seed", "logit_bias")  # of a request that are options of its answer
_N_TOP = 20
_WHOLE = {"max_tokens": (0,), "seed": (-1,), "top_k": (-1, 2**31 - 1), "n_top": (0, _N_TOP)}
_N_STOP = 128  # each is looked for after each token, while all others wait
# what chat handlers and llama_cpp's templates set themselves
_TAKEN = frozenset((
    *FIELDS, "llm", "llama", "self", "messages", "functions", "function_call", "tools", "tool_choice", "stream",
    "response_format", "tfs_z", "model", "logits_processor", "logprobs", "top_logprobs", "eos_token", "bos_token",
    "raise_exception", "add_generation_prompt", "strftime_now",
))  # fmt: skip
_OTHERS = ("max_tokens", "stop", "seed", "logit_bias", "n_top", "tools", "tool_choice", "response_format", "template")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a turn, under the names of the sampler. Raises InputError."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in _SAMPLING and name not in _OTHERS:
            raise InputError(f"{name} is no option of an answer{nearest(name, (*_SAMPLING, *_OTHERS))}")
    for name in _NUMBERS:
        if name in given and not _is_number(given[name]):
            raise InputError(f"{name} is a number, not {shown_value(given[name])}")
    for name, (low, high) in _BOUNDS.items():
        if name in given and not low <= given[name] <= high:
            raise InputError(f"{name} is {low} to {high}, not {given[name]}")
    for name, bounds in _WHOLE.items():
        if name in given:
            given[name] = checked_whole(name, given[name], *bounds)
    if "template" in given:
        checked_template("template", given["template"])
    stop = given.get("stop")
    if isinstance(stop, str):
        given["stop"] = [stop]
    elif stop is not None and not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
        raise InputError("stop is a text, or a list of texts")
    elif stop is not None and len(stop) > _N_STOP:
        raise InputError(f"stop has at most {_N_STOP} texts, not {len(stop)}")
    return {**DEFAULTS, **{_SAMPLING.get(name, name): value for name, value in given.items()}}


def of_sampler(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of checked options that the sampler takes."""
    return {name: value for name, value in options.items() if name in _SAMPLING.values()}


def checked_whole(name: str, value: Any, low: int, high: int | None = None) -> int | None:
    """A whole number, or None. Raises InputError, which names it `name`."""
    if value is None:
        return None
    # JSON has one kind of number: clients in some languages write 8.0
    is_whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not is_whole or value < low or (high is not None and value > high):
        bounds = f"from {low} on" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} is a whole number {bounds}, not {shown_value(value)}")
    return int(value)


def checked_n_top(name: str, value: Any) -> int | None:
    """How many of the likeliest tokens to list, or None. Raises InputError, which names it `name`."""
    return checked_whole(name, value, 0, _N_TOP)


def checked_template(name: str, given: Any) -> dict[str, Any]:
    """Further variables of a chat template. Raises InputError, which names them `name`."""
    if not isinstance(given, dict):
        raise InputError(f"{name} is an object")
    for key in given:
        if key in _TAKEN:
            raise InputError(f"{name}: {key} is set by the server and cannot be given here")
    return given


def _is_number(value: Any) -> bool:
    """Whether it is one that llama.cpp can take."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -3.4e38 < value < 3.4e38
