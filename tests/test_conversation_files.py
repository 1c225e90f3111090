"""The memory file of a Conversation, and copies of it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from conversing import GREEDY, roles
from pydeltamem import Conversation, InputError, MemoryFileError, MemoryFileInUse, say_together, stream_together
from refusals import refuses


@pytest.fixture
def llm(make):
    return make(n_seq_max=3)


def cannot_be_saved(path):
    """Nothing can be saved at `path` from here on."""
    path.unlink()
    path.mkdir()


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
