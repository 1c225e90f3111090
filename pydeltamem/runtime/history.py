"""The rule of one write (docs/reference/one-write.md), without llama.cpp.

A `Position` says where a text and its memory are. It is immutable: reading, going back and dropping tokens each make a
new one, and a decode that fails leaves the old one. The state of a memory is always that after the first `n` tokens of
its text, so a text that goes back takes the state back with it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_N_OLD = 8  # older checkpoints that are kept however large a state is
TOKEN = -2  # in place of a segment id: the token writes by itself, if it writes
REPLY = -3  # likewise, and it is of a reply, to an adapter that defers writes

Tokens = Sequence[int] | npt.NDArray[np.integer]  # ids
State = npt.NDArray[np.float32]  # [L, H, r, r], never changed once it is in a record
_position = attrgetter("position")


class Log:
    """Tokens by their place in a text, and how the memory read them: an append-only buffer that records share.

    Entries never change. A record at the end of the log appends in place; one that went back copies what is before it.

    Attributes, of each token:
        tokens: its id.
        wrote: whether it wrote.
        segment: its segment id, -1 for none; TOKEN or REPLY if it was not read in segments.
        begins: whether an ingest in segments begins with it, or a turn, if writes are deferred.
    """

    __slots__ = ("begins", "end", "segment", "tokens", "wrote")

    def __init__(self, n_ctx: int) -> None:
        self.end = 0
        self.tokens: npt.NDArray[np.intc] = np.zeros(n_ctx, dtype=np.intc)
        self.wrote: npt.NDArray[np.bool_] = np.zeros(n_ctx, dtype=np.bool_)
        self.segment: npt.NDArray[np.int32] = np.zeros(n_ctx, dtype=np.int32)
        self.begins: npt.NDArray[np.bool_] = np.zeros(n_ctx, dtype=np.bool_)

    def without(self, start: int, end: int, n: int) -> Log:
        """A copy of the first n tokens, without those from `start` to `end`."""
        log = Log(len(self.tokens))
        log.end = n - (end - start)
        for name in ("tokens", "wrote", "segment", "begins"):
            new, old = getattr(log, name), getattr(self, name)
            new[:start], new[start : log.end] = old[:start], old[end:n]
        return log

    def extended(
        self, n: int, tokens: Tokens, wrote: bool | npt.NDArray[np.bool_], segment: int | npt.NDArray[np.int32]
    ) -> Log:
        """The first n tokens, followed by these."""
        log = self if n == self.end else self.without(n, n, n)
        span = slice(n, n + len(tokens))
        log.tokens[span], log.wrote[span], log.segment[span], log.begins[span] = tokens, wrote, segment, False
        log.end = span.stop
        return log


class Checkpoint(NamedTuple):
    """A memory at one position of its text."""

    position: int
    state: State
    n_written: int  # tokens ever written into it
    kept: bool = False  # kept beyond the last ones
    of_turn: State | None = None  # what the turn reads, if writes are deferred; None: this state


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints by position: the last `n_last`, and older ones that are marked as kept.

    The older ones, `old`, are thinned when all together exceed `n_bytes`: of two close neighbours the earlier one goes.
    The first one, where the text began, always stays, and so do the latest two: while a reply is sampled, these are
    before and behind the last token of its prompt, from where another one begins.
    """

    old: tuple[Checkpoint, ...] = ()
    last: tuple[Checkpoint, ...] = ()
    n_bytes: int = 4 << 20
    n_last: int = 65  # where the memory is, and 64 before

    def __len__(self) -> int:
        return len(self.old) + len(self.last)

    def __iter__(self) -> Iterator[Checkpoint]:
        return itertools.chain(self.old, self.last)

    @property
    def positions(self) -> list[int]:
        """Ascending."""
        return [checkpoint.position for checkpoint in self]

    def only(self, *checkpoints: Checkpoint) -> Checkpoints:
        """Only these checkpoints."""
        return Checkpoints((), checkpoints, self.n_bytes, self.n_last)

    def newest(self, position: int) -> Checkpoint | None:
        """The one nearest before or at `position`."""
        if self.last and self.last[-1].position <= position:
            return self.last[-1]
        some = self.last if self.last and self.last[0].position <= position else self.old
        i = bisect.bisect_right(some, position, key=_position)
        return some[i - 1] if i else None

    def add(self, checkpoint: Checkpoint) -> Checkpoints:
        """Adds one after all others, or in place of the latest at the same position."""
        old, last = self.old, self.last
        if last and last[-1].position == checkpoint.position:
            checkpoint = checkpoint._replace(kept=checkpoint.kept or last[-1].kept)
            last = last[:-1]
        last = (*last, checkpoint)
        if len(last) > self.n_last:
            left, last = last[0], last[1:]
            if left.kept:
                old = (*old, left)
        n_max = max(self.n_last + _N_OLD, self.n_bytes // max(1, checkpoint.state.nbytes))
        while len(old) + len(last) > n_max:
            some = old[: len(old) + len(last) - self.n_last]
            # the gap that each would leave
            gaps = [after.position - before.position for before, after in zip(some[:-3], some[2:-1])]
            i = 1 + int(np.argmin(gaps)) if gaps else 1
            old = old[:i] + old[i + 1 :]
        return Checkpoints(old, last, self.n_bytes, self.n_last)

    def keep_latest(self) -> Checkpoints:
        """Marks the latest as kept."""
        return self if not self.last or self.last[-1].kept else self.add(self.last[-1]._replace(kept=True))

    def until(self, position: int) -> Checkpoints:
        """Without those after `position`."""
        if self.last and self.last[-1].position <= position:
            return self
        old, last = (some[: bisect.bisect_right(some, position, key=_position)] for some in (self.old, self.last))
        return Checkpoints(old, last, self.n_bytes, self.n_last)

    def without(self, start: int, end: int) -> Checkpoints:
        """For a text without its tokens from `start` to `end`. The memory can no longer go back to before `end`."""

        left = [c._replace(position=c.position - (end - start)) for c in self if c.position >= end]
        if left:
            left[0] = left[0]._replace(kept=True)  # where the text now begins for the memory
        n_old = max(0, len(left) - len(self.last))
        return Checkpoints(tuple(left[:n_old]), tuple(left[n_old:]), self.n_bytes, self.n_last)


class Piece(NamedTuple):
    """Tokens of one sequence, for one llama_decode or several. All write or none, unless they have segments."""

    tokens: npt.NDArray[np.intc]
    write: bool
    segments: npt.NDArray[np.int32] | None = None
    begins: bool = False  # whether an ingest in segments begins with it, or a turn
    ends: bool = False  # whether one ends with it
    reply: bool = False  # whether it is of a reply, if writes are deferred

    def split(self, n: int) -> tuple[Piece, Piece]:
        """Its first n tokens, and the rest."""
        ids = self.segments
        return (
            Piece(self.tokens[:n], self.write, None if ids is None else ids[:n], self.begins, False, self.reply),
            Piece(self.tokens[n:], self.write, None if ids is None else ids[n:], False, self.ends, self.reply),
        )


class Position(NamedTuple):
    """Where a text and its memory are. A changed field makes another record.

    n_tokens is less than n while the text has gone back and the memory still has to follow. It is greater while the
    memory has gone back to a checkpoint and still has to read up to the end of the text.
    """

    log: Log
    since: str = ""  # when the memory began
    n_tokens: int = 0  # length of the text
    n: int = 0  # tokens of it that the memory has read
    n_kv: int = 0  # tokens of it that the KV cache holds
    floor: int = 0  # where the text began for the memory, which cannot go back before it
    fresh: int = 0  # where another memory came: no token before counts as written
    prompted: int = 0  # where the latest prompt ended, also while the text has gone back into it
    n_written: int = 0  # tokens ever written into the memory
    epoch: int = 0  # how often another text or memory began
    adapter: int = 0  # which attached adapter the memory belongs to, as `Slots` counts them
    checkpoints: Checkpoints = Checkpoints()  # one of them at n; none without a memory

    @property
    def tokens(self) -> npt.NDArray[np.intc]:
        """The token ids of the text, a view."""
        return self.log.tokens[: self.n_tokens]

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The memory at n; None without a memory."""
        return self.checkpoints.newest(self.n)

    def common(self, position: int, tokens: Tokens) -> int:
        """How many of `tokens` equal those that the memory read from `position` on."""
        return n_common(self.log.tokens[position : self.n], tokens)

    def ingest(self, position: int) -> int:
        """Where the ingest in segments began to which the token at `position` belongs; `position` if to none."""
        others = np.flatnonzero(self.log.segment[: position + 1] <= TOKEN)
        first = int(others[-1]) + 1 if len(others) else 0
        if first > position:
            return position
        begun = np.flatnonzero(self.log.begins[first : position + 1])  # none if its beginning left the text
        return first + (int(begun[-1]) if len(begun) else 0)

    def begins_turn(self, tokens: Tokens) -> bool:
        """Whether a turn begins with `tokens`, the next of the text: a prompt does, unless it replaces a part of an
        earlier one, as where the text went back for another reply. Sampled tokens go on with their turn.
        """
        return len(tokens) > 1 and not self._is_in_prompt

    @property
    def replies(self) -> bool:
        """Whether the next token, if no turn begins with it, is of a reply: it follows a whole prompt."""
        return self.prompted > 0 and not (self._is_in_prompt or (self._went_back and self.log.begins[self.n_tokens]))

    @property
    def _is_in_prompt(self) -> bool:
        """Whether the text went back into a prompt, and not to where it began."""
        n, log = self.n_tokens, self.log
        return self._went_back and not log.begins[n] and bool(log.segment[n] != REPLY)

    @property
    def _went_back(self) -> bool:
        return self.n_tokens < min(self.prompted, len(self.log.tokens))

    def ended(self) -> Position:
        """For a log that will have no token after this text: what it knows of the next one."""
        return self if self._is_in_prompt else self._replace(prompted=min(self.prompted, self.n_tokens))

    def goes_on(self) -> Position:
        """What was read is the beginning of a message: what follows goes on with its turn."""
        return self._replace(prompted=self.n_tokens + 1)

    def known(self, tokens: npt.NDArray[np.intc]) -> npt.NDArray[np.bool_] | None:
        """Which of `tokens`, the next of the text, were written here before the memory's floor. They are not written
        again. None if there are none.
        """
        start, end = self.n_tokens, min(self.floor, self.n)
        if start >= end:
            return None
        n = n_common(self.log.tokens[start:end], tokens)
        known = np.zeros(len(tokens), dtype=np.bool_)
        known[:n] = self.log.wrote[start : start + n]
        known[: max(0, self.fresh - start)] = False
        return known if known.any() else None

    #
    # another text, or another memory
    #

    def begun(self, position: int, checkpoint: Checkpoint | None, of_turn: State | None = None) -> Position:
        """Another text begins after `position`. The memory cannot go back before it. `of_turn`: what its turn reads;
        None: the memory as it is.
        """
        one = () if checkpoint is None else (checkpoint._replace(position=position, kept=True, of_turn=of_turn),)
        return self._replace(
            n_tokens=position,
            n=position,
            n_kv=min(self.n_kv, position),
            floor=position,
            fresh=min(self.fresh, position),
            prompted=min(self.prompted, position),
            epoch=self.epoch + 1,
            checkpoints=self.checkpoints.only(*one),
        )

    def with_memory(self, state: State, n_written: int, since: str, adapter: int) -> Position:
        """Another memory: nothing of the present text counts as written into it."""
        begun = self.begun(self.n_tokens, Checkpoint(0, state, n_written))
        return begun._replace(fresh=self.n_tokens, n_written=n_written, since=since, adapter=adapter)

    def rehearsed(self) -> Position:
        """The memory has to read the whole text again, each token as the first time. It cannot go back before that."""
        return self.begun(0, self.checkpoint)._replace(n_tokens=self.n_tokens, prompted=self.prompted)

    def by_token(self) -> Position:
        """For an adapter that writes per token: no token is read in segments any more."""
        n = max(self.n, self.n_tokens)
        if not (self.log.segment[:n] != TOKEN).any():
            return self
        log = self.log.without(n, n, n)
        log.segment[:n], log.begins[:n] = TOKEN, False
        return self._replace(log=log)

    def without_memory(self) -> Position:
        """The text goes on without a memory."""
        return self._replace(checkpoints=self.checkpoints.only())

    def with_text(self, tokens: Tokens, n_kv: int) -> Position:
        """Replaces the text by these tokens. All count as read and written; the KV cache holds the first n_kv."""
        log = Log(len(self.log.tokens)).extended(0, tokens, True, TOKEN)
        checkpoint = self.checkpoint
        of_turn = None if checkpoint is None else checkpoint.of_turn  # a reply may be in progress
        begun = self._replace(log=log, fresh=0).begun(len(tokens), checkpoint, of_turn)
        return begun._replace(n_kv=min(n_kv, len(tokens)))

    #
    # reading
    #

    def pieces(
        self,
        tokens: npt.NDArray[np.intc],
        segments: npt.NDArray[np.int32] | None,
        known: npt.NDArray[np.bool_] | None,
        write: bool,
        begins_turn: bool = False,
        reply: bool = False,
    ) -> list[Piece]:
        """What to decode, in order, to add `tokens` to the text: first what the KV cache lacks, without writing; then
        what the memory has to read again, as the first time; then the tokens.

        n_kv <= n <= n_tokens. `write`: whether the tokens that are not `known` write. `begins_turn`: whether a turn
        begins with them. `reply`: whether they are of a reply.
        """
        n_new, n_past, n_kv = len(tokens), self.n_tokens, self.n_kv
        if n_new and n_past == self.n == n_kv and segments is None and known is None:
            return [Piece(tokens, write, begins=begins_turn, reply=reply)]
        if known is None:
            known = np.zeros(n_new, dtype=np.bool_)
        old, log = slice(n_kv, n_past), self.log
        unread = np.arange(n_kv, n_past) >= self.n  # which old tokens the memory has not read
        alone = np.full(n_new, REPLY if reply else TOKEN, dtype=np.int32)
        ids = alone if segments is None else np.where(known, -1, segments)
        begins = np.concatenate([log.begins[old] & unread, np.zeros(n_new, dtype=np.bool_)])
        if (segments is not None or begins_turn) and n_new:
            begins[n_past - n_kv] = True
        return list(
            _runs(
                np.concatenate([log.tokens[old], tokens]),
                np.concatenate([log.wrote[old] & unread, ~known & write]),
                np.concatenate([np.where(unread, log.segment[old], TOKEN), ids]),
                begins,
                self.n - n_kv,
            )
        )

    def decoded(self, piece: Piece, states: Mapping[int, State] | None = None, defers_writes: bool = False) -> Position:
        """The record after a decoded piece of `pieces`; an ingest in segments counts as one piece. `states`: by number
        of its tokens, the state after them; a memory that read the piece has at least the one after all.
        """
        at, n = self.n_kv, len(piece.tokens)
        if at < self.n:
            return self._replace(n_kv=at + n)
        log, n_old = self.log, min(n, self.n_tokens - at)
        if n_old < n:
            alone = REPLY if piece.reply else TOKEN
            ids = alone if piece.segments is None else piece.segments[n_old:]
            wrote = piece.write if piece.segments is None else piece.write & (piece.segments[n_old:] >= 0)
            log = log.extended(self.n_tokens, piece.tokens[n_old:], wrote, ids)
            if piece.begins and n_old == 0:
                log.begins[self.n_tokens] = True
        wrote = log.wrote[at : at + n]
        n_written = self.n_written + int(np.count_nonzero(wrote))
        checkpoints, before, of_turn = self.checkpoints, self.checkpoint, None
        if defers_writes and before is not None:
            of_turn = before.state if piece.begins or before.of_turn is None else before.of_turn
        for i, state in sorted(states.items()) if states else ():
            n_later = int(np.count_nonzero(wrote[i:])) if i < n else 0
            checkpoints = checkpoints.add(Checkpoint(at + i, state, n_written - n_later, n > 1, of_turn))
        n_read = at + n
        return self._replace(
            log=log,
            n_tokens=max(self.n_tokens, n_read),
            n=n_read,
            n_kv=n_read,
            n_written=n_written,
            prompted=self.prompted if n_old == n else min(self.prompted, self.n_tokens) if piece.reply else n_read,
            checkpoints=checkpoints,
        )

    #
    # going back
    #

    def back(self) -> Position:
        """The memory goes back to the end of the text, or to the nearest checkpoint before it and reads again from
        there. Without a memory nothing is read again.
        """
        return self if self.n <= self.n_tokens else self.memory_at(self.n_tokens)

    def memory_at(self, position: int) -> Position:
        """The memory goes back to the newest checkpoint at or before `position`, which is not after the text's end.
        Before its floor it goes back to the checkpoint with which the text began.
        """
        checkpoint = self.checkpoints.newest(max(position, self.floor))
        if checkpoint is None:
            return self._replace(n=position, n_kv=min(self.n_kv, position))
        back = self._replace(n_written=checkpoint.n_written)
        if position < self.floor:
            return back.begun(position, checkpoint)
        n = checkpoint.position
        return back._replace(n=n, n_kv=min(self.n_kv, n), checkpoints=self.checkpoints.until(n))

    def without(self, start: int, end: int, n_kv: int) -> Position:
        """Drops the tokens from `start` to `end` from a text that the memory has read to its end. What they wrote
        stays. The KV cache then holds n_kv tokens.
        """
        n, checkpoints = self.n - (end - start), self.checkpoints.without(start, end)  # the one at n stays
        return self._replace(
            log=self.log.without(start, end, self.n),
            n_tokens=n,
            n=n,
            n_kv=n_kv,
            floor=checkpoints.positions[0] if checkpoints else n,
            fresh=_moved(self.fresh, start, end),
            prompted=_moved(self.prompted, start, end),
            checkpoints=checkpoints,
        )


def _moved(position: int, start: int, end: int) -> int:
    """Where `position` is in a text without its tokens from `start` to `end`."""
    return position if position <= start else max(start, position - (end - start))


def before_content(
    render: Callable[[list[Any]], Sequence[int]], messages: Sequence[Mapping[str, Any]], message: Mapping[str, Any]
) -> list[int]:
    """Tokens of a chat up to where the content of one more message begins, whatever that is.

    It is what two renderings have in common. A space before "a" may be a part of its token, as before most first words.
    """
    ways = [render([*messages, {**message, "content": content}]) for content in "0a"]
    return list(ways[0][: n_common(*ways)])


def n_common(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def _runs(
    tokens: npt.NDArray[np.intc],
    write: npt.NDArray[np.bool_],
    segment: npt.NDArray[np.int32],
    begins: npt.NDArray[np.bool_],
    n_read: int,
) -> Iterator[Piece]:
    """Cuts where tokens start or stop writing, where an ingest in segments begins or ends, where a turn begins, and
    after the first `n_read` tokens, which the memory has read already.
    """
    in_segments, reply = segment > TOKEN, segment == REPLY
    cuts = (in_segments[1:] != in_segments[:-1]) | begins[1:] | (~in_segments[1:] & (write[1:] != write[:-1]))
    cuts |= reply[1:] != reply[:-1]
    cuts[n_read - 1 : n_read] = True
    bounds = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(tokens)]
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        if in_segments[start]:
            yield Piece(tokens[start:end], bool(write[start:end].any()), segment[start:end], True, True)
        else:
            yield Piece(tokens[start:end], bool(write[start]), begins=bool(begins[start]), reply=bool(reply[start]))
