"""The public names of llama_cpp.Llama: docs/reference/llama-methods.md lists them, and the inherited ones work here."""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import pickle
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import Llama, LlamaGrammar, LlamaRAMCache, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp.llama_tokenizer import LlamaHFTokenizer, LlamaTokenizer

from pydeltamem import Conversation, DeltaMemLlama, InputError, ModelError
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.formats.packed import pack
from refusals import refuses
from test_inspect import rewritten

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "llama-methods.md"
TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31]
PUBLIC = [name for name in dir(Llama) if not name.startswith("_")] + [
    "__call__",
    "__init__",
    "__getstate__",
    "__setstate__",
]


def rows():
    """name: how it is, as the tables of the page say."""
    found = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_page_lists_every_public_name(base):
    plain = Llama(str(base()), n_ctx=64, verbose=False)
    attributes = [name for name in vars(plain) if not name.startswith("_")]
    plain.close()
    assert set(rows()) == {*PUBLIC, *attributes}


def test_the_page_says_which_are_our_own():
    overridden = {name for name, how in rows().items() if how == "overridden"}
    assert overridden == {name for name in rows() if name in vars(DeltaMemLlama)}
    assert set(rows().values()) == {"overridden", "inherited", "inherited and wrong"}


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isroutine(getattr(Llama, name))])
def test_the_parameters_are_those_of_llama_cpp(name):
    """Programs ask for them to see which of their options they can give. Ours may follow."""
    theirs, ours = (dict(inspect.signature(getattr(cls, name)).parameters) for cls in (Llama, DeltaMemLlama))
    if name == "__init__":
        del theirs["kwargs"]  # all that it ignores
    positional = [key for key, each in theirs.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    others = {"verbose": False, "filename": None}  # defaults, as docs/reference/llama-methods.md says
    for key, each in theirs.items():
        assert (ours[key].kind, ours[key].default) == (each.kind, others.get(key, each.default)), key


# tokens


def test_tokens_and_bytes(llm):
    for data in (b"hello there", "grün – €".encode(), b"a\0b", b""):
        tokens = llm.tokenize(data)
        assert llm.detokenize(tokens).removeprefix(b" ") == data
        assert llm.tokenizer().detokenize(tokens) == llm.detokenize(tokens)
        assert llm.tokenizer().tokenize(data) == llm.tokenize(data, special=True)
    assert llm.tokenize(b"\xff\xfe")  # no UTF-8
    for beyond in (b"\xf4\x90\x80\x80", b"\xf7\xbf\xbf\xbf"):  # after the last character of Unicode
        assert llm.tokenize(b"a" + beyond + b"b") == llm.tokenize("a\ufffdb".encode())
    assert llm.detokenize(llm.tokenize("\U0010ffff".encode())).removeprefix(b" ") == "\U0010ffff".encode()
    assert isinstance(llm.tokenizer(), LlamaTokenizer)
    assert llm.tokenizer().decode(llm.tokenizer().encode("hello")) in ("hello", " hello")


@pytest.mark.parametrize("n", [32, 33, 64, 65, 300])
def test_a_long_token_is_whole(base, tmp_path, n):
    """One of many spaces or dashes, as vocabularies have. llama_cpp drops what is longer than 32 bytes."""
    field = gguf.GGUFReader(base()).fields["tokenizer.ggml.tokens"]
    tokens = [token if i != 300 else "-" * n for i, token in enumerate(field.contents())]
    path = rewritten(tmp_path / "long.gguf", base(), tokenizer__ggml__tokens=tokens)
    with DeltaMemLlama(path, n_ctx=64, verbose=False) as llm:
        assert llm.detokenize([300, 300]) == llm.tokenizer().detokenize([300, 300]) == b"-" * 2 * n
        answer = llm.create_completion([7, 8], max_tokens=1, temperature=0, logit_bias={300: 1e6})
        assert answer["choices"][0]["text"] == "-" * n


def test_special_tokens(llm):
    end = llm.tokenize(b"<|im_end|>", add_bos=False, special=True)
    assert len(end) == 1 and llm.detokenize(end) == b"" and llm.detokenize(end, special=True) == b"<|im_end|>"
    assert len(llm.tokenize(b"<|im_end|>", special=False)) > 1


@pytest.mark.parametrize("token", [-1, 320, 10**6])
def test_bytes_of_no_token(llm, token):
    for detokenize in (llm.detokenize, llm.tokenizer().detokenize):
        with refuses(InputError, token):
            detokenize([5, token])


# sizes and ids


def test_sizes(llm, base):
    from pydeltamem.formats.gguf_header import Header

    keys = Header(base()).keys
    assert llm.token_bos() == keys["tokenizer.ggml.bos_token_id"]
    assert llm.token_eos() == keys["tokenizer.ggml.eos_token_id"]
    assert llm.detokenize([llm.token_nl()]) == b"\n"
    assert llm.n_vocab() == len(keys["tokenizer.ggml.tokens"]) == 320
    assert llm.n_embd() == keys["qwen3.embedding_length"] and llm.n_ctx() == 512
    assert llm.pooling_type() == 0


def test_pointers(make_llm):
    llm = make_llm()
    assert llm.ctx and llm.model
    path = llm.model_path
    llm.close()
    for name in ("ctx", "model"):
        with refuses(ModelError, path, "closed"):
            getattr(llm, name)


# the text


@pytest.mark.parametrize("logits_all", [False, True])
def test_what_was_read(make_llm, logits_all):
    llm = make_llm(logits_all=logits_all, n_batch=5)
    assert not llm.eval_tokens and not llm.eval_logits
    llm.eval(TOKENS)
    assert list(llm.eval_tokens) == TOKENS and llm.eval_tokens.maxlen == 512
    assert len(llm.eval_logits) == (12 if logits_all else 1)
    np.testing.assert_array_equal(llm.eval_logits[-1], llm.logits)
    llm.reset()
    assert not llm.eval_tokens and not llm.eval_logits and llm.n_tokens == 0


@pytest.mark.parametrize("verbose", [False, True])
def test_how_long_it_took_is_printed(make_llm, capfd, verbose):
    llm = make_llm(verbose=verbose)
    for _ in range(2):
        capfd.readouterr()
        llm.create_completion("hello", max_tokens=3)
        assert ("tokens per second" in capfd.readouterr().err) == verbose


def test_calls_that_know_nothing_of_each_other(make_llm):
    """As the page says: after both resets it is a model just loaded."""
    chat = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4, "temperature": 0}

    def asked(llm):
        choices = llm.create_chat_completion(**chat)["choices"]
        return choices, llm.logits, llm.memory.state

    llm, new = make_llm(), make_llm()
    llm.create_chat_completion([{"role": "user", "content": "grün"}], max_tokens=4)
    llm.reset()
    llm.memory.reset()
    for mine, expected in zip(asked(llm), asked(new)):
        np.testing.assert_array_equal(mine, expected)


