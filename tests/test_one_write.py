"""The rule of one write (docs/reference/one-write.md): the state equals that of a model which read the text once."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from one_write import GREEDY, OTHER, SAME, TOKENS, answer, different, one_decode, take, texts, user
from pydeltamem import Conversation, InputError
from pydeltamem.runtime.request import Request
from refusals import refuses


@pytest.fixture
def llm(make):
    return make()


# prompts


def test_a_longer_prompt(llm, read_once):
    """Writes what is new."""
    take(llm.generate(TOKENS[:6], temp=0), 1)
    take(llm.generate(TOKENS, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS), **SAME)
    assert llm.memory.n_written == len(TOKENS)


@pytest.mark.parametrize("n", [1, 12])
def test_the_same_prompt_again(llm, read_once, n):
    """Goes back to the end of the prompt: another reply takes the place of the first."""
    take(llm.generate(TOKENS, temp=0), n)
    for seed in range(3):
        llm.set_seed(seed)
        take(llm.generate(TOKENS, temp=2.0), n)
        assert texts(llm)[: len(TOKENS)] == TOKENS and llm.n_tokens == len(TOKENS) + n - 1
        np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
    assert llm.memory.n_decoded_again == 0


def test_a_shorter_prompt(llm, read_once):
    """Goes back to its end."""
    take(llm.generate(TOKENS, temp=0), 5)
    take(llm.generate(TOKENS[:6], temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS[:6]), **SAME)


def test_an_edited_prompt(llm, read_once):
    """Goes back to where they part, also where there is no checkpoint."""
    take(llm.generate(TOKENS, temp=0), 5)
    edited = TOKENS[:7] + OTHER
    take(llm.generate(edited, temp=0), 3)
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
    assert llm.memory.n_decoded_again == 7  # from the beginning of the text


def test_a_long_way_back_is_reported(make, read_once, caplog):
    llm = make(n_batch=512)
    tokens = np.random.default_rng(0).integers(6, 250, 200).tolist()  # none ends a message
    llm.eval(tokens)
    llm.n_tokens = 150
    with caplog.at_level(logging.WARNING, "pydeltamem"):
        llm.eval(OTHER)
    assert "went back to token 150" in caplog.text and "150 tokens are decoded again" in caplog.text
    np.testing.assert_allclose(llm.memory.state, read_once(tokens[:150] + OTHER), **SAME)
    caplog.clear()
    llm.n_tokens = 150
    with caplog.at_level(logging.WARNING, "pydeltamem"):
        llm.eval(TOKENS)  # now there is one
    assert not caplog.text
    np.testing.assert_allclose(llm.memory.state, read_once(tokens[:150] + TOKENS), **SAME)


def test_where_a_message_ends_there_is_a_checkpoint(llm):
    end = llm.token_eos()
    tokens = [15, 6, end, 7, 8, 9, end, 10, 11, 12]
    llm.eval(tokens)
    assert llm.memory.checkpoints == [0, 3, 7, 9, 10]


@pytest.mark.parametrize("how", ["reset", "nothing in common", "the first token in common"])
def test_another_text(llm, make, read_once, how):
    """The memory goes on."""
    by_hand = make()
    llm.eval(TOKENS)
    state = llm.memory.state
    other = {"the first token in common": TOKENS[:1] + OTHER}.get(how, OTHER)
    if how == "reset":
        llm.reset()
    take(llm.generate(other, temp=0), 1)
    known = other[:1] == TOKENS[:1]  # it is in the text already, and was written
    if known:
        by_hand.eval(TOKENS[:1])
        by_hand.memory.state = state
        by_hand.eval(OTHER)
        np.testing.assert_allclose(llm.memory.state, by_hand.memory.state, **SAME)
    else:
        np.testing.assert_allclose(llm.memory.state, read_once(other, state), **SAME)
    assert different(llm.memory.state, state)
    assert llm.memory.n_written == len(TOKENS) + len(other) - known


def test_tokens_are_set_back_by_hand(llm, read_once):
    llm.eval(TOKENS)
    llm.n_tokens = 6
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS[:6] + OTHER), **SAME)
    llm.n_tokens = 6
    llm.eval(TOKENS[6:])
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS), **SAME)


def test_one_by_one_the_last_64_positions_are_kept(llm, read_once):
    tokens = np.random.default_rng(1).integers(3, 250, 100).tolist()
    for token in tokens:
        llm.eval([token])
    assert llm.memory.checkpoints == [0, *range(36, 101)]
    for position in (99, 70, 36):
        assert llm.memory.rollback(position) == 0
        assert llm.n_tokens == position
        np.testing.assert_allclose(llm.memory.state, read_once(tokens[:position]), **SAME)


def test_going_back_after_the_slot_was_lost(make, read_once):
    """Where no checkpoint is, the memory reads the tokens again after those that it read the first time."""
    llm = make(n_seq_max=1)
    tokens = np.random.default_rng(2).integers(6, 250, 40).tolist()
    llm.eval(tokens[:20])
    llm.eval(tokens[20:])
    llm._engine.text().eval(OTHER)
    llm.memory.rollback(30)
    np.testing.assert_allclose(llm.memory.state, read_once(tokens[:30]), **SAME)
    assert llm.memory.n_written == 30 and llm.memory.n_decoded_again == 30


def test_rollback_to_a_checkpoint_of_ones_own(llm, read_once):
    llm.eval(TOKENS[:5])
    position = llm.memory.checkpoint()
    assert position == 5
    for token in TOKENS[5:] * 10:
        llm.eval([token])
    assert llm.memory.rollback(position) == 0 and llm.n_tokens == 5
    np.testing.assert_array_equal(llm.memory.state, read_once(TOKENS[:5]))
    take(llm.generate(TOKENS[:5] + OTHER, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS[:5] + OTHER), **SAME)


def test_rollback_where_nothing_is(llm):
    llm.eval(TOKENS)
    for position in (-1, len(TOKENS) + 1):
        with refuses(InputError, f"token {position}", len(TOKENS)):
            llm.memory.rollback(position)
    assert llm.memory.rollback(7) == 7
    llm.memory.state = np.zeros(llm.memory.shape)
    with refuses(InputError, "token 3", 7):
        llm.memory.rollback(3)


def test_a_checkpoint_leaves_the_logits(llm):
    llm.eval(TOKENS)
    llm.eval([14])  # alone: it has no checkpoint that is kept yet
    logits = llm.logits
    assert llm.memory.checkpoint() == len(TOKENS) + 1
    np.testing.assert_array_equal(llm.logits, logits)
    assert llm.sample(temp=0) == logits.argmax()


def test_where_a_call_began_is_kept(llm):
    """Also of one that reads in segments, and one that begins where tokens were read one by one."""
    for token in TOKENS:
        llm.eval([token])
    llm.eval(OTHER)
    for token in TOKENS * 10:
        llm.eval([token])
    assert [p for p in llm.memory.checkpoints if p <= len(TOKENS)] == [0, len(TOKENS)]


# chats


def test_a_growing_chat(llm, read_once):
    """Writes what is new; the system prompt once."""
    messages = user("hello there")
    for question in ("how are you", "what is new", "good bye"):
        reply = answer(llm, messages)
        np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
        assert llm.memory.n_written == llm.n_tokens
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]


def test_a_reply_again(llm, read_once):
    messages = user("hello there")
    first = answer(llm, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "how are you"}]
    second, state, tokens = answer(llm, messages), llm.memory.state, texts(llm)
    assert answer(llm, messages) == second
    assert texts(llm) == tokens
    np.testing.assert_allclose(llm.memory.state, state, **SAME)
    np.testing.assert_allclose(llm.memory.state, read_once(tokens), **SAME)
    assert llm.memory.n_decoded_again == 0


@pytest.mark.parametrize("turn", [1, 2])
def test_an_edited_turn(llm, read_once, turn):
    """The latest turn, or an earlier one: memory and text go back to it."""
    messages = user("hello there")
    for question in ("how are you", "what is new"):
        messages += [{"role": "assistant", "content": answer(llm, messages)}, {"role": "user", "content": question}]
    answer(llm, messages)
    edited = [*messages[: 1 + 2 * turn], {"role": "user", "content": "something else"}]
    answer(llm, edited)
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
    assert llm.memory.n_decoded_again < 30  # the header of the message, in byte tokens here


def test_another_chat(make, read_once):
    """The memory goes on; the system prompt that both have is not written again."""
    llm = make()
    answer(llm, user("my name is ada"))
    before, state, n = texts(llm), llm.memory.state, llm.memory.n_written
    answer(llm, user("what is my name"))
    after = texts(llm)
    common = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
    assert common > 10
    assert llm.memory.n_written == n + len(after) - common
    assert different(llm.memory.state, read_once(after))

    other = make()  # the same by hand
    other.eval(before)
    other._text.begin(common)
    other.eval(after[common:])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)
    assert different(llm.memory.state, state)


@pytest.mark.parametrize("how", ["too long", "a stream that is not begun"])
def test_another_chat_after_one_that_was_not_read(make, how):
    """It is another one still: the memory goes on."""
    written = []
    for comes_between in (False, True):
        llm = make()
        answer(llm, user("my name is ada"))
        if comes_between and how == "too long":
            with refuses(InputError, "exceed context window", 512):  # words that llama_cpp.server looks for
                answer(llm, user("hello", "hi", "x " * 700))
        elif comes_between:
            llm.create_chat_completion(user("hello", "hi", "what is my name"), stream=True)
        answer(llm, user("hello", "hi", "what is my name"))
        written.append((llm.memory.n_written, llm.memory.state))
    assert written[0][0] == written[1][0]
    np.testing.assert_array_equal(written[0][1], written[1][1])


def test_a_streamed_chat_grows(llm, read_once):
    messages = user("hello there")
    for question in ("how are you", "good bye"):
        chunks = llm.create_chat_completion(messages, stream=True, **GREEDY)
        reply = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
        assert llm.memory.n_written == llm.n_tokens
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]


def test_a_chat_asked_anew_after_reset(llm, read_once):
    answer(llm, user("hello there"))
    state = llm.memory.state
    llm.reset()
    answer(llm, user("hello there"))
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm), state), **SAME)


# the memory is changed


def test_reading_only(llm, read_once):
    llm.eval(TOKENS[:6])
    state = llm.memory.state
    llm.memory.write = False
    llm.eval(TOKENS[6:])
    np.testing.assert_array_equal(llm.memory.state, state)
    assert llm.memory.n_written == 6
    llm.memory.write = True
    llm.n_tokens = 8  # 6 and 7 before it did not write, and still do not
    llm.eval(OTHER)
    assert llm.memory.n_written == 6 + len(OTHER)
    llm.n_tokens = 6
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS[:6] + OTHER), **SAME)


def test_reading_only_after_the_cache_was_lost(make, read_once):
    """Tokens that are decoded again and new ones are separate pieces, although neither writes."""
    llm = make(n_seq_max=1)
    llm.eval(TOKENS[:6])
    llm.memory.write = False
    Conversation(llm, n_predict=1).say("hello")  # takes the slot
    llm.eval(OTHER)
    assert llm.n_tokens == 6 + len(OTHER)
    assert llm.input_ids[: llm.n_tokens].tolist() == TOKENS[:6] + OTHER
    llm.memory.write = True
    llm.n_tokens = 6
    llm.eval(TOKENS[6:])
    assert llm.memory.n_written == len(TOKENS)


@pytest.mark.parametrize("how", ["set", "reset", "load"])
def test_another_memory_in_the_middle(llm, read_once, tmp_path, how):
    """No token before it counts as written, and the text cannot take it back."""
    llm.eval(TOKENS)
    state = np.zeros(llm.memory.shape)
    if how == "reset":
        llm.memory.reset()
    else:
        state = np.random.default_rng(0).standard_normal(llm.memory.shape)
        llm.memory.state = state
        if how == "load":
            llm.memory.save(tmp_path / "a.memory")
            llm.memory.reset()
            llm.memory.load(tmp_path / "a.memory")
    llm.eval(OTHER)
    llm.n_tokens = 0
    llm.eval(TOKENS)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS, state), **SAME)


def test_detach_and_attach(llm, read_once):
    llm.eval(TOKENS)
    llm.memory.detach()
    llm.eval(OTHER)
    llm.n_tokens = 3
    llm.eval(OTHER)
    llm.memory.attach()
    assert not llm.memory.state.any()
    llm.n_tokens = 0
    llm.eval(TOKENS)
    np.testing.assert_allclose(llm.memory.state, read_once(TOKENS), **SAME)


@pytest.mark.parametrize("how", ["set", "reset", "restore", "detach", "attach", "rollback"])
def test_logits_of_another_memory_are_not_used(llm, make, how):
    """The prompt's last token is decoded again, so that the reply is that of the memory of now."""
    snapshot = llm.memory.copy()
    llm.memory.state = 3 * np.random.default_rng(0).standard_normal(llm.memory.shape)
    before = take(llm.generate(TOKENS, temp=0), 1)
    {
        "set": lambda: setattr(llm.memory, "state", np.zeros(llm.memory.shape)),
        "reset": llm.memory.reset,
        "restore": lambda: llm.memory.restore(snapshot),
        "detach": llm.memory.detach,
        "attach": llm.memory.attach,
        "rollback": lambda: llm.memory.rollback(len(TOKENS)),
    }[how]()
    with refuses(InputError, "logits", "eval"):
        _ = llm.logits
    after = take(llm.generate(TOKENS, temp=0), 1)
    assert (after == before) == (how == "rollback")
    assert not llm.memory.attached or llm.memory.n_written == (12 if how == "rollback" else 1)


