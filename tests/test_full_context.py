"""Replies that reach the end of the context, or the limit asked for: within a character, with drafts, through every
method. They end with "length", lose nothing, and write no more to the memory than asked for.
"""

from __future__ import annotations

import pytest
from llama_cpp import LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from pydeltamem import Conversation

N_CTX = 256
SMILE = "\N{GRINNING FACE}"


@pytest.fixture
def make(make_llm):
    return lambda *args, **kwargs: make_llm(*args, n_ctx=N_CTX, **kwargs)


@pytest.fixture(params=["plain", "drafts"])
def llm(request, make):
    options = {"draft_model": LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=10)}
    return make(**(options if request.param == "drafts" else {}))


def smiles(llm):
    """A logits processor after which nothing but smiles of four tokens is said, and the tokens of one."""
    four = llm.tokenize(SMILE.encode(), add_bos=False)[-4:]
    assert [len(llm.detokenize([token])) for token in four] == [1] * 4

    def process(ids, scores):
        after = four.index(ids[-1]) + 1 if ids[-1] in four else 0
        scores[:] = -100
        scores[four[after % 4]] = 100
        return scores

    return LogitsProcessorList([process]), four


def prompt(n):
    """Token ids that drafts are made of: they repeat."""
    return ([9, 8, 77, 6] * n)[:n]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("n_prompt", "max_tokens", "n"),
    [(250, 100, 6), (250, None, 6), (249, 7, 7), (100, 10, 10), (100, 1, 1), (255, 5, 1)],
)
def test_a_completion(llm, n_prompt, max_tokens, n, stream):
    processor, _ = smiles(llm)
    answer = llm.create_completion(
        prompt(n_prompt), max_tokens=max_tokens, temperature=0, logits_processor=processor, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(SMILE * (n // 4))
    assert llm.n_tokens <= n_prompt + n and llm.memory.n_written == llm.n_tokens >= n_prompt + n - 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat(llm, stream):
    processor, _ = smiles(llm)
    messages = [{"role": "user", "content": "hello " * 27}]
    answer = llm.create_chat_completion(messages, temperature=0, logits_processor=processor, stream=stream)
    last = list(answer)[-1] if stream else answer
    assert last["choices"][0]["finish_reason"] == "length"
    assert llm.memory.n_written == llm.n_tokens <= N_CTX
    if not stream:
        assert answer["choices"][0]["message"]["content"].startswith(SMILE)


def test_generate(llm):
    """It gives every token that there is room for, and says why it ended."""
    processor, four = smiles(llm)
    tokens = list(llm.generate(prompt(250), temp=0, logits_processor=processor))
    assert tokens == (four * 2)[:7]  # the last one is not decoded
    assert llm.finish_reason == "length"
    assert llm.memory.n_written == llm.n_tokens == N_CTX
    following = llm.generate([9, 8], temp=0)
    next(following)
    assert llm.finish_reason is None
    following.close()
    assert llm.finish_reason is None


def test_generate_that_is_stopped(llm):
    criteria = StoppingCriteriaList([lambda ids, logits: len(ids) >= 12])
    assert len(list(llm.generate(prompt(10), temp=0, stopping_criteria=criteria))) == 2
    assert llm.finish_reason == "stop"


def test_a_prompt_that_fills_the_context(llm):
    assert len(list(llm.generate(prompt(N_CTX), temp=0))) == 1
    assert llm.finish_reason == "length" and llm.memory.n_written == N_CTX


@pytest.mark.parametrize("n_predict", [None, 6])
def test_a_conversation(make, n_predict):
    llm = make(n_seq_max=2)
    processor, _ = smiles(llm)
    one = Conversation(llm, temp=0.0, logits_processor=processor)
    reply = one.say("hello there " * 12, n_predict=n_predict)
    assert one.finish_reason == "length" and reply.startswith(SMILE) and reply == one.messages[-1]["content"]
    assert one.memory.n_written == one.n_tokens <= N_CTX
    if n_predict is None:
        assert one.n_tokens == N_CTX
    assert one.say("and", n_predict=4) == SMILE  # it goes on
