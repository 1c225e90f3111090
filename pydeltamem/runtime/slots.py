"""The slots of a llama.cpp context: its sequences, what is attached to it, and one llama_decode for several of them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError, InputError, ModelError
from . import library
from .history import Piece, State
from .lock import FairLock, holding
from .names import option

_llama = library.llama_cpp

_T = TypeVar("_T")


def no_adapter() -> str:
    return f"no memory adapter is attached: load the model with one, by {option('deltamem_path')}"


class Holder(Protocol):
    """Who has a slot: a `Text`.

    Attributes:
        slot: its slot, None if it has none.
        home: the only slot that it may have; None: any.
    """

    slot: int | None
    home: int | None

    def lost_kv(self) -> None:
        """Its KV cache is gone."""


class Job(NamedTuple):
    """What one slot does in a llama_decode."""

    slot: int
    n_past: int  # tokens before it in the KV cache
    piece: Piece
    has_state: bool  # whether the memory reads it: else only the KV cache lacked it
    marks: Sequence[int] = ()  # ascending: after which of its tokens the state is to be kept
    scores: npt.NDArray[np.single] | None = None  # takes the logits of all its tokens, [n, n_vocab]


class Result(NamedTuple):
    """What came of a job."""

    row: int  # of its last token: where its logits are, until the next call
    states: dict[int, State]  # the memory after so many of its tokens, as marked, and at its end
    fault: str | None  # why it is of no use


class Slots:
    """The sequences of one context, what is attached to it, and the batch that they are decoded in.

    Args:
        context: llama_cpp's wrapper of the context.
        batch: llama_cpp's wrapper of a batch of n_batch tokens.
        model_path: for errors.

    Attributes:
        lock: whoever touches the context holds it, for one decode and what is made of its logits. What a text has in
            the context (its slot and KV cache) changes only under it, also by others that take its slot.
        n_attached: how often an adapter was: a memory belongs to one of these times.
        n_decodes: another number once the logits of the latest llama_decode are no longer there, or of no use.
    """

    def __init__(self, context: Any, batch: Any, n_batch: int, model_path: str) -> None:
        self.lock = FairLock()
        self._is_closing = False
        self._calls: set[tuple[int, object]] = set()  # thread and call
        self._context = context
        self._batch = batch
        self.n_batch = n_batch
        self.model_path = model_path
        self.n_seq_max: int = _llama.llama_n_seq_max(context.ctx)
        self.n_ctx: int = _llama.llama_n_ctx_seq(context.ctx)  # of one sequence
        self._shape: tuple[int, int, int, int] | None = None
        self.adapter_path = ""  # for errors
        self.n_attached = 0
        self.n_decodes = 0
        self._n_vocab = _llama.llama_vocab_n_tokens(_llama.llama_model_get_vocab(_llama.llama_get_model(context.ctx)))
        self._n_swa = _llama.llama_model_n_swa(_llama.llama_get_model(context.ctx))  # 0: no sliding window
        self._holders: list[weakref.ref[Any] | None] = [None] * self.n_seq_max
        self._used: list[int] = [0] * self.n_seq_max  # when, in decodes
        self._is_end: dict[int, bool] = {}

        fields = batch.batch
        self._token = np.ctypeslib.as_array(fields.token, (n_batch,))
        self._pos = np.ctypeslib.as_array(fields.pos, (n_batch,))
        self._wanted = np.ctypeslib.as_array(fields.logits, (n_batch,))  # whether logits are
        np.ctypeslib.as_array(fields.n_seq_id, (n_batch,))[:] = 1
        self._seq_id = [-1] * n_batch  # as it stands in the batch
        self._writes: list[bool | None] = [None] * self.n_seq_max  # as the memory was told
        self._states: list[State | None] = [None] * self.n_seq_max  # that the memory holds; None: not known
        self._records: list[object] = [None] * self.n_seq_max  # that the slot is in line with; None: with none

    @property
    def is_open(self) -> bool:
        """Until the model is closed."""
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
        """Calls what uses the model, also without the lock: `closing` waits for its end. Raises ModelError once it is
        closed.
        """
        call = threading.get_ident(), object()
        try:
            self._calls.add(call)
            self.require_open()
            return function(*args, **kwargs)
        finally:
            self._calls.discard(call)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Within it nobody uses model and context, nor afterwards: replies in the making end with ModelError."""
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
    def shape(self) -> tuple[int, int, int, int]:
        """Of a state: [L, H, r, r]. Raises AdapterError without a memory."""
        self.require_open()
        if self._shape is None:
            raise AdapterError(no_adapter())
        return self._shape

    def require_memory(self) -> None:
        """Raises AdapterError without a memory, ModelError after close."""
        self.shape  # noqa: B018 - which says so

    @holding("lock")
    def attach(self, adapter: library.llama_deltamem_adapter_p) -> None:
        """Attaches an adapter, with an empty state in every slot. Raises AdapterError."""
        check(library.llama_deltamem_attach(self.ctx, adapter))
        rank = library.llama_deltamem_rank(adapter)
        self._shape = library.llama_deltamem_n_layer(adapter), library.llama_deltamem_n_head(adapter), rank, rank
        self.n_attached += 1
        self._forget()

    @holding("lock")
    def detach(self) -> None:
        """The states are lost."""
        check(library.llama_deltamem_detach(self.ctx))
        self._shape = None
        self._forget()

    def _forget(self) -> None:
        """Others used the context: what it was told, what it holds and what it computed is not known."""
        self._writes = [None] * self.n_seq_max
        self._states = [None] * self.n_seq_max
        self._records = [None] * self.n_seq_max
        self._seq_id = [-1] * self.n_batch
        self.n_decodes += 1

    @holding("lock")
    def get_state(self, slot: int) -> State:
        """A copy of the state of a slot."""
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_state_get(self.ctx, slot, _floats(state), state.size))
        return state

    @holding("lock")
    def put_state(self, slot: int, state: State) -> None:
        """The memory of a slot is this one, which nobody writes to.
        What an unfinished ingest has gathered is dropped.
        """
        if self._states[slot] is not state:
            self._states[slot] = None
            check(library.llama_deltamem_state_set(self.ctx, slot, _floats(np.ascontiguousarray(state)), state.size))
            self._states[slot] = state

    def holds(self, slot: int, state: State) -> bool:
        """Whether the memory of a slot is known to be this one."""
        return self._states[slot] is state

    def follows(self, slot: int | None, record: object) -> bool:
        """Whether the slot is in line with this record of its text: no decode failed since."""
        return slot is not None and self._records[slot] is record

    def follow(self, slot: int, record: object, state: State | None = None) -> None:
        """The slot is in line with this record. `state`: what its memory holds; None: not known, in the middle of an
        ingest.
        """
        self._states[slot], self._records[slot] = state, record

    #
    # who has which
    #

    def text(self, slot: int) -> Any:
        """Who has it, None if nobody has."""
        reference = self._holders[slot]
        return None if reference is None else reference()

    @holding("lock")
    def take(self, text: Holder, staying: Sequence[Holder] = ()) -> int | None:
        """Gives the text a slot: the one that it has, its home, a free one, or that of the text decoded longest ago
        except those that are `staying`. None if these have all.
        """
        if text.slot is not None:
            return text.slot
        places = range(self.n_seq_max) if text.home is None else [text.home]
        places = [slot for slot in places if self.text(slot) is None or self.text(slot) not in staying]
        if not places:
            return None
        # from the back: the first is where llama_cpp.Llama evaluates its text
        slot = min(places, key=lambda s: (self.text(s) is not None, self._used[s], -s))
        self.leave(self.text(slot))
        text.lost_kv()
        self._states[slot] = self._records[slot] = None
        self.truncate(slot, 0)
        self._holders[slot] = weakref.ref(text)
        text.slot = slot
        return slot

    @holding("lock")
    def leave(self, text: Holder | None) -> None:
        """Takes a text out of its slot. Its memory is in its record."""
        if text is None or text.slot is None:
            return
        slot, text.slot = text.slot, None
        self._holders[slot] = None
        text.lost_kv()
        self._states[slot] = self._records[slot] = None
        self.truncate(slot, 0)

    @holding("lock")
    def fork(self, text: Holder, other: Holder) -> bool:
        """Gives a fork of a text a slot and its KV cache, if there is a free one. Returns whether it has."""
        if text.slot is None or None not in map(self.text, range(self.n_seq_max)):
            return False
        slot = self.take(other)
        _llama.llama_memory_seq_cp(_llama.llama_get_memory(self.ctx), text.slot, slot, -1, -1)
        return True

    @holding("lock")
    def lost_kv(self) -> None:
        """The KV cache was emptied, and the memories told otherwise: texts are to be read again."""
        self._forget()
        for slot in range(self.n_seq_max):
            text = self.text(slot)
            if text is not None:
                text.lost_kv()

    #
    # KV cache
    #

    @holding("lock")
    def truncate(self, slot: int, n: int) -> int:
        """Keeps the first n tokens of a sequence. Returns how many there are: 0 where the model cannot remove some."""
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
        """Whether tokens that token n attends to were overwritten: so it is in a cache as short as the sliding window
        (swa_full=False) after going back.
        """
        first = max(0, n - self._n_swa + 1)
        return self._n_swa > 0 and bool(_llama.llama_memory_seq_pos_min(memory, slot) > first)

    @holding("lock")
    def shift(self, slot: int, start: int, end: int, n: int) -> bool:
        """Removes tokens [start, end) of n; those behind move up. False, and nothing done, where the model cannot."""
        memory = _llama.llama_get_memory(self.ctx)
        if not library.llama_deltamem_can_shift(self.ctx) or not _llama.llama_memory_seq_rm(memory, slot, start, end):
            return False
        _llama.llama_memory_seq_add(memory, slot, end, n, start - end)
        return True

    #
    # decoding
    #

    @holding("lock")
    def decode(self, jobs: Sequence[Job]) -> list[Result]:
        """One llama_decode: one piece of each slot, n_batch tokens at most together. Returns for each job what came of
        it; if one is of no use (its fault), the KV cache is to be emptied (`empty_kv`).

        Raises DecodeError if llama.cpp fails; the states are not known then.
        """
        ctx, batch = self.ctx, self._batch.batch
        n_tokens = sum(len(job.piece.tokens) for job in jobs)
        wanted = self._wanted[:n_tokens]
        batch.n_tokens = n_tokens
        wanted[:] = 0
        marks: list[int] = []
        ends: list[int] = []
        at = 0
        for slot, n_past, piece, _, asked, scores in jobs:
            n = len(piece.tokens)
            self._token[at : at + n] = piece.tokens
            self._pos[at : at + n] = np.arange(n_past, n_past + n)
            for i in range(at, at + n):
                if self._seq_id[i] != slot:
                    self._seq_id[i] = batch.seq_id[i][0] = slot
            wanted[at : at + n] = scores is not None
            marks += [at + i for i in asked]
            at += n
            wanted[at - 1] = 1
            ends.append(at - 1)

        if self.has_memory:
            self._describe(jobs, marks)
        for job in jobs:
            self._states[job.slot] = self._records[job.slot] = None
        self.n_decodes += 1
        with library.decoding():
            self._context.decode(self._batch)

        kept = {mark: self._checkpoint(i) for i, mark in enumerate(marks[-library.LLAMA_DELTAMEM_MAX_CHECKPOINTS :])}
        results = []
        for (slot, _, piece, has_state, _, scores), end in zip(jobs, ends):
            at = end + 1 - len(piece.tokens)
            self._used[slot] = self.n_decodes
            if has_state and end not in kept and (piece.segments is None or piece.ends):
                kept[end] = self.get_state(slot)
            if scores is not None:
                rows = np.ctypeslib.as_array(_llama.llama_get_logits(ctx), (int(wanted.sum()), self._n_vocab))
                first = int(wanted[:at].sum())
                scores[:] = rows[first : first + len(piece.tokens)]
            states = {i - at + 1: state for i, state in kept.items() if at <= i <= end}
            results.append(Result(end, states, self._fault(end, kept.get(end))))
        return results

    @holding("lock")
    def empty_kv(self) -> None:
        """What is not finite in cells that nobody attends to would still reach others: 0 times it is not 0."""
        memory = _llama.llama_get_memory(self.ctx)
        if memory is not None:
            _llama.llama_memory_clear(memory, True)
        self.lost_kv()

    @holding("lock")
    def read_alone(self, texts: Sequence[Sequence[int]]) -> int:
        """One llama_decode of texts by themselves, in a KV cache that is emptied for them; each in a slot of its own.
        Returns how many tokens there are.
        """
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

    @holding("lock")
    def share_state(self, state: State, n: int) -> None:
        """Texts in the first n slots, or as many as there are, read this state and do not write. Others leave them."""
        for slot in range(min(n, self.n_seq_max)):
            self.leave(self.text(slot))
            self.put_state(slot, state)
        check(library.llama_deltamem_set_write(self.ctx, -1, False))
        self._forget()

    def _fault(self, row: int, state: State | None) -> str | None:
        """What is wrong with the logits and the state behind a token, None if all is well."""
        if state is not None and not np.isfinite(state).all():
            return self.not_finite("the memory")
        logits = _llama.llama_get_logits_ith(self.ctx, row)
        if not logits:  # of a model that embeds
            return None
        highest = np.ctypeslib.as_array(logits, (self._n_vocab,)).max()
        # NaN in what the model computes is NaN in every logit; beyond what float32 holds, a norm makes it 0
        if np.isfinite(highest) and (highest != 0 or np.ctypeslib.as_array(logits, (self._n_vocab,)).any()):
            return None
        return self.not_finite("what the model computes")

    def not_finite(self, what: str) -> str:
        """The sentence of a NotFiniteError."""
        path = self.adapter_path if self.has_memory else self.model_path
        return f"{path}: {what} is not finite any more: its weights are damaged or far too large"

    def _describe(self, jobs: Sequence[Job], marks: Sequence[int]) -> None:
        """Tells the memory what the next llama_decode writes, and which states to keep."""
        pieces = [job.piece for job in jobs]
        for job in jobs:
            if self._writes[job.slot] != job.piece.write:
                check(library.llama_deltamem_set_write(self.ctx, job.slot, job.piece.write))
                self._writes[job.slot] = job.piece.write
        if any(piece.segments is not None for piece in pieces):
            # a token without segments writes by itself: an ingest of its own
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
        if marks:
            kept = np.array(marks[-library.LLAMA_DELTAMEM_MAX_CHECKPOINTS :], dtype=np.int32)
            check(library.llama_deltamem_set_checkpoints(self.ctx, kept.ctypes.data_as(library.int32_p), len(kept)))

    def _checkpoint(self, i: int) -> State:
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_checkpoint_get(self.ctx, i, _floats(state), state.size))
        return state

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Of a row of the latest llama_decode, [n_vocab], a copy."""
        return np.array(np.ctypeslib.as_array(_llama.llama_get_logits_ith(self.ctx, row), (self._n_vocab,)))

    def is_end(self, token: int) -> bool:
        """Whether the token ends a message or a text."""
        if token not in self._is_end:
            with self.lock:
                vocab = _llama.llama_model_get_vocab(_llama.llama_get_model(self.ctx))
                self._is_end[token] = bool(_llama.llama_vocab_is_eog(vocab, token))
        return self._is_end[token]


def check(status: int, error: type[Exception] = AdapterError) -> None:
    """Raises the native library's last error if a call of it failed."""
    if status != 0:
        raise error(library.last_error())


def _floats(array: npt.NDArray[np.float32]) -> ctypes._Pointer[ctypes.c_float]:
    return array.ctypes.data_as(library.float_p)