def test_setting_a_conversations_memory_leaves_the_models_logits(make):
    llm = make(n_seq_max=2)
    llm.eval(TOKENS)
    logits = llm.logits
    Conversation(llm).memory.reset()
    np.testing.assert_array_equal(llm.logits, logits)


# segments


@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_an_ingest_in_segments_is_taken_back_as_a_whole(make, case):
    segments = [0, 0, 0, 1, 1, 2]
    llm, once = make(case), make(case)
    llm.eval(TOKENS)
    llm.eval(OTHER, segments=segments)
    llm.eval([21, 22])
    llm.n_tokens = len(TOKENS) + 4  # in the middle of the ingest
    llm.eval([23, 24])
    once.eval(TOKENS)
    once.eval(OTHER[:4], segments=segments[:4])
    once.eval([23, 24])
    np.testing.assert_allclose(llm.memory.state, once.memory.state, **SAME)


def test_what_another_text_begins_with_is_not_in_its_segments(make):
    """It stands there and was written: decoded again after going back, it is not written again with what is new."""
    llm, by_hand = make("ssw_message"), make("ssw_message")
    for model in (llm, by_hand):
        model.eval(TOKENS, segments=[0] * len(TOKENS))
        model._text.begin(len(TOKENS))
        model.n_tokens = 8
    llm.eval(TOKENS[8:] + OTHER, segments=[0] * 10)
    by_hand.memory.write = False
    by_hand.eval(TOKENS[8:])
    by_hand.memory.write = True
    by_hand.eval(OTHER, segments=[0] * 6)
    np.testing.assert_allclose(llm.memory.state, by_hand.memory.state, **SAME)
    assert llm.memory.n_written == len(TOKENS) + len(OTHER)


