"""Several conversations in one model: they speak together, and nothing of one shows in another."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_MEAN

from conversing import GREEDY, SAME
from decoding import go_on
from pydeltamem import Conversation, DeltaMemLlama, InputError, say_together, stream_together
from pydeltamem.models import default_files
from refusals import refuses


@pytest.fixture
def llm(make):
    return make(n_seq_max=3)


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


def test_nothing_of_one_shows_in_another(make, monkeypatch):
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
        go_on(monkeypatch, llm)  # all replies are of one length
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


def test_a_fork_goes_its_own_way(llm, read_once):
    conversation = Conversation(llm, system="be short", **GREEDY)
    conversation.say("hello there")
    fork = conversation.fork()
    assert fork.say("how are you") == conversation.say("how are you")
    np.testing.assert_allclose(fork.memory.state, conversation.memory.state, **SAME)
    fork.undo()
    assert len(fork.messages) == 3 and len(conversation.messages) == 5
    for each in (fork, conversation):
        np.testing.assert_allclose(each.memory.state, read_once(each.tokens), **SAME)


def test_a_fork_after_a_failure_goes_on_as_its_origin(llm):
    """Another text was not finite, so all have lost their KV cache. That changes nothing for either."""
    conversation = Conversation(llm, **GREEDY)
    for content in ("my name is ada and i live in lima", "what is new"):
        conversation.say(content)
    llm._engine.slots.empty_kv(by_failure=True)
    fork = conversation.fork()
    assert fork.say("what is my name") == conversation.say("what is my name")
    np.testing.assert_allclose(fork.memory.state, conversation.memory.state, **SAME)


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
