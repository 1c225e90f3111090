"""The rule of one write (docs/reference/one-write.md): the state equals that of a model which read the text once."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from llama_cpp import LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from pydeltamem import AdapterError, Conversation, DecodeError, DeltaMemLlama, InputError, ModelError
from pydeltamem.runtime.engine import Request
from refusals import refuses

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88, 200, 31]
OTHER = [9, 8, 77, 6, 50, 4]
GREEDY = {"max_tokens": 10, "temperature": 0}

# float32 sums in another order: a token alone or within a batch
SAME = {"rtol": 0, "atol": 2e-6}


@pytest.fixture
def make(make_llm):
    """make(...): a model whose KV cache is F32 too, so that nothing but the order of sums differs."""
    return lambda *args, **kwargs: make_llm(*args, type_k=0, type_v=0, **kwargs)


@pytest.fixture
def llm(make):
    return make()


@pytest.fixture(scope="module")
def hybrid_files(tmp_path_factory):
    """A tiny LFM2, whose layers without attention keep a state of their own, and a memory on its attention."""
    from test_architectures import convert, converted, reference

    folder = tmp_path_factory.mktemp("lfm2")
    reference("Lfm2", folder)
    return converted(folder, convert(folder))


@pytest.fixture
def make_hybrid(hybrid_files):
    """make_hybrid(**kwargs): its KV cache cannot be cut."""
    base, adapter = hybrid_files
    made = []

    def make(**kwargs):
        options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "type_k": 0, "type_v": 0}
        made.append(DeltaMemLlama(base, deltamem_path=adapter, **{**options, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def texts(llm):
    return llm.input_ids[: llm.n_tokens].tolist()


def take(generator, n):
    return [token for _, token in zip(range(n), generator)]


def user(*contents):
    """Messages: a system prompt, then user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": "system", "content": "be short"}] + [
        {"role": role, "content": content} for role, content in zip(roles, contents)
    ]


def answer(llm, messages):
    return llm.create_chat_completion(messages, **GREEDY)["choices"][0]["message"]["content"]


def different(a, b):
    return np.abs(a - b).max() > 1e-4


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


# a KV cache that cannot be cut


HYBRID = [5, 7, 9, 11, 13, 15, 17, 19]


