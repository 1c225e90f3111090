"""Conversation: turns, going back, full contexts, and several conversations in one model."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import threading

import numpy as np
import pytest
from llama_cpp import (
    LLAMA_POOLING_TYPE_MEAN,
    LLAMA_POOLING_TYPE_NONE,
    Llama,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    Jinja2ChatFormatter,
    chat_formatter_to_chat_completion_handler,
)

from pydeltamem import (
    Conversation,
    DecodeError,
    DeltaMemLlama,
    InputError,
    MemoryFileError,
    MemoryFileInUse,
    MemorySnapshot,
    ModelError,
    NotFiniteError,
    say_together,
    stream_together,
)
from pydeltamem.models import default_files
from pydeltamem.runtime.chat_format import chat_prompt
from refusals import refuses

GREEDY = {"n_predict": 8, "temp": 0.0}
SAME = {"rtol": 0, "atol": 2e-6}  # float32 sums in another order


@pytest.fixture
def make(make_llm):
    return lambda *args, **kwargs: make_llm(*args, type_k=0, type_v=0, **kwargs)


@pytest.fixture
def llm(make):
    return make(n_seq_max=3)


def roles(conversation):
    return "".join(message["role"][0] for message in conversation.messages)


def cannot_be_saved(path):
    """Nothing can be saved at `path` from here on."""
    path.unlink()
    path.mkdir()


# one conversation


def test_it_says_what_a_chat_completion_says(llm):
    messages = [{"role": "system", "content": "be short"}]
    conversation = Conversation(llm, system="be short", **GREEDY)
    for content in ("hello there", "how are you"):
        messages.append({"role": "user", "content": content})
        llm.create_chat_completion(messages, max_tokens=8, temperature=0)
        messages.append({"role": "assistant", "content": conversation.say(content)})
        assert conversation.tokens == llm._input_ids.tolist()
        np.testing.assert_allclose(conversation.memory.state, llm.memory.state, **SAME)
    assert conversation.messages == messages


@pytest.mark.parametrize("chat_format", ["chatml-function-calling", "functionary"])
def test_handlers_that_ask_for_text(make, chat_format):
    plain, llm = (make(chat_format=chat_format, n_ctx=2048) for _ in range(2))
    talk, messages = Conversation(llm, **GREEDY), []
    for said in ("hello there", "how are you"):
        messages.append({"role": "user", "content": said})
        answer = plain.create_chat_completion(messages, max_tokens=8, temperature=0)
        talk.say(said)
        assert talk.tokens == plain._input_ids.tolist() and answer["usage"]["completion_tokens"] == 8
        messages.append(talk.messages[-1])
    np.testing.assert_allclose(talk.memory.state, plain.memory.state, **SAME)


@pytest.mark.parametrize("verb", ["say", "regenerate", "edit"])
def test_what_a_verb_returns_its_stream_yields(llm, verb):
    """`stream` before the verb; that of `say` is `stream`."""
    one, other = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    said = [] if verb == "regenerate" else ["how are you"]
    for conversation in (one, other):
        conversation.say("hello there")
    name = "stream" if verb == "say" else f"stream_{verb}"
    assert "".join(getattr(other, name)(*said)) == getattr(one, verb)(*said)
    assert one.messages == other.messages
    streams = {name for name in dir(Conversation) if name.startswith("stream")}
    assert streams == {"stream", "stream_regenerate", "stream_edit"}


def test_every_token_is_written_once(llm, read_once):
    conversation = Conversation(llm, system="be short", **GREEDY)
    for content in ("hello there", "how are you", "good bye"):
        conversation.say(content)
        np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
        assert conversation.memory.n_written == conversation.n_tokens


def test_going_back(llm, read_once):
    conversation = Conversation(llm, system="be short", n_predict=8)
    conversation.say("hello there", seed=1)
    before, n = conversation.memory.state, conversation.n_tokens
    first = conversation.say("how are you", seed=2)
    assert conversation.regenerate(seed=3) != first
    assert conversation.regenerate(seed=2) == first
    conversation.edit("what is new", seed=2)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["hello there", "what is new"]
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    conversation.undo()
    assert len(conversation.messages) == 3 and conversation.n_tokens >= n
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    conversation.undo()
    conversation.undo() if len(conversation.messages) > 1 else None
    with refuses(InputError):
        conversation.undo()
    assert np.abs(before).max() > 0


def test_another_reply_is_another_whatever_the_seed_of_the_model(make):
    options = {"n_predict": 12, "temp": 2.0, "top_k": 0}
    told = []
    for completes in (False, True):
        llm = make(n_seq_max=3, seed=3)
        talk = Conversation(llm, **options)
        said = [talk.say("hello there"), *(talk.regenerate() for _ in range(3))]
        other = talk.fork()
        assert len(set(said)) == 4 and other.regenerate() == talk.regenerate()
        if completes:
            llm.create_completion("hello", max_tokens=1, seed=9)  # it says nothing about conversations
        told.append([*said, talk.regenerate()])
        assert len(set(told[-1])) == 5
    assert told[0] == told[1]


def test_reading_without_replying(llm, read_once):
    conversation = Conversation(llm, **GREEDY)
    for role, content in (("user", "my name is ada"), ("assistant", "hello ada"), ("user", "i live in lima")):
        conversation.add(role, content)
        np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    prompt = chat_prompt(llm, conversation.messages)
    assert conversation.tokens == prompt


def test_clear(llm, make):
    """The system prompt stays, and is not written again."""
    conversation, by_hand = Conversation(llm, system="be short", **GREEDY), make()
    conversation.say("my name is ada")
    before, state = conversation.tokens, conversation.memory.state
    conversation.clear()
    system = conversation.tokens
    assert roles(conversation) == "s" and 10 < len(system) < len(before) and before[: len(system)] == system
    np.testing.assert_array_equal(conversation.memory.state, state)
    conversation.say("what is my name")
    assert conversation.memory.n_written == len(before) + conversation.n_tokens - len(system)
    by_hand.eval(before)
    by_hand._text.begin(len(system))
    by_hand.eval(conversation.tokens[len(system) :])
    np.testing.assert_allclose(conversation.memory.state, by_hand.memory.state, **SAME)


def test_a_reply_that_is_closed_counts(llm, read_once):
    conversation = Conversation(llm, n_predict=50, temp=0.0)
    stream = conversation.stream("hello there")
    said = next(stream) + next(stream)
    stream.close()
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith(said)
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    conversation.say("go on", **GREEDY)
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)


@pytest.mark.parametrize("call", [1, 3])
def test_a_failure_leaves_everything_as_it_was(make, read_once, monkeypatch, call):
    llm = make(n_batch=16)
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello there")
    messages, n = list(conversation.messages), conversation.n_tokens
    decode, calls = type(llm._ctx).decode, []

    def fail(ctx, batch):
        calls.append(batch)
        if len(calls) == call:
            raise RuntimeError("llama_decode returned 1")
        decode(ctx, batch)

    monkeypatch.setattr(type(llm._ctx), "decode", fail)
    with refuses(DecodeError, "llama_decode returned 1"):
        conversation.say("how are you, what is new, and what else is there to say, friend")
    monkeypatch.undo()
    assert conversation.messages == messages
    assert conversation.n_tokens <= n  # less if the reply has other tokens when it is decoded again
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    other = Conversation(make(n_batch=16), **GREEDY)
    other.say("hello there")
    for each in (conversation, other):
        each.say("good bye")
    assert conversation.tokens == other.tokens
    np.testing.assert_allclose(conversation.memory.state, other.memory.state, **SAME)


def test_a_failing_reply_in_place_of_another_keeps_the_messages(llm, read_once, monkeypatch):
    conversation = Conversation(llm, system="be short", **GREEDY)
    conversation.say("hello there")
    messages = list(conversation.messages)

    def fail(ctx, batch):
        raise RuntimeError("llama_decode returned 1")

    for act in (conversation.regenerate, lambda: conversation.edit("good bye"), lambda: conversation.edit("x " * 900)):
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, InputError)):
            patch.setattr(type(llm._ctx), "decode", fail)
            act()
        assert conversation.messages == messages
    with refuses(InputError, "tempo", "n_predict"):
        conversation.say("hello", tempo=1)
    assert conversation.messages == messages
    conversation.say("how are you")
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)


@pytest.mark.parametrize("verb", ["say", "stream", "regenerate", "edit"])
def test_a_turn_that_fails_at_its_first_token(llm, make, tmp_path, verb):
    """Messages, text, memory and memory file are as before."""
    path = tmp_path / "ada.memory"
    conversation, other = Conversation(llm, memory_file=path, **GREEDY), Conversation(make(), **GREEDY)
    for each in (conversation, other):
        each.say("my name is ada")
    messages, text, state = list(conversation.messages), conversation.tokens, conversation.memory.state

    def fail(*_):
        raise ValueError("no")

    said = [] if verb == "regenerate" else ["who are you"]
    with pytest.raises(ValueError):
        list(getattr(conversation, verb)(*said, logits_processor=LogitsProcessorList([fail])))
    assert conversation.messages == messages and conversation.tokens == text
    np.testing.assert_array_equal(conversation.memory.state, state)
    conversation.save()
    np.testing.assert_array_equal(MemorySnapshot.load(path).state, state)
    assert conversation.memory.n_written == other.memory.n_written
    for each in (conversation, other):
        each.say("who are you")
    assert conversation.messages == other.messages
    np.testing.assert_allclose(conversation.memory.state, other.memory.state, **SAME)


def test_a_template_that_refuses(llm):
    conversation = Conversation(llm, system="be short", **GREEDY)
    template = Jinja2ChatFormatter("{{ raise_exception('no system prompt, please') }}", eos_token="", bos_token="")
    llm._chat_handlers[llm.chat_format] = template.to_chat_handler()
    with refuses(InputError, "no system prompt, please"):
        conversation.say("hello")
    assert len(conversation.messages) == 1


def test_without_a_memory(make):
    conversation = Conversation(make(None, n_ctx=256), **GREEDY)
    for i in range(8):
        conversation.say(f"this is message number {i}")
    conversation.regenerate()
    assert conversation.n_dropped > 0 and conversation.n_tokens <= 256


@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_an_adapter_that_writes_per_segment(make, case):
    """What is said is one segment, and each token of the reply."""
    conversation, by_hand = Conversation(make(case), **GREEDY), make(case)
    conversation.say("hello there")
    prompt = chat_prompt(conversation.llm, conversation.messages[:1])
    reply = conversation.tokens[len(prompt) :]
    by_hand.eval(prompt, segments=[0] * len(prompt))
    for token in reply:
        by_hand.eval([token])
    np.testing.assert_allclose(conversation.memory.state, by_hand.memory.state, **SAME)
    conversation.regenerate()
    assert conversation.tokens[len(prompt) :] == reply
    np.testing.assert_allclose(conversation.memory.state, by_hand.memory.state, **SAME)


@pytest.mark.parametrize("n", [3, 100])
def test_a_long_reply_again_where_segments_are_written(make, n):
    """Without a near checkpoint it goes back to where the turn began; its first segment is the user's message."""
    llm, by_hand = make("ssw_message"), make("ssw_message")
    llm._engine.slots.is_end = lambda token: False
    conversation = Conversation(llm, temp=0.0)
    conversation.say("hello there", n_predict=20)
    first, prompt = conversation.tokens, chat_prompt(llm, conversation.messages[:1])
    conversation.say("how are you", n_predict=100)
    conversation.regenerate(n_predict=n)
    text, second = conversation.tokens, chat_prompt(llm, conversation.messages[:-1])
    common = next(i for i, (a, b) in enumerate(zip(first, text)) if a != b)
    assert len(prompt) <= common < len(second) == len(text) - n + 1
    by_hand.eval(prompt, segments=[0] * len(prompt))
    for token in text[len(prompt) : common]:
        by_hand.eval([token])
    by_hand.eval(second[common:], segments=[0] * len(second[common:]))
    for token in text[len(second) :]:
        by_hand.eval([token])
    np.testing.assert_allclose(conversation.memory.state, by_hand.memory.state, **SAME)
    assert conversation.memory.n_written == conversation.n_tokens


