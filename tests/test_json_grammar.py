"""Grammars of JSON schemas allow JSON, and nothing else."""

from __future__ import annotations

import ctypes
import json

import llama_cpp
import pytest

from pydeltamem import DeltaMemLlama
from pydeltamem.runtime.stream import checked_grammar
from pydeltamem.runtime.tokenizer import piece
from servers import BASE


@pytest.fixture(scope="module")
def llm():
    with DeltaMemLlama(BASE, n_ctx=256, n_threads=1, verbose=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def byte_tokens(llm):
    """A token for each byte."""
    return {data: token for token in reversed(range(llm.n_vocab())) if len(data := piece(llm._model.vocab, token)) == 1}


def allows(llm, byte_tokens, schema, text):
    """Whether the grammar of a schema lets a text through, byte by byte."""
    grammar = checked_grammar(llm, llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False))
    sampler = llama_cpp.llama_sampler_init_grammar(llm._model.vocab, grammar._grammar.encode(), b"root")
    try:
        for byte in text.encode():
            one = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(id=byte_tokens[bytes([byte])], logit=1))
            array = llama_cpp.llama_token_data_array(data=one, size=1, sorted=False)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            if one[0].logit == float("-inf"):
                return False
            llama_cpp.llama_sampler_accept(sampler, one[0].id)
    finally:
        llama_cpp.llama_sampler_free(sampler)
    return True


STRING = {"type": "string"}
MAIL = {"type": "string", "pattern": "^[^@]+@x$"}


@pytest.mark.parametrize(
    "schema, text",
    [
        (STRING, '"a\nb"'),
        (STRING, '"a\tb"'),
        ({"type": "string", "maxLength": 9}, '"a\nb"'),
        ({"type": "object", "properties": {"a": STRING}}, '{"a": "\0'),
        ({"type": "array", "items": STRING}, '["\x1f'),
        ({}, '{"a\n'),
        (MAIL, '"a"@x"'),
        (MAIL, '"a\\@x"'),
        ({"type": "string", "pattern": "^.+$"}, '"a"b"'),
    ],
)
def test_what_is_no_json_is_not_allowed(llm, byte_tokens, schema, text):
    """Found: strings went over several lines, and what a pattern excluded by a class had quotes."""
    assert not allows(llm, byte_tokens, schema, text)


@pytest.mark.parametrize(
    "schema, text",
    [
        (STRING, r'"a\nb \u00e9 é ü 🙂"'),
        (MAIL, '"a b@x"'),
        ({"type": "string", "pattern": "^[a-z]{2}.$"}, '"abc"'),
        ({"const": "[^a]"}, '"[^a]"'),
    ],
)
def test_json_is_allowed(llm, byte_tokens, schema, text):
    assert allows(llm, byte_tokens, schema, text)


@pytest.mark.parametrize("value", ["a\nb", 'say "hi"', "a\\b", "café", "🙂", "\ud800", "[^a", 5, None, {"a": ["b"]}])
def test_constants_and_names_of_any_text(llm, byte_tokens, value):
    """Found: they lost their escapes, so a line break was no JSON, and a quote no grammar."""
    is_text = isinstance(value, str) and value != "\ud800"
    text = json.dumps(value, ensure_ascii=not is_text)
    assert allows(llm, byte_tokens, {"const": value}, text)
    assert allows(llm, byte_tokens, {"enum": ["x", value]}, text)
    if is_text:
        named = {"type": "object", "properties": {value: {"type": "null"}}, "required": [value]}
        assert allows(llm, byte_tokens, named, f"{{{text}: null}}")


def test_chat_handlers_use_them(llm, byte_tokens):
    wanted = {"type": "json_object", "schema": {"type": "string", "maxLength": 6}}
    asked = {"logit_bias": {byte_tokens[b"\n"]: 100}, "max_tokens": 40, "response_format": wanted}
    answer = llm.create_chat_completion([{"role": "user", "content": "hello"}], **asked)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), str)
