"""llama_deltamem_set_checkpoints: states in the middle of a batch, over micro-batches and sequences."""

from __future__ import annotations

import numpy as np
import pytest

from pydeltamem.runtime import library
from refusals import check_names, refuses
from session import open_session

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88, 200, 31]


def ask(session, tokens):
    marks = np.asarray(tokens, dtype=np.int32)
    return library.llama_deltamem_set_checkpoints(session.ctx, marks.ctypes.data_as(library.int32_p), len(marks))


def kept(session, i):
    state = np.empty_like(session.state(0))
    if library.llama_deltamem_checkpoint_get(session.ctx, i, state.ctypes.data_as(library.float_p), state.size):
        raise RuntimeError(library.last_error())
    return state


@pytest.mark.parametrize("n_ubatch", [512, 5, 1])
@pytest.mark.parametrize("case", ["tsw_qo", "msw4_qo", "standard_uncoupled_scalar_gate"])
def test_the_states_in_between(base, adapter, case, n_ubatch):
    """Two sequences, token by token in turn: each checkpoint is the state of the sequence at that token."""
    batch = [(token, i % 2) for i, token in enumerate(TOKENS)]
    marks = [0, 1, 4, 7, 10, 11]
    with open_session(base(), adapter("qwen3", case), n_seq=2, n_ubatch=n_ubatch, unified=False) as session:
        assert ask(session, marks) == 0
        session.decode(batch)
        states = [kept(session, i) for i in range(len(marks))]
        ends = [session.state(seq) for seq in (0, 1)]
    with open_session(base(), adapter("qwen3", case), n_seq=2, unified=False) as session:
        for i, (token, seq) in enumerate(batch):
            session.decode([(token, seq)])
            if i in marks:
                np.testing.assert_allclose(states[marks.index(i)], session.state(seq), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(states[marks.index(10)], ends[0])
    np.testing.assert_array_equal(states[marks.index(11)], ends[1])


def test_where_an_ingest_ends(base, adapter):
    """Tokens of an ingest in segments read the state as it was; the checkpoint after its end has its writes."""
    with open_session(base(), adapter("qwen3", "ssw_message")) as session:
        session.decode([(token, 0) for token in TOKENS[:4]])
        before = session.state(0)
        assert ask(session, [3, 7]) == 0
        session.decode([(token, 0) for token in TOKENS[4:]], segments=[0, 0, 0, 0, 1, 1, 1, 1], ends=[0] * 7 + [1])
        np.testing.assert_array_equal(kept(session, 0), before)
        np.testing.assert_array_equal(kept(session, 1), session.state(0))
        assert np.abs(session.state(0) - before).max() > 1e-4


def test_they_hold_for_one_batch(base, adapter):
    with open_session(base(), adapter("qwen3", "tsw_qo")) as session:
        assert ask(session, [0]) == 0
        session.decode([(14, 0)])
        assert kept(session, 0).any()
        session.decode([(15, 0)])
        with refuses(RuntimeError, "0 checkpoints"):
            kept(session, 0)


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
    with open_session(base(), adapter("qwen3", "tsw_qo")) as session:
        assert ask(session, marks) == -1
        check_names(library.last_error(), names)
        session.decode([(14, 0)])


def test_a_checkpoint_beyond_the_batch(base, adapter):
    with open_session(base(), adapter("qwen3", "tsw_qo")) as session:
        assert ask(session, [5]) == 0
        with refuses(RuntimeError, "token 5", 1):
            session.decode([(14, 0)])
        assert not session.state(0).any()
        session.n_past[0] = 0
        session.decode([(14, 0)])
        assert session.state(0).any()
