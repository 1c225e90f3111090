"""`Request`: what the engine decodes for a caller."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from .history import Piece, Position, Tokens
from .keeping import Keeping
from .slots import Job, Result
from .text import Text


class Request(Keeping):
    """Tokens to decode after a text, one ingest, and what to do with the logits after them.

    Args:
        text: the text.

    Attributes:
        calls_back: it calls functions of the thread that waits for it; only that thread may decode it.
        before: the record of the text before its tokens; None until they are first decoded.
        undo: the record that a failure takes the text back to, if the caller has begun another text, or gone back,
            since; None: `before`.
        generates: it decodes sampled tokens, and goes before prompts.
        goes_on: the caller comes back for more.
        is_sampled: all tokens are decoded, and `sampled` was called.
        is_over: nothing is left to decode.
        error: why it ended, None if it ended well.
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.generates = self.goes_on = self.drafted = self.calls_back = False
        self.is_over = self.is_cancelled = False
        self.n_served = 0  # the step that last decoded a piece of it
        self.n_sampled = 0  # the step that last used its logits
        self.ask(())

    def ask(
        self,
        tokens: Tokens,
        segments: npt.NDArray[np.int32] | None = None,
        keep_at: Collection[int] = (),
        known: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Sets what to decode next. `keep_at`: positions that need a checkpoint. `known`: which of the tokens do not
        write, because the memory has them from another text.
        """
        self.tokens, self.segments, self.keep_at = tokens, segments, set(keep_at)
        self.before: Position | None = None
        self.undo: Position | None = None
        self._n_past = self.text.n_tokens
        self._pieces: list[Piece] = []
        self._gathered: list[Piece] = []  # pieces of an ingest in segments, which writes at its end
        self._planned: Position | None = None  # the record that the pieces follow
        self._known: npt.NDArray[np.bool_] | None = None  # which of the tokens were written before the memory's floor
        position = self.text.position
        self._begins_turn, self._replies = position.begins_turn(tokens) and not self.generates, position.replies
        if len(tokens) and self.text.n_tokens < self.text.position.n:
            self._known = self.text.position.known(np.asarray(tokens, dtype=np.intc))
        if known is not None and known.any():
            self._known = known if self._known is None else known | self._known
        self.is_sampled = False

    @property
    def is_given(self) -> bool:
        """Whether it has something for the caller."""
        return self.is_over

    def cancel(self) -> None:
        """Ends it before the next decode. An unfinished ingest is taken back. Any thread may call this."""
        self.is_cancelled = True

    def sampled(self, row: int) -> None:
        """Called with the lock held once all tokens are decoded. `row`: where the last token's logits are."""

    def follow(self) -> None:
        """Called after `sampled`: asks for more tokens, or the request is over."""

    #
    # for the engine, which holds the lock
    #

    @property
    def is_decoded(self) -> bool:
        """Whether all its tokens are decoded."""
        return self._planned is not None and not self._pieces

    @property
    def only_sampled(self) -> bool:
        """Whether what was sampled is all that is to be read."""
        return self.generates and sum(len(piece.tokens) for piece in self._pieces) <= len(self.tokens)

    def plan(self, staying: Sequence[Text]) -> bool:
        """Cuts what is to decode into pieces, in a slot. The texts `staying` keep theirs. False if no slot is left."""
        text = self.text
        text.renew()
        position = text.position
        if self._pieces and self._planned is position and text.slots.follows(text.slot, position):
            return True
        n_done = max(0, position.n_tokens - self._n_past)  # above 0 if the text lost its slot in the middle
        if self.before is not None and n_done >= len(self.tokens) > 0:  # all decoded, but the logits are lost
            text.restore(self.before)
            position, n_done = text.position, 0
        if position.n_tokens < position.n:
            self.keep_at.add(position.n_tokens)
        segments = None if self.segments is None else self.segments[n_done:]
        known = None if self._known is None else self._known[n_done:]
        before = position if self.before is None else self.before
        try:
            begins_turn, reply = self._begins_turn and n_done == 0, self._replies and not self._begins_turn
            pieces = text.prepare(self.tokens[n_done:], segments, staying, known, begins_turn, reply)
        finally:
            # back before the memory's floor another memory begins; a failure takes the text back to before that, too
            if before.epoch == position.epoch != text.position.epoch:
                self.before = before._replace(epoch=text.position.epoch)
                self.undo = self.undo and self.undo._replace(epoch=text.position.epoch)
        if pieces is None:
            return False
        if self.before is None:
            self.before = text.position
        self._pieces, self._gathered, self._planned = pieces, [], text.position
        return True

    def piece(self, n_max: int) -> tuple[Piece, Job]:
        """The next piece, or its first `n_max` tokens."""
        piece = self._pieces[0]
        if len(piece.tokens) > n_max:
            piece = piece.split(n_max)[0]
        n_gathered = sum(len(each.tokens) for each in self._gathered)
        return piece, self.text.job(piece, n_gathered, self.keep_at, self.drafted)

    def did_decode(self, piece: Piece, result: Result) -> None:
        """Enters a decoded piece into the text."""
        text, rest = self.text, self._pieces[1:]
        if len(piece.tokens) < len(self._pieces[0].tokens):
            rest = [self._pieces[0].split(len(piece.tokens))[1], *rest]
        if piece.segments is not None and not (piece.begins and piece.ends):
            self._gathered.append(piece)
            if not piece.ends:
                assert text.slot is not None  # it was decoded there
                text.slots.follow(text.slot, text.position)
                self._pieces = rest
                return
            piece, n = _joined(self._gathered), len(piece.tokens)
            result = result._replace(states={len(piece.tokens): result.states[n]} if result.states else {})
            self._gathered = []
        text.did_decode(piece, result)
        self._pieces, self._planned = rest, text.position

    def end(self, error: BaseException | None = None) -> None:
        """Ends the request. What was not decoded to its end is taken back."""
        if not self.is_over:
            self.error = error
            self.is_over = True
            if not self.is_decoded:
                self._take_back()

    def give_up(self) -> None:
        """Ends the request for a caller who is interrupted: even what was decoded to its end is taken back."""
        self.is_over = True
        self._take_back()

    def _take_back(self) -> None:
        before = self.undo or self.before
        if before is not None:
            self.text.restore(before)


def _joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of an ingest in segments, joined into one."""
    segments = np.concatenate([piece.segments for piece in pieces])
    write = any(piece.write for piece in pieces)
    return Piece(np.concatenate([piece.tokens for piece in pieces]), write, segments, True, True)