def test_an_empty_memory_that_is_not_written_changes_nothing(make_llm):
    llm, without = make_llm(), make_llm(None)
    llm.memory.write = False
    for model in (llm, without):
        model.eval(TOKENS)
        model.eval(TOKENS[::-1])
    np.testing.assert_array_equal(llm.logits, without.logits)
    assert not llm.memory.state.any()


def test_call_is_create_completion(llm):
    options = dict(max_tokens=5, temperature=0)
    answers = []
    for ask in (llm, llm.create_completion):
        llm.reset()
        llm.memory.reset()
        answers.append(ask("hello", **options))
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def test_set_cache(llm):
    llm.set_cache(LlamaRAMCache())
    first = llm("hello", max_tokens=3, temperature=0)
    assert llm.cache.cache_size > 0
    llm.set_cache(None)
    assert llm.cache is None and first["usage"]["completion_tokens"] > 0


# sampling


def test_sample(make_llm):
    llm = make_llm(None)
    with refuses(InputError, "logits", "eval"):
        llm.sample()
    llm.eval(TOKENS)
    assert llm.sample(temp=0) == llm.sample(temp=1.0, top_k=1) == llm.logits.argmax()
    with refuses(InputError, "token 3", "logits_all=True"):
        llm.sample(idx=3)
    llm.n_tokens = 5
    with refuses(InputError, "logits", "eval"):
        llm.sample()


def test_each_sample_is_another_draw(make_llm):
    """Of a seed and a position it is always the same. llama_cpp draws the same number for each token."""
    llm = make_llm(None, seed=7)
    flat = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logits_processor": [lambda ids, scores: scores * 0]}

    def drawn(n):
        llm.reset()
        llm.eval(TOKENS)
        for _ in range(n):
            llm.eval([llm.sample(**flat)])
        return llm.eval_tokens

    tokens = drawn(8)
    assert len({*tokens} - {*TOKENS}) > 4 and drawn(8) == tokens
    llm.set_seed(8)
    assert drawn(8) != tokens


