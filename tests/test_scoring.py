"""create_completion: log probabilities of prompts and replies, and why a reply ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
from llama_cpp import LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp.llama_tokenizer import LlamaHFTokenizer

from pydeltamem import InputError
from pydeltamem.runtime.completion import biased
from refusals import refuses

TEXT = "hello there, how are you"
TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31]
NEAR = dict(rtol=0, atol=1e-4)
MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def scorer(make_llm):
    """scorer(**kwargs): a model with the logits of every token, in float32."""
    return lambda case="tsw_qo", **kwargs: make_llm(case, type_k=0, type_v=0, logits_all=True, **kwargs)


def expected(llm, tokens):
    """Log probabilities of what may follow each token, read at once by an empty memory, [n, n_vocab]."""
    llm.reset()
    if llm.memory.attached:
        llm.memory.reset()
    llm.eval(tokens)
    logits = llm.scores[: len(tokens)].astype(np.float64)
    llm.reset()
    if llm.memory.attached:
        llm.memory.reset()
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def never_end(llm):
    return {token: -1e6 for token in range(llm.n_vocab()) if llm._engine.slots.is_end(token)}


def scored(llm, prompt, **options):
    options = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 5, **options}
    return llm.create_completion(prompt, **options)["choices"][0]["logprobs"]


# the prompt


@pytest.mark.parametrize("case", [None, "tsw_qo"])
@pytest.mark.parametrize("prompt", [TEXT, TOKENS], ids=["text", "tokens"])
@pytest.mark.parametrize("n_batch", [512, 5])
def test_a_prompt_is_scored_by_what_stands_before(scorer, case, prompt, n_batch):
    llm = scorer(case, n_batch=n_batch)
    tokens = llm.tokenize(prompt.encode()) if prompt is TEXT else prompt
    right = expected(llm, tokens)
    logprobs = scored(llm, prompt, max_tokens=0)
    assert {len(values) for values in logprobs.values()} == {len(tokens)}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(
        logprobs["token_logprobs"][1:], [right[i - 1, tokens[i]] for i in range(1, len(tokens))], **NEAR
    )
    for i in range(1, len(tokens)):
        top = logprobs["top_logprobs"][i]
        assert max(top.values()) == pytest.approx(right[i - 1].max(), abs=1e-4)
        assert top[logprobs["tokens"][i]] >= logprobs["token_logprobs"][i]
    json.dumps(logprobs)


def test_a_prompt_behind_the_token_that_begins_texts(scorer):
    """It is none of the text: the first token that is has a log probability."""
    llm = scorer(None, kv_overrides={"tokenizer.ggml.add_bos_token": True})
    tokens = llm.tokenize(TEXT.encode())
    assert tokens[0] == llm.token_bos()
    right = expected(llm, tokens)
    logprobs = scored(llm, TEXT, max_tokens=0)
    np.testing.assert_allclose(
        logprobs["token_logprobs"], [right[i - 1, tokens[i]] for i in range(1, len(tokens))], **NEAR
    )
    assert logprobs["text_offset"][0] == 0
    as_tokens = scored(llm, tokens, max_tokens=0)
    assert as_tokens["token_logprobs"][0] is None
    np.testing.assert_allclose(as_tokens["token_logprobs"][1:], logprobs["token_logprobs"], **NEAR)


def by_offset(logprobs, n_context):
    """As lm-eval's model "gguf" adds them up."""
    first = next(i for i, offset in enumerate(logprobs["text_offset"]) if offset >= n_context)
    greedy = all(
        max(top, key=top.get) == token
        for token, top in zip(logprobs["tokens"][first:-1], logprobs["top_logprobs"][first:-1])
    )
    return sum(logprobs["token_logprobs"][first:-1]), greedy


def by_position(logprobs, n_context):
    """As lm-eval's model "local-completions" does, which sends token ids."""
    values, tops = logprobs["token_logprobs"][n_context:-1], logprobs["top_logprobs"][n_context:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops))


def test_lm_eval(scorer):
    llm = scorer()
    context, continuation = "hello there,", " how are you"
    tokens, n_context = llm.tokenize((context + continuation).encode()), len(llm.tokenize(context.encode()))
    assert llm.tokenize(context.encode()) == tokens[:n_context]
    right = expected(llm, tokens)
    total = sum(right[i - 1, tokens[i]] for i in range(n_context, len(tokens)))
    for add, prompt, n in ((by_offset, context + continuation, len(context)), (by_position, tokens, n_context)):
        llm.reset()
        llm.memory.reset()
        value, greedy = add(scored(llm, prompt, logprobs=10), n)
        assert value == pytest.approx(total, abs=1e-3) and not greedy


