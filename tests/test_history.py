"""Random histories of texts and memories, against a naive model that replays everything.

The naive model knows no records, checkpoints or batches. It keeps what was read, token by token. Each time it is asked
for the memory, it replays everything that wrote since the memory began.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import fuzz.inputs  # noqa: F401 - how many
from pydeltamem.runtime.history import TOKEN, Checkpoints, Log, Position, n_common

N_CTX = 48
MODULUS = 65521  # states are exact in float32, and no two writes change places


def array(state):
    return np.full((1, 1, 1, 1), state, np.float32)


def written(state, token):
    return (31 * state + token + 1) % MODULUS


def ingested(state, tokens, segments):
    """One write of an ingest in segments: it depends on all of them."""
    return written(
        state, sum(i * (token + 3) * (segment + 2) for i, (token, segment) in enumerate(zip(tokens, segments), 1))
    )


@dataclass(frozen=True)
class Entry:
    token: int
    wrote: bool
    segment: int
    group: int  # the ingest in segments that it belongs to; 0: none
    counts: bool = True  # as written; not if another memory came since


class Naive:
    """What a text and its memory should be."""

    def __init__(self):
        self.text: list[Entry] = []
        self.floor, self.base, self.n_base = 0, 0, 0  # the memory's state and its written tokens there
        self.n_groups = 0

    def copy(self):
        other = Naive()
        other.__dict__.update(self.__dict__, text=list(self.text))
        return other

    def state(self, n=None):
        n, at, state = len(self.text) if n is None else n, self.floor, self.base
        while at < n:
            end, entry = at + 1, self.text[at]
            if entry.group:
                while end < n and self.text[end].group == entry.group:
                    end += 1
                some = self.text[at:end]
                if any(each.wrote for each in some):
                    state = ingested(state, [each.token for each in some], [each.segment for each in some])
            elif entry.wrote:
                state = written(state, entry.token)
            at = end
        return state

    def n_written(self, n=None):
        return self.n_base + sum(entry.wrote for entry in self.text[self.floor : n])

    def read(self, n, tokens, segments, write):
        """The text goes back to n, and these come."""
        known = [False] * len(tokens)
        for i, (entry, token) in enumerate(zip(self.text[n : self.floor], tokens)):
            if entry.token != token:
                break
            known[i] = entry.wrote and entry.counts
        self.floor = min(self.floor, n)
        self.n_groups += 1
        del self.text[n:]
        for token, is_known, segment in zip(tokens, known, segments or [TOKEN] * len(tokens)):
            if segments:
                segment = -1 if is_known else segment
                self.text.append(Entry(token, write and segment >= 0, segment, self.n_groups))
            else:
                self.text.append(Entry(token, write and not is_known, TOKEN, 0))

    def begin(self, n):
        self.base, self.n_base, self.floor = self.state(), self.n_written(), n
        del self.text[n:]

    def rehearse(self):
        self.base, self.n_base, self.floor = self.state(), self.n_written(), 0
        self.text = [replace(entry, counts=True) for entry in self.text]

    def become(self, state, n_written):
        self.text = [replace(entry, counts=False) for entry in self.text]
        self.base, self.n_base, self.floor = state, n_written, len(self.text)

    def without(self, start, end, floor):
        """`floor`: from where on the memory can go back afterwards."""
        at = floor + end - start
        self.base, self.n_base, self.floor = self.state(at), self.n_written(at), floor
        del self.text[start:end]

    def ingest(self, position):
        group, first = self.text[position].group, position
        while group and first > 0 and self.text[first - 1].group == group:
            first -= 1
        return first


class Memory:
    """Records, used as an engine does: with a KV cache, a state, and batches of tokens."""

    def __init__(self, n_bytes, n_last):
        checkpoints = Checkpoints(n_bytes=n_bytes, n_last=n_last)
        self.position = Position(Log(N_CTX), checkpoints=checkpoints).with_memory(array(0), 0, "", 0)
        self.kv: list[int] = []

    def copy(self):
        other = Memory(0, 1)
        other.position, other.kv = self.position, list(self.kv)
        return other

    def read(self, tokens, segments, write, n_batch, n_decodes=None):
        """As the engine. If it fails after n_decodes: False, and the old record is back."""
        new = np.array(tokens, dtype=np.intc)
        known = self.position.known(new)
        position = self.position.back()
        del self.kv[min(position.n_kv, position.n) :]
        position = position._replace(n_kv=len(self.kv))
        if len(new) > 1:
            position = position._replace(checkpoints=position.checkpoints.keep_latest())
        self.position = before = position
        state = int(position.checkpoint.state.item())
        ids = None if segments is None else np.array(segments, dtype=np.int32)
        for piece in position.pieces(new, ids, known, write):
            while piece is not None:
                piece, rest = (
                    piece.split(n_batch) if piece.segments is None and len(piece.tokens) > n_batch else (piece, None)
                )
                if n_decodes == 0:
                    self.kv += piece.tokens.tolist()[:1]  # what a decode that failed left
                    self.position = before._replace(n_kv=min(self.position.n_kv, before.n))
                    return False
                n_decodes = None if n_decodes is None else n_decodes - 1
                position = self.position
                states, reads = {}, position.n_kv >= position.n
                assert position.n_kv == len(self.kv)
                self.kv += piece.tokens.tolist()
                if reads and piece.segments is None:
                    for i, token in enumerate(piece.tokens.tolist(), 1):
                        state = written(state, token) if piece.write else state
                        states[i] = array(state)
                elif reads:
                    if piece.write and (piece.segments >= 0).any():
                        state = ingested(state, piece.tokens.tolist(), piece.segments.tolist())
                    states[len(piece.tokens)] = array(state)
                else:
                    assert not piece.write  # what the KV cache lacked is not written again
                self.position = position.decoded(piece, states)
                piece = rest
        return True


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=9)
places = st.floats(0, 1)
which = st.integers(0, 9)
batches = st.sampled_from([1, 3, 16])


class Histories(RuleBasedStateMachine):
    """Up to four texts, which began as forks of one."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    @precondition(lambda self: not self.pairs)
    @rule(n_bytes=st.integers(0, 64), n_last=st.integers(1, 4))
    def begins(self, n_bytes, n_last):
        self.pairs.append((Memory(n_bytes, n_last), Naive()))

    def pair(self, which):
        return self.pairs[which % len(self.pairs)]

    def at(self, memory, place):
        return round(place * memory.position.n_tokens)

    @precondition(lambda self: self.pairs)
    @rule(
        which=which,
        tokens=tokens,
        write=st.booleans(),
        in_segments=st.booleans(),
        n_batch=batches,
        back=places | st.just(1.0),
    )
    def read(self, which, tokens, write, in_segments, n_batch, back):
        memory, naive = self.pair(which)
        n = self.at(memory, back)
        tokens = tokens[: N_CTX - n]
        memory.position = memory.position._replace(n_tokens=n)
        segments = None
        if in_segments:  # the end of a message is in none
            segments = [i // 2 for i in range(len(tokens) - 1)] + [-1] * bool(tokens)
        if tokens:
            assert memory.read(tokens, segments, write, n_batch)
            naive.read(n, tokens, segments, write)
        else:
            memory.position = memory.position._replace(n_tokens=len(naive.text))

    @precondition(lambda self: self.pairs)
    @rule(which=which, n_more=st.integers(0, 6), place=places)
    def read_the_same_again(self, which, n_more, place):
        """A prompt of which some stands there already."""
        memory, naive = self.pair(which)
        n = self.at(memory, place)
        again = [entry.token for entry in naive.text[n : n + 5]] + [1] * n_more
        again = again[: N_CTX - n]
        if again:
            memory.position = memory.position._replace(n_tokens=n)
            assert memory.read(again, None, True, 4)
            naive.read(n, again, None, True)

    @precondition(lambda self: self.pairs)
    @rule(which=which, tokens=tokens, n_batch=batches, n_decodes=st.integers(0, 3))
    def a_read_that_fails(self, which, tokens, n_batch, n_decodes):
        memory, naive = self.pair(which)
        if len(naive.text) + len(tokens) <= N_CTX and memory.read(tokens, None, True, n_batch, n_decodes):
            naive.read(len(naive.text), tokens, None, True)

    @precondition(lambda self: self.pairs)
    @rule(which=which, place=places)
    def goes_back(self, which, place):
        """And the memory catches up."""
        memory, naive = self.pair(which)
        n = self.at(memory, place)
        if n >= naive.floor:
            memory.position = memory.position._replace(n_tokens=n)
            assert memory.read([], None, True, 5)
            del naive.text[n:]

    @precondition(lambda self: self.pairs)
    @rule(which=which)
    def loses_its_slot(self, which):
        memory, _ = self.pair(which)
        memory.kv = []
        memory.position = memory.position._replace(n_kv=0)

    @precondition(lambda self: self.pairs)
    @rule(which=which, place=places)
    def another_text_begins(self, which, place):
        memory, naive = self.pair(which)
        n = self.at(memory, place)
        memory.position = memory.position.begun(n, memory.position.checkpoint)
        naive.begin(n)

    @precondition(lambda self: self.pairs)
    @rule(which=which, n_batch=batches)
    def the_text_is_rehearsed(self, which, n_batch):
        memory, naive = self.pair(which)
        memory.position = memory.position.rehearsed()
        assert memory.read([], None, True, n_batch)
        naive.rehearse()

    @precondition(lambda self: self.pairs)
    @rule(which=which, state=st.integers(0, MODULUS - 1), n_written=st.integers(0, 5))
    def another_memory_comes(self, which, state, n_written):
        memory, naive = self.pair(which)
        memory.position = memory.position.with_memory(array(state), n_written, "", 0)
        naive.become(state, n_written)

    @precondition(lambda self: self.pairs)
    @rule(which=which, first=places, last=places)
    def some_text_leaves(self, which, first, last):
        memory, naive = self.pair(which)
        start, end = sorted((self.at(memory, first), self.at(memory, last)))
        if start < end:
            memory.kv = memory.kv[: min(start, memory.position.n_kv)]
            memory.position = memory.position.without(start, end, len(memory.kv))
            assert start <= memory.position.floor <= memory.position.n
            naive.without(start, end, memory.position.floor)

    @precondition(lambda self: self.pairs)
    @rule(which=which, tokens=tokens)
    def the_text_is_worded_otherwise(self, which, tokens):
        memory, naive = self.pair(which)
        memory.position = memory.position.with_text(tokens, 0)
        naive.base, naive.n_base = naive.state(), naive.n_written()
        naive.floor, naive.text = len(tokens), [Entry(token, True, TOKEN, 0) for token in tokens]

    @precondition(lambda self: 0 < len(self.pairs) < 4)
    @rule(which=which)
    def fork(self, which):
        """From here on neither changes the other, although they share what was before."""
        memory, naive = self.pair(which)
        self.pairs.append((memory.copy(), naive.copy()))

    def teardown(self):
        self.pairs.clear()

    @invariant()
    def they_agree(self):
        for memory, naive in self.pairs:
            position, n = memory.position, len(naive.text)
            assert position.tokens.tolist() == [entry.token for entry in naive.text]
            assert (position.n_tokens, position.n, position.floor) == (n, n, naive.floor)
            assert (position.checkpoint.position, position.checkpoint.state.item()) == (n, naive.state())
            assert position.n_written == position.checkpoint.n_written == naive.n_written()
            assert memory.kv[: position.n_kv] == position.tokens[: position.n_kv].tolist()
            log = position.log
            assert log.segment[:n].tolist() == [entry.segment for entry in naive.text]
            assert log.wrote[position.fresh : n].tolist() == [entry.wrote for entry in naive.text[position.fresh :]]
            assert all(not entry.counts for entry in naive.text[: position.fresh])
            positions = position.checkpoints.positions
            assert positions == sorted(set(positions)) and positions[0] == naive.floor
            for each in position.checkpoints:
                assert each.state.item() == naive.state(each.position)
                assert each.n_written == naive.n_written(each.position)
                assert position.checkpoints.newest(each.position) == each
            checkpoints = position.checkpoints
            assert len(checkpoints) <= max(checkpoints.n_last + 8, checkpoints.n_bytes // 4)


TestHistories = Histories.TestCase
TestHistories.settings = settings(stateful_step_count=30)


@given(tokens_of_a_text := st.lists(st.integers(0, 3), max_size=N_CTX), tokens_of_a_text, st.integers(0, N_CTX))
def test_what_agrees(read, asked, position):
    memory = Memory(0, 1)
    assert not read or memory.read(read, None, True, N_CTX)
    position = min(position, len(read))
    same = 0
    while same < min(len(read) - position, len(asked)) and read[position + same] == asked[same]:
        same += 1
    assert memory.position.common(position, asked) == n_common(read[position:], asked) == same


def test_the_checkpoint_where_a_text_begins_stays():
    """Also where the first ones have left the text: one that was not to be kept is the first then."""
    memory = Memory(0, 1)
    for token in (1, 2, 3):
        memory.read([token], None, True, 9)
    memory.position = memory.position.without(0, 2, 1)
    begun = memory.position.checkpoint
    for token in (4, 5):
        memory.read([token], None, True, 9)
    assert memory.position.checkpoints.positions[0] == memory.position.floor == begun.position
    back = memory.position.memory_at(begun.position)
    assert (back.n, back.checkpoint.state.item()) == (begun.position, begun.state.item())


def test_one_token_more_copies_nothing():
    """Records share the buffer. A record that goes back and reads something else gets its own, and changes no other."""
    memory = Memory(0, 1)
    memory.read([1, 2, 3], None, True, 9)
    first = memory.position
    memory.read([4], None, True, 9)
    second = memory.position
    assert second.log is first.log and first.tokens.tolist() == [1, 2, 3]
    memory.position = second._replace(n_tokens=2)
    memory.read([0], None, True, 9)
    assert memory.position.log is not second.log
    assert [record.tokens.tolist() for record in (first, second, memory.position)] == [
        [1, 2, 3],
        [1, 2, 3, 4],
        [1, 2, 0],
    ]
