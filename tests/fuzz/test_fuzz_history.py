"""Random histories against a model that keeps the state after every token and knows no checkpoints."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import inputs  # noqa: F401 - how many
from pydeltamem.runtime.history import TOKEN, History

N_CTX = 48


def array(state):
    return np.full((1, 1, 1, 1), state, np.float32)


def written(state, token):
    return (31 * state + token + 1) % 65521  # exact in float32, and no two writes change places


class Simple:
    """A text and its memory; `after` has state and tokens written for every position that can be gone back to."""

    def __init__(self):
        self.text = []  # token, whether it wrote, segment id, whether an ingest begins there
        self.after = {0: (0, 0)}
        self.floor = 0

    @property
    def now(self):
        return self.after[len(self.text)]

    def read(self, entry):
        state, n_written = self.now
        self.text.append(entry)
        self.after[len(self.text)] = (written(state, entry[0]), n_written + 1) if entry[1] else (state, n_written)

    def cut(self, position):
        del self.text[position:]
        self.after = {p: value for p, value in self.after.items() if p <= position}

    def begin(self, position, value):
        self.cut(position)
        self.floor, self.after = position, {position: value}

    def shift(self, start, end, floor):
        del self.text[start:end]
        self.after = {p - (end - start): value for p, value in self.after.items() if p >= end}
        self.floor = floor

    def ingest(self, position):
        first = position
        while first >= 0 and self.text[first][2] != TOKEN:
            if self.text[first][3]:
                return first
            first -= 1
        return position if first == position else first + 1


class Memory:
    """A history with what an engine does beside it: the state, reading, and reading again after going back."""

    def __init__(self, n_bytes, n_last):
        self.history, self.state = History(N_CTX), 0
        self.history.checkpoints.n_bytes, self.history.checkpoints.n_last = n_bytes, n_last
        self.history.begin(0, array(0))

    def read(self, entry, checkpoint=False, keep=False):
        token, wrote, segment, begins = entry
        segments = None if segment == TOKEN else np.array([segment], np.int32)
        self.history.read([token], wrote or segment == -1, segments, begins)
        if wrote:
            self.state = written(self.state, token)
        if checkpoint:
            self.history.checkpoint(self.history.n, array(self.state), keep)

    def back(self, position, text):
        self.state = int(self.history.checkpoint_before(position).state.item())
        self.history.back(position)
        for entry in text[self.history.n : position]:
            self.read(entry)


places = st.floats(0, 1)
tokens = st.integers(0, 3)
operations = st.one_of(
    st.tuples(st.just("read"), st.lists(tokens, min_size=1, max_size=9), st.booleans(), st.booleans()),
    st.tuples(st.just("ingest"), st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=9), st.booleans()),
    st.tuples(st.just("back"), places),
    st.tuples(st.just("begin"), places),
    st.tuples(st.just("shift"), places, places),
    st.tuples(st.just("copy")),
)


def check(memory, simple):
    history, checkpoints = memory.history, memory.history.checkpoints
    n = len(simple.text)
    assert (history.n, history.floor, memory.state, history.n_written) == (n, simple.floor, *simple.now)
    columns = [list(column) for column in zip(*simple.text)] or [[]] * 4
    for kept, column in zip((history.tokens, history.wrote, history.segment, history.begins), columns):
        assert kept[:n].tolist() == column
    positions = checkpoints.positions
    assert positions == sorted(set(positions)) and positions[0] == history.floor and positions[-1] <= n
    for position in positions:
        at, checkpoint = checkpoints.newest(position)
        assert at == position and (checkpoint.state.item(), checkpoint.n_written) == simple.after[position]
    assert len(checkpoints) <= max(checkpoints.n_last + 2, checkpoints.n_bytes // 4)
    for position in range(n):
        assert history.ingest(position) == simple.ingest(position)


@given(st.lists(operations, max_size=25), st.integers(0, 64), st.integers(1, 4))
def test_history(done, n_bytes, n_last):
    memory, simple = Memory(n_bytes, n_last), Simple()
    for name, *arguments in done:
        n = len(simple.text)
        at = round(arguments[0] * n) if name in ("back", "begin", "shift") else None
        if name in ("read", "ingest"):
            if name == "read":
                content, wrote, keep = arguments
                entries = [(token, wrote, TOKEN, False) for token in content]
            else:
                content, keep = arguments
                ids = np.cumsum([follows for _, follows in content]).tolist()
                entries = [(token, True, i, at == 0) for at, ((token, _), i) in enumerate(zip(content, ids))]
                entries[-1] = (entries[-1][0], False, -1, entries[-1][3])  # the end of a message is in no segment
            for entry in entries[: N_CTX - n]:
                simple.read(entry)
                memory.read(entry, checkpoint=True, keep=keep)
        elif name == "back":
            memory.back(at, simple.text)
            if at < simple.floor:
                simple.begin(at, simple.after[simple.floor])
            else:
                simple.cut(at)
        elif name == "begin":
            memory.history.begin(at, array(memory.state))
            simple.begin(at, simple.now)
        elif name == "shift":
            end = round(arguments[1] * n)
            if end <= at:
                continue
            if not any(position >= end for position in memory.history.checkpoints.positions):
                memory.history.checkpoint(n, array(memory.state))  # as Text.drop
            memory.history.shift(at, end)
            assert at <= memory.history.floor <= memory.history.n
            simple.shift(at, end, memory.history.floor)
        else:
            before, memory.history = memory.history, memory.history.copy()
            before.begin(0, array(-1))  # nothing of it is shared
            before.tokens[:] = -1
        check(memory, simple)


@given(st.lists(tokens, max_size=N_CTX), st.lists(tokens, max_size=N_CTX), st.integers(0, N_CTX))
def test_what_agrees(read, asked, position):
    history = History(N_CTX)
    history.begin(0, array(0))
    if read:
        history.read(read, True)
    position = min(position, len(read))
    same = 0
    while same < min(len(read) - position, len(asked)) and read[position + same] == asked[same]:
        same += 1
    assert history.common(position, asked) == same
