"""Ctrl-C waits for the end of a step, and a callback that decodes keeps nobody from being sampled."""

from __future__ import annotations

import contextlib
import signal

import numpy as np
import pytest

from decoding import press_at
from pydeltamem import Conversation, MemorySnapshot, stream_together
from pydeltamem.runtime import library
from pydeltamem.runtime.interrupt import interruptible, uninterrupted

GREEDY = {"n_predict": 12, "temp": 0.0}


@pytest.fixture(autouse=True)
def python_handles_it():
    """A shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("the step")
        done.append("what follows")
    assert done == ["the step"]
    with pytest.raises(KeyboardInterrupt):  # as it was
        signal.raise_signal(signal.SIGINT)


def test_the_second_one_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("a little")
        signal.raise_signal(signal.SIGINT)
        done.append("too much")
    assert done == ["a little"]


def test_a_stream_without_text_ends_at_the_second_one():
    def pieces():
        yield "once"
        for _ in range(3):  # tokens without text
            signal.raise_signal(signal.SIGINT)
            n_pressed.append(1)
        yield "never"

    n_pressed = []
    with pytest.raises(KeyboardInterrupt):
        list(interruptible(pieces()))
    assert len(n_pressed) == 1
    with pytest.raises(KeyboardInterrupt):  # as it was
        signal.raise_signal(signal.SIGINT)


def test_a_handler_of_ones_own_is_called_once():
    called = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append("pressed"))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not called
        assert called == ["pressed"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_does_not_hide_it():
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the step failed")


def test_none_is_lost_where_python_drops_exceptions():
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt):  # as in a callback of llama.cpp
                signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the second one
@pytest.mark.parametrize("n", [1, 2])
def test_a_model_that_loads(make_llm, monkeypatch, n):
    """Pressed once or twice in llama.cpp's callback for its log."""
    said = []

    def press(level, text, user_data):
        said.append(text.decode())
        if len(said) <= n:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(library, "llama_log_callback", press)
    with pytest.raises(KeyboardInterrupt):
        make_llm(verbose=True)
    assert not any("llama_context" in line for line in said)  # it ended in the middle
    assert make_llm().create_completion("hello", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_no_token_is_lost(make_llm):
    """Pressed while one of two is sampled: what was decoded for both is in their texts, and written once."""
    llm = make_llm(n_seq_max=3, type_k=0, type_v=0)
    n_calls = 0

    def press(ids, scores):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            signal.raise_signal(signal.SIGINT)
        return scores

    one, two = Conversation(llm, logits_processor=[press], **GREEDY), Conversation(llm, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(stream_together({one: "hello there", two: "and how are you"}))
    for conversation in (one, two):
        assert conversation.messages[-1]["role"] == "assistant"
        llm.reset()
        llm.memory.reset()
        llm.eval(conversation.tokens)
        np.testing.assert_allclose(conversation.memory.state, llm.memory.state, rtol=0, atol=2e-6)
        assert conversation.memory.n_written == conversation.n_tokens


@pytest.mark.parametrize("how", ["eval", "generate", "rehearse", "rollback"])
def test_an_interrupted_call_changes_nothing(make_llm, monkeypatch, how):
    """Pressed in its last decode, too: nobody hears of what that computed."""
    llm, other = (make_llm(type_k=0, type_v=0) for _ in range(2))
    for model in (llm, other):
        model.eval([9, 8, 77, 6, 50, 4])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        press_at(patch, llm)
        if how == "eval":
            llm.eval([14, 17, 40])
        elif how == "generate":
            next(llm.generate([9, 8, 14, 17, 40]))
        elif how == "rehearse":
            llm.memory.rehearse()
        else:
            llm.memory.rollback(3)
    assert llm.n_tokens == llm.memory.n_written == 6
    np.testing.assert_array_equal(llm.memory.state, other.memory.state)
    for model in (llm, other):
        model.eval([33, 34])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, rtol=0, atol=2e-6)
    np.testing.assert_allclose(llm.logits, other.logits, rtol=0, atol=1e-4)


def test_an_interrupted_message_is_not_kept(make_llm, monkeypatch, tmp_path):
    llm, path = make_llm(), tmp_path / "ada.memory"
    with Conversation(llm, memory_file=path) as ada:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            press_at(patch, llm)
            ada.add("user", "my name is ada")
        assert ada.messages == [] and ada.n_tokens == 0
    assert MemorySnapshot.load(path).tokens_written == 0


def test_an_adapter_that_is_attached(make_llm, adapter, monkeypatch):
    """Pressed while llama.cpp attaches it: the model is of one adapter afterwards, and decodes."""
    llm, attach = make_llm(), library.llama_deltamem_attach

    def attach_and_press(*arguments):
        status = attach(*arguments)
        signal.raise_signal(signal.SIGINT)
        return status

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(library, "llama_deltamem_attach", attach_and_press)
        llm.memory.attach(adapter("qwen3", "msw4_qo"))
    llm.eval([5, 6, 7])
    assert llm.memory.state.shape == llm.memory.shape and llm.memory.n_written == 3
    assert llm.deltamem_path == str(adapter("qwen3", "msw4_qo"))


def test_a_callback_that_decodes_keeps_nobody_waiting(make_llm):
    llm = make_llm(n_seq_max=3, type_k=0, type_v=0)

    def decode(ids, scores):
        llm.eval([5])
        return scores

    alone = Conversation(llm, **GREEDY).say("and how are you")
    one, two = Conversation(llm, logits_processor=[decode], **GREEDY), Conversation(llm, **GREEDY)
    said = {one: 0, two: 0}
    for conversation, _ in stream_together({one: "hello there", two: "and how are you"}):
        said[conversation] += 1
        if conversation is one and said[one] > 3:
            assert said[two] > 0
    assert two.messages[-1]["content"].lstrip(" ") == alone
