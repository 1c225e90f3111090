"""save_state, load_state and pickles: between contexts of one length, all or nothing, and nothing that was not read."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from llama_cpp import Llama, LlamaDiskCache, LlamaRAMCache

from pydeltamem import InputError
from refusals import refuses

TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31]
OTHER = [21, 22, 23, 24, 25, 26]
NEAR = dict(rtol=0, atol=1e-4)


@pytest.mark.parametrize("logits_all", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("n_batch", [(512, 5), (5, 512), (16, 7)])
@pytest.mark.parametrize("case", [None, "tsw_qo"])
def test_from_one_batch_size_to_another(make, case, n_batch, logits_all):
    llm, elsewhere = (make(case, n_batch=n, logits_all=every) for n, every in zip(n_batch, logits_all))
    once = make(case)
    llm.eval(TOKENS)
    elsewhere.eval(OTHER)
    elsewhere.load_state(pickle.loads(pickle.dumps(llm.save_state())))
    assert elsewhere.eval_tokens == llm.eval_tokens and elsewhere.n_tokens == len(TOKENS)
    once.eval(TOKENS + OTHER)
    elsewhere.eval(OTHER)
    np.testing.assert_allclose(elsewhere.logits, once.logits, rtol=0, atol=1e-3)
    if case is not None:
        np.testing.assert_allclose(elsewhere.memory.state, once.memory.state, **NEAR)


@pytest.mark.parametrize("n_batch", [512, 5])
def test_a_state_holds_what_was_read(make, n_batch):
    """Not rows of logits that nobody asked for, nor what stood in the arrays before."""
    llm = make(n_batch=n_batch)
    llm.eval([77] * 400)
    llm.reset()
    llm.eval(TOKENS)
    state = llm.save_state()
    assert len(state.scores) == 0 and state.input_ids.tolist() == TOKENS
    assert 77 not in state.position.log.tokens
    assert len(pickle.dumps(state)) < len(state.llama_state) + 64 * llm.memory.state.nbytes + 50_000


def test_a_state_holds_the_logits_of_every_token_where_they_are_kept(make):
    llm, elsewhere = make(logits_all=True), make(logits_all=True)
    llm.eval(TOKENS)
    elsewhere.eval(OTHER * 5)
    elsewhere.load_state(llm.save_state())
    np.testing.assert_array_equal(elsewhere.scores[: len(TOKENS)], llm.scores[: len(TOKENS)])
    assert elsewhere.eval_logits == llm.eval_logits


def test_pickles_are_small(make):
    llm = make()
    llm.eval(TOKENS)
    assert len(pickle.dumps(llm)) < llm.memory.state.nbytes + 20_000


@pytest.mark.parametrize("source", ["ours", "plain"])
def test_logits_that_a_state_lacks_are_made_again(make, base, source):
    """A prompt is scored rightly that continues a state without them."""
    llm = make(None, logits_all=True)
    options = dict(max_tokens=0, echo=True, logprobs=1)
    expected = llm.create_completion(TOKENS + OTHER, **options)["choices"][0]["logprobs"]
    if source == "ours":
        other = make(None)
    else:
        other = Llama(str(base()), n_ctx=512, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False)
    other.eval(TOKENS)
    llm.eval(OTHER)
    llm.load_state(other.save_state())
    assert llm.n_tokens == len(TOKENS)
    found = llm.create_completion(TOKENS + OTHER, **options)["choices"][0]["logprobs"]
    np.testing.assert_allclose(found["token_logprobs"][1:], expected["token_logprobs"][1:], rtol=0, atol=1e-3)


def state_of(llm):
    memory = llm.memory.state if llm.memory.attached else np.zeros(0)
    return llm.eval_tokens, memory, llm._seed


@pytest.mark.parametrize("case", [None, "tsw_qo"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {"llama_state": state.llama_state[: len(state.llama_state) // 2]},
        lambda state: {"llama_state": b""},
        lambda state: {"llama_state": bytes(len(state.llama_state))},
        lambda state: {"scores": np.zeros((0, 7), dtype=np.single)},
        lambda state: {"input_ids": np.full(len(state.input_ids), 320, dtype=np.intc)},
    ],
    ids=["half", "empty", "zeros", "vocabulary", "tokens"],
)
@pytest.mark.parametrize("source", ["ours", "plain"])
def test_a_state_that_does_not_fit_leaves_all_as_it_was(make, base, case, spoil, source):
    llm, once = make(case, logits_all=True), make(case)
    if source == "ours":
        other = make(case)
    else:
        other = Llama(str(base()), n_ctx=512, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False)
    other.eval(OTHER)
    state = copy.copy(other.save_state())
    for name, value in spoil(state).items():
        setattr(state, name, value)
    state.llama_state_size = len(state.llama_state)
    llm.eval(TOKENS)
    tokens, memory, seed = state_of(llm)
    scores = llm.scores[: llm.n_tokens].copy()
    with pytest.raises(InputError, match=r"the state|320"):
        llm.load_state(state)
    assert state_of(llm)[0] == tokens and llm._seed == seed
    np.testing.assert_array_equal(state_of(llm)[1], memory)
    np.testing.assert_array_equal(llm.scores[: llm.n_tokens], scores)
    llm.eval(OTHER)
    assert list(llm.eval_tokens) == TOKENS + OTHER
    once.eval(TOKENS + OTHER)
    np.testing.assert_allclose(llm.logits, once.logits, rtol=0, atol=1e-3)
    if case is not None:
        np.testing.assert_allclose(llm.memory.state, once.memory.state, **NEAR)


def test_a_state_of_another_model_is_refused(make):
    llm, other = make(None), make(None, arch="smollm3")
    llm.eval(TOKENS)
    other.eval(OTHER)
    with refuses(InputError, "state"):
        llm.load_state(other.save_state())
    assert list(llm.eval_tokens) == TOKENS


def test_a_plain_state_longer_than_the_context(make, base):
    plain = Llama(str(base()), n_ctx=512, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False)
    plain.eval([5] * 300)
    llm = make(n_ctx=256)
    llm.eval(TOKENS)
    with refuses(InputError, "state", 512, 256):
        llm.load_state(plain.save_state())
    assert list(llm.eval_tokens) == TOKENS
    plain.close()


# caches of texts


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_of_another_context_is_a_miss(make, tmp_path, kind):
    cache = LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path))
    answers = []
    for n_ctx, n_batch in ((512, 512), (512, 7), (1024, 512)):
        llm = make(None, n_ctx=n_ctx, n_batch=n_batch)
        llm.set_cache(cache)
        answers.append(llm.create_completion(TOKENS, max_tokens=5, temperature=0)["choices"][0]["text"])
    assert answers[0] == answers[1] == answers[2]


def test_a_cache_makes_no_difference_to_log_probabilities(make):
    llm, cached = make(None, logits_all=True), make(None, logits_all=True)
    cached.set_cache(LlamaRAMCache())
    options = dict(max_tokens=3, echo=True, logprobs=2, temperature=0)
    for prompt in (TOKENS, OTHER, TOKENS[:8] + OTHER, TOKENS):
        found, expected = (model.create_completion(prompt, **options)["choices"][0] for model in (cached, llm))
        assert found["text"] == expected["text"]
        values = [each["logprobs"]["token_logprobs"][1:] for each in (found, expected)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-3)