def test_a_closed_model(make):
    llm = make()
    conversation = Conversation(llm)
    path = llm.model_path
    llm.close()
    with refuses(ModelError, path, "closed"):
        conversation.say("hello")
    conversation.close()


def test_an_undo_that_fails_changes_nothing(llm):
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello there")
    conversation.say("how are you")
    conversation.memory.reset()
    messages, text, state = list(conversation.messages), conversation.tokens, conversation.memory.state
    with refuses(InputError, "memory", conversation.n_tokens):
        conversation.undo()
    assert conversation.messages == messages and conversation.tokens == text
    np.testing.assert_array_equal(conversation.memory.state, state)


def test_options_as_create_completion_calls_them(llm):
    reply = Conversation(llm, n_predict=5, temp=0.0).say("hello there")
    assert Conversation(llm, max_tokens=5, temperature=0.0).say("hello there") == reply
    assert Conversation(llm, max_tokens=50, temp=0.0).say("hello there", max_tokens=5) == reply
    assert Conversation(llm, max_tokens=0, temp=0.0).say("hello there") == ""
    changed = Conversation(llm)
    changed.options.update(max_tokens=5, temperature=0.0)
    assert changed.say("hello there") == reply
    unlimited = Conversation(llm, temp=0.0, max_tokens=None)
    llm._engine.slots.is_end = lambda token: unlimited.n_tokens > 100
    assert unlimited.say("hello there").startswith(reply) and unlimited.n_tokens > 100


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tempo": 1}, ["tempo", "n_predict", "stop", "seed", "top_k"]),
        ({"n_predict": 3, "max_tokens": 3}, ["n_predict", "max_tokens"]),
        ({"temp": 0, "temperature": 0}, ["temp", "temperature"]),
        ({"n_predict": "3"}, ["n_predict", "'3'"]),
        ({"max_tokens": 1.5}, ["n_predict", 1.5]),
        ({"stop": 5}, ["stop", 5]),
        ({"stop": ["a", 5]}, ["stop", "['a', 5]"]),
        ({"grammar": "root ::= other"}, ["grammar", "GBNF"]),
        ({"grammar": 5}, ["grammar", 5]),
    ],
)
def test_bad_options(llm, options, names):
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello there")
    messages, state = list(conversation.messages), conversation.memory.state
    for act in (
        lambda: Conversation(llm, **options),
        lambda: conversation.say("how are you", **options),
        lambda: conversation.regenerate(**options),
        lambda: say_together({conversation: "how are you"}, **options),
    ):
        with refuses(InputError, *names):
            act()
    assert conversation.messages == messages
    np.testing.assert_array_equal(conversation.memory.state, state)


