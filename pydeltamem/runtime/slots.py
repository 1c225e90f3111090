"""The slots of a llama.cpp context: its sequences, the attached adapter, and llama_decode for several slots at once."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError, DecodeError, InputError, ModelError
from . import library
from .history import Piece, State
from .lock import FairLock, holding
from .names import option

_llama = library.llama_cpp

_T = TypeVar("_T")

# A graph of its own costs as much as six to eight more tokens in one: it reads the weights again (docs/lab/server.md).
MAX_BETWEEN = 4


def no_adapter() -> str:
    return f"no adapter is attached: load the model with one, by {option('deltamem_path')}"


class Holder(Protocol):
    """What has a slot: a `Text`.

    Attributes:
        slot: its slot, None if it has none.
        home: the only slot that it may have; None: any.
    """

    slot: int | None
    home: int | None

    def lost_kv(self, *, by_failure: bool = False) -> None:
        """Notes that its KV cache is gone. `by_failure`: another text's, which is to change nothing for this one."""


class Job(NamedTuple):
    """What one slot decodes in a llama_decode."""

    slot: int
    n_past: int  # tokens before it in the KV cache
    piece: Piece
    has_state: bool  # whether the memory reads it; False: only the KV cache lacked it
    marks: Sequence[int] = ()  # ascending: the tokens after which the state is kept
    scores: npt.NDArray[np.single] | None = None  # receives the logits of all its tokens, [n, n_vocab]


class Result(NamedTuple):
    """The result of a job."""

    row: int  # where the logits of its last token are, until the next call
    states: dict[int, State]  # by number of tokens: the state after them, where marked and at the end
    fault: str | None  # why the result is unusable