def test_lm_eval_of_the_greedy_continuation(scorer):
    llm = scorer()
    tokens = list(TOKENS)
    for _ in range(4):
        tokens.append(int(expected(llm, tokens)[-1].argmax()))
    value, greedy = by_position(scored(llm, tokens, logprobs=1), len(TOKENS))
    assert greedy and value < 0
    other = [*TOKENS, (tokens[len(TOKENS)] + 1) % llm.n_vocab(), *tokens[len(TOKENS) + 1 :]]
    assert not by_position(scored(llm, other, logprobs=1), len(TOKENS))[1]


def test_a_prompt_that_was_read_in_part(scorer):
    """Its beginning is not read again, and its log probabilities are those of then."""
    llm = scorer(None)
    first = scored(llm, TOKENS[:8], max_tokens=4)
    again = scored(llm, TOKENS, max_tokens=0)
    np.testing.assert_allclose(again["token_logprobs"][1:8], first["token_logprobs"][1:8], **NEAR)
    right = expected(llm, TOKENS)
    np.testing.assert_allclose(
        again["token_logprobs"][1:], [right[i - 1, TOKENS[i]] for i in range(1, len(TOKENS))], **NEAR
    )
    assert scored(llm, TOKENS, max_tokens=0) == scored(llm, TOKENS, max_tokens=0)


def test_offsets_are_those_of_the_characters(scorer):
    llm = scorer(None)
    prompt = "hello – you"
    choice = llm.create_completion(prompt, max_tokens=3, echo=True, logprobs=0, temperature=0)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        if not token.startswith("bytes:") and offset not in (0, len(choice["text"])):
            assert choice["text"][offset:].startswith(token) or token.startswith("<")
    n_prompt = len(llm.tokenize(prompt.encode()))
    assert logprobs["text_offset"][n_prompt] == len(prompt)
    assert len(set(logprobs["tokens"])) > 3 and any(token == "bytes:\\xe2" for token in logprobs["tokens"])


# the reply


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_scored(scorer, echo, draft, stream):
    drafts = {"draft_model": LlamaPromptLookupDecoding(2, 5)} if draft else {}
    llm = scorer(None, **drafts)
    options = dict(max_tokens=12, logprobs=3, temperature=1.5, seed=4, echo=echo)
    answer = llm.create_completion(TOKENS * 2, stream=stream, **options)
    chunks = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    n_prompt = 24 if echo else 0
    assert len(logprobs["tokens"]) > n_prompt + 3
    tokens = list(llm.eval_tokens)
    assert tokens[:24] == TOKENS * 2
    right = expected(llm, tokens)
    first = 1 if echo else 24
    for i in range(first, len(tokens)):
        at = i if echo else i - 24
        assert logprobs["token_logprobs"][at] == pytest.approx(right[i - 1, tokens[i]], abs=1e-3)
        top = logprobs["top_logprobs"][at]
        assert max(top.values()) == pytest.approx(right[i - 1].max(), abs=1e-3)
        assert list(top.values())[:2] == sorted(top.values(), reverse=True)[:2]
    json.dumps(logprobs)


def test_the_likeliest_token_is_listed_also_where_another_was_sampled(scorer):
    llm = scorer(None)
    logprobs = scored(
        llm, TOKENS, logprobs=1, max_tokens=30, temperature=3.0, seed=1, echo=False, top_k=0, top_p=1, min_p=0
    )
    others = [top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"]) if max(top, key=top.get) != token]
    assert others and all(len(top) == 2 for top in others)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_begins_a_text(scorer, prompt):
    llm = scorer(None)
    right = expected(llm, [llm.token_bos()])
    answer = llm.create_completion(prompt, max_tokens=3, logprobs=1, temperature=0, echo=True)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] == pytest.approx(right[0].max(), abs=1e-4)
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(scorer, stream):
    llm = scorer(None)

    def contents(**options):
        answer = llm.create_chat_completion(MESSAGES, max_tokens=5, temperature=0, stream=stream, **options)
        choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
        return [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]

    assert contents() == []
    tokens = contents(logprobs=True, top_logprobs=2)
    assert tokens and all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in tokens)
    alone = contents(logprobs=True)
    assert [token["logprob"] for token in alone] == pytest.approx([token["logprob"] for token in tokens], abs=1e-4)
    assert all(token["top_logprobs"] == [] for token in alone)
    read = list(llm.eval_tokens)
    right = expected(llm, read)
    n_prompt = len(read) - len(tokens) + (0 if len(tokens) < 5 else 1)
    values = [right[i - 1, read[i]] for i in range(n_prompt, len(read))]
    np.testing.assert_allclose([token["logprob"] for token in tokens][: len(values)], values, rtol=0, atol=1e-3)


