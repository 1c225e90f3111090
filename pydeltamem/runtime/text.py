"""`Text`: one text of a model, and the memory that reads it.

A model has as many slots as its context has sequences (n_seq_max). A text takes a slot when it is decoded. A text that
has lost its slot keeps its memory and its tokens. When it gets a slot again, the tokens are decoded without writing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..formats.memory_file import now
from .history import Log, Piece, Position, State, Tokens, n_common
from .lock import FairLock, holding
from .names import option
from .slots import Holder, Job, Result, Slots
from .values import whole

log = logging.getLogger("pydeltamem")


class Text:
    """A text and its memory.

    Args:
        slots: of the context.
        decode: decodes tokens after a text: `Engine.decode`.
        home: the only slot that it may have; None: any.

    Attributes:
        position: where text and memory are: a record, which each success replaces at once.
        write: whether tokens write the memory, or only read it.
        exact: whether a text that lost its KV cache is decoded again as the first time, from the memory with which it
            began, so that nothing differs from a text that kept it. Otherwise without writing: it reads the present
            memory.
        slot: its sequence in the context, None if it has none.
        n_decoded_again: tokens that were decoded again with writing, because the text went back to where there was no
            checkpoint, or because the model cannot cut its KV cache there.
        scores: if not None, receives the logits of every token, [n_ctx, n_vocab].
        turn: a thread that uses the text holds this lock, for a whole call or one piece of a stream. The lock of the
            context is taken after it, and released between two decodes.
    """

    def __init__(self, slots: Slots, decode: Callable[..., Position], home: int | None = None) -> None:
        self.slots = slots
        self.home = home
        self.lock = slots.lock
        self.turn = FairLock(before=slots.lock)
        self.write = True
        self.exact = False
        self.slot: int | None = None
        self.scores: npt.NDArray[np.single] | None = None
        self.n_decoded_again = 0
        self.position = Position(Log(slots.n_ctx), now())
        self._decode = decode
        self._is_exact_once = False  # after a failure that took tokens from the KV cache: they come back as if `exact`
        self._logits: tuple[int, Position, int] | None = None  # where they are: decode, record, row
        self.renew()

    @property
    def tokens(self) -> npt.NDArray[np.intc]:
        """The token ids of the text, a view."""
        return self.position.tokens

    @property
    def n_tokens(self) -> int:
        """Length of the text. Setting it lower goes back; the next tokens take the memory back too."""
        return self.position.n_tokens

    @n_tokens.setter
    @holding("lock")
    def n_tokens(self, value: int) -> None:
        position, value = self.position, whole(value, "n_tokens")
        if value != position.n_tokens:
            n = max(position.n_tokens, position.n)
            if not 0 <= value <= n:
                raise InputError(f"the text has {n} tokens: it cannot be set to {value}")
            self.position = position._replace(n_tokens=value)

    @property
    def n_kv(self) -> int:
        """Tokens of the text that the KV cache holds."""
        return self.position.n_kv

    @property
    def n_ready(self) -> int:
        """Tokens of the text that need not be decoded again before it goes on."""
        position = self.position
        n = min(position.n_kv, position.n_tokens)
        return min(n, position.memory_at(n).n) if self.slots.has_memory else n

    @property
    def lost_by_failure(self) -> bool:
        """Whether what the KV cache lacks was lost by a failure, which is to change nothing."""
        return self._is_exact_once

    @property
    def n_ctx(self) -> int:
        """Most tokens of the text."""
        return self.slots.n_ctx

    @property
    def version(self) -> tuple[Log, int]:
        """A value that changes when the text grows, goes back or is replaced."""
        return self.position.log, self.position.n_tokens

    @property
    def row(self) -> int | None:
        """The context's row with the logits of what may follow the text, as text and memory are now; None if there is
        none.
        """
        if self._logits is None:
            return None
        n_decodes, position, row = self._logits
        return row if position is self.position and n_decodes == self.slots.n_decodes else None

    def require_row(self) -> int:
        """As `row`. Raises InputError if there is none."""
        row = self.row
        if self.n_tokens == 0 or row is None:
            raise InputError("there are no logits of the present text and memory: eval tokens first")
        return row

    #
    # the memory
    #

    @property
    @holding("lock")
    def state(self) -> State:
        """A copy of the state, [L, H, r, r]. Raises AdapterError without an adapter."""
        self.slots.require_memory()
        self.renew()
        checkpoint = self.position.checkpoint
        assert checkpoint is not None  # there is a memory
        if self.slot is not None and self.slots.holds(self.slot, checkpoint.state):
            return self.slots.get_state(self.slot)
        return np.array(checkpoint.state)

    @holding("lock")
    def become(self, state: npt.NDArray[np.float32], n_written: int = 0, since: str | None = None) -> None:
        """Replaces the memory. No token of the present text counts as written into the new one."""
        state = np.array(state, dtype=np.float32, order="C")
        self.position = self.position.with_memory(state, n_written, since or now(), self.slots.n_attached)

    def renew(self) -> None:
        """Begins with an empty memory if another adapter was attached."""
        slots, position = self.slots, self.position
        if not slots.has_memory:
            if position.checkpoints:
                with self.lock:
                    self.position = self.position.without_memory()
        elif position.adapter != slots.n_attached:
            with self.lock:
                self.become(np.zeros(slots.shape, dtype=np.float32))
                if not slots.writes_by_segment:
                    self.position = self.position.by_token()

    def begin(self, position: int = 0) -> None:
        """Begins another text after `position`. The memory stays, and cannot go back before it."""
        self.finish()
        with self.lock:
            self.renew()
            self.position = self.position.begun(position, self.position.checkpoint)

    def reset(self) -> None:
        """Forgets the text and keeps the memory."""
        self.begin(0)

    def checkpoint(self) -> int:
        """Keeps the state at the end of the text, as long as there is room. Returns the position."""
        self.catch_up()
        with self.lock:
            before = self.position
            self.position = before._replace(checkpoints=before.checkpoints.keep_latest())
            if self._logits is not None and self._logits[1] is before:  # they are still those of text and memory
                self._logits = self._logits[0], self.position, self._logits[2]
        return self.n_tokens

    def back(self, position: int) -> int:
        """Takes text and memory back to `position`. Returns how many tokens were decoded again, from the nearest
        checkpoint before it.

        Raises InputError if the memory cannot go back so far. If it fails, text and memory are as before.
        """
        position = whole(position, "a position")
        if not 0 <= position <= self.n_tokens:
            raise InputError(f"cannot go back to token {position}: the text has {self.n_tokens}")
        if self.slots.has_memory and position < self.position.floor:
            raise InputError(
                f"cannot go back to token {position}: the text or the memory began at {self.position.floor}"
            )
        with self.lock:
            before = self.position
            self.position = before._replace(n_tokens=position)
        try:
            return self.catch_up()
        except BaseException:
            self.restore(before)
            raise

    def catch_up(self) -> int:
        """Takes the memory to the end of the text. Returns how many tokens were decoded again."""
        self._settle()
        n_again = self.position.n_tokens - self.position.n
        if n_again > 0:
            self._decode(self, [])
        return n_again

    def rehearse(self) -> None:
        """Lets the memory read the whole text once more, as a text of its own: each token that wrote writes again. The
        memory cannot go back to before that. If it fails, text and memory are as before.
        """
        self.catch_up()
        before = self.position
        with self.lock:
            self.position = before.rehearsed()
        try:
            self.finish()
        except BaseException:
            with self.lock:
                self.position = before
                self.lost_kv(by_failure=True)
            raise

    @holding("lock")
    def goes_on(self) -> None:
        """What was read last is the beginning of a message: what follows goes on with its turn."""
        self.position = self.position.goes_on()

    def finish(self) -> None:
        """Lets the memory read the rest of the text, if that was interrupted after going back."""
        if self.slots.has_memory and self.position.n_tokens > self.position.n:
            self._decode(self, [])

    @holding("lock")
    def _settle(self) -> None:
        """Takes the memory back to the end of the text, or to a checkpoint before it; the rest must be read again."""
        self.renew()
        if self.position.n_tokens < self.position.n:
            self.position = position = self.position.back()
            again = position.n_tokens - position.n
            self.n_decoded_again += again
            if again >= position.checkpoints.n_last:
                log.warning(
                    "the memory went back to token %d, where there is no checkpoint: %d tokens are decoded again",
                    position.n_tokens,
                    again,
                )

    def shift(self, start: int, end: int) -> None:
        """Drops the tokens from `start` to `end` from the text. The memory keeps what they wrote.

        Later tokens move up in the KV cache. If the model cannot do that, they are decoded again without writing.
        """
        assert 0 <= start < end <= self.n_tokens
        self.catch_up()
        with self.lock:
            self._shift(start, end)

    def _shift(self, start: int, end: int) -> None:
        before, n_kv = self.position, min(self.n_kv, self.n_tokens)
        self.lost_kv()  # until the cells are moved
        if self.slot is not None and n_kv > end and self.slots.shift(self.slot, start, end, n_kv):
            n_kv -= end - start
        else:
            n_kv = min(n_kv, start)
            n_kv = n_kv if self.slot is None else self.slots.truncate(self.slot, n_kv)
        self.position = before.without(start, end, n_kv)

    def replace(self, tokens: Tokens, n: int) -> None:
        """Replaces the text by these tokens; the first n are as before. All count as read and written."""
        self.finish()
        with self.lock:
            self.renew()
            self.position = self.position.with_text(tokens, min(self.n_kv, n))

    def fork(self) -> Text:
        """A second text that goes on from here on its own, with its own memory."""
        self.catch_up()
        other = Text(self.slots, self._decode)
        other.write, other.exact = self.write, self.exact
        with self.lock:
            other._is_exact_once = self._is_exact_once
            other.position = self.position._replace(n_kv=0)
            if self.slots.fork(self, other):
                other.position = self.position
        return other

    @holding("lock")
    def restore(self, before: Position, epoch: int | None = None) -> bool:
        """Takes text and memory back to an earlier record. False, and nothing done, if the memory was replaced since:
        what the new one has read stays. `epoch`: of the present text, if the caller began it after that record.
        """
        self.renew()
        position = self.position
        if position.epoch != (before.epoch if epoch is None else epoch):
            return False
        n_kv = min(position.n_kv, before.n)
        if position.log is not before.log:
            n_kv = n_common(position.log.tokens[:n_kv], before.log.tokens[:n_kv])
            if self.scores is not None:
                self.scores[n_kv : before.n_tokens] = np.nan  # not kept: other tokens may have taken their place
        self._is_exact_once = n_kv < before.n
        self.position = before._replace(n_kv=n_kv, epoch=position.epoch)
        return True

    #
    # slots
    #

    @holding("lock")
    def lost_kv(self, n: int = 0, by_failure: bool = False) -> None:
        """Notes that its KV cache is gone except for the first n tokens: the rest must be decoded again. `by_failure`:
        as the first time, so that the failure changes nothing.
        """
        self.position = self.position._replace(n_kv=min(self.position.n_kv, n))
        self._is_exact_once |= by_failure

    #
    # reading
    #

    def eval(self, tokens: Tokens, segments: npt.NDArray[np.int32] | None = None, **options: Any) -> Position:
        """Decodes tokens after the text: one ingest. Returns the record before. If llama.cpp fails, or memory or logits
        are not finite, that record is in place again. Options and result as `Engine.decode`.
        """
        return self._decode(self, tokens, segments, **options)

    def require_room(self, n_past: int, n: int) -> None:
        """Raises InputError if n tokens do not fit after n_past."""
        if n_past + n > self.n_ctx:
            raise InputError(
                f"{n} tokens do not fit after {n_past} in a context of {self.n_ctx}: raise {option('n_ctx')}"
            )

    @holding("lock")
    def prepare(
        self,
        tokens: Tokens,
        segments: npt.NDArray[np.int32] | None = None,
        staying: Sequence[Holder] = (),
        known: npt.NDArray[np.bool_] | None = None,
        begins_turn: bool = False,
        reply: bool = False,
    ) -> list[Piece] | None:
        """What to decode, in order, to add `tokens` to the text as one ingest.

        The text takes a slot, but none of the texts `staying`; None if no slot is left. With `segments`
        (DeltaMemLlama.eval) all tokens read the memory as it was before; then each segment writes. `known`: which of
        the tokens were written before the memory's floor. `begins_turn`: whether a turn begins with them, and
        `reply` whether they are of a reply, if the adapter defers its writes.
        """
        self.require_room(self.n_tokens, len(tokens))
        new = np.asarray(tokens, dtype=np.intc)
        begins_turn, reply = begins_turn and self.slots.defers_writes, reply and self.slots.defers_writes
        if len(new) == 1 and segments is None and known is None and self._is_ready():
            return [Piece(new, self.write, reply=reply)]
        self.renew()
        if segments is not None and not self.slots.writes_by_segment:
            raise InputError("the adapter writes per token and takes no segments")
        slot = self.slot
        self._settle()
        if slot is None:
            slot = self.slots.take(self, staying)
        if slot is None:
            return None
        self._cut(slot)
        position = self.position
        if len(new) > 1:
            self.position = position = position._replace(checkpoints=position.checkpoints.keep_latest())
        checkpoint = position.checkpoint
        if checkpoint is not None:
            self.slots.put_state(slot, checkpoint.state, checkpoint.of_turn)
        self._follow(slot)
        return position.pieces(new, segments, known, self.write, begins_turn, reply)

    def _follow(self, slot: int) -> None:
        """Notes that the slot has memory and turn as the record has them."""
        position = self.position
        checkpoint = position.checkpoint
        if checkpoint is None:
            self.slots.follow(slot, position)
        else:
            self.slots.follow(slot, position, checkpoint.state, checkpoint.of_turn)

    def _is_ready(self) -> bool:
        """Whether its slot is as the last decode left it, at the end of the text: another token may follow at once."""
        position = self.position
        return position.n_tokens == position.n == position.n_kv and self.slots.follows(self.slot, position)

    def _cut(self, slot: int) -> None:
        """Cuts the KV cache to where the memory is, or before."""
        position, slots = self.position, self.slots
        n = min(position.n_kv, position.n)
        n_kv = slots.truncate(slot, n)
        # The text went back and the model cannot cut its cache, or the memory has to read again after tokens that are
        # gone from the cache. So everything is read again as the first time, from the memory with which the text began,
        # with the same writes: each token then meets the same memory as before.
        if slots.has_memory and (n_kv < n or n_kv < position.n < position.n_tokens):
            self.n_decoded_again += position.n - position.floor
            position = position.memory_at(position.floor)
            n_kv = slots.truncate(slot, min(n_kv, position.n))
        elif slots.has_memory and (self.exact or self._is_exact_once) and n_kv < position.n:
            position = position.memory_at(max(n_kv, position.floor))
            n_kv = slots.truncate(slot, min(n_kv, position.n))
            if n_kv < position.n:  # the model cannot cut its cache
                position = position.memory_at(position.floor)
        self._is_exact_once = False
        if position is not self.position or n_kv != position.n_kv:
            self.position = position._replace(n_kv=n_kv)

    def job(self, piece: Piece, n_gathered: int, keep_at: Collection[int], drafted: bool) -> Job:
        """A piece of `prepare` as a job of the slot. `n_gathered`: tokens before it of the same ingest in segments."""
        position, slots = self.position, self.slots
        n_past, n = position.n_kv + n_gathered, len(piece.tokens)
        reads = slots.has_memory and position.n_kv >= position.n
        marks = self._marks(piece, {p - n_past - 1 for p in keep_at}, drafted) if reads and n > 1 else ()
        scores = None if self.scores is None else self.scores[n_past : n_past + n]
        assert self.slot is not None  # `prepare` gave it one
        return Job(self.slot, n_past, piece, reads, marks, scores)

    def _marks(self, piece: Piece, wanted: set[int], drafted: bool) -> list[int]:
        """The tokens of a piece after which the state is kept: ends of messages, positions in `wanted`, the last token,
        and the one before it, because another reply to the same prompt reads the last token again. If they are
        guesses: all.
        """
        n = len(piece.tokens)
        if piece.segments is not None:
            return []
        if drafted:
            return list(range(n))
        is_end = self.slots.is_end
        return [i for i, token in enumerate(piece.tokens.tolist()) if i >= n - 2 or i in wanted or is_end(token)]

    def did_decode(self, piece: Piece, result: Result) -> None:
        """Enters a decoded piece; an ingest in segments comes as one piece."""
        self.position = position = self.position.decoded(piece, result.states, self.slots.defers_writes)
        assert self.slot is not None  # it was decoded there
        self._follow(self.slot)
        self._logits = self.slots.n_decodes, position, result.row
