"""What Python does when llama.cpp aborts a llama_decode in the middle."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np
import pytest

from pydeltamem import Conversation, DeltaMemError, DeltaMemLlama, say_together
from pydeltamem.runtime import library


class Limit:
    """Ends a computation of the model after n nodes, once; n None: never. `seen` counts them."""

    def __init__(self, llm: DeltaMemLlama) -> None:
        self.n: int | None = None
        self.seen = 0
        self._callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self._is_over)
        llama_cpp.llama_set_abort_callback(llm.ctx, self._callback, None)

    def _is_over(self, _data: object) -> bool:
        self.seen += 1
        if self.n is None or self.seen < self.n:
            return False
        self.n = None
        return True

    def after(self, n: int) -> None:
        self.n, self.seen = n, 0


TOKENS = [5, 17, 300, 42, 8, 99, 250, 11, 23, 77, 130, 64]
FAILURES = (RuntimeError, DeltaMemError)


@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_deferred", "msw4_replies"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_text_and_memory_are_as_before(make_llm, case, part):
    llm = make_llm(case, n_batch=8, n_ubatch=4)
    limit = Limit(llm)
    segments = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2] if case == "ssw_message" else None
    llm.eval(TOKENS[:5])
    before = llm.memory.state
    limit.after(1_000_000)
    llm.eval(TOKENS, segments=segments)
    after, n_nodes = llm.memory.state, limit.seen
    logits = llm.logits

    llm.reset()
    llm.memory.reset()
    llm.eval(TOKENS[:5])
    limit.after(int(part * n_nodes))
    with pytest.raises(FAILURES):
        llm.eval(TOKENS, segments=segments)
    assert llm.n_tokens == 5
    np.testing.assert_array_equal(llm.memory.state, before)

    llm.eval(TOKENS, segments=segments)
    np.testing.assert_array_equal(llm.memory.state, after)
    np.testing.assert_array_equal(llm.logits, logits)


def test_a_state_between_two_is_not_handed_out(llm):
    """Code that decodes without the engine learns that there is no valid state."""
    limit = Limit(llm)
    llm.eval(TOKENS)
    limit.after(20)
    batch = llama_cpp.llama_batch_get_one((ctypes.c_int32 * 3)(1, 2, 3), 3)
    assert llama_cpp.llama_decode(llm.ctx, batch) == 2
    state = np.empty(library.llama_deltamem_state_size(llm.ctx), dtype=np.float32)
    pointer = state.ctypes.data_as(library.float_p)
    assert library.llama_deltamem_state_get(llm.ctx, 0, pointer, state.size) == -1 and library.last_error()
    assert library.llama_deltamem_checkpoint_get(llm.ctx, 0, pointer, state.size) == -1
    with pytest.raises(DeltaMemError):
        _ = llm.memory.state
    llm.memory.reset()
    assert not llm.memory.state.any()


def test_both_of_two_conversations_are_as_before(make_llm):
    """A decode of two texts that fails takes back both turns."""
    llm = make_llm(n_seq_max=3)
    limit = Limit(llm)
    talks = [Conversation(llm), Conversation(llm)]
    say_together(dict(zip(talks, ["one", "two"])), n_predict=0)
    states = [talk.memory.state for talk in talks]
    for n in (10, 40, 80):  # of more than 100 nodes of the first decode
        limit.after(n)
        with pytest.raises(FAILURES):
            say_together(dict(zip(talks, ["three", "four"])), n_predict=0)
        for talk, state in zip(talks, states):
            np.testing.assert_array_equal(talk.memory.state, state)
