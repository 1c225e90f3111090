"""`Text`: one text of a model, the memory that reads it, and the sequence of the context that they are in.

A model has as many seats as its context has sequences (n_seq_max); a text takes one when it is evaluated. One that has
lost its seat keeps its memory and its tokens; when it is back, the tokens are read again without writing.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError, NotFiniteError
from ..formats.memory_file import now
from .history import TOKEN, Checkpoint, History
from .lock import FairLock, holding
from .names import option

if TYPE_CHECKING:
    from .slots import Seats

log = logging.getLogger("pydeltamem")


class Piece(NamedTuple):
    """Tokens for one sequence of one llama_decode, at most; they write all or none, unless they have segments."""

    tokens: npt.NDArray[np.intc]
    write: bool
    segments: npt.NDArray[np.int32] | None = None
    begins: bool = False  # an ingest begins with it
    ends: bool = False  # and ends with it

    def split(self, n: int) -> tuple[Piece, Piece]:
        """Its first n tokens, and the rest."""
        ids = self.segments
        return (
            Piece(self.tokens[:n], self.write, None if ids is None else ids[:n], self.begins, False),
            Piece(self.tokens[n:], self.write, None if ids is None else ids[n:], False, self.ends),
        )


class Text:
    """A text and its memory.

    Attributes:
        n_tokens: length of the text. Setting it lower goes back: what is read next takes the memory back too.
        write: whether tokens write the memory, or only read it.
        seat: its sequence in the context, None if it has none.
        home: the only sequence that it may have; None: any.
        n_read_again: tokens that were read again with writing, because no checkpoint stood where the text went back to,
            or because the model cannot cut its KV cache there.
        n_decoded: how often some of it was decoded.
        keep_at: positions that are still to be read, where a checkpoint is wanted.
        scores: if not None, takes the logits of every token, [n_ctx, n_vocab].
        drafted: tokens are guesses: a checkpoint after each.
        fault: why what was decoded last is of no use, None if it is.
        since: when the memory began, ISO 8601, UTC.
        turn: whoever uses the text holds it, for all of a call or for one piece of a stream; the lock of the context is
            taken after it, and let go of between two decodes.
    """

    def __init__(self, seats: Seats, home: int | None = None) -> None:
        self.seats = seats
        self.home = home
        self.lock = seats.lock
        self.turn = FairLock(before=seats.lock)
        self.history = History(seats.n_ctx)
        self.n_tokens = 0
        self.write = True
        self.seat: int | None = None
        self.scores: npt.NDArray[np.single] | None = None
        self.drafted = False
        self.fault: str | None = None
        self.since = now()
        self.n_kv = 0  # tokens that the KV cache holds
        self.n_read_again = 0
        self.n_decoded = 0
        self.keep_at: set[int] = set()
        self._attached = seats.n_attached
        self._away: npt.NDArray[np.float32] | None = None  # the state while there is no seat; None: empty
        self._ingest: int | None = None  # where an ingest in segments began of which more is to come
        seats.texts.add(self)

    @property
    def tokens(self) -> npt.NDArray[np.intc]:
        """The token ids of the text, a view."""
        return self.history.tokens[: self.n_tokens]

    @property
    def n_ctx(self) -> int:
        return len(self.history.tokens)

    @property
    def version(self) -> tuple[int, int, History]:
        """Another one once the text was read on, gone back in or replaced."""
        return self.n_decoded, self.n_tokens, self.history

    #
    # the memory
    #

    @property
    @holding("lock")
    def state(self) -> npt.NDArray[np.float32]:
        """A copy of the state, [L, H, r, r]."""
        self.renew()
        if self.seat is not None:
            return self.seats.get_state(self.seat)
        return np.zeros(self.seats.shape, dtype=np.float32) if self._away is None else self._away.copy()

    @holding("lock")
    def put_state(self, state: npt.NDArray[np.float32]) -> None:
        """Replaces the state; the record of what it has read is the caller's business."""
        self._attached = self.seats.n_attached
        if self.seat is not None:
            self.seats.set_state(self.seat, state)
        else:
            self._away = state.copy()

    @holding("lock")
    def become(self, state: npt.NDArray[np.float32], n_written: int = 0) -> None:
        """Another memory from here on: nothing of the present text counts as written into it."""
        self.put_state(state)
        self.since = now()
        self.history.wrote[:] = False
        self.history.n_written = n_written
        self.history.begin(self.n_tokens, state)

    @holding("lock")
    def renew(self) -> None:
        """If another adapter was attached: an empty memory."""
        if self._attached != self.seats.n_attached and self.seats.has_memory:
            self.become(np.zeros(self.seats.shape, dtype=np.float32))

    def begin(self, position: int = 0) -> None:
        """Another text begins after `position`; the memory stays, and cannot be taken back before."""
        self.finish()
        with self.lock:
            state = self.state if self.seats.has_memory else None
            self.history.begin(position, state)
            self.n_tokens = position
            self.n_kv = min(self.n_kv, position)

    def reset(self) -> None:
        """Forgets the text and keeps the memory."""
        self.begin(0)
        self.history.wrote[:] = False

    def checkpoint(self) -> int:
        """Keeps the state at the end of the text, as long as there is room for it. Returns that position."""
        self.catch_up()
        if self.seats.has_memory:
            self.history.checkpoint(self.n_tokens, self.state, keep=True)
        return self.n_tokens

    def back(self, position: int) -> int:
        """Takes text and memory back to `position`. Returns how many tokens were read again for it, because the next
        checkpoint is that far before.

        Raises InputError if the memory cannot go back so far.
        """
        if not 0 <= position <= self.n_tokens:
            raise InputError(f"cannot go back to token {position}: the text has {self.n_tokens}")
        if self.seats.has_memory and position < self.history.floor:
            raise InputError(
                f"cannot go back to token {position}: the text or the memory began anew at {self.history.floor}"
            )
        self.n_tokens = position
        return self.catch_up()

    def catch_up(self) -> int:
        """Takes the memory to where the text is. Returns how many tokens were read again for it."""
        self._settle()
        n_again = self.n_tokens - self.history.n
        if n_again > 0:
            self.eval([])
        return n_again

    def finish(self) -> None:
        """Lets the memory read what it still has to, if it was interrupted on its way back to where the text is."""
        if self.seats.has_memory and self.n_tokens > self.history.n:
            self.eval([])

    @holding("lock")
    def _settle(self) -> None:
        """Takes the memory back to where the text is, or before it; what lies between is to be read again."""
        self.renew()
        history = self.history
        if self.n_tokens < history.n:
            if self.seats.has_memory:
                # in this order: after an interrupt in between it goes back once more
                self.put_state(history.checkpoint_before(self.n_tokens).state)
                history.back(self.n_tokens)
                again = self.n_tokens - history.n
                self.n_read_again += again
                if again >= history.checkpoints.n_last:
                    log.warning(
                        "the memory went back to token %d: no checkpoint is there, %d tokens before it are read again",
                        self.n_tokens,
                        again,
                    )
            else:
                history.n = self.n_tokens
            self.n_kv = min(self.n_kv, history.n)

    def shift(self, start: int, end: int) -> None:
        """Drops the tokens from `start` to `end` from the text. The memory keeps what they wrote.

        What follows moves up in the KV cache; where the model cannot do that, it is read again, without writing.
        """
        if not 0 <= start < end <= self.n_tokens:
            raise InputError(f"cannot drop tokens {start} to {end} of a text of {self.n_tokens}")
        self.catch_up()
        with self.lock:
            if self.seats.has_memory and not any(p >= end for p in self.history.checkpoints.positions):
                self.history.checkpoint(self.n_tokens, self.state)  # the others go
            n_moved = min(self.n_kv, self.n_tokens) - end
            if self.seat is not None and n_moved > 0 and self.seats.shift(self.seat, start, end, self.n_kv):
                self.n_kv -= end - start
            else:
                n = min(self.n_kv, start)
                self.n_kv = n if self.seat is None else self.seats.truncate(self.seat, n)
            self.history.shift(start, end)
            self.n_tokens -= end - start

    def replace(self, tokens: Sequence[int], n: int) -> None:
        """The text is these tokens now, the first n of them as before; all count as read and written."""
        self.finish()
        history = self.history
        span = slice(0, len(tokens))
        history.tokens[span], history.wrote[span], history.segment[span] = tokens, True, TOKEN
        history.begins[span] = False
        with self.lock:
            history.begin(len(tokens), self.state if self.seats.has_memory else None)
            self.n_tokens, self.n_kv = len(tokens), min(self.n_kv, n)

    def fork(self) -> Text:
        """A second text that goes on from here by itself, with a memory of its own."""
        self.catch_up()
        other = Text(self.seats)
        other.history = self.history.copy()
        other.n_tokens, other.write, other.since = self.n_tokens, self.write, self.since
        with self.lock:
            if self.seats.has_memory:
                other._away = self.state
            self.seats.fork(self, other)
        return other

    #
    # seats
    #

    def sits(self, seat: int) -> None:
        """Called by Seats: the text has a seat, and nothing in the KV cache."""
        self.seat, self.n_kv, self._away = seat, 0, None

    def stands(self, state: npt.NDArray[np.float32] | None) -> None:
        """Called by Seats: the text has lost its seat; it keeps the state. An ingest in segments that was not at its
        end has written nothing, and what it had gathered is gone: it is to be read again.
        """
        if self._ingest is not None:
            if self.n_tokens == self.n_kv:  # it was new, not one that is read again after going back
                self.n_tokens = self._ingest
            self.history.unread(self._ingest)
            self._ingest = None
        self.seat, self.n_kv, self._away = None, 0, state

    #
    # reading
    #

    @holding("lock")
    def pieces(
        self,
        tokens: Sequence[int],
        segments: npt.NDArray[np.int32] | None = None,
        staying: Sequence[Text] = (),
    ) -> list[Piece]:
        """What is to be decoded, in order, so that `tokens` are read after the text, one ingest: what the KV cache
        lacks, what the memory is to read again after going back, and the tokens.

        The text takes a seat, none that belongs to the texts `staying`. With `segments` (DeltaMemLlama.eval) the memory
        reads all of them as it was before and then writes per segment.
        """
        history, seats = self.history, self.seats
        if self.n_tokens + len(tokens) > self.n_ctx:
            raise InputError(
                f"{len(tokens)} tokens do not fit after {self.n_tokens} in a context of {self.n_ctx}: "
                f"raise {option('n_ctx')}"
            )
        self.renew()
        new = np.asarray(tokens, dtype=np.intc)
        n_past = self.n_tokens
        known = np.zeros(len(new), dtype=np.bool_)  # written before the memory's beginning, in this place
        if n_past < history.n:
            self.keep_at.add(n_past)
            n_known = max(0, min(history.floor - n_past, history.common(n_past, new)))
            known[:n_known] = history.wrote[n_past : n_past + n_known]
            self._settle()
        seats.take(self, staying=staying)
        self._cut()
        self._keep_state(len(new) > 1)
        if n_past == history.n == self.n_kv and segments is None and len(new) and not known.any():
            return [Piece(new, self.write)]

        old = slice(self.n_kv, n_past)
        unread = np.arange(self.n_kv, n_past) >= history.n  # of the old ones, by the memory
        every = np.concatenate([history.tokens[old], new])
        write = np.concatenate([history.wrote[old] & unread, ~known & self.write])
        ids = np.full(len(new), TOKEN, dtype=np.int32) if segments is None else np.where(known, -1, segments)
        segment = np.concatenate([np.where(unread, history.segment[old], TOKEN), ids])
        begins = np.concatenate([history.begins[old] & unread, np.zeros(len(new), dtype=np.bool_)])
        if segments is not None:
            begins[n_past - self.n_kv] = True
        return list(_runs(every, write, segment, begins, history.n - self.n_kv))

    def _cut(self) -> None:
        """The KV cache ends where the memory is, or before."""
        history = self.history
        n = min(self.n_kv, history.n)
        n_kv = self.seats.truncate(self.seat, n)
        # The text went back and the model cannot cut its cache, or the memory is to read again what follows tokens that
        # are not there any more. So all is read again as it was the first time, with the memory with which the text
        # began and with what it wrote: the tokens then meet what they met then.
        if self.seats.has_memory and (n_kv < n or n_kv < history.n < self.n_tokens):
            self.put_state(history.checkpoint_before(history.floor).state)
            self.n_read_again += history.n - history.floor
            history.back(history.floor)
            n_kv = self.seats.truncate(self.seat, min(n_kv, history.n))
        self.n_kv = n_kv  # last: after an interrupt before it all this is done once more

    def _keep_state(self, keep: bool) -> None:
        """A checkpoint where the memory is, if there is none. `keep`: beyond the last ones."""
        history = self.history
        if not self.seats.has_memory:
            return
        if history.n not in history.checkpoints:
            history.checkpoint(history.n, self.state, keep)
        elif keep:
            history.checkpoints.keep(history.n)

    def did_read(self, piece: Piece, checkpoints: dict[int, npt.NDArray[np.float32]]) -> None:
        """Records a piece that was decoded; `checkpoints` are states by the number of its tokens read."""
        position = self.n_kv
        self.n_kv += len(piece.tokens)
        self.n_decoded += 1
        self.keep_at = {p for p in self.keep_at if p > self.n_kv}
        if piece.segments is not None:
            begun = position if piece.begins else self._ingest
            self._ingest = None if piece.ends else begun
        if position >= self.history.n:
            self.history.read(piece.tokens, piece.write, piece.segments, piece.begins)
            for n, state in checkpoints.items():
                self.history.checkpoint(position + n, state, keep=len(piece.tokens) > 1)
        self.n_tokens = max(self.n_tokens, self.n_kv)

    def marks(self, piece: Piece) -> list[int]:
        """After which tokens of a piece the state is to be kept: where messages end, and where it was asked for; at the
        end; and before the last token, which is read again when another reply is generated from one prompt.
        """
        n = len(piece.tokens)
        if n < 2 or piece.segments is not None:
            return []
        if self.drafted:
            return list(range(n))
        wanted = {position - self.n_kv - 1 for position in self.keep_at}
        return [
            i for i, token in enumerate(piece.tokens.tolist()) if i >= n - 2 or i in wanted or self.seats.is_end(token)
        ]

    def eval(
        self,
        tokens: Sequence[int],
        segments: npt.NDArray[np.int32] | None = None,
        then: Callable[[], object] = lambda: None,
    ) -> Before:
        """Reads tokens after the text: one ingest. Returns what text and memory were before: if llama.cpp fails, or
        memory or logits are not finite, they are so again.

        Others may be decoded between two decodes. `then` is called before they may be: what it does with the logits.
        """
        reading = Reading(self, tokens, segments)
        seats = self.seats
        try:
            while True:
                with self.lock:
                    reading.prepare()
                    while reading.pieces:
                        seats.decode([(self, reading.take(seats.n_batch))])
                        self.check_finite()
                        if reading.pieces and not seats.is_crowded:
                            break
                    else:
                        then()
                        return reading.before
        except BaseException:
            reading.fail()
            raise

    def check_finite(self) -> None:
        """Raises NotFiniteError if the memory, or the logits behind what was decoded last, are not finite."""
        if self.fault:
            raise NotFiniteError(self.fault)

    def before(self) -> Before:
        """What `undo` goes back to: text and memory as they are, with a checkpoint where the memory is."""
        history = self.history
        found = history.checkpoints.newest(history.n)
        return Before(history, self.n_tokens, history.n, history.n_begun, found[1] if found else None)

    @holding("lock")
    def undo(self, before: Before) -> bool:
        """Takes text and memory back. False, and nothing done, if there is another memory by now: what that has read
        stays.
        """
        self.fault = None
        self.renew()
        history = self.history
        if history is not before.history or history.n_begun != before.n_begun:
            return False
        self.n_tokens = before.n_tokens
        self._ingest = None
        if self.seat is not None:
            self.seats.abandon(self.seat)
        if self.seats.has_memory and before.checkpoint is not None:
            self.put_state(before.checkpoint.state)
            history.n_written = before.checkpoint.n_written
            history.checkpoints.drop_after(before.n_read)
        history.n = min(history.n, before.n_read)
        self.n_kv = min(self.n_kv, history.n)
        return True


