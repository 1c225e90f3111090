"""Text as it is generated, for the terminal: UTF-8 split over tokens, and stop strings.

llama_cpp's own stream waits forever at a byte that is no UTF-8, and detokenizes the whole reply again for each token.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from . import library
from .model import Model
from .tokenizer import piece as _piece

_llama = library.llama_cpp


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


class TextStream:
    """Iterates over the pieces of text that follow a prompt.

    Args:
        llm: the model.
        prompt: token ids.
        n_predict: tokens to generate. 0: only decode the prompt; negative: until the text ends or the context is full.
        stop: strings that end the text; they are not part of it.
        **options: sampling, as `Llama.generate`, and `seed`.

    Attributes:
        n_tokens: tokens generated so far.
        finish_reason: "stop" after the end of the text or a stop string, "length" after n_predict or a full context.
    """

    def __init__(
        self,
        llm: Model,
        prompt: Sequence[int],
        *,
        n_predict: int = -1,
        stop: Sequence[str] = (),
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.llm = llm
        self.prompt = list(prompt)
        room = llm.n_ctx() - len(self.prompt)
        self.limit = room if n_predict < 0 else min(n_predict, room)
        self.decodes_only = n_predict == 0
        self.stop = stop
        self.seed = seed
        self.options = options
        self.n_tokens = 0
        self.finish_reason = "length"

    def __iter__(self) -> Iterator[str]:
        if self.decodes_only:
            with contextlib.closing(self.llm.generate(self.prompt, **self.options)) as tokens:
                next(tokens, None)
        if self.limit <= 0:
            return
        if self.seed is not None:
            self.llm.set_seed(self.seed)
        text = Assembler(self.llm._model.vocab, self.stop)
        for token in self.llm.generate(self.prompt, **self.options):
            if self.llm._engine.slots.is_end(token):
                self.finish_reason = "stop"
                break
            self.n_tokens += 1
            piece = self.llm._engine.slots.call(text.push, token)
            if piece:
                yield piece
            if text.stopped:
                self.finish_reason = "stop"
                return
            if self.n_tokens >= self.limit:
                break
        piece = text.finish()
        if piece:
            yield piece