def test_what_is_said_is_text(llm):
    conversation = Conversation(llm, **GREEDY)
    for act in (
        conversation.say,
        lambda content: conversation.add("user", content),
        lambda content: say_together({conversation: content}),
    ):
        for content in (None, 5, b"hello"):
            with refuses(InputError, "message", type(content).__name__):
                act(content)
        with refuses(InputError, "message", "Unicode"):
            act("half a \ud83d")
    for role in (None, 5):
        with refuses(InputError, "role", repr(role)):
            conversation.add(role, "hello")
    assert conversation.messages == [] and conversation.n_tokens == 0
    with refuses(InputError, "message", "int"):
        Conversation(llm, system=5)


def test_a_plain_model_has_no_conversations(base):
    plain = Llama(str(base()), n_ctx=256, verbose=False)
    with refuses(InputError, "DeltaMemLlama"):
        Conversation(plain)
    plain.close()


def test_sampling_options_are_numbers(llm):
    conversation = Conversation(llm, **GREEDY)
    for options in ({"temp": "hot"}, {"temp": float("nan")}, {"top_p": None}, {"top_k": 5.0}):
        ((name, value),) = options.items()
        with refuses(InputError, name, repr(value)):
            conversation.say("hello there", **options)
        with refuses(InputError, name, repr(value)):
            next(llm.generate([5, 6], **options))
    assert conversation.messages == [] and llm.n_tokens == 0


