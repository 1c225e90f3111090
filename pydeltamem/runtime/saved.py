"""What `DeltaMemLlama.save_state` keeps of a text, and its KV cache as bytes."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import InputError
from ..formats.memory_file import MemorySnapshot
from . import library
from .history import Position
from .library import LlamaState
from .model import Model

_llama = library.llama_cpp


class DeltaMemState(LlamaState):
    """What `DeltaMemLlama.save_state` returns: the text, its KV cache, and the memory."""

    def __init__(
        self,
        *,
        position: Position,
        memory: MemorySnapshot | None,
        write: bool,
        messages: list[Any] | None,
        lost_by_failure: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.position = position
        self.memory = memory
        self.write = write
        self.messages = messages  # if the text is a chat
        self.lost_by_failure = lost_by_failure  # as of the text


def kv_of(llm: Model) -> bytes:
    """The KV cache of the model's own text."""
    slot = llm._engine.slots.take(llm._text)
    size = _llama.llama_state_seq_get_size(llm.ctx, slot)
    data = (ctypes.c_uint8 * size)()
    n = _llama.llama_state_seq_get_data(llm.ctx, data, size, slot)
    return bytes(data)[:n]


def load_kv(llm: Model, state: LlamaState) -> None:
    """Takes the KV cache from a state. If it fails (InputError), the present text is decoded again as at first."""
    size, text, slots = len(state.llama_state), llm._text, llm._engine.slots
    data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
    slot = slots.take(text)
    assert slot is not None  # its home
    text.lost_kv()
    try:
        if isinstance(state, DeltaMemState):
            n_read = _llama.llama_state_seq_set_data(llm.ctx, data, size, slot)
        else:
            n_read = _llama.llama_state_set_data(llm.ctx, data, size)
        if not n_read:
            slots.truncate(slot, 0)
            raise InputError("the state is of another model, or damaged: llama.cpp cannot read its KV cache")
    except BaseException:
        text.lost_kv(by_failure=True)
        raise
