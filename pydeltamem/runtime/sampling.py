"""Samplers that report errors of logits processors.

llama.cpp calls logits processors from C, and Python drops exceptions there: llama_cpp would go on with unchanged
logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import library

_llama = library.llama_cpp


class Guard:
    """Logits processors, one after the other, as one that never raises where llama.cpp calls it.

    Args:
        processors: called with the tokens decoded, [n], and the logits, [n_vocab]; return logits.
        tokens: gives the tokens before the sampled one; llama_cpp would give drafted ones too.
    """

    def __init__(
        self, processors: Callable[..., Any] | Sequence[Callable[..., Any]], tokens: Callable[[], Any]
    ) -> None:
        self.processors = list(processors) if isinstance(processors, Sequence) else [processors]
        self.tokens = tokens
        self.error: BaseException | None = None

    def __call__(self, _: Any, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = scores.copy()
        try:
            for processor in self.processors:
                result[:] = processor(self.tokens(), result)
        except BaseException as error:
            self.error = error
            return scores
        return result

    def check(self) -> None:
        """Raises the exception that a processor raised since the last check."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class Sampler:
    """A sampler of llama_cpp whose processors may raise, and which also samples from kept logits.

    Args:
        sampler: llama_cpp's, with `guard` as its only logits processor, if there is one.
        candidates: llama_cpp's array of candidates.
    """

    def __init__(self, sampler: Any, candidates: Any, guard: Guard | None = None) -> None:
        self._sampler = sampler
        self._candidates = candidates
        self._guard = guard

    def sample(self, context: Any, row: int | npt.NDArray[np.float32] = -1) -> int:
        """A token from a row of llama_cpp's context, as llama_decode left it, or from logits [n_vocab]."""
        token = self._sampler.sample(context, row) if isinstance(row, int) else self._from(row)
        if self._guard is not None:
            self._guard.check()
        return token

    def _from(self, logits: npt.NDArray[np.float32]) -> int:
        """As llama_sampler_sample, from these logits."""
        self._candidates.copy_logits(logits)
        array, chain = self._candidates.candidates, self._sampler.sampler
        array.selected = -1
        _llama.llama_sampler_apply(chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        _llama.llama_sampler_accept(chain, token)
        return token