def test_sample_is_of_its_options_after_a_reply(make_llm):
    llm = make_llm(None)
    next(llm.generate(TOKENS, temp=5.0, top_k=0, top_p=1.0, min_p=0.0))
    assert {llm.sample(temp=0) for _ in range(20)} == {llm.logits.argmax()}


def test_sample_of_an_earlier_token(make_llm):
    """It may be of another batch than the latest one."""
    llm = make_llm(None, logits_all=True, n_batch=5)
    llm.eval(TOKENS)
    for i in range(len(TOKENS)):
        assert llm.sample(idx=i, temp=0) == llm.scores[i].argmax()
        grammar = LlamaGrammar.from_string('root ::= "l" "l"', verbose=False)
        assert llm.detokenize([llm.sample(idx=i, temp=0, grammar=grammar)]) in (b"l", b"ll")
    for i in (-1, 12, 500):
        with refuses(InputError, f"token {i}"):
            llm.sample(idx=i)


@pytest.mark.parametrize("n_batch", [3, 512])
def test_drafts_that_are_longer_than_a_batch(make_llm, n_batch):
    prompt = [*range(15, 25)] * 3
    seen, told = [], []

    def processor(ids, scores):
        seen.append(len(ids))
        wanted = scores.copy()
        wanted[15 + len(ids) % 10] += 1000  # as in the prompt
        wanted[200] += 2000 * (len(ids) % 7 == 0)  # but for some
        return wanted

    def criteria(ids, logits):
        told.append(ids.tolist())
        return False

    options = dict(max_tokens=25, temperature=0, logits_processor=[processor], stopping_criteria=criteria)
    plain = make_llm(None)
    plain.create_completion(prompt, **options)
    expected, order, was_told = plain.input_ids[: plain.n_tokens].tolist(), list(seen), list(told)
    seen.clear()
    told.clear()
    llm = make_llm(None, n_batch=n_batch, draft_model=LlamaPromptLookupDecoding(2, 10))
    llm.create_completion(prompt, **options)
    assert llm.input_ids[: llm.n_tokens].tolist()[: len(expected)] == expected and seen == order and len(seen) == 25
    assert told == was_told == [expected[:n] for n in order]


def test_processors_of_any_kind(llm):
    answers = []
    for processors in (add_to_five, [add_to_five], (add_to_five,), LogitsProcessorList([add_to_five])):
        llm.reset()
        llm.memory.reset()
        answers.append(
            llm.create_completion("hello", temperature=0, max_tokens=2, logits_processor=processors)["choices"]
        )
    assert answers == answers[:1] * 4


def add_to_five(ids, scores):
    scores[5 + len(ids)] += 1000
    return scores


def test_what_a_processor_raises_is_raised(llm):
    def fails(ids, scores):
        raise KeyError("mine")

    def short(ids, scores):
        return scores[:7]

    def nothing(ids, scores):
        scores[5] = 0  # in place, which llama_cpp would take for NaN everywhere

    def bad(ids, scores):
        scores[5] = np.nan
        return scores

    def none(ids, scores):  # llama.cpp would sample token 0
        return np.full_like(scores, -np.inf)

    for processor, error in (
        (fails, KeyError), (short, InputError), (nothing, InputError), (bad, InputError), (none, InputError)
    ):  # fmt: skip
        options = dict(logits_processor=LogitsProcessorList([processor]))
        with pytest.raises(error):
            llm.create_completion("hello", **options)
        with pytest.raises(error):
            list(llm.create_completion("hello", stream=True, **options))
        with pytest.raises(error):
            next(llm.generate(TOKENS, **options))
        llm.eval([5])
        with pytest.raises(error):
            llm.sample(**options)


def test_a_processor_of_a_chat_uses_a_conversation(make_llm):
    """Stopping criteria, which each chat has, get the logits of the chat."""
    llm = make_llm(n_seq_max=2)
    other = Conversation(llm, n_predict=1)

    def ask(ids, scores):
        other.say("well?")
        return scores

    message = [{"role": "user", "content": "hello"}]
    options = {"max_tokens": 4, "temperature": 0}
    alone = llm.create_chat_completion(message, **options)["choices"]
    llm.reset()
    llm.memory.reset()
    assert llm.create_chat_completion(message, logits_processor=[ask], **options)["choices"] == alone
    assert len(other.messages) == 8


