"""What a memory has read: the tokens of one text by position, and checkpoints of the state between them.

The rule of one write (docs/reference/one-write.md) is kept here, without llama.cpp: the state of a memory is always
that after the first `n` tokens recorded, so a text that goes back takes the state back with it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOKEN = -2  # in place of a segment id: the token writes by itself, if it writes


class Checkpoint(NamedTuple):
    """A memory at one position."""

    state: npt.NDArray[np.float32]  # [L, H, r, r], not written to
    n_written: int  # tokens that it was ever written


class Checkpoints:
    """Checkpoints by position: the last `n_last` whatever they are, and older ones that were worth keeping.

    Older ones are thinned when they exceed `n_bytes`: of two that stand close together the earlier one goes. The first
    is where the text began and always stays.
    """

    def __init__(self, n_bytes: int = 4 << 20, n_last: int = 65) -> None:  # where the memory is, and 64 before
        self.n_bytes = n_bytes
        self.n_last = n_last
        self._positions: list[int] = []  # ascending
        self._items: dict[int, Checkpoint] = {}
        self._kept: set[int] = set()

    def __contains__(self, position: int) -> bool:
        return position in self._items

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def positions(self) -> list[int]:
        return list(self._positions)

    def copy(self) -> Checkpoints:
        """The same checkpoints; nobody writes to their states."""
        other = Checkpoints(self.n_bytes, self.n_last)
        other._positions, other._items, other._kept = list(self._positions), dict(self._items), set(self._kept)
        return other

    def add(self, position: int, checkpoint: Checkpoint, keep: bool = False) -> None:
        """`keep`: beyond the last `n_last`, as long as there is room."""
        # in this order, here and below, an interrupt leaves no position without its checkpoint
        self._items[position] = checkpoint
        i = bisect.bisect_left(self._positions, position)
        if self._positions[i : i + 1] != [position]:
            self._positions.insert(i, position)
        if keep or position == self._positions[0]:
            self._kept.add(position)
        self._thin(checkpoint.state.nbytes)

    def keep(self, position: int) -> None:
        """The one at `position` is worth keeping beyond the last `n_last`."""
        self._kept.add(position)

    def newest(self, position: int) -> tuple[int, Checkpoint] | None:
        """The one nearest before or at `position`."""
        i = bisect.bisect_right(self._positions, position)
        return (self._positions[i - 1], self._items[self._positions[i - 1]]) if i else None

    def drop_after(self, position: int) -> None:
        while self._positions and self._positions[-1] > position:
            self._remove(len(self._positions) - 1)

    def clear(self) -> None:
        self._positions = []
        self._items = {}
        self._kept = set()

    def shift(self, start: int, end: int) -> None:
        """The text between `start` and `end` is gone: those before `end` cannot be gone back to any more."""
        moved = {p - (end - start): (self._items[p], p in self._kept) for p in self._positions if p >= end}
        positions = sorted(moved)
        self.clear()
        self._items = {p: item for p, (item, _) in moved.items()}
        self._kept = {p for p, (_, kept) in moved.items() if kept} | set(positions[:1])
        self._positions = positions

    def _thin(self, n_bytes_each: int) -> None:
        # what has just left the last n_last
        i = len(self._positions) - 1 - self.n_last
        if i > 0 and self._positions[i] not in self._kept:
            self._remove(i)
        n_max = max(self.n_last + 2, self.n_bytes // max(1, n_bytes_each))
        while len(self._positions) > n_max:
            old = self._positions[: len(self._positions) - self.n_last]
            gaps = [after - before for before, after in zip(old[:-2], old[2:])]  # if the one between goes
            self._remove(1 + int(np.argmin(gaps)) if gaps else 1)

    def _remove(self, i: int) -> None:
        position = self._positions.pop(i)
        self._items.pop(position, None)
        self._kept.discard(position)


class History:
    """The tokens that a memory has read, by position in the text, up to `n`; which of them wrote; and checkpoints.

    Args:
        n_ctx: most tokens of a text.
    """

    def __init__(self, n_ctx: int) -> None:
        self.n = 0
        self.floor = 0  # the memory cannot go back before: there the text began for it
        self.n_written = 0  # tokens that the memory was ever written
        self.n_begun = 0  # how often another text or memory began
        self.tokens: npt.NDArray[np.intc] = np.zeros(n_ctx, dtype=np.intc)
        self.wrote: npt.NDArray[np.bool_] = np.zeros(n_ctx, dtype=np.bool_)
        # of tokens read in segments: their id, -1 for none; and whether an ingest begins
        self.segment: npt.NDArray[np.int32] = np.full(n_ctx, TOKEN, dtype=np.int32)
        self.begins: npt.NDArray[np.bool_] = np.zeros(n_ctx, dtype=np.bool_)
        self.checkpoints = Checkpoints()

    def copy(self) -> History:
        """For a fork, or to be saved."""
        other = History(len(self.tokens))
        other.n, other.floor, other.n_written = self.n, self.floor, self.n_written
        for name in ("tokens", "wrote", "segment", "begins"):
            getattr(other, name)[:] = getattr(self, name)
        other.checkpoints = self.checkpoints.copy()
        return other

    def common(self, position: int, tokens: Sequence[int]) -> int:
        """How many of `tokens` at `position` are those that were read there."""
        return n_common(self.tokens[position : self.n], tokens)

    def read(
        self, tokens: Sequence[int], wrote: bool, segments: npt.NDArray[np.int32] | None = None, begins: bool = False
    ) -> None:
        """Records tokens read at `n`. `begins`: the first of them begins an ingest in segments."""
        span = slice(self.n, self.n + len(tokens))
        self.tokens[span] = tokens
        self.segment[span] = TOKEN if segments is None else segments
        self.wrote[span] = wrote if segments is None else wrote & (segments >= 0)
        self.begins[span] = False
        self.begins[self.n] = begins
        self.n_written += int(np.count_nonzero(self.wrote[span]))
        self.n += len(tokens)

    def ingest(self, position: int) -> int:
        """Where the ingest in segments began that the token at `position` was read in; else `position`."""
        others = np.flatnonzero(self.segment[: position + 1] == TOKEN)
        first = int(others[-1]) + 1 if len(others) else 0
        if first > position:
            return position
        begun = np.flatnonzero(self.begins[first : position + 1])  # none if it left the text
        return first + (int(begun[-1]) if len(begun) else 0)

    def unread(self, position: int) -> None:
        """What was read from `position` on has not written yet and is to be read again."""
        self.n_written -= int(np.count_nonzero(self.wrote[position : self.n]))
        self.checkpoints.drop_after(position)
        self.n = position

    def checkpoint(self, position: int, state: npt.NDArray[np.float32], keep: bool = False) -> None:
        """Keeps the state at a position, `n` or one that was just read."""
        later = int(np.count_nonzero(self.wrote[position : self.n]))
        self.checkpoints.add(position, Checkpoint(state, self.n_written - later), keep)

    def checkpoint_before(self, position: int) -> Checkpoint:
        """The newest one at or before `position`; for what is before `floor`, that with which the text began."""
        return self.checkpoints.newest(max(position, self.floor))[1]

    def back(self, position: int) -> None:
        """Takes the record back to `checkpoint_before(position)`; what was read after it is to be read again."""
        at, checkpoint = self.checkpoints.newest(max(position, self.floor))
        self.checkpoints.drop_after(at)
        self.n_written = checkpoint.n_written
        self.n = min(at, position)  # last: after an interrupt before it the memory goes back once more
        if position < self.floor:
            self.begin(position, checkpoint.state)

    def begin(self, position: int, state: npt.NDArray[np.float32] | None) -> None:
        """The memory cannot go back before `position` from here on: another text begins there, or another memory."""
        self.n = self.floor = position
        self.n_begun += 1
        self.checkpoints.clear()
        if state is not None:
            self.checkpoints.add(position, Checkpoint(state, self.n_written))

    def shift(self, start: int, end: int) -> None:
        """The tokens from `start` to `end` left the text; what they wrote stays."""
        for array in (self.tokens, self.wrote, self.segment, self.begins):
            array[start : self.n - (end - start)] = array[end : self.n].copy()
        self.n -= end - start
        self.checkpoints.shift(start, end)
        positions = self.checkpoints.positions
        self.floor = positions[0] if positions else self.n


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n
