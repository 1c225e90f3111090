"""A Conversation whose stream is still open, and what is done to it meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_NONE

from conversing import GREEDY, SAME, roles
from pydeltamem import Conversation, stream_together
from pydeltamem.runtime.chat_format import chat_prompt


@pytest.fixture
def llm(make):
    return make(n_seq_max=3)


@pytest.mark.parametrize("end", ["go on", "close"])
@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda c: c.say("other"), "uaua"),
        (lambda c: "".join(c.stream("other")), "uaua"),
        (lambda c: c.regenerate(), "ua"),
        (lambda c: c.edit("other"), "ua"),
        (lambda c: c.add("user", "a note"), "uau"),
        (lambda c: c.undo(), ""),
        (lambda c: c.fork().say("other"), "ua"),
        (lambda c: c.close(), "ua"),
        (lambda c: c.memory.rollback(c.memory.checkpoint()), "ua"),
    ],
    ids=["say", "stream", "regenerate", "edit", "add", "undo", "fork", "close", "rollback"],
)
def test_it_is_used_while_it_speaks(llm, read_once, use, expected, end):
    """What was said so far is the reply; the stream ends, and leaves alone what came after it."""
    conversation = Conversation(llm, n_predict=20, temp=0.0)
    stream = conversation.stream("hello there")
    next(stream)
    use(conversation)
    assert roles(conversation) == expected
    messages, text, state = list(conversation.messages), conversation.tokens, conversation.memory.state
    if end == "close":
        stream.close()
    assert list(stream) == []
    assert conversation.messages == messages and conversation.tokens == text
    np.testing.assert_array_equal(conversation.memory.state, state)
    if text:
        np.testing.assert_allclose(state, read_once(text), **SAME)
        conversation.say("good bye")
        assert conversation.memory.n_written == conversation.n_tokens


def test_it_is_cleared_while_it_speaks(llm):
    conversation = Conversation(llm, n_predict=20, temp=0.0)
    stream = conversation.stream("hello there")
    next(stream)
    written = conversation.memory.state
    conversation.clear()
    assert list(stream) == [] and conversation.messages == []
    np.testing.assert_array_equal(conversation.memory.state, written)


def test_it_is_rehearsed_while_it_speaks(llm, read_once):
    conversation = Conversation(llm, n_predict=20, temp=0.0)
    stream = conversation.stream("hello there")
    next(stream)
    conversation.memory.rehearse()
    text = conversation.tokens
    assert list(stream) == [] and roles(conversation) == "ua" and conversation.tokens == text
    np.testing.assert_allclose(conversation.memory.state, read_once(text, read_once(text)), **SAME)


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(
    "use",
    [lambda talk: talk.undo(), lambda talk: talk.say("how are you"), lambda talk: talk.add("user", "how are you")],
    ids=["undo", "say", "add"],
)
def test_a_callback_uses_the_conversation_that_speaks(llm, use, in_pieces):
    """As between two pieces of a stream: the reply ends there. It said nothing so far, so the turn never was."""
    talk, other = (Conversation(llm, **GREEDY) for _ in range(2))
    for each in (talk, other):
        each.say("hello there")

    def process(ids, scores):
        use(talk)
        return scores

    if in_pieces:
        assert list(talk.stream("a question", logits_processor=process)) == []
    else:
        assert talk.say("a question", logits_processor=process) == ""
    use(other)
    assert talk.messages == other.messages and talk.tokens == other.tokens
    np.testing.assert_array_equal(talk.memory.state, other.memory.state)


def test_a_stale_reply_in_place_of_another(llm):
    conversation = Conversation(llm, system="be short", **GREEDY)
    conversation.say("hello there")
    messages = list(conversation.messages)
    conversation.say("how are you")
    stream = conversation.stream_regenerate()
    next(stream)
    conversation.undo()
    stream.close()
    assert conversation.messages == messages


@pytest.mark.parametrize("what", ["embed", "attach", "rollback"])
def test_its_text_moves_while_it_is_told(make, read_once, what):
    """Between two pieces of another's reply, while a long prompt is read: it is read without holes, or not at all."""
    llm = make(embedding=True, n_seq_max=3, n_batch=16, n_ubatch=16, pooling_type=LLAMA_POOLING_TYPE_NONE)
    one, other = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    one.say("hello")
    messages = list(one.messages)
    stream = stream_together({one: "a very long message that needs many batches " * 4, other: "hi"})
    next(stream)
    n_read = one.n_tokens
    if what == "embed":
        llm.embed("x")
    elif what == "attach":
        llm.memory.attach()
    else:
        one.memory.rollback(4)
    pieces = list(stream)
    assert any(conversation is other for conversation, _ in pieces)
    if what == "rollback":
        assert one.messages == messages and one.n_tokens == 4
        np.testing.assert_array_equal(one.memory.state, read_once(one.tokens))
    else:
        prompt = chat_prompt(llm, one.messages[:-1])
        assert one.tokens[: len(prompt)] == prompt and len(messages) < len(one.messages)
        assert one.memory.n_written == one.n_tokens - (n_read if what == "attach" else 0)


