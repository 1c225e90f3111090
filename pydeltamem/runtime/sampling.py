"""Samplers that look at the likeliest tokens only, where no other can be sampled, and report errors of processors.

llama.cpp copies and sorts the whole vocabulary for each token: of 151,000 tokens 0.6 ms, in which nothing is decoded.
It calls logits processors from C, and Python drops exceptions there: llama_cpp would go on with unchanged logits.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import random
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from . import library
from .grammar import checked_grammar
from .keeping import Keeping
from .model import Model
from .values import functions, number, whole

_llama = library.llama_cpp
_OPTIONS = inspect.signature(library.Llama._init_sampler)
_WHOLE, _NUMBERS = (
    {name for name, of in _OPTIONS.parameters.items() if type(of.default) is kind} for kind in (int, float)
)
RANDOM = _llama.LLAMA_DEFAULT_SEED  # asks llama.cpp for a random one


def derived(seed: int, n: int) -> int:
    """The seed of the n-th of several draws, so that each is another one; a random seed stays random."""
    seed %= 2**32
    return seed if seed == RANDOM else random.Random(f"{seed} {n}").randrange(RANDOM)


class Guard(Keeping):
    """Logits processors, one after the other, as one that never raises where llama.cpp calls it.

    Args:
        processors: called with the tokens decoded, [n], and the logits, [n_vocab]; return logits.
        tokens: gives the tokens before the sampled one; llama_cpp would give drafted ones too.
    """

    def __init__(self, processors: Sequence[Callable[..., Any]], tokens: Callable[[], Any]) -> None:
        self.processors, self.tokens = processors, tokens

    def __call__(self, _: Any, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = scores.copy()
        try:
            for processor in self.processors:
                given = np.asarray(processor(self.tokens(), result))
                if given.shape != result.shape:
                    raise InputError(f"a logits processor returned an array of {given.shape}, not of {result.shape}")
                result[:] = given
            if not result.max() > -np.inf:
                raise InputError("logits processors and biases exclude all tokens, or return NaN")
        except BaseException as error:
            self.error = error
            return scores
        return result


_MAX_LIKELIEST = 512


def n_likeliest(options: Mapping[str, Any], n_penalized: int) -> int | None:
    """Of how many of the likeliest tokens llama_cpp's sampler takes one, whatever the logits; None: it may need all.

    Args:
        options: all of `Llama._init_sampler`.
        n_penalized: how many of the last tokens penalties look at.
    """
    if options["logits_processor"] or options["grammar"] is not None or options["temp"] < 0:
        return None
    if options["temp"] == 0:
        n = 1  # greedy
    elif options["mirostat_mode"] in (1, 2):
        return None
    else:
        n = options["top_k"]  # its first step
    repeat, others = options["repeat_penalty"], (options["frequency_penalty"], options["presence_penalty"])
    if repeat != 1 or any(others):
        if not (repeat >= 1 and min(others) >= 0):
            return None  # a token may become likelier
        n += max(n_penalized, 0)  # so many may become less likely than the next
    return n if 0 < n <= _MAX_LIKELIEST else None


class Sampler:
    """A sampler of llama_cpp whose processors may raise, and which also samples from kept logits.

    Args:
        sampler: llama_cpp's, with `guard` as its only logits processor, if there is one.
        candidates: llama_cpp's array of candidates, for the whole vocabulary.
        n_likeliest: of how many of the likeliest tokens it takes one, as `n_likeliest` says; None: of all.
        has_grammar: whether it samples by a grammar. llama.cpp ends the process if that allows none of the tokens that
            processors and biases leave; here it is InputError.
    """

    def __init__(
        self,
        sampler: Any,
        candidates: Any,
        guard: Guard | None = None,
        n_likeliest: int | None = None,
        has_grammar: bool = False,
    ) -> None:
        self._sampler = sampler
        self._candidates = candidates
        self._guard = guard
        self._has_grammar = has_grammar
        self._likeliest = (_llama.llama_token_data * n_likeliest)() if n_likeliest else None

    def sample(self, context: Any, row: int | npt.NDArray[np.float32] = -1) -> int:
        """A token from a row of llama_cpp's context, as llama_decode left it, or from logits [n_vocab]."""
        token = self._from_likeliest(context, row, self._likeliest) if self._likeliest else None
        if token is None:
            if isinstance(row, int) and not self._has_grammar:
                token = self._sampler.sample(context, row)
            else:
                token = self._from(self._logits(context, row) if isinstance(row, int) else row)
        if self._guard is not None:
            self._guard.check()
        return token

    def _from_likeliest(self, context: Any, row: int | npt.NDArray[np.float32], likeliest: Any) -> int | None:
        """As llama_sampler_sample, of the likeliest tokens, for which there is space; None if no logit is a number."""
        if isinstance(row, int):
            logits = _llama.llama_get_logits_ith(context.ctx, row)
        else:
            row = np.ascontiguousarray(row, np.float32)
            logits = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        n = library.llama_deltamem_candidates(logits, self._candidates.n_vocab, len(likeliest), likeliest)
        return self._taken(_llama.llama_token_data_array(data=likeliest, size=n, sorted=False)) if n else None

    def _logits(self, context: Any, row: int) -> npt.NDArray[np.float32]:
        pointer = _llama.llama_get_logits_ith(context.ctx, row)
        return np.ctypeslib.as_array(pointer, (self._candidates.n_vocab,))

    def _from(self, logits: npt.NDArray[np.float32]) -> int:
        """As llama_sampler_sample, from these logits."""
        self._candidates.copy_logits(logits)
        return self._taken(self._candidates.candidates)

    def _taken(self, array: Any) -> int:
        """The token that the sampler takes of these."""
        chain = self._sampler.sampler
        array.selected = -1
        _llama.llama_sampler_apply(chain, ctypes.byref(array))
        taken = array.data[array.selected]
        if self._has_grammar and not taken.logit > -np.inf:
            raise InputError(
                "the grammar allows no token: a logit bias, a logits processor or --ignore-eos excludes all others"
            )
        _llama.llama_sampler_accept(chain, taken.id)
        return int(taken.id)


