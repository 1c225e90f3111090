"""The log probability of a token, beside those of the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .tokenizer import token_text


class Scored(NamedTuple):
    """A token of a text, as log probabilities list it."""

    token: str
    offset: int  # characters of the text before it
    logprob: float | None  # None: nothing stands before it
    top: dict[str, float] | None  # the likeliest first, and the token itself


def listed(each: Sequence[Scored]) -> dict[str, Any]:
    """Scored tokens as OpenAI's completions have them."""
    return {
        "tokens": [one.token for one in each],
        "text_offset": [one.offset for one in each],
        "token_logprobs": [one.logprob for one in each],
        "top_logprobs": [one.top for one in each],
    }


def scored(vocab: Any, token: int, offset: int, row: npt.NDArray[np.float32] | None, n_top: int) -> Scored:
    """Scores a token. `row`: the logits that predict it, [n_vocab]; None: nothing stands before it."""
    name = token_text(vocab, token)
    if row is None:
        return Scored(name, offset, None, None)
    logits = row.astype(np.float64)
    logits -= logits.max()
    values = logits - np.log(np.exp(logits).sum())
    n = min(n_top, len(values))
    best: list[int] = np.argpartition(-values, n - 1)[:n].tolist() if n else []
    top: dict[str, float] = {}
    for i in sorted(best, key=lambda i: (-values[i], i)):
        top.setdefault(token_text(vocab, i), float(values[i]))
    top.setdefault(name, float(values[token]))
    return Scored(name, offset, float(values[token]), top)
