"""`Generation`: tokens sampled after a prompt, one a decode, until something ends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .assembler import Assembler
from .history import Position
from .logprobs import Scored, scored
from .model import Model
from .request import Request
from .sampling import Sampler
from .text import Text


class Generation(Request):
    """A request that goes on with the tokens that it samples.

    Args:
        text: the text.

    `prepare` sets how it samples and what ends it, and `ask` the prompt; then the engine may have it.

    Attributes:
        pieces: text that nobody has taken yet.
        scored: its tokens, if log probabilities were asked for.
        content: all of the text so far.
        n_tokens: tokens generated so far.
        finish_reason: "stop" after the end of the text or a stop string, "length" after n_predict tokens or in a full
            context; None before.
    """

    def __init__(self, text: Text) -> None:
        super().__init__(text)
        self.content = ""
        self.pieces: list[str] = []
        self.scored: list[Scored] = []
        self.n_tokens = 0
        self.finish_reason: str | None = None
        self._before_prompt: Position | None = None
        self._token = 0
        self._row: npt.NDArray[np.float32] | None = None

    def prepare(
        self,
        llm: Model,
        sampler: Sampler,
        *,
        n_predict: int = -1,
        stop: Sequence[str] = (),
        criteria: Callable[..., bool] | None = None,
        n_top: int | None = None,
    ) -> None:
        """Sets how it samples, and what ends it.

        Args:
            n_predict: tokens at most; 0: only decode the prompt; negative: until the text ends or the context is full.
            stop: strings that end the text and are not part of it.
            criteria: called with the tokens decoded, [n], and no logits; True ends the text.
            n_top: how many of the likeliest tokens to score with each token; None: no log probabilities.
        """
        self._context, self._vocab, self._sampler = llm._ctx, llm._model.vocab, sampler
        self.n_predict, self._criteria, self._n_top = n_predict, criteria, n_top
        self._assembler = Assembler(self._vocab, stop)

    @property
    def is_given(self) -> bool:
        """As Request: whether there is a piece, if pieces are wanted, or the end."""
        return self.is_over or (self.goes_on and bool(self.pieces))

    @property
    def is_sampled_once(self) -> bool:
        """Whether the prompt is decoded and the first token sampled."""
        return self._before_prompt is not None

    def sampled(self, row: int) -> None:
        """As Request."""
        if self._before_prompt is None:
            self._before_prompt = self.undo or self.before
        if self._n_top is not None:
            self._row = self.text.slots.logits(row)
        self._token = self._sampler.sample(self._context, row)

    def follow(self) -> None:
        """As Request: adds the sampled token to the text, and asks to decode it."""
        piece = self._push(self._token)
        self.content += piece
        piece = self.shown(piece)
        if piece:
            self.pieces.append(piece)
        if self.finish_reason:
            self.goes_on = False

    def shown(self, piece: str) -> str:
        """The part of a piece that the caller gets."""
        return piece

    def has_room(self) -> bool:
        """Whether the text can take another token."""
        return self.text.n_tokens < self.text.n_ctx

    def rest(self) -> str:
        """What was held back, because it might have begun a stop string: to be called once, after an early end."""
        return self._assembler.finish()

    def _push(self, token: int) -> str:
        """Takes the sampled token. Returns the text that it makes certain; sets finish_reason at the end."""
        text, assembler = self.text, self._assembler
        if self.n_predict == 0:
            self.finish_reason = "length"
            return ""
        if text.slots.is_end(token):
            self.finish_reason = "stop"
            return assembler.finish()
        if self._n_top is not None:
            self.scored.append(scored(self._vocab, token, assembler.n_chars, self._row, self._n_top))
        piece = assembler.push(token)
        self.n_tokens += 1
        if assembler.stopped:
            self.finish_reason = "stop"
            return piece
        if 0 < self.n_predict <= self.n_tokens or not self.has_room():
            self.finish_reason = "length"
            return piece + assembler.finish()
        if self._criteria is not None and self._criteria(text.tokens, np.zeros(0, dtype=np.single)):
            self.finish_reason = "stop"
            return piece
        self.ask([token])
        return piece