def raising(ids, scores):
    raise ArithmeticError


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.create_completion("hello", max_tokens=2, logits_processor=[lambda ids, scores: scores]),
        lambda llm: llm.create_completion("hello", max_tokens=2, stopping_criteria=lambda ids, logits: False),
        lambda llm: llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=2),
        lambda llm: list(llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=2, stream=True)),
        lambda llm: llm.create_completion("hello", logits_processor=[raising]),
        lambda llm: llm.create_completion("hello", stopping_criteria=raising),
        lambda llm: Conversation(llm).say("hello", logits_processor=[raising]),
    ],
    ids=["processor", "criteria", "chat", "stream", "bad-processor", "bad-criteria", "conversation"],
)
def test_what_was_asked_keeps_no_model_alive(base, use):
    """Gigabytes would wait for the garbage collector."""
    gc.disable()
    try:
        llm = DeltaMemLlama(base(), n_ctx=256)
        with contextlib.suppress(ArithmeticError):
            use(llm)
        reference = weakref.ref(llm)
        del llm
        assert reference() is None
    finally:
        gc.enable()


def test_a_grammar_that_is_none(make_llm):
    """llama_cpp follows a null pointer."""
    llm = make_llm(None)
    broken = LlamaGrammar.from_string("root ::= other", verbose=False)
    for grammar in (broken, "root ::= other", 5):
        with refuses(InputError, "grammar"):
            llm.create_completion("hello", grammar=grammar)
        with refuses(InputError, "grammar"):
            llm.create_chat_completion([{"role": "user", "content": "hello"}], grammar=grammar)
    assert llm.create_completion("hello", grammar='root ::= "yes"', max_tokens=9)["choices"][0]["text"] == "yes"


def test_seeds(make_llm):
    llm, zero = make_llm(None), make_llm(None, seed=0)

    def three(model, **options):
        tokens = model.generate(TOKENS, temp=3.0, top_k=0, top_p=1.0, min_p=0.0, **options)
        return [next(tokens) for _ in range(3)]

    llm.set_seed(0)
    assert three(llm) == three(zero) == three(zero)
    llm.set_seed(1)
    assert three(llm) == three(llm) != three(zero)
    for seed in ("1", None, 1.5):
        with refuses(InputError, "seed", repr(seed)):
            llm.set_seed(seed)
    with refuses(InputError, "seed", repr("1")):
        llm.create_completion("hello", seed="1")


def test_numbers_of_numpy(make_llm):
    options = {"max_tokens": 3, "seed": 5, "temperature": 2.5, "top_k": 9, "logprobs": 2}
    llm = make_llm(logits_all=True, seed=np.int64(3))
    answers = []
    for given in (options, {name: np.asarray(n)[()] for name, n in options.items()}):
        llm.reset()
        llm.memory.reset()
        answers.append(llm.create_completion("hello", **given)["choices"])
    assert answers[0] == answers[1]
    assert len(llm.create_completion("hello")["choices"]) == 1


def test_guesses_need_the_logits_of_every_token(llm):
    tokens = llm.generate(TOKENS)
    next(tokens)
    with refuses(InputError, "logits_all"):
        tokens.send([5, 6])
    assert llm.n_tokens == len(TOKENS)


def test_a_vocabulary_decodes_nothing(base):
    """llama.cpp ends the process."""
    with DeltaMemLlama(base(), n_ctx=256, vocab_only=True, embedding=True) as llm:
        assert llm.detokenize(llm.tokenize(b"hello")) == b" hello"
        for act in (lambda: llm.eval([5]), lambda: llm.create_completion("hello"), lambda: llm.embed("hello")):
            with refuses(InputError, "vocab_only"):
                act()
        assert llm.n_tokens == 0


class Message:
    """As the package `openai` returns them; templates take them for dictionaries."""

    def __init__(self, role, content):
        self.role, self.content = role, content

    def __eq__(self, other):
        return vars(self) == vars(other)


def test_messages_that_are_objects(make_llm, read_once):
    llm = make_llm(type_k=0, type_v=0)
    messages = [Message("user", "hello there")]
    for _ in range(2):
        llm.create_chat_completion(messages, max_tokens=1, temperature=0)
        messages += [Message("assistant", "hi"), Message("user", "how are you")]
    np.testing.assert_allclose(llm.memory.state, read_once(llm.input_ids[: llm.n_tokens]), rtol=0, atol=2e-6)


