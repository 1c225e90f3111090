"""Sampling from the likeliest tokens: the same tokens as llama_cpp's samplers, which sort the whole vocabulary."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from llama_cpp import Llama, LlamaGrammar, llama_token_data

from pydeltamem import Conversation, DeltaMemLlama, InputError
from pydeltamem.runtime import library
from pydeltamem.runtime.sampling import n_likeliest
from refusals import refuses

PROMPT = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88]
NEUTRAL = {
    "top_k": 40,
    "temp": 0.8,
    "repeat_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "mirostat_mode": 0,
    "logits_processor": None,
    "grammar": None,
}


def candidates(logits, k):
    """(ids, logits) of the library's k likeliest tokens."""
    out = (llama_token_data * max(k, 1))()
    pointer = logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    n = library.llama_deltamem_candidates(pointer, len(logits), k, out)
    return [entry.id for entry in out[:n]], [entry.logit for entry in out[:n]]


@given(
    arrays.arrays(
        np.float32,
        st.integers(0, 300),
        elements=st.one_of(
            st.floats(width=32, allow_infinity=False),
            st.integers(-2, 2).map(float),  # as likely
            st.sampled_from([-np.inf, np.nan]),
        ),
    ),
    st.integers(-1, 400),
)
@settings(deadline=None)
def test_the_likeliest_tokens(logits, k):
    known = [i for i in range(len(logits)) if logits[i] > -np.inf]
    first = sorted(sorted(known, key=lambda i: -logits[i])[: max(k, 0)])  # stable: of equal logits the first
    assert candidates(logits, k) == (first, [logits[i] for i in first])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temp": 0.0},
        {"temp": 0.0, "repeat_penalty": 1.3},
        {"temp": -1.0},
        {"top_k": 1},
        {"top_k": 0},
        {"top_k": 100_000, "min_p": 0.0},
        {"repeat_penalty": 1.5, "top_k": 3, "temp": 1.5},
        {"repeat_penalty": 0.5, "top_k": 3},
        {"frequency_penalty": 0.7, "presence_penalty": 0.4, "top_k": 5},
        {"presence_penalty": -0.4, "top_k": 5},
        {"typical_p": 0.5, "top_p": 0.5, "min_p": 0.0, "temp": 2.0},
        {"mirostat_mode": 1},
        {"mirostat_mode": 2},
        pytest.param({"logits_processor": [lambda tokens, logits: -logits], "top_k": 2}, id="logits_processor"),
        pytest.param({"grammar": LlamaGrammar.from_string('root ::= [a-z]+ "."', verbose=False)}, id="grammar"),
    ],
    ids=str,
)
def test_the_same_tokens_as_llama_cpp(golden_dir, options):
    shared = {"n_ctx": 128, "n_threads": 1, "seed": 3, "verbose": False}
    path = golden_dir / "qwen3" / "base-f32.gguf"
    found = []
    for llm in (Llama(str(path), **shared), DeltaMemLlama(path, **shared)):
        found.append(list(itertools.islice(llm.generate(PROMPT, **options), 40)))
        llm.close()
    assert found[0] == found[1]
    if not options:
        assert len(set(found[0])) > 5  # not one token again and again


@pytest.mark.parametrize(
    "options, n",
    [
        ({}, 40),
        ({"temp": 0.0, "mirostat_mode": 2}, 1),
        ({"top_k": 7, "repeat_penalty": 1.1}, 7 + 64),
        ({"temp": 0.0, "presence_penalty": 0.1}, 1 + 64),
        ({"repeat_penalty": 0.9}, None),
        ({"frequency_penalty": -0.1}, None),
        ({"repeat_penalty": float("nan")}, None),
        ({"temp": -1.0}, None),
        ({"mirostat_mode": 1}, None),
        ({"top_k": 0}, None),
        ({"top_k": 10_000}, None),
        ({"grammar": ...}, None),
        ({"logits_processor": [len]}, None),
    ],
    ids=str,
)
def test_of_how_many_tokens_one_is_taken(options, n):
    assert n_likeliest({**NEUTRAL, **options}, 64) == n


@pytest.mark.parametrize(
    "options", [{"temp": 0.0}, {"temp": 0.8}, {"temp": -1.0}, {"mirostat_mode": 1}, {"mirostat_mode": 2}]
)
def test_a_grammar_that_allows_no_token_that_is_left(golden_dir, options):
    """llama.cpp ends the process."""
    grammar = LlamaGrammar.from_string('root ::= "a"+', verbose=False)

    with DeltaMemLlama(golden_dir / "qwen3" / "base-f32.gguf", n_ctx=256, verbose=False) as llm:
        b = llm.tokenize(b"b", add_bos=False)[-1]

        def only_b(ids, scores):
            return np.where(np.arange(len(scores)) == b, scores, -np.inf)

        def exclude(ids, scores):
            return only_b(ids, scores) if len(ids) > len(PROMPT) + 1 else scores

        tokens = llm.generate(PROMPT, grammar=grammar, logits_processor=[exclude], **options)
        assert len([next(tokens), next(tokens)]) == 2
        with refuses(InputError, "grammar"):
            next(tokens)
        assert llm.n_tokens == len(PROMPT) + 1
        talk = Conversation(llm, grammar=grammar, logits_processor=[only_b])
        with refuses(InputError, "grammar"):
            talk.say("hello")
        assert talk.messages == [] and talk.n_tokens == 0