@pytest.mark.parametrize("end", ["go on", "close"])
def test_one_is_used_while_several_are_told(make, read_once, end):
    """A reply whose prompt is still being decoded is taken back. The others go on."""
    llm = make(n_seq_max=3, n_batch=16)
    one, other = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    stream = stream_together({one: "a very long message that needs many batches " * 4, other: "hello"})
    pieces = [next(stream)]
    assert pieces[0][0] is other and one.n_tokens > 0
    one.say("i live in lima")
    messages, text = list(one.messages), one.tokens
    if end == "close":
        stream.close()
    pieces += stream
    assert all(conversation is other for conversation, _ in pieces)
    assert other.messages[-1]["content"].startswith("".join(piece for _, piece in pieces))
    assert one.messages == messages and roles(one) == "ua" and one.tokens == text
    assert one.memory.n_written == one.n_tokens
    np.testing.assert_allclose(one.memory.state, read_once(text), **SAME)


def test_others_speak_between_two_pieces(make):
    """A reply is not sampled from the batch of another conversation that spoke in between."""
    llm = make(n_seq_max=3)
    contents = ["hello there", "how are you today my friend"]
    together, other = [Conversation(llm, **GREEDY) for _ in contents], Conversation(llm, **GREEDY)
    replies = dict.fromkeys(together, "")
    for conversation, piece in stream_together(dict(zip(together, contents))):
        replies[conversation] += piece
        other.say("well")
    for conversation, content in zip(together, contents):
        assert replies[conversation] == Conversation(make(), **GREEDY).say(content)


def test_a_prompt_that_lost_its_slot_is_not_decoded_by_halves(make):
    llm = make(n_seq_max=2, n_batch=16)
    one, other, *more = (Conversation(llm, **GREEDY) for _ in range(4))
    stream = stream_together({one: "a very long message that needs many batches " * 4, other: "hello"})
    next(stream)
    for conversation in more:
        conversation.say("well")
    assert one._text.slot is None and one.n_tokens > 0
    next(stream)
    assert one._text.slot is not None
    stream.close()
    assert one.messages == [] and one.memory.n_written == 0 and one.n_tokens == 0
    assert not one.memory.state.any()


def test_a_stream_that_ends_while_another_thread_has_the_turn(make, monkeypatch):
    """As the garbage collector ends one: it does not wait for that thread, which ends the reply itself."""
    llm = make()
    talk = Conversation(llm, **GREEDY)
    stream = talk.stream("hello there")
    next(stream)
    decode, begun, go_on = llm._engine.slots.decode, threading.Event(), threading.Event()

    def wait(*arguments):
        begun.set()
        assert go_on.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(llm._engine.slots, "decode", wait)
    other = threading.Thread(target=talk.say, args=("and yours",))
    other.start()
    try:
        assert begun.wait(60)
        stream.close()
        assert other.is_alive()
    finally:
        go_on.set()
        other.join(60)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