def test_an_ingest_that_loses_its_slot_in_the_middle_is_read_again(make):
    llm = make("ssw_message", n_batch=4)
    other, segments = llm._engine.text(), np.zeros(len(TOKENS), dtype=np.int32)
    text = llm._text
    for again in (False, True):  # also where the memory reads it again after going back
        if again:
            text.n_tokens = len(TOKENS) - 1
        request = Request(text)
        request.ask([] if again else TOKENS, None if again else segments)
        before = text.position
        one_decode(request, 4)
        assert again or text.position.n == before.n == 0  # nothing is written before its end
        text.slots.leave(text)
        other.eval(OTHER)
        llm._engine.wait([request])
        assert request.is_over and request.error is None
        once = make("ssw_message", n_batch=4)
        n = text.n_tokens
        once.eval(TOKENS[:n], segments=[0] * n)
        np.testing.assert_allclose(text.state, once.memory.state, **SAME)
        assert llm.memory.n_written == n == len(TOKENS) - again


# the text is shortened


def test_dropping_text_keeps_what_it_wrote(make):
    llm = make()
    tokens = np.random.default_rng(3).integers(3, 250, 60).tolist()
    llm.eval(tokens[:20])
    llm.eval(tokens[20:40])
    llm.eval(tokens[40:])
    state = llm.memory.state
    llm._text.shift(10, 40)
    assert texts(llm) == tokens[:10] + tokens[40:]
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.eval(OTHER)
    after = llm.memory.state
    llm.memory.rollback(30)
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.eval(OTHER)
    np.testing.assert_allclose(llm.memory.state, after, **SAME)
    with refuses(InputError, "token 5"):
        llm.memory.rollback(5)


def test_dropping_text_before_which_all_checkpoints_are(make):
    llm = make("ssw_message")
    tokens = np.random.default_rng(3).integers(3, 250, 60).tolist()
    llm.eval(tokens, segments=[0] * 60)  # an ingest: no checkpoint in it
    state = llm.memory.state
    llm._text.shift(5, 30)
    llm.n_tokens = 20
    llm.eval(OTHER)  # goes back to where the memory cannot
    assert texts(llm) == tokens[:5] + tokens[30:45] + OTHER
    llm._text.reset()
    assert different(llm.memory.state, state)
