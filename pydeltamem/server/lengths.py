"""How many tokens a text has at least, by its bytes alone.

llama.cpp takes a time that grows with the square of the length to tokenize some texts, line breaks or digits alone for
one: hours for a few megabytes, and nothing ends it. So what cannot fit is refused before.
"""

from __future__ import annotations

import functools

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..llama import DeltaMemLlama
from ..runtime.tokenizer import piece

_SHORT = 10_000  # bytes that are tokenized in no time
_STRIP = llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP | llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP


class PromptTooLong(InputError):
    """The prompt does not fit in the context."""


class Lengths:
    """Counts by the vocabulary of a model."""

    def __init__(self, llm: DeltaMemLlama) -> None:
        self._llm = llm

    def at_least(self, text: bytes) -> int:
        """A number of tokens that a text surely has. No token holds more of one byte than any piece of the vocabulary,
        so many of them take many tokens.
        """
        if len(text) <= _SHORT:
            return 0
        counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
        return int(np.ceil(counts / self._most).max())

    @functools.cached_property
    def _most(self) -> npt.NDArray[np.float64]:
        """How many of each byte a token holds at most; infinity for bytes that may get lost."""
        vocab, unknown = self._llm._model.vocab, np.full(256, np.inf)
        kind = llama_cpp.llama_vocab_type(vocab)
        if kind not in (llama_cpp.LLAMA_VOCAB_TYPE_SPM, llama_cpp.LLAMA_VOCAB_TYPE_BPE):  # others change the text
            return unknown
        tokens = range(self._llm.n_vocab())
        pieces = {piece(vocab, token, special=True) for token in tokens}
        most = np.zeros(256)
        for each in pieces:
            for byte in set(each):
                most[byte] = max(most[byte], each.count(byte))
        if kind == llama_cpp.LLAMA_VOCAB_TYPE_SPM:
            most = np.maximum(most, [1] * 128 + [4] * 128)  # a character of no piece is a token
        else:
            most[[byte for byte in range(256) if bytes([byte]) not in pieces]] = np.inf  # such a byte gives no token
        if any(llama_cpp.llama_vocab_get_attr(vocab, token) & _STRIP for token in tokens):
            most[list(b" \t\n\v\f\r")] = np.inf  # these swallow the spaces beside them
        return most