def test_numbers_of_numpy(llm):
    options = {"n_predict": 3, "seed": 5, "temp": 2.5, "top_k": 9}
    reply = Conversation(llm).say("hello there", **options)
    assert Conversation(llm).say("hello there", **{name: np.asarray(n)[()] for name, n in options.items()}) == reply


def test_a_grammar_as_text(llm, capfd):
    conversation = Conversation(llm, grammar='root ::= "yes" | "no"', n_predict=8)
    for content in ("hello there", "how are you"):
        assert conversation.say(content) in ("yes", "no")
    assert conversation.say("well", grammar='root ::= "maybe"') == "maybe"
    with pytest.raises(InputError):
        conversation.say("well", grammar="root ::= other")
    assert capfd.readouterr() == ("", "")


def test_stop_strings(llm):
    reply = Conversation(llm, n_predict=30, temp=0.0).say("hello there")
    stop = reply[3:6]
    assert len(stop) == 3
    cut = reply[: reply.index(stop)]
    for given in (stop, [stop], (stop,)):
        conversation = Conversation(llm, n_predict=30, temp=0.0)
        assert conversation.say("hello there", stop=given) == cut and conversation.finish_reason == "stop"
    assert Conversation(llm, n_predict=30, temp=0.0).say("hello there", stop=None) == reply


def test_how_much_is_predicted(llm, read_once):
    conversation = Conversation(llm, temp=0.0)
    assert conversation.say("hello there", n_predict=0) == "" and conversation.finish_reason == "length"
    assert conversation.tokens == chat_prompt(llm, conversation.messages[:1])
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    assert roles(conversation) == "ua"
    llm._engine.slots.is_end = lambda token: conversation.n_tokens > 100
    n = {n_predict: len(Conversation(llm).say("hello there", seed=1, n_predict=n_predict)) for n_predict in (2, 20)}
    assert n[2] < n[20]
    for unlimited in (None, -1, -2):
        conversation = Conversation(llm)
        conversation.say("hello there", seed=1, n_predict=unlimited)  # another seed may draw a stop word before
        assert conversation.n_tokens > 100 and conversation.finish_reason == "stop"


@pytest.mark.parametrize("processors", [lambda p: LogitsProcessorList([p]), lambda p: [p], lambda p: p])
def test_logits_processors_get_the_text_of_the_conversation(llm, processors):
    seen = []

    def process(ids, scores):
        seen.append(ids.tolist())
        assert ids.dtype == np.intc
        return scores

    conversation = Conversation(llm, n_predict=3, temp=0.0)
    llm.eval([5, 6, 7, 8])
    conversation.say("hello there", logits_processor=processors(process))
    text, prompt = conversation.tokens, chat_prompt(llm, conversation.messages[:1])
    assert seen == [text[:n] for n in range(len(prompt), len(prompt) + 3)]


def test_it_cannot_be_pickled(llm):
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with refuses(TypeError, "Conversation", "fork()"):
            act(Conversation(llm))


def test_rolling_its_memory_back(llm, read_once):
    """Text and memory go back; the messages stay, and are read again with the next turn, written once."""
    conversation = Conversation(llm, system="be short", **GREEDY)
    conversation.say("hello there")
    position = conversation.memory.checkpoint()
    conversation.say("a secret")
    conversation.memory.rollback(position)
    np.testing.assert_array_equal(conversation.memory.state, read_once(conversation.tokens))
    assert conversation.n_tokens == position and roles(conversation) == "suaua"
    conversation.say("well")
    assert roles(conversation) == "suauaua" and conversation.memory.n_written == conversation.n_tokens
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)


# a conversation whose stream is still open


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


# a full context


@pytest.mark.parametrize("can_shift", [True, False])
def test_the_oldest_turns_leave_the_text(make, monkeypatch, can_shift):
    llm = make(n_ctx=256)
    if not can_shift:
        monkeypatch.setattr(llm._engine.slots, "shift", lambda *args: False)
    conversation = Conversation(llm, system="be short", n_predict=6)
    written = 0
    for i in range(15):
        before = conversation.tokens
        conversation.say(f"this is message number {i}", seed=i)
        after, prompt = conversation.tokens, chat_prompt(llm, conversation.messages[:-1])
        assert after[: len(prompt)] == prompt and len(after) <= 256
        assert conversation.messages[0]["role"] == "system"
        written += len(after) if not before else 0
    assert conversation.n_dropped >= 20 and len(conversation.messages) < 10
    assert np.isfinite(conversation.memory.state).all()
    # each token was written once, whether it is still in the text or not; a reply may get other tokens
    every = Conversation(make(n_ctx=2048), system="be short", n_predict=6)
    for i in range(15):
        every.say(f"this is message number {i}", seed=i)
    assert abs(conversation.memory.n_written - every.memory.n_written) < 60


