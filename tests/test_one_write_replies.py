"""The rule of one write within a reply: drafted tokens, and what happens between two tokens."""

from __future__ import annotations

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from one_write import OTHER, SAME, TOKENS, take, texts
from pydeltamem import Conversation, InputError
from refusals import refuses


@pytest.fixture
def llm(make):
    return make()


# drafts


class WrongDrafts(LlamaDraftModel):
    """Guesses that are right `n_right` times and then wrong."""

    def __init__(self, text, n_right):
        self.text, self.n_right = text, n_right

    def __call__(self, input_ids, /, **kwargs):
        right = self.text[len(input_ids) : len(input_ids) + self.n_right]
        return np.array([*right, 3, 4, 3, 4], dtype=np.intc)


@pytest.mark.parametrize("n_right", [0, 1, 3])
def test_rejected_drafts_were_never_read(make, read_once, n_right):
    plain = make()
    expected = TOKENS + take(plain.generate(TOKENS, temp=0), 20)
    llm = make(draft_model=WrongDrafts(expected, n_right), logits_all=True)
    assert TOKENS + take(llm.generate(TOKENS, temp=0), 20) == expected
    assert texts(llm) == expected[: llm.n_tokens] and llm.n_tokens >= len(expected) - 1
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
    assert llm.memory.n_decoded_again == 0  # each draft has its checkpoint
    take(llm.generate(expected + OTHER, temp=0), 4)
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_drafted_reply_that_is_cut(make, read_once, n):
    """What was drafted beyond the last token taken is gone."""
    plain = make()
    expected = TOKENS + take(plain.generate(TOKENS, temp=0), 30)
    llm = make(draft_model=WrongDrafts(expected, 5), logits_all=True)
    generator = llm.generate(TOKENS, temp=0)
    taken = TOKENS + take(generator, n)
    generator.close()
    assert taken == expected[: len(taken)]
    assert texts(llm) == taken[: llm.n_tokens] and llm.n_tokens >= len(taken) - 1
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)


def test_prompt_lookup(make, read_once):
    llm = make(draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=10))
    prompt = "one two one two one two one"
    for _ in range(3):
        llm.create_completion(prompt, max_tokens=40, temperature=0)
        np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)


def test_drafts_after_a_text(make, read_once):
    llm = make(draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=5))
    llm.eval(TOKENS)
    generator = llm.generate(OTHER, temp=0, reset=False)
    taken = take(generator, 3)
    generator.close()
    assert texts(llm)[:20] == [*TOKENS, *OTHER, *taken[:2]]
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)


def test_drafts_after_a_prompt_of_several_batches(make, read_once):
    prompt = np.random.default_rng(5).integers(3, 250, 150).tolist()
    llm = make(n_batch=64, draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=5))
    plain = make(n_batch=64)
    assert take(llm.generate(prompt, temp=0), 8) == take(plain.generate(prompt, temp=0), 8)
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)


# between two tokens


@pytest.fixture(params=[False, True], ids=["one by one", "drafted"])
def streaming(request, make):
    """streaming(**kwargs): a model, and the text that it generates greedily after TOKENS."""
    plain = make()
    expected = TOKENS + take(plain.generate(TOKENS, temp=0), 20)

    def model(**kwargs):
        if request.param:
            kwargs |= {"draft_model": WrongDrafts(expected, 5), "logits_all": True}
        return make(**kwargs), expected

    return model


def test_others_speak_between_two_tokens(streaming, read_once):
    llm, expected = streaming(n_seq_max=2)
    conversation = Conversation(llm, n_predict=2, temp=0.0)
    taken = list(TOKENS)
    for token in llm.generate(TOKENS, temp=0):
        taken.append(token)
        conversation.say("well")
        if len(taken) == 20:
            break
    assert taken == expected[:20]
    np.testing.assert_allclose(llm.memory.state, read_once(texts(llm)), **SAME)
    assert texts(llm) == taken[: llm.n_tokens] and llm.n_tokens >= 19


@pytest.mark.parametrize(
    "change",
    [
        lambda llm: (llm.reset(), llm.eval(OTHER)),
        lambda llm: llm.eval(OTHER),
        lambda llm: take(llm.generate(OTHER, temp=0), 1),
        lambda llm: llm.memory.rollback(5),
        lambda llm: llm.load_state(llm.save_state()),
    ],
    ids=["reset", "eval", "generate", "rollback", "load_state"],
)
@pytest.mark.parametrize("end", ["go on", "close"])
def test_the_text_is_changed_between_two_tokens(streaming, change, end):
    """It is not generated further, and is left as it is then."""
    llm, _ = streaming()
    stream = llm.generate(TOKENS, temp=0)
    take(stream, 2)
    change(llm)
    text, state, n_written = texts(llm), llm.memory.state, llm.memory.n_written
    if end == "go on":
        with refuses(InputError, "text"):
            next(stream)
    stream.close()
    assert texts(llm) == text and llm.memory.n_written == n_written
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize("callback", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_callback_changes_the_text(streaming, callback, n):
    """It is not generated further, and is left as the callback left it."""
    llm, _ = streaming()
    left = []

    def change(ids, scores):
        if len(ids) == len(TOKENS) + n - 1:
            llm.reset()
            llm.eval(OTHER)
            left.append((texts(llm), llm.memory.state, llm.memory.n_written))
        return scores if callback == "logits_processor" else False

    with refuses(InputError, "text"):
        take(llm.generate(TOKENS, temp=0, **{callback: change}), n)
    [(text, state, n_written)] = left
    assert texts(llm) == text and llm.memory.n_written == n_written
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize("end", ["go on", "close"])
def test_the_memory_is_changed_between_two_tokens(streaming, read_once, end):
    """What comes after is written into the new one, and no more."""
    llm, _ = streaming()
    stream = llm.generate(TOKENS, temp=0)
    taken = TOKENS + take(stream, 2)
    llm.memory.reset()
    if end == "close":
        stream.close()
        assert not llm.memory.state.any() and texts(llm) == taken[: llm.n_tokens]
        return
    taken += take(stream, 5)
    stream.close()
    assert texts(llm) == taken[: llm.n_tokens]
    assert llm.memory.n_written == llm.n_tokens - len(TOKENS) - 1  # the last of the two was still to be read
