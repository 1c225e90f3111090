"""`Assembler`: text out of tokens, as they come.

llama_cpp's own stream waits forever at a byte that is no UTF-8, and detokenizes the whole reply again for each token.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from .tokenizer import piece as _piece


class Assembler:
    """Text out of tokens: UTF-8 split over tokens, and stop strings, which are not part of the text.

    Args:
        errors: how bytes that are no UTF-8 are treated, as `bytes.decode`.

    Attributes:
        stopped: a stop string was found.
        n_chars: characters so far, those of stop strings too.
    """

    def __init__(self, vocab: Any, stop: Sequence[str] = (), errors: str = "replace") -> None:
        self.vocab = vocab
        self.stop = [text for text in stop if text]
        self.stopped = False
        self.n_chars = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """The text that a token makes certain, often none."""
        return self.push_bytes(_piece(self.vocab, token))

    def push_bytes(self, data: bytes) -> str:
        """The text that these bytes make certain."""
        new = self._decoder.decode(data)
        self.n_chars += len(new)
        text = self._held + new
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - self._n_held_back(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What is left at the end."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return "" if self.stopped else text

    def _n_held_back(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