def test_going_back_in_a_hybrid(make_hybrid):
    """All is decoded again as it was the first time: text, memory and logits are those of a model that read it once."""

    def once(tokens):
        llm = make_hybrid()
        llm.eval(tokens)
        return llm.memory.state, llm.logits

    llm = make_hybrid()
    take(llm.generate(HYBRID, temp=0), 4)
    take(llm.generate(HYBRID, temp=0), 1)  # again
    np.testing.assert_allclose(llm.memory.state, once(HYBRID)[0], **SAME)
    assert llm.memory.n_written == llm.n_tokens == len(HYBRID)
    edited = [*HYBRID[:5], 30]
    take(llm.generate(edited, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, once(edited)[0], **SAME)
    assert llm.memory.n_written == llm.n_tokens == 6
    assert llm.memory.n_decoded_again > 0  # reported
    llm.n_tokens = 4
    llm.eval([20, 21])
    llm.memory.checkpoint()
    llm.eval([22, 23])
    assert llm.memory.rollback(6) == 0
    llm.eval([24])
    state, logits = once([*HYBRID[:4], 20, 21, 24])
    np.testing.assert_allclose(llm.memory.state, state, **SAME)
    np.testing.assert_allclose(llm.logits, logits, rtol=0, atol=1e-4)


def test_decode_of_a_hybrid_cannot_be_timed(hybrid_files):
    """The bench decodes at the same depth again and again."""
    from pydeltamem.bench import runs
    from pydeltamem.runtime import library

    model = runs.Model(library.llama_cpp, runs.Options(str(hybrid_files[0]), 256, 64, 32, 1, 0, False, "f16", "f16"))
    side = runs.Runner(model, None)
    with refuses(ModelError, hybrid_files[0]):
        side.decode(20, 2)
    side.close()
    model.close()


def test_a_hybrid_goes_on(make_hybrid):
    """A longer prompt, and one that comes after the text was forgotten: nothing but what is new is read."""
    llm, other = make_hybrid(), make_hybrid()
    take(llm.generate(HYBRID[:5], temp=0), 1)
    take(llm.generate(HYBRID, temp=0), 1)
    assert llm.memory.n_written == len(HYBRID) and llm.memory.n_decoded_again == 0
    llm.reset()
    llm.eval([20, 21])
    other.eval(HYBRID)
    other.reset()
    other.eval([20, 21])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_forgetting_one_text_of_a_hybrid_leaves_the_others(make_hybrid):
    llm, alone = make_hybrid(n_seq_max=2), make_hybrid()
    text = llm._engine.text()
    text.eval(HYBRID)
    llm.eval([20, 21])
    llm.reset()
    text.eval([22, 23])
    alone.eval([*HYBRID, 22, 23])
    np.testing.assert_allclose(text.state, alone.memory.state, **SAME)


def test_dropping_text_of_a_hybrid_keeps_what_it_wrote(make_hybrid):
    llm = make_hybrid()
    llm.eval(HYBRID)
    state = llm.memory.state
    llm._text.shift(2, 5)
    llm.memory.write = False
    llm.eval([20])
    np.testing.assert_array_equal(llm.memory.state, state)


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


# states that are saved


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


def one_decode(request, n_max):
    """Reads the first n_max tokens of a request, as the engine does."""
    with request.text.lock:
        assert request.plan([])
        piece, job = request.piece(n_max)
        [result] = request.text.slots.decode([job])
        request.did_decode(piece, result)


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


def fail(*_):
    raise ValueError("no")


def fail_at(patch, llm, n):
    """llama.cpp fails in the n-th decode from here on, and in those after it."""
    decode, left = type(llm._ctx).decode, [n]

    def fail_later(ctx, batch):
        left[0] -= 1
        if left[0] <= 0:
            raise RuntimeError("llama_decode returned 1")
        return decode(ctx, batch)

    patch.setattr(type(llm._ctx), "decode", fail_later)


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

    def fail(ctx, batch):
        raise RuntimeError("llama_decode returned 1")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(type(llm._ctx), "decode", fail)
        llm.eval(OTHER)
    if then == "another memory":
        llm.memory.reset()
        assert not llm.memory.state.any() and llm.memory.n_written == 0
        return
    if then == "the text is forgotten":
        llm.reset()
    assert llm.memory.n_written == 10
    np.testing.assert_allclose(llm.memory.state, read_once(tokens[:10]), **SAME)


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


# rehearsal


def read_twice(llm, *ingests):
    """The memory of a model that read a text, forgot it and read it again. Each ingest: tokens, and options of eval."""
    for _ in range(2):
        llm.reset()
        for tokens, options in ingests:
            llm.eval(tokens, **options)
    return llm.memory.state


@pytest.mark.parametrize("n_batch", [512, 5])
def test_a_rehearsed_text_is_read_twice(make, n_batch):
    """It stays, with the logits of what may follow it."""
    llm, other = make(n_batch=n_batch), make(n_batch=n_batch)
    for tokens in (TOKENS, OTHER):
        llm.eval(tokens)
    llm.memory.rehearse()
    twice = read_twice(other, (TOKENS + OTHER, {}))
    np.testing.assert_allclose(llm.memory.state, twice, **SAME)
    assert llm.memory.n_written == 2 * len(TOKENS + OTHER) and texts(llm)[: llm.n_tokens] == TOKENS + OTHER
    np.testing.assert_allclose(llm.logits, other.logits, rtol=0, atol=1e-5)
    llm.eval([14])
    other.eval([14])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_rehearsal_writes_what_wrote(make):
    llm, other = make(), make()
    llm.eval(TOKENS)
    llm.memory.write = False
    llm.eval(OTHER)
    llm.memory.rehearse()
    assert llm.memory.n_written == 2 * len(TOKENS)
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (TOKENS, {})), **SAME)


def test_rehearsal_in_segments(make):
    llm, other = make("ssw_message"), make("ssw_message")
    ids = np.array([0] * 5 + [1] * 7, dtype=np.int32)
    llm.eval(TOKENS, ids)
    llm.memory.rehearse()
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (TOKENS, {"segments": ids})), **SAME)


def test_going_back_after_a_rehearsal(make):
    """The text goes back, and the second reading with it; the first one stays."""
    llm, other = make(), make()
    llm.eval(TOKENS)
    llm.eval(OTHER)
    llm.memory.rehearse()
    llm.memory.rollback(len(TOKENS))
    other.eval(TOKENS + OTHER)
    other.reset()
    other.eval(TOKENS)
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_a_rehearsal_that_fails(make, monkeypatch):
    """Leaves text and memory as they were."""
    llm, other = make(n_batch=4), make(n_batch=4)
    llm.eval(TOKENS)
    other.eval(TOKENS)
    before, decode, left = llm.memory.state, type(llm._ctx).decode, [2]

    def fail(ctx, batch):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("llama_decode returned 1")
        return decode(ctx, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(type(llm._ctx), "decode", fail)
        llm.memory.rehearse()
    np.testing.assert_array_equal(llm.memory.state, before)
    assert llm.memory.n_written == len(TOKENS) and texts(llm)[: llm.n_tokens] == TOKENS
    llm.memory.rollback(5)
    other.memory.rollback(5)
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_rehearsal_of_a_hybrid(make_hybrid):
    llm, other = make_hybrid(), make_hybrid()
    llm.eval(HYBRID)
    llm.memory.rehearse()
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (HYBRID, {})), **SAME)


def test_nothing_to_rehearse(make):
    llm = make()
    llm.memory.rehearse()
    assert not llm.memory.state.any() and llm.n_tokens == 0
    llm.memory.detach()
    with refuses(AdapterError):
        llm.memory.rehearse()
