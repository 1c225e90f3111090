"""The rule of one write when something fails: text and memory stay as they were."""

from __future__ import annotations

import numpy as np
import pytest
from llama_cpp import LogitsProcessorList, StoppingCriteriaList

from decoding import fail_at
from one_write import OTHER, SAME, TOKENS, answer, fail, one_decode, take, texts, user
from pydeltamem import DecodeError, InputError
from pydeltamem.runtime.request import Request


@pytest.fixture
def llm(make):
    return make()


def test_a_failure_after_another_memory_came_keeps_that(make):
    """A reply that was in progress when the memory was replaced does not restore the old one."""
    llm = make(n_batch=4)
    llm.eval(OTHER)
    request = Request(llm._text)
    request.ask(TOKENS)
    one_decode(request, 4)
    llm.memory.reset()
    llm._engine.drop(request)
    assert not llm.memory.state.any() and llm.memory.n_written == 0


@pytest.mark.parametrize("how", ["llama.cpp", "a processor", "a criterion", "too long", "no token"])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_a_prompt_that_fails_changes_nothing(make, read_once, monkeypatch, how, n):
    """Of which the first n tokens are those of the text: another text, or an edited one."""
    llm = make(n_batch=4)
    llm.eval(TOKENS)
    state, prompt, options, error = llm.memory.state, TOKENS[:n] + OTHER, {}, InputError
    if how == "too long":
        prompt = prompt + [5] * 512
    elif how == "no token":
        prompt = [*prompt, 10**6]
    elif how == "a processor":
        options, error = {"logits_processor": LogitsProcessorList([fail])}, ValueError
    elif how == "a criterion":
        options, error = {"stopping_criteria": StoppingCriteriaList([fail])}, ValueError
    with monkeypatch.context() as patch:
        if how == "llama.cpp":
            fail_at(patch, llm, 2)
            error = DecodeError
        with pytest.raises(error):
            next(llm.generate(prompt, temp=0, **options))
    assert texts(llm) == TOKENS and llm.memory.n_written == len(TOKENS)
    np.testing.assert_array_equal(llm.memory.state, state)
    take(llm.generate(TOKENS + OTHER, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS + OTHER), **SAME)
    assert llm.memory.n_written == len(TOKENS + OTHER)


@pytest.mark.parametrize("how", ["llama.cpp", "too long"])
def test_an_eval_that_fails_leaves_the_text_gone_back(make, read_once, monkeypatch, how):
    llm = make(n_batch=4)
    llm.eval(TOKENS)
    llm.n_tokens = 0
    with monkeypatch.context() as patch, pytest.raises((DecodeError, InputError)):
        fail_at(patch, llm, 2 if how == "llama.cpp" else 100)
        llm.eval(OTHER if how == "llama.cpp" else OTHER * 100)
    assert llm.n_tokens == 0
    llm.eval(TOKENS)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS), **SAME)
    assert llm.memory.n_written == len(TOKENS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["llama.cpp", "a processor"])
def test_a_chat_that_fails_changes_nothing(make, monkeypatch, how, stream):
    """The chat before it goes on, and is not written again."""
    llm, other = make(), make()
    first = user("my name is ada")
    for model in (llm, other):
        answer(model, first)
    before, state, n_written = texts(llm), llm.memory.state, llm.memory.n_written
    with monkeypatch.context() as patch:
        options = {"logits_processor": LogitsProcessorList([fail])} if how == "a processor" else {}
        if how == "llama.cpp":
            fail_at(patch, llm, 1)
        with pytest.raises((DecodeError, ValueError)):
            list(llm.create_chat_completion(user("who are you"), stream=stream, **options))
    assert texts(llm) == before and llm.memory.n_written == n_written
    np.testing.assert_array_equal(llm.memory.state, state)
    for messages in (first, user("who are you")):
        for model in (llm, other):
            answer(model, messages)
        np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)
        assert llm.memory.n_written == other.memory.n_written


def test_a_processor_that_sets_the_memory_and_fails(make):
    """The new memory stays."""
    llm = make()
    llm.eval(TOKENS)

    def fail_afterwards(*_):
        llm.memory.reset()
        raise ValueError("no")

    with pytest.raises(ValueError):
        next(llm.generate(OTHER, logits_processor=LogitsProcessorList([fail_afterwards])))
    assert not llm.memory.state.any() and llm.memory.n_written == 0


@pytest.mark.parametrize("then", ["the memory is looked at", "the text is forgotten", "another memory"])
def test_a_failure_on_the_way_back_loses_nothing(make, read_once, monkeypatch, then):
    """Without a checkpoint the memory still has to read; it does so before it is saved or goes on."""
    llm = make()
    tokens = np.random.default_rng(4).integers(6, 250, 20).tolist()
    llm.eval(tokens)
    llm.n_tokens = 10

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        fail_at(patch, llm)
        llm.eval(OTHER)
    if then == "another memory":
        llm.memory.reset()
        assert not llm.memory.state.any() and llm.memory.n_written == 0
        return
    if then == "the text is forgotten":
        llm.reset()
    assert llm.memory.n_written == 10
    np.testing.assert_allclose(llm.memory.state, read_once(tokens[:10]), **SAME)


def test_a_rollback_that_fails_changes_nothing(make, read_once, monkeypatch):
    """Where there is no checkpoint tokens must be decoded again, which llama.cpp cannot do."""
    llm = make()
    llm.eval(TOKENS)
    llm.eval(OTHER)
    with monkeypatch.context() as patch, pytest.raises(DecodeError):
        fail_at(patch, llm)
        llm.memory.rollback(5)
    assert texts(llm) == TOKENS + OTHER and llm.memory.n_written == len(TOKENS + OTHER)
    llm.eval([33])
    np.testing.assert_allclose(llm.memory.state, read_once([*TOKENS, *OTHER, 33]), **SAME)


def test_an_interrupt_while_going_back(make, read_once, monkeypatch):
    llm = make()
    llm.eval(TOKENS)
    llm.eval(OTHER)
    llm.n_tokens = len(TOKENS)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pydeltamem.runtime.history.Position.back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.memory.rollback(len(TOKENS))
    llm.memory.rollback(len(TOKENS))
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS + OTHER), **SAME)
