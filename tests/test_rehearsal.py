"""`memory.rehearse()`: the text is decoded and written once more."""

from __future__ import annotations

import numpy as np
import pytest

from decoding import fail_at
from one_write import OTHER, SAME, TOKENS, read_twice, texts
from pydeltamem import AdapterError
from refusals import refuses


@pytest.fixture
def llm(make):
    return make()


@pytest.mark.parametrize("n_batch", [512, 5])
def test_a_rehearsed_text_is_read_twice(make, n_batch):
    """It stays, with the logits of what may follow it."""
    llm, other = make(n_batch=n_batch), make(n_batch=n_batch)
    for tokens in (TOKENS, OTHER):
        llm.eval(tokens)
    llm.memory.rehearse()
    twice = read_twice(other, (TOKENS + OTHER, {}))
    np.testing.assert_allclose(llm.memory.state, twice, **SAME)
    assert llm.memory.n_written == 2 * len(TOKENS + OTHER) and texts(llm)[: llm.n_tokens] == TOKENS + OTHER
    np.testing.assert_allclose(llm.logits, other.logits, rtol=0, atol=1e-5)
    llm.eval([14])
    other.eval([14])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_rehearsal_writes_what_wrote(make):
    llm, other = make(), make()
    llm.eval(TOKENS)
    llm.memory.write = False
    llm.eval(OTHER)
    llm.memory.rehearse()
    assert llm.memory.n_written == 2 * len(TOKENS)
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (TOKENS, {})), **SAME)


def test_rehearsal_in_segments(make):
    llm, other = make("ssw_message"), make("ssw_message")
    ids = np.array([0] * 5 + [1] * 7, dtype=np.int32)
    llm.eval(TOKENS, ids)
    llm.memory.rehearse()
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (TOKENS, {"segments": ids})), **SAME)


def test_rehearsal_of_what_another_adapter_read_in_segments(make, adapter):
    """One that writes per token writes each token of it."""
    llm = make("ssw_message")
    llm.eval(TOKENS, np.array([0] * 5 + [-1] * 2 + [1] * 5, dtype=np.int32))
    llm.memory.attach(adapter("qwen3", "tsw_qo"))
    llm.memory.rehearse()
    other = make()
    other.eval(TOKENS[:5])
    other.memory.write = False
    other.eval(TOKENS[5:7])
    other.memory.write = True
    other.eval(TOKENS[7:])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_going_back_after_a_rehearsal(make):
    """The text goes back, and the second reading with it; the first one stays."""
    llm, other = make(), make()
    llm.eval(TOKENS)
    llm.eval(OTHER)
    llm.memory.rehearse()
    llm.memory.rollback(len(TOKENS))
    other.eval(TOKENS + OTHER)
    other.reset()
    other.eval(TOKENS)
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_a_rehearsal_that_fails(make, monkeypatch):
    """Leaves text and memory as they were."""
    llm, other = make(n_batch=4), make(n_batch=4)
    llm.eval(TOKENS)
    other.eval(TOKENS)
    before = llm.memory.state
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        fail_at(patch, llm, 3)
        llm.memory.rehearse()
    np.testing.assert_array_equal(llm.memory.state, before)
    assert llm.memory.n_written == len(TOKENS) and texts(llm)[: llm.n_tokens] == TOKENS
    for model in (llm, other):
        model.eval(OTHER)
    np.testing.assert_allclose(llm.logits, other.logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)
    llm.memory.rollback(5)
    other.memory.rollback(5)
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_nothing_to_rehearse(make):
    llm = make()
    llm.memory.rehearse()
    assert not llm.memory.state.any() and llm.n_tokens == 0
    llm.memory.detach()
    with refuses(AdapterError):
        llm.memory.rehearse()
