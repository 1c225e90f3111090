"""The sequences of a llama.cpp context: which text sits in which, and one llama_decode for several of them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import AdapterError, InputError, ModelError
from . import library
from .lock import FairLock, holding
from .names import option

if TYPE_CHECKING:
    from .text import Piece, Text

_llama = library.llama_cpp

_T = TypeVar("_T")


def no_adapter() -> str:
    return f"no memory adapter is attached: load the model with one, by {option('deltamem_path')}"


class Seats:
    """The sequences of one context, what is attached to it, and the batch that they are decoded in.

    Args:
        context: llama_cpp's wrapper of the context.
        batch: llama_cpp's wrapper of a batch of n_batch tokens.
        model_path: for errors.

    Attributes:
        lock: whoever touches the context holds it, for one decode and what is made of its logits. What a text has in
            the context (its seat, KV cache and state) changes only under it, also by others that take its seat.
        texts: all that there are, with or without a seat.
    """

    def __init__(self, context: Any, batch: Any, n_batch: int, model_path: str) -> None:
        self.lock = FairLock()
        self.texts: weakref.WeakSet[Text] = weakref.WeakSet()
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
        self.n_attached = 0  # how often an adapter was: a memory belongs to one of these times
        # in the latest llama_decode, by seat
        self.latest: weakref.WeakValueDictionary[int, Text] = weakref.WeakValueDictionary()
        self._n_vocab = _llama.llama_vocab_n_tokens(_llama.llama_model_get_vocab(_llama.llama_get_model(context.ctx)))
        self._n_swa = _llama.llama_model_n_swa(_llama.llama_get_model(context.ctx))  # 0: no sliding window
        self._texts: list[weakref.ref[Text] | None] = [None] * self.n_seq_max
        self._used: list[int] = [0] * self.n_seq_max  # when, in decodes
        self._n_decodes = 0
        self._is_end: dict[int, bool] = {}

        fields = batch.batch
        self._token = np.ctypeslib.as_array(fields.token, (n_batch,))
        self._pos = np.ctypeslib.as_array(fields.pos, (n_batch,))
        self._wanted = np.ctypeslib.as_array(fields.logits, (n_batch,))  # whether logits are
        np.ctypeslib.as_array(fields.n_seq_id, (n_batch,))[:] = 1
        self._seq_id = [-1] * n_batch  # as it stands in the batch
        self._writes: list[bool | None] = [None] * self.n_seq_max  # as the memory was told

    @property
    def is_open(self) -> bool:
        """Until the model is closed."""
        return self._context.ctx is not None and not self._is_closing

    @property
    def ctx(self) -> library.llama_context_p:
        """The native context. Raises ModelError after close."""
        if not self.is_open:
            raise ModelError(f"{self.model_path}: the model is closed")
        return self._context.ctx

    @property
    def is_crowded(self) -> bool:
        """Whether texts have to take each other's seats. Then one that is read in several decodes is read in one go: it
        would begin again and again if others took its seat in the middle.
        """
        return len(self.texts) > self.n_seq_max

    def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Calls what uses the model, also without the lock: `closing` waits for its end. Raises ModelError once it is
        closed.
        """
        call = threading.get_ident(), object()
        try:
            self._calls.add(call)
            _ = self.ctx
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
        _ = self.ctx
        if self._shape is None:
            raise AdapterError(no_adapter())
        return self._shape

    @holding("lock")
    def attach(self, adapter: library.llama_deltamem_adapter_p) -> None:
        """Attaches an adapter, with an empty state in every seat. Raises AdapterError."""
        check(library.llama_deltamem_attach(self.ctx, adapter))
        rank = library.llama_deltamem_rank(adapter)
        self._shape = library.llama_deltamem_n_layer(adapter), library.llama_deltamem_n_head(adapter), rank, rank
        self.n_attached += 1
        self.forget_writes()

    @holding("lock")
    def detach(self) -> None:
        """The states are lost."""
        check(library.llama_deltamem_detach(self.ctx))
        self._shape = None

    def forget_writes(self) -> None:
        """The memory may have been told by others what writes."""
        self._writes = [None] * self.n_seq_max

    @holding("lock")
    def get_state(self, seat: int) -> npt.NDArray[np.float32]:
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_state_get(self.ctx, seat, _floats(state), state.size))
        return state

    @holding("lock")
    def set_state(self, seat: int, state: npt.NDArray[np.float32]) -> None:
        check(library.llama_deltamem_state_set(self.ctx, seat, _floats(np.ascontiguousarray(state)), state.size))

    @holding("lock")
    def abandon(self, seat: int) -> None:
        """Drops what an unfinished ingest has gathered."""
        if self.has_memory:
            check(library.llama_deltamem_abandon_ingest(self.ctx, seat))

    #
    # seats
    #

    def text(self, seat: int) -> Text | None:
        reference = self._texts[seat]
        return None if reference is None else reference()

    @holding("lock")
    def take(self, text: Text, staying: Sequence[Text] = ()) -> int:
        """Gives the text a seat: the one that it has, its home, a free one, or that of the text decoded longest ago
        except those that are `staying`. A text that loses its seat keeps its memory.
        """
        if text.seat is not None:
            return text.seat
        seat = text.home
        if seat is None:
            free = [s for s in range(self.n_seq_max) if self.text(s) not in staying]
            if not free:
                raise InputError(f"{len(staying) + 1} texts do not fit in {self.n_seq_max} sequences: raise n_seq_max")
            # from the back: the first is where llama_cpp.Llama evaluates its text
            seat = min(free, key=lambda s: (self.text(s) is not None, self._used[s], -s))
        sitting = self.text(seat)
        if sitting is not None:
            self.leave(sitting)
        state = text.state if self.has_memory else None
        self._texts[seat] = weakref.ref(text)
        self.truncate(seat, 0)
        text.sits(seat)
        if state is not None:
            self.set_state(seat, state)
        return seat

    @holding("lock")
    def leave(self, text: Text) -> None:
        """Takes the text's memory out of its seat."""
        seat = text.seat
        if seat is None:
            return
        text.stands(self.get_state(seat) if self.has_memory else None)
        self._texts[seat] = None
        self.latest.pop(seat, None)
        self.truncate(seat, 0)

    @holding("lock")
    def fork(self, text: Text, other: Text) -> None:
        """Gives a fork of a text its KV cache, if there is a free seat; else it will be read again."""
        if text.seat is not None and None in map(self.text, range(self.n_seq_max)):
            seat = self.take(other)
            memory = _llama.llama_get_memory(self.ctx)
            _llama.llama_memory_seq_cp(memory, text.seat, seat, -1, -1)
            other.n_kv = text.n_kv

    @holding("lock")
    def lost_kv(self) -> None:
        """The KV cache was emptied behind our back: texts are to be read again."""
        self.latest.clear()
        self._seq_id = [-1] * self.n_batch  # llama_cpp filled the batch
        for seat in range(self.n_seq_max):
            text = self.text(seat)
            if text is not None:
                text.n_kv = 0

    #
    # KV cache
    #

    @holding("lock")
    def truncate(self, seat: int, n: int) -> int:
        """Keeps the first n tokens of a sequence. Returns how many there are: 0 where the model cannot remove some."""
        memory = _llama.llama_get_memory(self.ctx)
        if memory is None:
            return n
        n_held = _llama.llama_memory_seq_pos_max(memory, seat) + 1
        n, is_shorter = min(n, n_held), n < n_held
        if _llama.llama_memory_seq_rm(memory, seat, n, -1) and not (is_shorter and self._lacks_window(memory, seat, n)):
            return n
        _llama.llama_memory_seq_rm(memory, seat, 0, -1)
        return 0

    def _lacks_window(self, memory: Any, seat: int, n: int) -> bool:
        """Whether tokens that token n attends to were overwritten: so it is in a cache as short as the sliding window
        (swa_full=False) after going back.
        """
        first = max(0, n - self._n_swa + 1)
        return self._n_swa > 0 and _llama.llama_memory_seq_pos_min(memory, seat) > first

    @holding("lock")
    def shift(self, seat: int, start: int, end: int, n: int) -> bool:
        """Removes tokens [start, end) of n; those behind move up. False, and nothing done, where the model cannot."""
        memory = _llama.llama_get_memory(self.ctx)
        if not library.llama_deltamem_can_shift(self.ctx) or not _llama.llama_memory_seq_rm(memory, seat, start, end):
            return False
        _llama.llama_memory_seq_add(memory, seat, end, n, start - end)
        return True

    #
    # decoding
    #

    @holding("lock")
    def decode(self, jobs: Sequence[tuple[Text, Piece]]) -> dict[Text, int]:
        """One llama_decode: one piece of each text, n_batch tokens at most together. Returns for each text the row of
        its last token, to sample from until the next call.

        Raises DecodeError if llama.cpp fails.
        """
        ctx, batch = self.ctx, self._batch.batch
        n_tokens = sum(len(piece.tokens) for _, piece in jobs)
        wanted = self._wanted[:n_tokens]
        batch.n_tokens = n_tokens
        wanted[:] = 0
        marks: list[int] = []
        last: dict[Text, int] = {}
        at = 0
        for text, piece in jobs:
            n = len(piece.tokens)
            self._token[at : at + n] = piece.tokens
            self._pos[at : at + n] = np.arange(text.n_kv, text.n_kv + n)
            for i in range(at, at + n):
                if self._seq_id[i] != text.seat:
                    self._seq_id[i] = batch.seq_id[i][0] = text.seat
            wanted[at : at + n] = text.scores is not None
            wanted[at + n - 1] = 1
            if self.has_memory and text.n_kv >= text.history.n:
                marks += [at + i for i in text.marks(piece)]
            last[text] = at + n - 1
            at += n

        if self.has_memory:
            self._describe(jobs, marks)
        self.latest.clear()
        with library.decoding():
            self._context.decode(self._batch)
        self.latest.update({text.seat: text for text, _ in jobs})
        self._n_decodes += 1

        states = {mark: self._checkpoint(i) for i, mark in enumerate(marks[-library.LLAMA_DELTAMEM_MAX_CHECKPOINTS :])}
        at = 0
        for text, piece in jobs:
            n = len(piece.tokens)
            self._used[text.seat] = self._n_decodes
            end = at + n - 1
            has_state = self.has_memory and text.n_kv >= text.history.n and (piece.segments is None or piece.ends)
            if has_state and end not in states:
                states[end] = self.get_state(text.seat)
            text.fault = self._fault(end, states.get(end))
            if text.scores is not None:
                rows = np.ctypeslib.as_array(_llama.llama_get_logits(ctx), (int(wanted.sum()), self._n_vocab))
                first = int(wanted[:at].sum())
                text.scores[text.n_kv : text.n_kv + n] = rows[first : first + n]
            text.did_read(piece, {i - at + 1: state for i, state in states.items() if at <= i < at + n})
            at += n
        if any(text.fault for text, _ in jobs):
            # what is not finite in cells that nobody attends to would still reach the others: 0 times it is not 0
            memory = _llama.llama_get_memory(ctx)
            if memory is not None:
                _llama.llama_memory_clear(memory, True)
            self.lost_kv()
        return last

    def _fault(self, row: int, state: npt.NDArray[np.float32] | None) -> str | None:
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

    def _describe(self, jobs: Sequence[tuple[Text, Piece]], marks: Sequence[int]) -> None:
        """Tells the memory what the next llama_decode writes, and which states to keep."""
        for text, piece in jobs:
            if self._writes[text.seat] != piece.write:
                check(library.llama_deltamem_set_write(self.ctx, text.seat, piece.write))
                self._writes[text.seat] = piece.write
        if any(piece.segments is not None for _, piece in jobs):
            # a token without segments writes by itself: an ingest of its own
            ids = [np.zeros(len(p.tokens), dtype=np.int32) if p.segments is None else p.segments for _, p in jobs]
            ends = [np.full(len(p.tokens), p.segments is None, dtype=np.int8) for _, p in jobs]
            for (_, piece), end in zip(jobs, ends):
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

    def _checkpoint(self, i: int) -> npt.NDArray[np.float32]:
        state = np.empty(self.shape, dtype=np.float32)
        check(library.llama_deltamem_checkpoint_get(self.ctx, i, _floats(state), state.size))
        return state

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