def test_static_methods():
    logits = np.array([[1, 2, 3], [-np.inf, 0, -np.inf]], dtype=np.single)
    with np.errstate(divide="ignore"):
        expected = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True, dtype=np.float64))
    np.testing.assert_allclose(DeltaMemLlama.logits_to_logprobs(logits), expected, rtol=0, atol=1e-6)
    assert DeltaMemLlama.logits_to_logprobs([0, 0]) == pytest.approx([-np.log(2)] * 2)
    assert DeltaMemLlama.longest_token_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert DeltaMemLlama.longest_token_prefix([], [1]) == 0


# other packages


@pytest.mark.parametrize("stream", [False, True])
def test_openai_v1(llm, monkeypatch, stream):
    class Model(dict):
        pass

    module = types.ModuleType("openai.types.chat")
    module.ChatCompletion, module.ChatCompletionChunk = Model, Model
    for name in ("openai", "openai.types"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "openai.types.chat", module)
    messages = [{"role": "user", "content": "hello"}]
    answer = llm.create_chat_completion_openai_v1(messages, max_tokens=4, temperature=0, stream=stream)
    chunks = list(answer) if stream else [answer]
    assert all(isinstance(chunk, Model) for chunk in chunks)
    llm.reset()
    llm.memory.reset()
    expected = llm.create_chat_completion(messages, max_tokens=4, temperature=0)["choices"][0]["message"]["content"]
    key = "delta" if stream else "message"
    assert "".join(chunk["choices"][0][key].get("content") or "" for chunk in chunks) == expected


# the constructor and pickles


def test_a_batch_smaller_than_the_number_of_texts(make_llm):
    """llama.cpp ends the process."""
    with refuses(InputError, "n_batch", "n_seq_max, 4", 2):
        make_llm(n_batch=2, n_seq_max=4)
    assert make_llm(n_batch=4, n_seq_max=4).n_batch == 4


class Words:
    def encode(self, text, add_special_tokens=True):
        return [7] * len(text.split())

    def decode(self, tokens, skip_special_tokens=True):
        return "x " * len(tokens)


def test_a_pickle_keeps_the_tokenizer_and_the_servers(make_llm, monkeypatch):
    connected = []
    monkeypatch.setattr("pydeltamem.llama.connect", connected.append)
    llm = make_llm(tokenizer=LlamaHFTokenizer(Words()), rpc_servers="host:1")
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert copy.tokenize(b"one two") == [7, 7] and connected == ["host:1"] * 2
    finally:
        copy.close()
    plain = make_llm(seed=0, n_batch=64)
    copy = pickle.loads(pickle.dumps(plain))
    try:
        assert copy.tokenize(b"one two") == plain.tokenize(b"one two") and copy.n_batch == 64
    finally:
        copy.close()


def test_half_a_character_in_a_chat(llm):
    for stream in (False, True):
        with refuses(InputError, "Unicode"):
            llm.create_chat_completion([{"role": "user", "content": "half a \ud83d"}], stream=stream)
    assert llm.n_tokens == 0


def test_half_a_character(make_llm):
    llm = make_llm(None)
    with refuses(InputError, "prompt", "character 6"):
        llm.create_completion("hello \ud800")
    with refuses(InputError, "text 1", "character 0"):
        make_llm(None, embedding=True).embed(["hello", "\udfff"])


def test_a_cache_is_the_callers_own(llm):
    cache = LlamaRAMCache()
    llm.set_cache(cache)
    assert llm.cache is cache
    llm.create_completion("hello there", max_tokens=2, temperature=0)
    assert len(cache.cache_state) == 1


def test_tokens_that_were_read_are_not_set(llm):
    llm.eval([5, 6, 7])
    with refuses(InputError, "input_ids"):
        llm.input_ids = np.zeros(3, dtype=np.intc)
    with refuses(InputError, 3, 4):
        llm.n_tokens = 4
    assert llm.input_ids[: llm.n_tokens].tolist() == [5, 6, 7]


def test_a_plain_state_is_for_one_text(make_llm, base):
    plain = Llama(str(base()), n_ctx=512, n_threads=1, verbose=False)
    plain.eval([5, 6, 7])
    llm = make_llm(n_seq_max=2)
    with pytest.raises(InputError):
        llm.load_state(plain.save_state())
    assert llm.n_tokens == 0
    plain.close()