class Slots:
    """The sequences of one context, the attached adapter, and the batch for llama_decode.

    Args:
        context: llama_cpp's wrapper of the context.
        batch: llama_cpp's wrapper of a batch of n_batch tokens.
        model_path: for errors.
        n_seq_max: how many texts may have a slot. With embeddings llama_cpp makes more sequences, which share the cells
            of one KV cache: it has room for so many texts.

    Attributes:
        n_ctx: tokens of a text.
        lock: a thread that uses the context holds it, for one decode and the use of its logits. What a text has in the
            context (slot and KV cache) changes only under this lock, also when another text takes its slot.
        n_attached: how often an adapter was attached. A memory belongs to one of these times.
        n_decodes: changes once the logits of the latest llama_decode are gone or unusable.
    """

    def __init__(self, context: Any, batch: Any, n_batch: int, model_path: str, n_seq_max: int) -> None:
        self.lock = FairLock()
        self._is_closing = False
        self._calls: set[tuple[int, object]] = set()  # calls in progress, with their thread
        self._context = context
        self._batch = batch
        self.n_batch = n_batch
        self.model_path = model_path
        self.n_ctx: int = _llama.llama_n_ctx(context.ctx) // n_seq_max
        self._n_sequences: int = _llama.llama_n_seq_max(context.ctx)
        self.n_seq_max = min(n_seq_max, self._n_sequences)
        self._shares_cells = _llama.llama_n_ctx_seq(context.ctx) == _llama.llama_n_ctx(context.ctx)
        self._shape: tuple[int, int, int, int] | None = None
        self._by_segment = False
        self._defers = self._defers_replies = False
        self.adapter_path = ""  # for errors
        self.n_attached = 0
        self.n_decodes = 0
        model = _llama.llama_get_model(context.ctx)
        self._n_vocab = _llama.llama_vocab_n_tokens(_llama.llama_model_get_vocab(model))
        self._has_weights = _llama.llama_model_n_embd(model) > 0  # not with vocab_only
        self._has_logits = _llama.llama_get_memory(context.ctx) is not None  # an encoder computes none
        self._n_swa = _llama.llama_model_n_swa(model)  # 0: no sliding window
        # whether removing a sequence's last token leaves its cache as it was
        self._takes_back = not (
            self._n_swa or _llama.llama_model_is_recurrent(model) or _llama.llama_model_is_hybrid(model)
        )
        self._holders: list[weakref.ref[Any] | None] = [None] * self._n_sequences
        self._used: list[int] = [0] * self._n_sequences  # when last decoded, in decodes
        self._is_end: dict[int, bool] = {}

        fields = batch.batch
        self._token = np.ctypeslib.as_array(fields.token, (n_batch,))
        self._pos = np.ctypeslib.as_array(fields.pos, (n_batch,))
        self._wanted = np.ctypeslib.as_array(fields.logits, (n_batch,))  # whether its logits are wanted
        np.ctypeslib.as_array(fields.n_seq_id, (n_batch,))[:] = 1
        self._seq_id = [-1] * n_batch  # as in the batch
        self._writes: list[bool | None] = [None] * self._n_sequences  # as last set; None: unknown
        self._replies: list[bool | None] = [None] * self._n_sequences  # likewise, whether tokens are of a reply
        self._states: list[State | None] = [None] * self._n_sequences  # as the context has them; None: unknown
        self._turns: list[State | None] = [None] * self._n_sequences  # likewise, what their turns read
        self._records: list[object] = [None] * self._n_sequences  # the record that the slot agrees with; None: none
        self._is_described = False  # whether the native library may still expect a batch that was never decoded

    @property
    def is_open(self) -> bool:
        """Whether the model is still open."""
        return self._context.ctx is not None and not self._is_closing

    @property
    def ctx(self) -> library.llama_context_p:
        """The native context. Raises ModelError after close."""
        self.require_open()
        ctx: library.llama_context_p = self._context.ctx
        return ctx

    def require_open(self) -> None:
        """Raises ModelError after close."""
        if not self.is_open:
            raise ModelError(f"{self.model_path}: the model is closed")

    def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Calls a function that uses the model. It needs no lock: `closing` waits for its end. Raises ModelError after
        close.
        """
        call = threading.get_ident(), object()
        try:
            self._calls.add(call)
            self.require_open()
            return function(*args, **kwargs)
        finally:
            self._calls.discard(call)

    @property
    def is_idle(self) -> bool:
        """Whether no other thread uses the model now."""
        if self._calls or not self.lock.acquire(blocking=False):
            return False
        self.lock.release()
        return True

    def forked(self) -> None:
        """Forgets other threads, none of which is there after a fork."""
        self._calls = {call for call in self._calls if call[0] == threading.get_ident()}
        if self.lock.is_lost:
            self._is_closing = True

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within it and afterwards nobody else uses model and context. Replies in progress end with ModelError."""
        self._is_closing = True
        while any(thread != threading.get_ident() for thread, _ in tuple(self._calls)):
            time.sleep(0.001)
        with self.lock:
            yield

    #
    # memories
    #

    @property
    def has_memory(self) -> bool:
        return self._shape is not None and self.is_open

    @property
    def writes_by_segment(self) -> bool:
        """Whether an adapter is attached that writes once per segment."""
        return self.has_memory and self._by_segment

    @property
    def defers_writes(self) -> bool:
        """Whether an adapter is attached whose turns, or replies, read what was written before their turn."""
        return self.has_memory and self._defers

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a state, (L, H, r, r). Raises AdapterError without an adapter."""
        self.require_open()
        if self._shape is None:
            raise AdapterError(no_adapter())
        return self._shape

    def require_memory(self) -> None:
        """Raises AdapterError without an adapter, ModelError after close."""
        self.shape  # noqa: B018 - raises

    @holding("lock")
    def attach(self, adapter: library.llama_deltamem_adapter_p) -> None:
        """Attaches an adapter, with an empty state in every slot. Raises AdapterError."""
        check(library.llama_deltamem_attach(self.ctx, adapter))
        granularity = library.llama_deltamem_write_granularity(adapter)
        self._defers_replies = granularity == library.LLAMA_DELTAMEM_REPLY_DEFERRED
        self._defers = self._defers_replies or granularity == library.LLAMA_DELTAMEM_TOKEN_DEFERRED
        self._by_segment = granularity != library.LLAMA_DELTAMEM_TOKEN and not self._defers
        rank = library.llama_deltamem_rank(adapter)
        self._shape = library.llama_deltamem_n_layer(adapter), library.llama_deltamem_n_head(adapter), rank, rank
        self.n_attached += 1
        self._forget()

    @holding("lock")
    def detach(self) -> None:
        """Detaches the adapter. The states are lost."""
        check(library.llama_deltamem_detach(self.ctx))
        self._shape = None
        self._forget()

    def _forget(self) -> None:
        """Notes that other code used the context: its settings, states and logits are unknown."""
        self._writes = [None] * self._n_sequences
        self._replies = [None] * self._n_sequences
        self._states = [None] * self._n_sequences
        self._turns = [None] * self._n_sequences
        self._records = [None] * self._n_sequences
        self._seq_id = [-1] * self.n_batch
        self.n_decodes += 1

    @holding("lock")
    def get_state(self, slot: int) -> State:
        """A copy of the state of a slot."""
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_state_get(self.ctx, slot, _floats(state), state.size))
        return state

    @holding("lock")
    def put_state(self, slot: int, state: State, of_turn: State | None = None) -> None:
        """Sets the state of a slot. Nobody may change the array afterwards. An unfinished ingest is dropped. `of_turn`:
        the state that its turn reads, if the adapter defers its writes; None: this one.
        """
        if self._states[slot] is not state:
            self._states[slot] = self._turns[slot] = None
            check(library.llama_deltamem_state_set(self.ctx, slot, _floats(np.ascontiguousarray(state)), state.size))
            self._states[slot] = self._turns[slot] = state
        reads = state if of_turn is None else of_turn
        if self._defers and self._turns[slot] is not reads:
            self._turns[slot] = None
            check(library.llama_deltamem_turn_set(self.ctx, slot, _floats(np.ascontiguousarray(reads)), reads.size))
            self._turns[slot] = reads

    def holds(self, slot: int, state: State) -> bool:
        """Whether the slot is known to hold this very state."""
        return self._states[slot] is state

    def follows(self, slot: int | None, record: object) -> bool:
        """Whether the slot agrees with this record of its text: no decode has failed since."""
        return slot is not None and self._records[slot] is record

    def follow(self, slot: int, record: object, state: State | None = None, of_turn: State | None = None) -> None:
        """Notes that the slot agrees with this record. `state`: the one it holds; None: unknown, in the middle of an
        ingest. `of_turn`: as `put_state`.
        """
        self._states[slot], self._records[slot] = state, record
        self._turns[slot] = state if of_turn is None else of_turn

    #
    # which text has which slot
    #

    def text(self, slot: int) -> Any:
        """The text that has this slot; None if it is free."""
        reference = self._holders[slot]
        return None if reference is None else reference()

    @holding("lock")
    def take(self, text: Holder, staying: Sequence[Holder] = ()) -> int | None:
        """Gives the text a slot: the one that it has, its home, a free one, or another text's: one beside those of the
        texts `staying`, which keep theirs, and among these the one decoded longest ago. None if they have all.
        """
        if text.slot is not None:
            return text.slot
        slots = range(self.n_seq_max) if text.home is None else [text.home]
        slots = [slot for slot in slots if self.text(slot) is None or self.text(slot) not in staying]
        if not slots:
            return None
        # llama.cpp computes slots together only if no other lies between them (`decode`)
        near = {other.slot + i for other in staying if other.slot is not None for i in (-1, 1)}

        def worth(slot: int) -> tuple[int, bool, int, int]:
            is_free = self.text(slot) is None
            # free ones from the last one on: llama_cpp.Llama evaluates its own text in the first
            return (0 if is_free else 1, slot not in near, 0 if is_free else self._used[slot], -slot)

        slot = min(slots, key=worth)
        self.leave(self.text(slot))
        text.lost_kv()
        self._states[slot] = self._turns[slot] = self._records[slot] = None
        self.truncate(slot, 0)
        self._holders[slot] = weakref.ref(text)
        text.slot = slot
        return slot

    @holding("lock")
    def leave(self, text: Holder | None) -> None:
        """Takes a text out of its slot. Its record keeps the memory."""
        if text is None or text.slot is None:
            return
        slot, text.slot = text.slot, None
        self._holders[slot] = None
        text.lost_kv()
        self._states[slot] = self._turns[slot] = self._records[slot] = None
        self.truncate(slot, 0)

    @holding("lock")
    def fork(self, text: Holder, other: Holder) -> bool:
        """Gives `other`, a fork of `text`, a slot with a copy of the KV cache. False if no slot is free, or if both
        would have the same cells: what moves those of one would move the other's.
        """
        if self._shares_cells or text.slot is None or None not in map(self.text, range(self.n_seq_max)):
            return False
        slot = self.take(other)
        _llama.llama_memory_seq_cp(_llama.llama_get_memory(self.ctx), text.slot, slot, -1, -1)
        return True

    @holding("lock")
    def lost_kv(self, by_failure: bool = False) -> None:
        """Notes that the KV cache was emptied and the states changed: texts will be decoded again."""
        self._forget()
        for slot in range(self.n_seq_max):
            text = self.text(slot)
            if text is not None:
                text.lost_kv(by_failure=by_failure)

    #
    # KV cache
    #

    @holding("lock")
    def truncate(self, slot: int, n: int) -> int:
        """Keeps the first n tokens of a sequence. Returns how many are left: 0 if the model cannot remove only some."""
        memory = _llama.llama_get_memory(self.ctx)
        if memory is None:
            return n
        n_held = _llama.llama_memory_seq_pos_max(memory, slot) + 1
        n, is_shorter = min(n, n_held), n < n_held
        if _llama.llama_memory_seq_rm(memory, slot, n, -1) and not (is_shorter and self._lacks_window(memory, slot, n)):
            return n
        _llama.llama_memory_seq_rm(memory, slot, 0, -1)
        return 0

    def _lacks_window(self, memory: Any, slot: int, n: int) -> bool:
        """Whether tokens that token n attends to were overwritten. This happens after going back in a cache that is as
        short as the sliding window (swa_full=False).
        """
        first = max(0, n - self._n_swa + 1)
        return self._n_swa > 0 and bool(_llama.llama_memory_seq_pos_min(memory, slot) > first)

    @holding("lock")
    def shift(self, slot: int, start: int, end: int, n: int) -> bool:
        """Removes tokens [start, end) of n and moves later ones up. False, and nothing done, if the model cannot."""
        memory = _llama.llama_get_memory(self.ctx)
        if not library.llama_deltamem_can_shift(self.ctx) or not _llama.llama_memory_seq_rm(memory, slot, start, end):
            return False
        _llama.llama_memory_seq_add(memory, slot, end, n, start - end)
        return True

    #
    # decoding
    #

    @holding("lock")
    def decode(self, jobs: Sequence[Job], meanwhile: Callable[[], object] = lambda: None) -> list[Result]:
        """One llama_decode: one piece of each slot, at most n_batch tokens in all. Returns a result for each job. If
        one is unusable (its fault), the caller must empty the KV cache (`empty_kv`). `meanwhile` is called last before
        llama.cpp computes, which other threads do not wait for.

        Raises DecodeError if llama.cpp fails; the states are then unknown.
        """
        self._require_weights()
        given = jobs
        # llama.cpp computes them together only if their numbers ascend by one
        between = self._between(jobs)
        unused = {job.slot for job in between}
        jobs = sorted([*jobs, *between], key=lambda job: job.slot)
        marks, ends = self._fill_batch(jobs, unused)
        for job in given:  # before they are described: a turn begins even if the batch is never decoded
            self._states[job.slot] = self._turns[job.slot] = self._records[job.slot] = None
        if self.has_memory:
            self._describe(jobs, marks)
        meanwhile()
        self.n_decodes += 1
        try:
            with library.decoding():
                self._context.decode(self._batch)
            self._is_described = False
        finally:
            for job in between:
                _llama.llama_memory_seq_rm(_llama.llama_get_memory(self.ctx), job.slot, job.n_past, -1)

        marks = marks[-library.LLAMA_DELTAMEM_MAX_CHECKPOINTS :]
        kept = {mark: self._checkpoint(i) for i, mark in enumerate(marks) if mark not in ends}
        results = {}
        for job, end in zip(jobs, ends):
            if job.slot in unused:
                continue
            self._used[job.slot] = self.n_decodes
            if job.scores is not None:
                self._copy_scores(job.scores, end)
            results[job.slot] = self._result(job, end, kept)
        return [results[job.slot] for job in given]

    def _fill_batch(self, jobs: Sequence[Job], unused: Set[int]) -> tuple[list[int], list[int]]:
        """Puts jobs into llama.cpp's batch, one after the other. Nobody wants the logits of the `unused` slots. Returns
        where in the batch there are tokens after which a state is asked for, and where each job ends.
        """
        batch, wanted = self._batch.batch, self._wanted
        marks: list[int] = []
        ends: list[int] = []
        at = 0
        for slot, n_past, piece, _, asked, scores in jobs:
            n = len(piece.tokens)
            for i in range(at, at + n):
                if self._seq_id[i] != slot:
                    self._seq_id[i] = batch.seq_id[i][0] = slot
            if n == 1:  # most pieces: without what makes arrays
                self._token[at], self._pos[at] = piece.tokens[0], n_past
            else:
                self._token[at : at + n] = piece.tokens
                self._pos[at : at + n] = np.arange(n_past, n_past + n)
                wanted[at : at + n] = scores is not None
            marks += [at + i for i in asked]
            at += n
            wanted[at - 1] = slot not in unused
            ends.append(at - 1)
        batch.n_tokens = at
        return marks, ends

    def _copy_scores(self, scores: npt.NDArray[np.single], end: int) -> None:
        """Copies the logits of all tokens of a job, whose last one is `end` of the batch, into `scores`."""
        wanted, n = self._wanted[: self._batch.batch.n_tokens], len(scores)
        rows = np.ctypeslib.as_array(_llama.llama_get_logits(self.ctx), (int(wanted.sum()), self._n_vocab))
        first = int(wanted[: end + 1 - n].sum())
        scores[:] = rows[first : first + n]

    def _result(self, job: Job, end: int, kept: dict[int, State]) -> Result:
        """The result of a job whose last token is `end` of the batch. `kept`: checkpoints by their token there."""
        piece, n = job.piece, len(job.piece.tokens)
        states = {n - end + i: state for i, state in kept.items() if end - n < i < end}
        state = None
        if job.has_state and (piece.segments is None or piece.ends):
            states[n] = state = np.empty(self.shape, dtype=np.float32)
        status = library.llama_deltamem_take_result(
            self._context.ctx,
            job.slot,
            end if self._has_logits else -1,
            None if state is None else state.ctypes.data,
            0 if state is None else state.size,
        )
        fault = None
        if status == library.LLAMA_DELTAMEM_STATE_NOT_FINITE:
            fault = self.not_finite("the memory")
        elif status == library.LLAMA_DELTAMEM_LOGITS_NOT_FINITE:
            fault = self.not_finite("what the model computes")
        else:
            check(status, DecodeError)
        return Result(end, states, fault)

    def _between(self, jobs: Sequence[Job]) -> list[Job]:
        """A token for each unused slot between these jobs, so that one graph computes all. It writes no memory, nobody
        wants its logits, and it is taken back after the decode. Only where each job has one token, too, and where few
        slots lie between them.
        """
        if len(jobs) == 1:
            return []
        used = sorted(job.slot for job in jobs)
        memory = _llama.llama_get_memory(self.ctx)
        if not self._takes_back or self._by_segment or memory is None or any(len(job.piece.tokens) > 1 for job in jobs):
            return []
        piece = Piece(np.zeros(1, dtype=np.intc), write=False)
        found = []
        for before, after in itertools.pairwise(used):
            slots = range(before + 1, after)
            ends = [_llama.llama_memory_seq_pos_max(memory, slot) + 1 for slot in slots]
            if len(slots) <= MAX_BETWEEN and all(end < self.n_ctx for end in ends):
                found += [Job(slot, end, piece, has_state=False) for slot, end in zip(slots, ends)]
        return found if len(found) + len(used) <= self.n_batch else []

    @holding("lock")
    def empty_kv(self, by_failure: bool = False) -> None:
        """Empties the KV cache. Values that are not finite reach others even from cells that nobody attends to: 0 times
        NaN is NaN. `by_failure`: as `Holder.lost_kv`.
        """
        memory = _llama.llama_get_memory(self.ctx)
        if memory is not None:
            _llama.llama_memory_clear(memory, True)
        self.lost_kv(by_failure)

    @holding("lock")
    def decode_alone(self, texts: Sequence[Sequence[int]]) -> int:
        """One llama_decode of these texts alone, each in its own slot. Empties the KV cache first. Returns the number
        of tokens.
        """
        self._require_weights()
        self.lost_kv()
        self._batch.reset()
        for slot, tokens in enumerate(texts):
            if tokens:
                self._batch.add_sequence(tokens, slot, True)
        n_tokens: int = self._batch.n_tokens()
        if n_tokens:
            self._context.kv_cache_clear()
            self._context.decode(self._batch)
            self._batch.reset()
        return n_tokens

    def _require_weights(self) -> None:
        """Raises InputError if there are none: llama.cpp would end the process."""
        if not self._has_weights:
            raise InputError(f"{self.model_path}: nothing can be decoded: load the model without vocab_only")

    @holding("lock")
    def share_state(self, state: State, n: int) -> None:
        """Texts in the first n slots (or all, if fewer) read this state and do not write. Other texts leave them."""
        for slot in range(min(n, self._n_sequences)):
            self.leave(self.text(slot))
            self.put_state(slot, state)
        check(library.llama_deltamem_set_write(self.ctx, -1, False))
        self._forget()

    def not_finite(self, what: str) -> str:
        """The sentence of a NotFiniteError."""
        path = self.adapter_path if self.has_memory else self.model_path
        return f"{path}: {what} is no longer finite: the weights are damaged or far too large"

    def _describe(self, jobs: Sequence[Job], marks: Sequence[int]) -> None:
        """Tells the native library what the next llama_decode writes, and which states to keep."""
        pieces, is_described, self._is_described = [job.piece for job in jobs], self._is_described, True
        for job in jobs:
            if self._writes[job.slot] != job.piece.write:
                check(library.llama_deltamem_set_write(self.ctx, job.slot, job.piece.write))
                self._writes[job.slot] = job.piece.write
            if job.piece.begins and self._defers:
                check(library.llama_deltamem_begin_turn(self.ctx, job.slot))
            if self._defers_replies and self._replies[job.slot] != job.piece.reply:
                check(library.llama_deltamem_set_replies(self.ctx, job.slot, job.piece.reply))
                self._replies[job.slot] = job.piece.reply
        if any(piece.segments is not None for piece in pieces) or (is_described and self._by_segment):
            # a token without segments writes by itself, as an ingest of one token
            ids = [np.zeros(len(p.tokens), dtype=np.int32) if p.segments is None else p.segments for p in pieces]
            ends = [np.full(len(p.tokens), p.segments is None, dtype=np.int8) for p in pieces]
            for piece, end in zip(pieces, ends):
                end[-1] |= piece.ends
            segments, flags = np.ascontiguousarray(np.concatenate(ids), dtype=np.int32), np.concatenate(ends)
            check(
                library.llama_deltamem_set_segments(
                    self.ctx,
                    segments.ctypes.data_as(library.int32_p),
                    flags.ctypes.data_as(library.int8_p),
                    len(segments),
                ),
                InputError,
            )
        if marks or is_described:
            kept = np.array(marks[-library.LLAMA_DELTAMEM_MAX_CHECKPOINTS :], dtype=np.int32)
            check(library.llama_deltamem_set_checkpoints(self.ctx, kept.ctypes.data_as(library.int32_p), len(kept)))

    def _checkpoint(self, i: int) -> State:
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_checkpoint_get(self.ctx, i, _floats(state), state.size))
        return state

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the logits in a row of the latest llama_decode, [n_vocab]."""
        return np.array(np.ctypeslib.as_array(_llama.llama_get_logits_ith(self.ctx, row), (self._n_vocab,)))

    def is_end(self, token: int) -> bool:
        """Whether the token ends a message or a text."""
        if token not in self._is_end:
            with self.lock:
                vocab = _llama.llama_model_get_vocab(_llama.llama_get_model(self.ctx))
                self._is_end[token] = bool(_llama.llama_vocab_is_eog(vocab, token))
        return self._is_end[token]


def check(status: int, error: type[Exception] = AdapterError) -> None:
    """Raises the native library's last error if `status` says that a call failed."""
    if status != 0:
        raise error(library.last_error())


def _floats(array: npt.NDArray[np.float32]) -> ctypes._Pointer[ctypes.c_float]:
    return array.ctypes.data_as(library.float_p)
