"""`DeltaMemLlama.generate`: a prompt, and the tokens that follow it, drafted ones too.

llama_cpp's own starts over where it cannot cut the KV cache, which would write everything again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, NotFiniteError
from .history import Tokens, n_common
from .model import Model
from .values import functions


class Continuation:
    """One call of `generate`.

    Args:
        llm: the model.
        whole: the prompt.
        options: of `Llama.generate`.
    """

    def __init__(self, llm: Model, whole: list[int], options: dict[str, Any]) -> None:
        self.llm, self.text, self.whole = llm, llm._text, whole  # which has the tokens that follow, too
        self.is_all = options.pop("reset", True)
        self.criteria = functions(options.pop("stopping_criteria", None), "stopping_criteria")
        self.calls_back = bool(self.criteria) or options.get("logits_processor") is not None
        self.options = options
        self._token: int | None = None  # that follows `whole`; None at the end
        self._n_taken = 0  # tokens that the caller has of this text
        self._version = self.text.version  # of the text, as this call has left it
        self._before, self._messages = self.text.position, llm._messages  # what a failure takes the text back to

    def tokens(self) -> Generator[int, Sequence[int] | None, None]:
        """The tokens that follow. Guesses at what comes next may be sent."""
        try:
            self._decode_prompt()
            while self._token is not None:
                self.whole.append(self._token)
                self._n_taken += 1
                sent = yield self._token
                if len(self.whole) > self.text.n_ctx:  # the token cannot be decoded
                    self.llm.finish_reason = "length"
                    return
                self._go_on(sent)
        finally:
            # do not wait forever, see Reply.fail
            if self._n_taken > 0 and self.text.turn.acquire(timeout=1):
                try:
                    if self._version == self.text.version:  # else another call has changed the text
                        self._take_back()
                finally:
                    self.text.turn.release()

    def _decode_prompt(self) -> None:
        llm, text = self.llm, self.text
        with text.turn:
            llm._engine.slots.require_open()
            llm.finish_reason = None
            llm._sampler = self._sampler = llm._init_sampler(**self.options)
            self.whole = whole = llm._checked_tokens(self.whole).tolist()
            text.require_room(0 if self.is_all else text.n_tokens, len(whole))
            self._messages = llm._messages
            self._before = before = begun = text.position
            try:
                with text.lock:
                    undecoded = self._begin() if self.is_all else whole
                    self.whole = whole if self.is_all else [*text.tokens.tolist(), *whole]
                    begun = text.position
                    if not undecoded:
                        self._take()
                if undecoded:
                    asked = {"then": self._take, "goes_on": True, "calls_back": self.calls_back}
                    self._before = llm._eval(undecoded, None if begun is before else before, **asked) or before
            except BaseException:
                llm._messages = self._messages
                if before is not begun is text.position:  # nothing was decoded
                    text.restore(before, begun.epoch)
                raise
            self._version = text.version

    def _begin(self) -> list[int]:
        """Goes back to where text and prompt differ. Returns the tokens to decode, none if the logits are there."""
        text, whole = self.text, self.whole
        if self.llm._begins_another_chat():
            self._begin_after(text.position.common(0, whole))
        n = n_common(text.tokens, whole)
        if n == len(whole) == text.n_tokens and text.row is not None:
            return []
        n = max(0, min(n, len(whole) - 1))
        if n == 0:
            text.reset()
        elif text.position.common(0, whole) == 1:
            self._begin_after(1)  # only the token that begins every text agrees: this is another text
        else:
            text.n_tokens = n
        return whole[n:]

    def _begin_after(self, n: int) -> None:
        """Begins another text after the first n tokens, which both share."""
        if n < self.text.n_tokens:
            self.text.begin(n)

    def _go_on(self, sent: Sequence[int] | None) -> None:
        """Decodes the latest token, and takes the one that follows."""
        text = self.text
        with text.turn:
            if text.version != self._version:
                raise InputError("the text was changed during generation: start again")
            try:
                if not self._was_drafted():
                    text.n_tokens = len(self.whole) - 1
                    text.eval(
                        self._with_drafts(sent),
                        drafted=self.llm.draft_model is not None,
                        then=self._take,
                        generates=True,
                        goes_on=True,
                        calls_back=self.calls_back,
                    )
            except NotFiniteError:
                if text.restore(self._before):
                    self.llm._messages, self._n_taken = self._messages, 0
                raise
            finally:
                self._version = text.version

    def _was_drafted(self) -> bool:
        """Whether the latest token was drafted and decoded already and its logits are there. If so, takes the next."""
        text, n = self.text, len(self.whole)
        if n > text.n_tokens:
            return False
        with text.lock:
            if text.row is None or text.tokens[n - 1] != self.whole[-1]:
                return False
            self._take()
        return True

    def _with_drafts(self, sent: Sequence[int] | None) -> Tokens:
        """The latest token, and guesses at what follows: those that were sent, and the draft model's."""
        llm, whole = self.llm, self.whole
        if sent is None and llm.draft_model is None:
            return whole[-1:]
        drafts = [] if sent is None else list(sent)
        if drafts and not llm._logits_all:
            raise InputError("tokens given by send need the logits of every token: load the model with logits_all=True")
        if llm.draft_model is not None:
            drafts += llm.draft_model(np.array([*whole, *drafts], dtype=np.intc)).astype(int).tolist()
        return llm._checked_tokens([whole[-1], *drafts[: llm.n_ctx() - len(whole)]])

    def _take(self) -> None:
        """Takes the token that follows. Called with the lock held."""
        llm, text, n = self.llm, self.text, len(self.whole)
        llm._n_before = n
        row, version, logits = text.require_row(), text.version, None
        if self.criteria:  # before a processor, which may decode other texts
            logits = llm.scores[n - 1].copy() if llm._logits_all else text.slots.logits(row)
        # drafts may follow it: then its logits are in no row of the context
        self._token = self._sampler.sample(llm._ctx, llm.scores[n - 1] if n < text.n_tokens else row)
        if text.version == version and any([ends(text.tokens[:n].copy(), logits) for ends in self.criteria]):
            self._token, llm.finish_reason = None, "stop"
        if text.version != version:
            self._n_taken = 0  # nothing of this is left to take back
            raise InputError("a callback changed the text that is generated: use a Conversation in it")

    def _take_back(self) -> None:
        """Removes what was drafted beyond the tokens that were taken."""
        text = self.text
        n = text.position.common(0, self.whole)
        if n < max(text.n_tokens, text.position.n):
            text.n_tokens = min(text.n_tokens, n)
            text.catch_up()