def test_segments_are_for_an_adapter_that_writes_them(llm):
    with pytest.raises(InputError):
        llm.eval([5, 6, 7], [0, 0, 1])
    assert llm.n_tokens == 0 and not llm.memory.state.any()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("n_gpu_layers", "all", "all"),
        ("n_gpu_layers", None, None),
        ("n_gpu_layers", 2**40, 2**40),  # would be 0
        ("n_ubatch", 1.5, 1.5),
        ("split_mode", "layer", "layer"),
        ("pooling_type", "mean", "mean"),
        ("type_k", "f16", "f16"),
        ("numa", "distribute", "distribute"),
        ("last_n_tokens_size", None, None),
        ("rope_freq_base", "x", "x"),
        ("yarn_ext_factor", None, None),
        ("lora_scale", float("nan"), "nan"),
        ("rpc_servers", 50052, 50052),
        ("tensor_split", 0.5, 0.5),
        ("tensor_split", ["a"], "a"),
        ("tensor_split", [1] * 17, 16),
        ("kv_overrides", [("a", 1)], "a"),
        ("kv_overrides", {1: 2}, 1),
        ("kv_overrides", {"a\0b": 1}, "a"),
        ("kv_overrides", {"k" * 128: 1}, 127),
        ("kv_overrides", {"some.key": 1j}, "some.key"),
        ("kv_overrides", {"some.key": None}, "some.key"),
        ("kv_overrides", {"some.key": 2**63}, 2**63),  # would be negative
        ("kv_overrides", {"some.key": "v" * 128}, 127),  # llama.cpp would read past it
    ],
    ids=str,
)
def test_values_that_llama_cpp_cannot_take(base, name, value, told):
    with refuses(InputError, name, told):
        DeltaMemLlama(base(), verbose=False, **{name: value})


@pytest.mark.parametrize("path", ["none.gguf", "\ud800"])
def test_a_lora_that_is_not_there(base, path):
    with pytest.raises(ModelError):
        DeltaMemLlama(base(), lora_path=path, verbose=False)


def test_values_that_llama_cpp_takes(make_llm):
    """As its annotations say: also None, numbers of NumPy, and names of long ago, which LangChain still gives."""
    llm = make_llm(
        n_gpu_layers=np.int64(0), rope_scaling_type=None, type_k=None, rope_freq_base=1000000, numa=False,
        tensor_split=[1, 0.5], op_offload=None, kv_overrides={"a": True, "b": 2, "c": 0.5, "k" * 127: "v" * 127},
        f16_kv=True, n_parts=-1,
    )  # fmt: skip
    assert len(list(llm.create_completion(TOKENS, max_tokens=2, stream=True))) >= 1


def test_the_server_of_llama_cpp_loads_it(make_llm):
    """It gives keywords that llama_cpp.Llama has no more, and does not say so."""
    source = Path(inspect.getfile(Llama)).parent / "server" / "model.py"
    calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "create_fn"]
    defaults = inspect.signature(Llama.__init__).parameters
    names = [keyword.arg for keyword in load.keywords if keyword.arg not in (None, "rpc_servers", "verbose")]
    former = [name for name in names if name not in defaults]
    assert former and len(names) > 25
    make_llm(**{name: True if name in former else defaults[name].default for name in names})


def test_an_unknown_chat_format(make_llm):
    llm = make_llm(chat_format="no-such-format")
    with refuses(InputError, "no-such-format"):
        llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=1)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("value", [5, "greedy", b"x", True, [None], ["greedy"], {"a": 1}, np.zeros(3)], ids=str)
def test_callbacks_that_are_no_functions(llm, name, value):
    """They are refused before anything is decoded."""
    calls = [
        lambda: llm.create_completion(TOKENS, max_tokens=2, **{name: value}),
        lambda: next(llm.generate(TOKENS, **{name: value})),
    ]
    if name == "logits_processor":
        calls.append(lambda: Conversation(llm, **{name: value}))
        calls.append(lambda: Conversation(llm).say("hello", **{name: value}))
    for call in calls:
        with refuses(InputError, name):
            call()
        assert llm.n_tokens == 0 and not llm.memory.state.any()


def test_callbacks_in_plain_lists(llm):
    """They are called one after the other, as those in llama_cpp's own lists; an empty list is none."""
    seen = []

    def exclude(ids, scores):
        seen.append(len(ids))
        scores[chosen] = -np.inf
        return scores

    chosen = next(llm.generate(TOKENS, temp=0))
    for nobody, nothing in (([], []), ((), ()), (LogitsProcessorList(), StoppingCriteriaList())):
        assert next(llm.generate(TOKENS, temp=0, logits_processor=nobody, stopping_criteria=nothing)) == chosen
    assert next(llm.generate(TOKENS, temp=0, logits_processor=[exclude, exclude])) != chosen
    assert seen == [len(TOKENS)] * 2
    ends = [lambda ids, logits: False, lambda ids, logits: len(ids) >= len(TOKENS) + 2]
    for criteria in (ends, StoppingCriteriaList(ends)):
        assert len(list(llm.generate(TOKENS, temp=0, stopping_criteria=criteria))) == 2
        answer = llm.create_completion(TOKENS, temperature=0, stopping_criteria=criteria)
        assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens", [None, 5, "hello", ["a"], ...], ids=str)