def two_turns(llm, can_shift):
    """A conversation of two turns, in a context whose text can or cannot be moved up."""
    conversation = Conversation(llm, system="be short")
    for role, content in (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")):
        conversation.add(role, content)
    if not can_shift:
        llm._engine.slots.shift = lambda *args: False
    return conversation


def test_what_left_the_text_is_not_written_again(make, read_once):
    """The text is shortened by a turn: the state stays, bit for bit, also where the rest is read again."""
    for can_shift in (True, False):
        conversation = two_turns(make(), can_shift)
        state, n = conversation.memory.state, conversation.memory.n_written
        conversation._drop(2)
        np.testing.assert_array_equal(conversation.memory.state, state)
        assert [m["content"] for m in conversation.messages] == ["be short", "three", "four"]
        text = conversation.tokens
        conversation.add("user", "five")
        assert conversation.tokens[: len(text)] == text
        assert conversation.memory.n_written - n == conversation.n_tokens - len(text)


@pytest.mark.parametrize("can_shift", [True, False])
def test_an_interrupt_while_a_turn_leaves_keeps_it(make, monkeypatch, can_shift):
    """Also if the chat template refuses what is left: messages and text stay as they were, and it leaves later."""
    conversation = two_turns(make(), can_shift)

    def refuse(llm, messages):
        if "one" not in [message["content"] for message in messages] and len(messages) > 2:
            raise KeyboardInterrupt
        return chat_prompt(llm, messages)

    def present():
        return list(conversation.messages), conversation.tokens, conversation.memory.n_written, conversation.n_dropped

    before, state = present(), conversation.memory.state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pydeltamem.conversation.chat_prompt", refuse)
        conversation._drop(2)
    assert present() == before
    conversation._drop(2)
    assert [m["content"] for m in conversation.messages] == ["be short", "three", "four"]
    assert conversation.n_dropped == 2 and conversation.memory.n_written == before[2]
    np.testing.assert_array_equal(conversation.memory.state, state)


def test_a_reply_runs_over(make):
    """A reply longer than what is left: the oldest turns go while it is written."""
    llm = make(n_ctx=256)
    conversation = Conversation(llm, system="be short", temp=0.0, n_predict=6)
    for i in range(3):
        conversation.say(f"this is message number {i}")
    end = llm._engine.slots.is_end
    llm._engine.slots.is_end = lambda token: False  # it goes on and on
    conversation.say("tell me more", n_predict=-1)
    llm._engine.slots.is_end = end
    assert conversation.finish_reason == "length"
    assert len(conversation.messages) == 3 and conversation.n_dropped == 6
    assert conversation.n_tokens == 256
    assert conversation.say("well", n_predict=4) is not None


def test_a_message_longer_than_the_context(make):
    conversation = Conversation(make(n_ctx=256), **GREEDY)
    conversation.say("hello")
    state, messages = conversation.memory.state, list(conversation.messages)
    for act in (conversation.say, lambda content: conversation.add("user", content)):
        with refuses(InputError, "256 tokens", "n_ctx"):
            act("word " * 300)
        assert conversation.messages[-2:] == messages[-2:]
        np.testing.assert_array_equal(conversation.memory.state, state)
    conversation.say("hello again")
    assert conversation.messages[-2]["content"] == "hello again"


# several conversations


def test_they_say_together_what_they_say_alone(llm, make):
    contents = ["hello there", "how are you today my friend", "what"]
    together = [Conversation(llm, **GREEDY) for _ in contents]
    alone = [Conversation(make(), **GREEDY) for _ in contents]
    for turn in ("", " and then"):
        replies = say_together({c: content + turn for c, content in zip(together, contents)})
        for one, other, content in zip(together, alone, contents):
            assert replies[one] == other.say(content + turn)
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.memory.state, other.memory.state, **SAME)


def test_nothing_of_one_shows_in_another(make):
    """States and logits are the same to the last bit whatever the others are told, and alone to float32's rounding."""

    def run(others):
        llm = make(n_seq_max=3)
        mine, *rest = (Conversation(llm, temp=0.0, n_predict=12) for _ in range(1 + len(others)))
        decode, logits, states = llm._engine.slots.decode, [], []

        def record(jobs, *meanwhile):
            results = decode(jobs, *meanwhile)
            for job, result in zip(jobs, results):
                if job.slot == mine._text.slot:
                    logits.append(llm._engine.slots.logits(result.row))
            return results

        llm._engine.slots.decode = record
        llm._engine.slots.is_end = lambda token: False  # all replies are of one length
        for turn in range(3):
            said = [f"turn {turn}", *(f"{text}{turn}" for text in others)]
            say_together(dict(zip([mine, *rest], said)))
            states.append(mine.memory.state)
        return mine.tokens, states, logits

    first, second = run(["aaaaa ", "bbbbb "]), run(["ccccc ", "ddddd "])
    assert first[0] == second[0] and len(first[2]) == 36
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[2], second[2])
    alone = run([])  # other batches, so sums in another order
    assert alone[0] == first[0]
    np.testing.assert_allclose(alone[1], first[1], **SAME)
    np.testing.assert_allclose(alone[2], first[2], rtol=0, atol=1e-4)


def test_more_conversations_than_slots(llm, make):
    conversations = [Conversation(llm, **GREEDY) for _ in range(7)]
    alone = Conversation(make(), **GREEDY)
    said = say_together({c: f"hello {i}" for i, c in enumerate(conversations)})
    assert all(said.values())
    assert alone.say("hello 5") == said[conversations[5]]
    np.testing.assert_allclose(conversations[5].memory.state, alone.memory.state, **SAME)
    # a slot lost and taken again: the memory is the same, bit for bit
    states = [c.memory.state for c in conversations]
    for conversation in conversations:
        conversation._text.eval([])
    for conversation, state in zip(conversations, states):
        np.testing.assert_array_equal(conversation.memory.state, state)