# where it ends


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_no_tokens(llm, stream, echo):
    """The prompt is read, and nothing else."""
    answer = llm.create_completion(TEXT, max_tokens=0, echo=echo, stream=stream)
    if stream:
        *chunks, last = answer
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT * echo
        assert last["choices"][0]["finish_reason"] == "length"
    else:
        assert answer["choices"][0]["text"] == TEXT * echo
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
    assert list(llm.eval_tokens) == llm.tokenize(TEXT.encode())
    assert llm.memory.n_written == llm.n_tokens


def test_no_tokens_of_a_chat(llm):
    answer = llm.create_chat_completion(MESSAGES, max_tokens=0)
    assert answer["choices"][0]["message"]["content"] == "" and answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("max_tokens", [None, -1])
def test_without_a_limit_the_context_is_one(make_llm, max_tokens):
    llm = make_llm(n_ctx=256)
    answer = llm.create_completion(TOKENS, max_tokens=max_tokens, logit_bias=never_end(llm), temperature=0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == llm.n_ctx() == 256


@pytest.mark.parametrize("n", [255, 256, 257])
def test_a_prompt_as_long_as_the_context(scorer, n):
    llm = scorer(None, n_ctx=256)
    prompt = (TOKENS * 22)[:n]
    if n <= 256:
        assert len(scored(llm, prompt, max_tokens=0)["tokens"]) == n
    if n > 255:
        with refuses(InputError, n, 256):
            llm.create_completion(prompt, max_tokens=0 if n > 256 else 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_within_a_character(make_llm, stream):
    """The reply up to there is not lost, nor is one that goes on."""
    llm = make_llm(None)
    euro = llm.tokenize("€".encode())[-3:]
    assert b"".join(map(lambda token: llm.detokenize([token]), euro)) == "€".encode()
    script = [*llm.tokenize(b"hello"), *euro, *llm.tokenize(b"you")]

    def forced(ids, scores):
        scores[:] = -1e9
        scores[script[len(ids) - len(TOKENS)]] = 0
        return scores

    for n in range(1, len(script)):
        llm.reset()
        options = dict(max_tokens=n, temperature=0, logits_processor=LogitsProcessorList([forced]), stream=stream)
        answer = llm.create_completion(TOKENS, **options)
        text = "".join(chunk["choices"][0]["text"] for chunk in answer) if stream else answer["choices"][0]["text"]
        assert text == b"".join(llm.detokenize([token]) for token in script[:n]).decode(errors="ignore")


@pytest.mark.parametrize("logits_all", [False, True])
def test_stopping_criteria(make_llm, logits_all):
    """They see the tokens that were read and the logits of the next, and end the reply with "stop"."""
    llm = make_llm(None, logits_all=logits_all)
    seen = []

    def criterion(ids, logits):
        seen.append((ids.tolist(), logits.copy()))
        return len(seen) == 4

    answer = llm.create_completion(
        TOKENS,
        max_tokens=20,
        temperature=0,
        stopping_criteria=StoppingCriteriaList([criterion]),
        logit_bias=never_end(llm),
    )
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 3
    assert [len(ids) for ids, _ in seen] == [12, 13, 14, 15] and seen[0][0] == TOKENS
    for ids, logits in seen:
        llm.reset()
        llm.eval(ids)
        np.testing.assert_allclose(logits, llm.logits, rtol=0, atol=1e-3)


def test_of_two_stop_strings_the_first_in_the_text_ends_it(make_llm):
    llm = make_llm(None)
    whole = llm.create_completion(TOKENS, max_tokens=30, temperature=0)["choices"][0]["text"]
    early, late = whole[3:5], whole[8:10]
    for stop in ([early, late], [late, early], early):
        answer = llm.create_completion(TOKENS, max_tokens=30, temperature=0, stop=stop)
        assert answer["choices"][0]["text"] == whole[: whole.index(early)]
        assert answer["choices"][0]["finish_reason"] == "stop"


# other arguments


def test_a_bias_beside_processors(make_llm):
    """Both count."""
    llm, called = make_llm(None), []

    def processor(ids, scores):
        called.append(len(ids))
        return scores

    options = dict(
        max_tokens=3, temperature=0, logit_bias={"77": 1e9}, logits_processor=LogitsProcessorList([processor])
    )
    llm.create_completion(TOKENS, **options)
    assert list(llm.eval_tokens)[12:] == [77, 77] and called == [12, 13, 14]


def test_a_suffix(make_llm):
    """A model without tokens for the middle of a text gets none of others; the suffix is appended."""
    llm = make_llm(None)
    plain = llm.create_completion(TEXT, max_tokens=4, temperature=0)
    for stream in (False, True):
        answer = llm.create_completion(TEXT, suffix=" end", max_tokens=4, temperature=0, stream=stream)
        text = "".join(each["choices"][0]["text"] for each in (answer if stream else [answer]))
        assert text == plain["choices"][0]["text"] + " end"
    assert list(llm.eval_tokens)[: len(llm.tokenize(TEXT.encode()))] == llm.tokenize(TEXT.encode())


class Characters:
    """A tokenizer of Hugging Face's kind: a character a token."""

    def encode(self, text, add_special_tokens=True):
        return [ord(character) % 256 + 3 for character in text]

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(max(0, token - 3) % 256 for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tokenizer_of_ones_own(make_llm, stream):
    llm = make_llm(None, tokenizer=LlamaHFTokenizer(Characters()))
    script = [byte + 3 for byte in "grün é!".encode()]

    def forced(ids, scores):
        scores[:] = -1e9
        scores[script[len(ids) - 5]] = 0
        return scores

    options = dict(max_tokens=len(script), temperature=0, logits_processor=LogitsProcessorList([forced]), stream=stream)
    answer = llm.create_completion("hello", **options)
    assert "".join(each["choices"][0]["text"] for each in (answer if stream else [answer])) == "grün é!"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"logprobs": -1}, ["logprobs", -1]),
        ({"logprobs": 1.5}, ["logprobs", 1.5]),
        ({"max_tokens": "3"}, ["max_tokens"]),
        ({"max_tokens": 1.5}, ["max_tokens", 1.5]),
        ({"stop": 5}, ["stop", 5]),
        ({"stop": ["a", b"b"]}, ["stop", "b'b'"]),
        ({"suffix": 5}, ["suffix", 5]),
        ({"temperature": "hot"}, ["temperature", "'hot'"]),
        ({"logit_bias": {400: 1.0}}, ["logit_bias", 400]),
        ({"logit_bias": {-1: 1.0}}, ["logit_bias", -1]),
        ({"logit_bias": {7: float("nan")}}, ["logit_bias", 7]),
        ({"logit_bias": {"a": 1.0}}, ["logit_bias"]),
        ({"logit_bias": [3]}, ["logit_bias"]),
        ({"prompt": [5, 320]}, [320]),
        ({"prompt": None}, ["tokens"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments(scorer, arguments, names, stream):
    llm = scorer()
    with refuses(InputError, *names):
        list(llm.create_completion(**{"prompt": TEXT, "stream": stream, **arguments}))
    assert llm.n_tokens == 0


def test_biases_are_added_at_once():
    """Found: those of a whole vocabulary took 40 ms a token, in which all requests of a server wait."""

    class Counting(np.ndarray):
        n_set = 0

        def __setitem__(self, *arguments):
            Counting.n_set += 1
            super().__setitem__(*arguments)

    scores = np.arange(1000, dtype=np.float32)
    added = biased({**{str(i): i / 7 for i in range(1000)}, "5": False, "6": 1e300}, 1000)([], scores.view(Counting))
    expected = scores + np.arange(1000, dtype=np.float32) / np.float32(7)
    expected[[5, 6]] = -np.inf, np.inf
    np.testing.assert_allclose(added, expected, rtol=1e-6)
    assert Counting.n_set < 10 and scores[5] == 5


def test_log_probabilities_need_all_logits(llm):
    with refuses(InputError, "logprobs", "logits_all=True"):
        llm.create_completion(TEXT, logprobs=1)
    with refuses(InputError, "logprobs", "logits_all=True"):
        llm.create_chat_completion(MESSAGES, logprobs=True)
    assert llm.n_tokens == 0