def test_tokens_that_are_none(llm, tokens):
    for call in (llm.eval, lambda tokens: next(llm.generate(tokens))):
        with pytest.raises(InputError):
            call(tokens)
    assert llm.n_tokens == 0


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (None, {}),
        ("hello", {}),
        ({"role": "user", "content": "hello"}, {}),
        (["hello"], {}),
        ([{}], {}),
        ([{"role": "user"}], {}),
        (HELLO, {"response_format": "json"}),
        (HELLO, {"response_format": {}}),
        (HELLO, {"response_format": {"type": "json_schema"}}),
        (HELLO, {"response_format": {"type": "yaml"}}),
        (HELLO, {"response_format": {"type": "json_object", "schema": {"type": "nothing"}}}),
        (HELLO, {"functions": 5}),
        (HELLO, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": {}}),
        (HELLO, {"temperature": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_is_refused(llm, messages, options, stream):
    """Of a stream some refuse with its first piece. Nothing is decoded, and the next chat works."""
    with pytest.raises(InputError):
        list(llm.create_chat_completion(messages, max_tokens=2, stream=stream, **options))
    assert llm.n_tokens == 0 and not llm.memory.state.any()
    assert llm.create_chat_completion(HELLO, max_tokens=1)["choices"]


def test_errors_of_a_chat_that_are_not_of_its_format(make_llm):
    """Those of a logits processor and of the user's own handler are raised as they are."""

    def failing(*args, **kwargs):
        raise LookupError("mine")

    llm = make_llm()
    with pytest.raises(LookupError, match="mine"):
        llm.create_chat_completion(HELLO, max_tokens=1, logits_processor=LogitsProcessorList([failing]))
    with pytest.raises(LookupError, match="mine"):
        make_llm(chat_handler=failing).create_chat_completion(HELLO)
    with pytest.raises(TypeError):
        llm.create_chat_completion(HELLO, no_such_option=1)


def test_a_response_format_of_a_json_schema(llm):
    """As OpenAI's API and the packages for it write it; llama_cpp answers without a schema."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answers = []
    for form in (wanted, {"type": "json_object", "schema": schema}):
        llm.reset()
        llm.memory.reset()
        answers.append(llm.create_chat_completion(HELLO, response_format=form, max_tokens=24, temperature=0))
    first, second = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert first == second and re.match(r'\{\s*"n"', first)


def test_values_that_are_none_of_ours(llm):
    for text in ("hello", None, 5):
        with pytest.raises(InputError):
            llm.tokenize(text)
    for tokens in ([1.5], ["a"], [None]):
        with pytest.raises(InputError):
            llm.detokenize(tokens)
    for state in (None, b"", llm):
        with pytest.raises(InputError):
            llm.load_state(state)


def test_a_vocabulary_has_no_memory(base, adapter, tmp_path):
    """A packed model has its adapter's file; what names one besides is refused."""
    pack(base(), adapter("qwen3", "tsw_qo"), tmp_path / "packed.gguf")
    with DeltaMemLlama(tmp_path / "packed.gguf", vocab_only=True, verbose=False) as llm:
        assert llm.tokenize(b"hello") and not llm.memory.attached
    with refuses(InputError, "deltamem_path", "vocab_only"):
        DeltaMemLlama(base(), deltamem_path=adapter("qwen3", "tsw_qo"), vocab_only=True, verbose=False)


def test_a_model_that_does_not_say_its_context(base, tmp_path):
    """Then it must be given where the context is divided among texts."""
    bare = tmp_path / "bare.gguf"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force"]
    script += ["--remove-metadata", "qwen3.context_length"]
    subprocess.run([*script, str(base()), str(bare)], check=True, capture_output=True)
    with refuses(ModelError, bare, "n_ctx"):
        DeltaMemLlama(bare, n_ctx=0, n_seq_max=2, verbose=False)


def test_a_chat_of_a_system_prompt_alone_begins_anew(llm):
    """It has no message that tells it from another chat: the memory goes on, and nothing is taken back."""
    system, greedy = [{"role": "system", "content": "be brief"}], {"max_tokens": 2, "temperature": 0}
    llm.create_chat_completion(system, **greedy)
    once = llm.memory.copy().tokens_written
    llm.create_chat_completion([*system, {"role": "user", "content": "hello"}], **greedy)
    twice = llm.memory.copy().tokens_written
    llm.create_chat_completion(system, **greedy)
    assert once < twice < llm.memory.copy().tokens_written


def test_a_memory_of_another_base_model_is_told(llm, caplog):
    llm.eval([5, 6, 7])
    copy = llm.memory.copy()
    llm.memory.restore(copy)
    assert not caplog.records
    llm.memory.restore(MemorySnapshot(copy.state, {**copy.metadata, "base": "another"}))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    np.testing.assert_array_equal(llm.memory.state, copy.state)


INFILL = {f"tokenizer.ggml.{name}_token_id": id for name, id in (("fim_pre", 20), ("fim_suf", 21), ("fim_mid", 22))}


def test_the_text_between_prompt_and_suffix(make_llm):
    """Where the model has tokens for infill, they stand around both."""
    llm = make_llm(kv_overrides=INFILL)
    llm.create_completion("hello", suffix=" there", max_tokens=1, temperature=0)
    read = llm.input_ids[: llm.n_tokens].tolist()
    begin, middle, end = (read.index(token) for token in (20, 21, 22))
    assert begin == (llm._model.add_bos_token() is True)
    assert read[begin + 1 : middle] == llm.tokenize(b"hello", add_bos=False)
    assert llm.detokenize(read[middle + 1 : end]) == b" there"  # without the space that a text of its own begins with
    plain = make_llm().create_completion("hello", suffix=" there", max_tokens=1, temperature=0)
    assert plain["choices"][0]["text"].endswith(" there")


def test_a_suffix_that_its_mark_joins(make_llm, monkeypatch):
    """Where the tokenizer joins the mark before a suffix with it, the suffix stands as a text of its own would."""
    llm = make_llm(kv_overrides=INFILL)
    tokenize, mark = llm.tokenize, "☺".encode()

    def joined(text, *args, **kwargs):
        rest = text.removeprefix(mark)
        return [30, *tokenize(rest, *args, **kwargs)] if rest and rest != text else tokenize(text, *args, **kwargs)

    monkeypatch.setattr(llm, "tokenize", joined)
    llm.create_completion("hello", suffix=" there", max_tokens=1, temperature=0)
    read = llm.input_ids[: llm.n_tokens].tolist()
    assert read[read.index(21) + 1 : read.index(22)] == tokenize(b" there", add_bos=False)


def test_tokens_that_begin_and_end_a_prompt(make_llm, monkeypatch):
    (bos,) = make_llm(None).tokenize(b"<|im_end|>", add_bos=False, special=True)
    marks = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    llm = make_llm(kv_overrides={**marks, "tokenizer.ggml.bos_token_id": bos})
    llm.create_completion("hello", max_tokens=1, temperature=0)
    said = llm.tokenize(b"hello", add_bos=False)
    assert llm.input_ids[: len(said) + 2].tolist() == [bos, *said, llm.token_eos()]
    with pytest.warns(RuntimeWarning):
        llm.create_completion("<|im_end|>hello", max_tokens=1, temperature=0)
    bare = make_llm(kv_overrides={"tokenizer.ggml.add_bos_token": False})
    monkeypatch.setattr(bare, "token_bos", lambda: -1)  # as of a T5
    with pytest.raises(InputError):
        bare.create_completion("", max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pattern", [r"^\d+$", r"^(a)\1$"])
def test_a_call_that_an_answer_cannot_be_held_to(llm, pattern, stream):
    """llama_cpp takes any JSON for it, without a word."""
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    function = {"name": "find", "parameters": parameters}
    tools = {"tools": [{"type": "function", "function": function}]}
    forced = {"tool_choice": {"type": "function", "function": {"name": "find"}}}
    asked = [{**tools, **forced}, {"functions": [function], "function_call": {"name": "find"}}]
    for options in asked:
        if pattern == r"^\d+$":
            assert list(llm.create_chat_completion(HELLO, max_tokens=2, stream=stream, **options))
            continue
        with refuses(InputError, "find"):
            list(llm.create_chat_completion(HELLO, max_tokens=2, stream=stream, **options))
    assert llm.create_chat_completion(HELLO, max_tokens=1, **tools)["choices"]