def test_a_long_prompt_beside_short_ones(make):
    llm = make(n_seq_max=3, n_batch=16)
    conversations = [Conversation(llm, **GREEDY) for _ in range(3)]
    contents = ["hello", "a very long message that needs many batches " * 4, "why"]
    replies = say_together(dict(zip(conversations, contents)))
    for conversation, content in zip(conversations, contents):
        alone = Conversation(make(), **GREEDY)
        assert replies[conversation] == alone.say(content)
        np.testing.assert_allclose(conversation.memory.state, alone.memory.state, **SAME)


def test_slots_are_taken_while_one_speaks(make):
    """Between two pieces of a reply others may use all slots."""
    llm = make(n_seq_max=1)
    speaking, other = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    pieces = []
    for piece in speaking.stream("hello there"):
        pieces.append(piece)
        other.say("well")
        llm.create_completion("one two", max_tokens=2)
    assert speaking.messages[-1]["content"] == "".join(pieces)
    assert speaking.memory.n_written == speaking.n_tokens


def test_a_fork_goes_its_own_way(llm, make):
    conversation = Conversation(llm, system="be short", **GREEDY)
    conversation.say("hello there")
    fork = conversation.fork()
    state = conversation.memory.state
    assert fork.say("how are you") == conversation.say("how are you")
    np.testing.assert_allclose(fork.memory.state, conversation.memory.state, **SAME)
    fork.undo()
    np.testing.assert_allclose(fork.memory.state[0], state[0], rtol=0, atol=1)
    assert len(fork.messages) == 3 and len(conversation.messages) == 5


def test_the_models_own_text_stands_beside_them(make, read_once):
    """llm.create_completion and conversations share one slot: neither changes the other's memory."""
    llm = make(n_seq_max=1)
    conversation = Conversation(llm, **GREEDY)
    prompt = llm.tokenize(b"one two three")
    next(llm.generate(prompt, temp=0))
    state = llm.memory.state
    conversation.say("hello there")
    np.testing.assert_array_equal(llm.memory.state, state)
    mine = conversation.memory.state
    next(llm.generate(prompt, temp=0))  # its logits are gone, its text is decoded again
    assert llm.memory.n_written == len(prompt)
    np.testing.assert_array_equal(conversation.memory.state, mine)


def test_a_conversation_that_is_gone_leaves_its_slot(make):
    llm = make(n_seq_max=2)
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello")
    slot = conversation._text.slot
    del conversation
    gc.collect()
    assert llm._engine.slots.text(slot) is None


def test_embedding_has_them_decoded_again(make_llm):
    llm = make_llm(embedding=True, n_batch=64, pooling_type=LLAMA_POOLING_TYPE_MEAN)
    state = np.random.default_rng(0).standard_normal(llm.memory.shape).astype(np.float32)
    llm.memory.state = state
    conversation = Conversation(llm, **GREEDY)
    conversation.memory.state = -state
    conversation._text.eval(llm.tokenize(b"hello"))
    written = conversation.memory.state
    llm.embed(["one", "two", "three"])
    np.testing.assert_array_equal(llm.memory.state, state)
    np.testing.assert_array_equal(conversation.memory.state, written)
    assert conversation._text.n_kv == 0 and conversation.n_tokens > 0
    conversation._text.eval([])
    np.testing.assert_array_equal(conversation.memory.state, written)


def test_embedding_beside_several_sequences(make):
    """llama_cpp leaves its own sequences in the batch that they share."""

    def run(n_seq_max):
        llm = make(embedding=True, n_batch=64, n_seq_max=n_seq_max, pooling_type=LLAMA_POOLING_TYPE_MEAN)
        llm.eval([14, 17, 40] * 8)
        llm.embed(["one two", "three four", "five"])
        llm.eval([9, 8, 77, 6, 50, 4] * 4)
        assert llm.memory.n_written == 48
        return llm.memory.state

    np.testing.assert_allclose(run(3), run(1), **SAME)


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_messages_are_decoded_once(monkeypatch, strategy):
    """Also by a tokenizer that joins the space after a header and the word that follows: no token of a message depends
    on the next message. An ingest in segments would be read again as a whole.
    """
    model, memories = default_files()
    llm = DeltaMemLlama(str(model), deltamem_path=str(memories[strategy]), n_ctx=256, verbose=False)
    decode, n_decoded = type(llm._ctx).decode, []

    def count(ctx, batch):
        n_decoded.append(batch.n_tokens())
        decode(ctx, batch)

    monkeypatch.setattr(type(llm._ctx), "decode", count)
    conversation = Conversation(llm)
    for said, answer in [("my cat is Tom", "nice"), ("12 mice", "2"), ("so it is", "yes")]:
        conversation.add("user", said)
        conversation.add("assistant", answer)
    assert sum(n_decoded) == conversation.n_tokens
    llm.close()


def test_saved_states_leave_them_alone(llm):
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello there")
    text, state = conversation.tokens, conversation.memory.state
    llm.eval([14, 15, 16])
    saved = llm.save_state()
    llm.eval([17, 18])
    llm.load_state(saved)
    assert conversation.tokens == text
    np.testing.assert_array_equal(conversation.memory.state, state)
    assert conversation.regenerate()
    assert conversation.memory.n_decoded_again == 0