def made_sampler(llm: Model, seed: int, *args: Any, **kwargs: Any) -> Sampler:
    """A sampler of a model. Options as `Llama._init_sampler`; raises InputError if one is invalid."""
    bound = _OPTIONS.bind(llm, *args, **kwargs)
    bound.apply_defaults()
    options = bound.arguments
    del options["self"]
    processors, guard = functions(options.pop("logits_processor"), "logits_processor"), None
    for name, value in options.items():
        if name in _WHOLE:
            options[name] = whole(value, name)
        elif name in _NUMBERS:
            options[name] = number(value, name)
    if options["grammar"] is not None:
        options["grammar"] = checked_grammar(llm, options["grammar"])
    if processors:
        guard = Guard(processors, functools.partial(_tokens_before, weakref.ref(llm)))
    options["logits_processor"] = [guard] if guard else None
    # not the model itself: a sampler with processors would keep it alive until the garbage collector runs
    names = ("_n_vocab", "_model", "last_n_tokens_size")
    owner: Any = types.SimpleNamespace(
        _input_ids=None, _seed=whole(seed, "seed"), **{name: getattr(llm, name) for name in names}
    )
    sampler = library.Llama._init_sampler(owner, **options)
    likeliest = n_likeliest(options, llm.last_n_tokens_size)
    return Sampler(sampler, llm._candidates, guard, likeliest, options["grammar"] is not None)


def _tokens_before(llm: weakref.ref[Model]) -> npt.NDArray[np.intc]:
    """The tokens before the sampled one."""
    model = llm()
    assert model is not None  # it samples
    return model.input_ids[: model._n_before]
