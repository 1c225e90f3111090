"""The rule of one write for states that are saved: save_state, pickles and prompt caches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from llama_cpp import LlamaRAMCache

from decoding import fail_at
from one_write import OTHER, SAME, TOKENS, answer, different, take, texts, user
from pydeltamem import DecodeError, InputError
from refusals import refuses


@pytest.fixture
def llm(make):
    return make()


def test_a_saved_state_remembers_the_chat(make):
    """Another chat after it is another one still: the memory goes on."""
    llm, elsewhere = make(), make()
    answer(llm, user("my name is ada"))
    elsewhere.load_state(pickle.loads(pickle.dumps(llm.save_state())))
    for model in (llm, elsewhere):
        answer(model, user("what is my name"))
    assert elsewhere.memory.n_written == llm.memory.n_written
    np.testing.assert_allclose(elsewhere.memory.state, llm.memory.state, **SAME)


def test_a_saved_state_carries_the_memory(make, read_once):
    llm = make()
    llm.eval(TOKENS)
    saved, state = llm.save_state(), llm.memory.state
    llm.eval(OTHER)
    llm.load_state(saved)
    assert texts(llm) == TOKENS
    np.testing.assert_array_equal(llm.memory.state, state)
    take(llm.generate(TOKENS, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, state, **SAME)
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS + OTHER), **SAME)
    llm.n_tokens = 8
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS[:8] + OTHER), **SAME)

    elsewhere = make()
    elsewhere.eval(OTHER)
    elsewhere.load_state(pickle.loads(pickle.dumps(saved)))
    elsewhere.eval(OTHER)
    np.testing.assert_allclose(elsewhere.memory.state, read_once(TOKENS + OTHER), **SAME)


def test_a_state_that_is_saved_after_a_failure(make, read_once, monkeypatch):
    """What that took from the KV cache is decoded as the first time, here and where the state is loaded."""
    llm, elsewhere = make(n_batch=4), make(n_batch=4)
    llm.eval(TOKENS)
    with monkeypatch.context() as patch, pytest.raises(DecodeError):
        fail_at(patch, llm, 2)
        next(llm.generate([*TOKENS[:3], *OTHER], temp=0))
    elsewhere.load_state(pickle.loads(pickle.dumps(llm.save_state())))
    for model in (llm, elsewhere):
        model.eval(OTHER)
        np.testing.assert_allclose(model.memory.state, read_once(TOKENS + OTHER), **SAME)


def test_a_state_of_another_context_is_refused(make):
    llm, larger = make(), make(n_ctx=1024)
    llm.eval(TOKENS)
    larger.eval(OTHER)
    state = larger.memory.state
    with refuses(InputError, "state", 512, 1024):
        larger.load_state(llm.save_state())
    np.testing.assert_array_equal(larger.memory.state, state)
    assert texts(larger) == OTHER


def test_a_saved_state_after_attaching_again(make, read_once):
    llm = make()
    llm.eval(TOKENS)
    saved = llm.save_state()
    llm.memory.attach()
    llm.load_state(saved)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS), **SAME)
    assert llm.memory.n_written == len(TOKENS)


def test_a_state_of_another_adapter_is_refused(make, adapter):
    llm = make()
    llm.eval(TOKENS)
    saved, state = llm.save_state(), llm.memory.state
    checksums = [llm.memory.copy().metadata["adapter"][:12]]
    llm.memory.attach(adapter("qwen3", "ssw_message"))  # of the same shape
    checksums.append(llm.memory.copy().metadata["adapter"][:12])
    assert llm.memory.shape == state.shape
    llm.eval(OTHER)
    present = llm.memory.state
    with refuses(InputError, "state", *checksums):
        llm.load_state(saved)
    np.testing.assert_array_equal(llm.memory.state, present)


def test_pickle_brings_back_the_adapter_that_is_attached(make, adapter):
    llm = make()
    llm.memory.attach(adapter("qwen3", "msw4_qo"))
    llm.eval(TOKENS)
    copy = pickle.loads(pickle.dumps(llm))
    np.testing.assert_array_equal(copy.memory.state, llm.memory.state)
    assert copy.memory.copy().metadata == llm.memory.copy().metadata
    copy.close()
    llm.memory.detach()
    copy = pickle.loads(pickle.dumps(llm))
    assert not copy.memory.attached
    copy.memory.attach()
    assert copy.memory.shape[1] == 4
    copy.close()


def test_pickle_carries_the_memory(make):
    llm = make()
    llm.eval(TOKENS)
    llm.memory.write = False
    copy = pickle.loads(pickle.dumps(llm))
    try:
        np.testing.assert_array_equal(copy.memory.state, llm.memory.state)
        assert copy.memory.n_written == len(TOKENS) and copy.memory.write is False and copy.n_tokens == 0
    finally:
        copy.close()


@pytest.mark.parametrize("n", [3, 12])
def test_a_prompt_cache_holds_texts_only(make, read_once, n):
    """A prompt that begins like an earlier one takes its text from the cache; the memory goes on."""
    llm = make()
    llm.set_cache(LlamaRAMCache())
    prompts = [TOKENS, OTHER, TOKENS[:n] + OTHER]
    for prompt in prompts:
        state, before = llm.memory.state, llm.memory.n_written
        llm.create_completion(prompt, max_tokens=4, temperature=0)
    assert llm.memory.n_written - before == llm.n_tokens - n
    assert different(llm.memory.state, state)