def test_bad_company(llm, make):
    with refuses(InputError, "models"):
        say_together({Conversation(llm): "a", Conversation(make()): "b"})
    assert list(stream_together({})) == [] and say_together({}) == {}
    for asked in (None, 5, "hello", [], [Conversation(llm)], {"ada": "hello"}, {None: "hello"}):
        with refuses(InputError, asked):
            say_together(asked)
        with refuses(InputError, asked):
            list(stream_together(asked))
    with refuses(InputError, "n_seq_max", 0):
        make(n_seq_max=0)


# memory files


def test_a_memory_file_is_kept_up_to_date(llm, tmp_path):
    path = tmp_path / "a.memory"
    with Conversation(llm, memory_file=path, **GREEDY) as conversation:
        assert path.exists()
        for content in ("my name is ada", "i live in lima"):
            conversation.say(content)
            other = Conversation(llm)
            other.memory.load(path)
            np.testing.assert_array_equal(other.memory.state, conversation.memory.state)
        with refuses(MemoryFileInUse, path, "this process"):
            Conversation(llm, memory_file=path)
        n = conversation.memory.n_written
    assert os.listdir(tmp_path) == ["a.memory"]
    with Conversation(llm, memory_file=path) as conversation:
        assert conversation.n_tokens == 0 and conversation.memory.n_written == n
        np.testing.assert_array_equal(conversation.memory.state, other.memory.state)


def test_a_memory_file_stays_where_it_is(llm, tmp_path, monkeypatch):
    """Also if the process goes to another folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Conversation(llm, memory_file="a.memory", **GREEDY) as conversation:
        monkeypatch.chdir(tmp_path / "elsewhere")
        conversation.say("my name is ada")
        other = Conversation(llm)
        other.memory.load(tmp_path / "a.memory")
        np.testing.assert_array_equal(other.memory.state, conversation.memory.state)
        conversation.open(tmp_path / "a.memory")  # the same one
    assert os.listdir(tmp_path / "elsewhere") == [] and sorted(os.listdir(tmp_path)) == ["a.memory", "elsewhere"]


def test_a_bad_memory_file_is_left_alone(llm, tmp_path):
    path = tmp_path / "a.memory"
    path.write_text("no memory")
    with refuses(MemoryFileError, path):
        Conversation(llm, memory_file=path)
    assert path.read_text() == "no memory" and os.listdir(tmp_path) == ["a.memory"]


def test_copies_are_restored(llm, make):
    conversation = Conversation(llm, **GREEDY)
    conversation.say("hello there")
    copy = conversation.memory.copy()
    conversation.say("how are you")
    conversation.memory.restore(copy)
    np.testing.assert_array_equal(conversation.memory.state, copy.state)
    assert conversation.memory.n_written == copy.tokens_written
    other = make("msw4_qo")
    with refuses(MemoryFileError, *(each["adapter"][:12] for each in (copy.metadata, other.memory.copy().metadata))):
        other.memory.restore(copy)


def test_going_back_is_saved(llm, tmp_path):
    path = tmp_path / "a.memory"

    def saved():
        other = Conversation(llm)
        other.memory.load(path)
        return other.memory

    with Conversation(llm, memory_file=path, **GREEDY) as conversation:
        conversation.say("hello there")
        conversation.say("a secret")
        conversation.undo()
        np.testing.assert_array_equal(saved().state, conversation.memory.state)
        assert saved().n_written == conversation.memory.n_written
        conversation.memory.reset()
        conversation.clear()
        assert not saved().state.any()


def test_another_kind_of_adapter_comes_in_the_middle_of_a_message(make, adapter):
    """One that writes token by token takes no message as a whole: what was read of it is taken back."""
    llm = make("ssw_message", n_batch=16, n_ubatch=16)
    conversation = Conversation(llm, **GREEDY)
    conversation.say("my name is ada")
    messages = list(conversation.messages)

    def attach(_):
        llm._engine.stepped = lambda seconds: None
        llm.memory.attach(adapter("qwen3", "tsw_qo"))

    llm._engine.stepped = attach
    with refuses(InputError, "segments"):
        conversation.say("a long message that needs many batches " * 3)
    assert conversation.messages == messages and conversation.memory.n_written == 0
    assert conversation.say("hello") and conversation.memory.n_written > 0


@pytest.mark.parametrize("change", ["other", "again", "detach"])
def test_a_memory_file_outlives_the_adapter(make, adapter, tmp_path, change):
    """The file is not overwritten by what another adapter, or none, made of the memory."""
    path, llm = tmp_path / "a.memory", make()
    conversation = Conversation(llm, memory_file=path, **GREEDY)
    conversation.say("my name is ada")
    before, messages, state = path.read_bytes(), list(conversation.messages), conversation.memory.state
    if change == "detach":
        llm.memory.detach()
    else:
        llm.memory.attach(adapter("qwen3", "msw4_qo") if change == "other" else None)
    for act in (
        lambda: conversation.say("hello"),
        lambda: conversation.regenerate(),
        lambda: conversation.add("user", "hello"),
        lambda: conversation.undo(),
        lambda: conversation.clear(),
        lambda: conversation.save(),
        lambda: say_together({Conversation(llm): "a", conversation: "b"}),
    ):
        with refuses(MemoryFileError, path, "open()"):
            act()
        assert conversation.messages == messages and path.read_bytes() == before
    if change == "again":
        conversation.open(path)
        np.testing.assert_array_equal(conversation.memory.state, state)
        conversation.say("hello")
        assert path.read_bytes() != before
    elif change == "other":
        with refuses(MemoryFileError, path):
            conversation.open(path)
    conversation.close()
    assert os.listdir(tmp_path) == ["a.memory"]
    assert change == "again" or path.read_bytes() == before
    assert conversation.say("hello") is not None


def test_a_save_that_fails_takes_no_turn_back(llm, make, tmp_path):
    path = tmp_path / "a.memory"
    one, other = Conversation(llm, memory_file=path, n_predict=2), Conversation(llm, n_predict=12, temp=0.0)
    cannot_be_saved(path)
    pieces = dict.fromkeys((one, other), "")
    with refuses(MemoryFileError, path):
        for conversation, piece in stream_together({one: "x", other: "tell me"}):
            pieces[conversation] += piece
    assert roles(one) == roles(other) == "ua"
    for conversation, reply in pieces.items():
        assert conversation.messages[-1]["content"].lstrip(" ") == reply
    assert pieces[other] == Conversation(make(), n_predict=12, temp=0.0).say("tell me")
    pieces = []
    with pytest.raises(MemoryFileError):
        pieces.extend(one.stream("y"))
    assert roles(one) == "uaua"


def test_a_save_that_fails_while_several_are_ended(llm, tmp_path):
    paths = [tmp_path / "a.memory", tmp_path / "b.memory"]
    conversations = [Conversation(llm, memory_file=path, n_predict=20) for path in paths]
    stream = stream_together(dict.fromkeys(conversations, "hello there"))
    for _ in range(4):
        next(stream)
    for path in paths:
        cannot_be_saved(path)
    with pytest.raises(MemoryFileError, match=r"\b[ab]\.memory\b"):
        stream.close()
    assert [roles(conversation) for conversation in conversations] == ["ua", "ua"]


def test_a_reply_begins_with_its_first_word():
    """The package's model begins with a space. It is in the message, whose tokens are the text, not in the reply."""
    model, memories = default_files()
    with contextlib.closing(DeltaMemLlama(model, deltamem_path=memories["tsw"], n_ctx=512)) as llm:
        one, other = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
        said = [one.say("My name is Ada."), "".join(one.stream("Hello.")), one.regenerate(), one.edit("Where is Ada?")]
        assert all(reply and not reply.startswith(" ") for reply in said)
        content = one.messages[-1]["content"]
        assert content.startswith(" ") and content.lstrip(" ") == said[-1]
        together = say_together({other: "My name is Ada."}, **GREEDY)[other]
        assert together == said[0] and other.messages[-1]["content"].lstrip(" ") == together

        n_written = one.memory.n_written
        n_text = one.n_tokens
        one.add("user", "Good.")
        assert one.memory.n_written - n_written == one.n_tokens - n_text > 0  # the common beginning was not read again


