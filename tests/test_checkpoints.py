"""llama_deltamem_set_checkpoints: states in the middle of a batch, over micro-batches and sequences."""

from __future__ import annotations

import numpy as np
import pytest

from native_context import open_context
from pydeltamem.runtime import library
from refusals import check_names, refuses

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88, 200, 31]


def ask(context, tokens):
    marks = np.asarray(tokens, dtype=np.int32)
    return library.llama_deltamem_set_checkpoints(context.ctx, marks.ctypes.data_as(library.int32_p), len(marks))


def kept(context, i):
    state = np.empty_like(context.state(0))
    if library.llama_deltamem_checkpoint_get(context.ctx, i, state.ctypes.data_as(library.float_p), state.size):
        raise RuntimeError(library.last_error())
    return state


@pytest.mark.parametrize("n_ubatch", [512, 5, 1])
@pytest.mark.parametrize("case", ["tsw_qo", "msw4_qo", "standard_uncoupled_scalar_gate"])
def test_the_states_in_between(base, adapter, case, n_ubatch):
    """Two sequences, token by token in turn: each checkpoint is the state of the sequence at that token."""
    batch = [(token, i % 2) for i, token in enumerate(TOKENS)]
    marks = [0, 1, 4, 7, 10, 11]
    with open_context(base(), adapter("qwen3", case), n_seq=2, n_ubatch=n_ubatch, unified=False) as context:
        assert ask(context, marks) == 0
        context.decode(batch)
        states = [kept(context, i) for i in range(len(marks))]
        ends = [context.state(seq) for seq in (0, 1)]
    with open_context(base(), adapter("qwen3", case), n_seq=2, unified=False) as context:
        for i, (token, seq) in enumerate(batch):
            context.decode([(token, seq)])
            if i in marks:
                np.testing.assert_allclose(states[marks.index(i)], context.state(seq), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(states[marks.index(10)], ends[0])
    np.testing.assert_array_equal(states[marks.index(11)], ends[1])


def test_where_an_ingest_ends(base, adapter):
    """Tokens of an ingest in segments read the state as it was; the checkpoint after its end has its writes."""
    with open_context(base(), adapter("qwen3", "ssw_message")) as context:
        context.decode([(token, 0) for token in TOKENS[:4]])
        before = context.state(0)
        assert ask(context, [3, 7]) == 0
        context.decode([(token, 0) for token in TOKENS[4:]], segments=[0, 0, 0, 0, 1, 1, 1, 1], ends=[0] * 7 + [1])
        np.testing.assert_array_equal(kept(context, 0), before)
        np.testing.assert_array_equal(kept(context, 1), context.state(0))
        assert np.abs(context.state(0) - before).max() > 1e-4


def test_they_hold_for_one_batch(base, adapter):
    with open_context(base(), adapter("qwen3", "tsw_qo")) as context:
        assert ask(context, [0]) == 0
        context.decode([(14, 0)])
        assert kept(context, 0).any()
        context.decode([(15, 0)])
        with refuses(RuntimeError, "0 checkpoints"):
            kept(context, 0)


@pytest.mark.parametrize(
    ("marks", "names"),
    [
        (list(range(17)), ["17 checkpoints", 16]),
        ([3, 3], ["checkpoints", 0]),
        ([3, 1], ["checkpoints", 0]),
        ([-1], ["checkpoints", 0]),
    ],
)
def test_what_cannot_be_asked_for(base, adapter, marks, names):
    with open_context(base(), adapter("qwen3", "tsw_qo")) as context:
        assert ask(context, marks) == -1
        check_names(library.last_error(), names)
        context.decode([(14, 0)])


def test_a_checkpoint_beyond_the_batch(base, adapter):
    with open_context(base(), adapter("qwen3", "tsw_qo")) as context:
        assert ask(context, [5]) == 0
        with refuses(RuntimeError, "token 5", 1):
            context.decode([(14, 0)])
        assert not context.state(0).any()
        context.n_past[0] = 0
        context.decode([(14, 0)])
        assert context.state(0).any()
