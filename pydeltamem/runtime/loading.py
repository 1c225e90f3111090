"""What is checked before llama.cpp loads a model: keywords, and numbers in the model's header.

llama_cpp ignores keywords that it does not know, and llama.cpp ends the process at some numbers.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError, ModelError, shown, shown_value
from ..formats.gguf_header import Header
from ..formats.model_numbers import MAX_CONTEXT, check_numbers
from . import library
from .cpus import MAX_THREADS
from .library import Llama
from .names import nearest, option
from .values import number, whole

_llama = library.llama_cpp

# keywords that llama_cpp took once and ignores now; LangChain and llama_cpp's own server still give some of them
FORMER = {"f16_kv", "low_vram", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps"}

_KEYWORDS = [name for name, of in inspect.signature(Llama.__init__).parameters.items() if of.kind == of.KEYWORD_ONLY]
_TYPES = typing.get_type_hints(Llama.__init__)
_MAX_OVERRIDE = 127  # bytes of a key or text of llama_model_kv_override, beside the null


class FileName(str):
    """The name of a file for llama_cpp, which encodes names as UTF-8. Not every name can be."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))  # a plain str, whose encode is not this one


def check_keywords(kwargs: Mapping[str, Any], n_ctx: int, n_seq_max: int, ours: Iterable[str]) -> None:
    """Raises InputError if one of llama_cpp's keywords is unknown, or a number is out of range. `ours`: keywords that
    are not llama_cpp's.
    """
    for name, value in kwargs.items():
        if name not in _KEYWORDS:  # llama_cpp ignores unknown ones
            known = {*ours, *_KEYWORDS} - {"kwargs"}
            raise InputError(f"{name} is no keyword of DeltaMemLlama{nearest(name, known)}")
        _check_type(name, value)
    n_batch = kwargs.get("n_batch", n_seq_max)
    threads = {name: kwargs.get(name) or 0 for name in ("n_threads", "n_threads_batch")}
    for name, n in {"n_ctx": n_ctx, "n_seq_max": n_seq_max, "n_batch": n_batch, **threads}.items():
        whole(n, option(name))
    n_max = _llama.llama_max_parallel_sequences()
    if not 1 <= n_seq_max <= n_max:
        raise InputError(f"{option('n_seq_max')} is 1 to {n_max}, not {n_seq_max}")
    for name, n in threads.items():
        if not 0 <= n <= MAX_THREADS:
            raise InputError(f"{option(name)} is 1 to {MAX_THREADS}, not {n}")
    if n_batch < n_seq_max:
        raise InputError(f"{option('n_batch')} is at least {option('n_seq_max')}, {n_seq_max}, not {n_batch}")
    longest = min(MAX_CONTEXT, (2**31 - 1) // n_seq_max)  # llama.cpp's numbers are of 32 bits
    if not 0 <= n_ctx <= longest:
        raise InputError(f"{option('n_ctx')} is 0 to {longest}, not {n_ctx}")


def _check_type(name: str, value: Any) -> None:
    """Raises InputError if a keyword of llama_cpp is no number where it must be one, or too large for llama.cpp."""
    kinds = typing.get_args(_TYPES[name]) or (_TYPES[name],)
    if value is None and type(None) in kinds:
        return
    if name == "kv_overrides":
        _check_overrides(value)
    elif name == "tensor_split":
        if not isinstance(value, (list, tuple)) or len(value) > _llama.LLAMA_MAX_DEVICES:
            raise InputError(f"tensor_split is a list of at most {_llama.LLAMA_MAX_DEVICES} numbers, not {value!r}")
        for part in value:
            number(part, "a number of tensor_split")
    elif float in kinds:
        number(value, name)
    elif int in kinds and name != "seed" and not -(2**31) <= whole(value, option(name)) < 2**31:
        raise InputError(f"{option(name)} is a number of 32 bits, not {value}")


def _check_overrides(overrides: Any) -> None:
    """Raises InputError if a value for a key of the model's header cannot be given to llama.cpp."""
    if not isinstance(overrides, dict):
        raise InputError(f"kv_overrides is a dict of keys and values, not {shown(overrides)}")
    for key, value in overrides.items():
        if not isinstance(key, str) or not key or "\0" in key or len(key.encode()) > _MAX_OVERRIDE:
            raise InputError(f"kv_overrides: a key is text of 1 to {_MAX_OVERRIDE} bytes, not {shown(key)}")
        if not isinstance(value, (int, float, str)):
            raise InputError(f"kv_overrides: {key} is a bool, an int, a float or a str, not {shown_value(value)}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"kv_overrides: {key} is a number of 64 bits, not {value}")
        if isinstance(value, str) and ("\0" in value or len(value.encode()) > _MAX_OVERRIDE):
            raise InputError(f"kv_overrides: {key} is text of at most {_MAX_OVERRIDE} bytes, not {shown(value)}")


def trained_context(model_path: str) -> int:
    """The length of context, in tokens, that the model was trained on. Raises ModelError if its file does not say."""
    keys = Header(model_path).keys
    n_ctx = keys.get(f"{keys.get('general.architecture')}.context_length")
    if not isinstance(n_ctx, int) or n_ctx < 1:
        raise ModelError(f"{model_path}: does not say on how long a context it was trained: give {option('n_ctx')}")
    return n_ctx


def check_header(model_path: str, overrides: Mapping[str, Any]) -> None:
    """Raises ModelError if llama.cpp would end the process for a number in a model's header."""
    try:
        keys = Header(model_path).keys
    except ModelError:
        return  # llama.cpp reports what is wrong
    if keys.get("general.type") != "adapter":
        check_numbers(model_path, {**keys, **overrides})
