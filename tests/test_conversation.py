"""Conversation: turns, going back, options, and full contexts."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
from llama_cpp import Llama, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    Jinja2ChatFormatter,
    chat_formatter_to_chat_completion_handler,
)

from conversing import GREEDY, SAME, roles
from decoding import fail_at, go_on
from pydeltamem import (
    Conversation,
    DecodeError,
    DeltaMemLlama,
    InputError,
    MemorySnapshot,
    ModelError,
    NotFiniteError,
    say_together,
)
from pydeltamem.models import default_files
from pydeltamem.runtime.chat_format import chat_prompt
from refusals import refuses


@pytest.fixture
def llm(make):
    return make(n_seq_max=3)


# one conversation


def test_it_says_what_a_chat_completion_says(llm):
    messages = [{"role": "system", "content": "be short"}]
    conversation = Conversation(llm, system="be short", **GREEDY)
    for content in ("hello there", "how are you"):
        messages.append({"role": "user", "content": content})
        llm.create_chat_completion(messages, max_tokens=8, temperature=0)
        messages.append({"role": "assistant", "content": conversation.say(content)})
        assert conversation.tokens == llm.input_ids[: llm.n_tokens].tolist()
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
        assert talk.tokens == plain.input_ids[: plain.n_tokens].tolist() and answer["usage"]["completion_tokens"] == 8
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
    first = conversation.say("how are you", seed=2)
    assert conversation.regenerate(seed=3) != first
    assert conversation.regenerate(seed=2) == first
    conversation.edit("what is new", seed=2)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["hello there", "what is new"]
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    conversation.undo()
    assert roles(conversation) == "sua"
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    conversation.undo()
    assert roles(conversation) == "s"
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    with refuses(InputError):
        conversation.undo()


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
    with monkeypatch.context() as patch, refuses(DecodeError, "llama_decode returned 1"):
        fail_at(patch, llm, call)
        conversation.say("how are you, what is new, and what else is there to say, friend")
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

    for act in (conversation.regenerate, lambda: conversation.edit("good bye"), lambda: conversation.edit("x " * 900)):
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, InputError)):
            fail_at(patch, llm)
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
def test_a_long_reply_again_where_segments_are_written(make, monkeypatch, n):
    """Without a near checkpoint it goes back to where the turn began; its first segment is the user's message."""
    llm, by_hand = make("ssw_message"), make("ssw_message")
    go_on(monkeypatch, llm)
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


def test_options_as_create_completion_calls_them(llm, monkeypatch):
    reply = Conversation(llm, n_predict=5, temp=0.0).say("hello there")
    assert Conversation(llm, max_tokens=5, temperature=0.0).say("hello there") == reply
    assert Conversation(llm, max_tokens=50, temp=0.0).say("hello there", max_tokens=5) == reply
    assert Conversation(llm, max_tokens=0, temp=0.0).say("hello there") == ""
    changed = Conversation(llm)
    changed.options.update(max_tokens=5, temperature=0.0)
    assert changed.say("hello there") == reply
    unlimited = Conversation(llm, temp=0.0, max_tokens=None)
    go_on(monkeypatch, llm, lambda: unlimited.n_tokens > 100)
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


def test_how_much_is_predicted(llm, read_once, monkeypatch):
    conversation = Conversation(llm, temp=0.0)
    assert conversation.say("hello there", n_predict=0) == "" and conversation.finish_reason == "length"
    assert conversation.tokens == chat_prompt(llm, conversation.messages[:1])
    np.testing.assert_allclose(conversation.memory.state, read_once(conversation.tokens), **SAME)
    assert roles(conversation) == "ua"
    go_on(monkeypatch, llm, lambda: conversation.n_tokens > 100)
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


def test_stopping_criteria_of_a_chat_format(llm, monkeypatch):
    """They end a reply, as in create_chat_completion."""

    def form(messages, **_):
        stops = StoppingCriteriaList([lambda tokens, logits: len(tokens) >= 7])
        return ChatFormatterResponse(prompt="hello", stopping_criteria=stops)

    n = len(llm.tokenize(b"hello", special=True))
    llm.chat_handler = chat_formatter_to_chat_completion_handler(form)
    go_on(monkeypatch, llm)
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


def test_a_reply_runs_over(make, monkeypatch):
    """A reply longer than what is left: the oldest turns go while it is written."""
    llm = make(n_ctx=256)
    conversation = Conversation(llm, system="be short", temp=0.0, n_predict=6)
    for i in range(3):
        conversation.say(f"this is message number {i}")
    with monkeypatch.context() as patch:
        go_on(patch, llm)
        conversation.say("tell me more", n_predict=-1)
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