class Before(NamedTuple):
    """A text and its memory at one moment."""

    history: History
    n_tokens: int
    n_read: int  # by the memory
    n_begun: int
    checkpoint: Checkpoint | None


class Reading:
    """Tokens on their way into a text, one ingest. Between two of its decodes others may be decoded, also in the text's
    seat: it goes on where it was.

    Attributes:
        pieces: what is to be decoded now, none at the end.
        before: text and memory as they were, None before the first `prepare`.
    """

    def __init__(self, text: Text, tokens: Sequence[int], segments: npt.NDArray[np.int32] | None = None) -> None:
        self.text = text
        self.tokens = tokens
        self.segments = segments
        self.pieces: list[Piece] = []
        self._n_past = text.n_tokens
        self._at = 0  # tokens in the KV cache that the pieces follow
        self.before: Before | None = None

    def prepare(self, staying: Sequence[Text] = ()) -> None:
        """Makes pieces of what is to be read, in a seat, none that belongs to the texts `staying`."""
        text = self.text
        text.renew()
        if self.pieces and text.seat is not None and text.n_kv == self._at:
            return
        n_read = text.n_tokens - self._n_past  # more than 0 if the text lost its place in the middle
        segments = None if self.segments is None else self.segments[n_read:]
        self.pieces = text.pieces(self.tokens[n_read:], segments, staying)
        self._at = text.n_kv
        if self.before is None:  # else the place was lost in the middle: back to where it began
            self.before = text.before()

    def take(self, n_max: int) -> Piece:
        """The next piece, or the beginning of it."""
        first = self.pieces.pop(0)
        if len(first.tokens) > n_max:
            first, rest = first.split(n_max)
            self.pieces.insert(0, rest)
        self._at += len(first.tokens)
        return first

    def fail(self) -> None:
        """Text and memory are as before what could not be read."""
        if self.before is not None:
            self.text.undo(self.before)


def _runs(
    tokens: npt.NDArray[np.intc],
    write: npt.NDArray[np.bool_],
    segment: npt.NDArray[np.int32],
    begins: npt.NDArray[np.bool_],
    n_read: int,
) -> Iterator[Piece]:
    """Cuts at every change between writing and not, where an ingest in segments begins or ends, and behind the first
    `n_read` tokens, which the memory knows.
    """
    in_segments = segment != TOKEN
    cuts = (in_segments[1:] != in_segments[:-1]) | begins[1:] | (~in_segments[1:] & (write[1:] != write[:-1]))
    cuts[n_read - 1 : n_read] = True
    bounds = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(tokens)]
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        if in_segments[start]:
            yield Piece(tokens[start:end], bool(write[start:end].any()), segment[start:end], True, True)
        else:
            yield Piece(tokens[start:end], bool(write[start]))