def test_another_memory_file_frees_the_first(make, tmp_path):
    llm = make(n_seq_max=2)
    with Conversation(llm, **GREEDY) as one, Conversation(llm, **GREEDY) as other:
        one.open(tmp_path / "a.memory")
        with refuses(MemoryFileInUse, tmp_path / "a.memory"):
            other.open(tmp_path / "a.memory")
        one.open(tmp_path / "b.memory")
        other.open(tmp_path / "a.memory")
        with refuses(MemoryFileInUse, tmp_path / "b.memory"):
            other.open(tmp_path / "b.memory")


def test_the_latest_message_stays_however_long_it_is(make):
    """More room than is needed is made only as long as there are older turns."""
    llm = make(n_ctx=256)
    with Conversation(llm, **GREEDY) as talk:
        talk.say("hello there")
        n = len(chat_prompt(llm, [{"role": "user", "content": ""}]))
        long = "a " * 230
        while len(chat_prompt(llm, [{"role": "user", "content": long}])) > 240:
            long = long[:-2]
        assert n < 240
        talk.say(long, n_predict=2)
        assert [message["content"] for message in talk.messages[:1]] == [long]


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


def test_stopping_criteria_of_a_chat_format(llm, monkeypatch):
    """They end a reply, as in create_chat_completion."""

    def form(messages, **_):
        stops = StoppingCriteriaList([lambda tokens, logits: len(tokens) >= 7])
        return ChatFormatterResponse(prompt="hello", stopping_criteria=stops)

    n = len(llm.tokenize(b"hello", special=True))
    llm.chat_handler = chat_formatter_to_chat_completion_handler(form)
    monkeypatch.setattr(llm._engine.slots, "is_end", lambda token: False)
    with Conversation(llm, n_predict=40, temp=0.0) as talk:
        talk.say("x")
        assert talk.finish_reason == "stop" and n < talk.n_tokens <= 8


def test_a_memory_that_was_replaced_stays_when_the_turn_is_taken_back(make):
    llm = make("standard_uncoupled_scalar_gate")
    with Conversation(llm, **GREEDY) as talk:
        talk.say("hello there")
        before, messages = talk.memory.state, list(talk.messages)
        stream = talk.stream("and yours")
        next(stream)
        talk.memory.state = huge = np.full_like(before, 3e38)
        with pytest.raises(NotFiniteError):
            list(stream)
        assert talk.messages == messages
        np.testing.assert_array_equal(talk.memory.state, huge)
        talk.memory.state = before
        assert talk.say("and yours")
