"""Grammars of JSON schemas allow JSON, and nothing else."""

from __future__ import annotations

import ctypes
import json
import re

import llama_cpp
import pytest

from pydeltamem import DeltaMemLlama, InputError
from pydeltamem.runtime.grammar import checked_grammar
from pydeltamem.runtime.tokenizer import piece
from pydeltamem.server.openai import Completion
from refusals import refuses
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


def pattern(text):
    return {"type": "string", "pattern": text}


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
        (pattern("^.+$"), '"a"b"'),
        (pattern(r"^[ -~]+$"), '"a"b"'),
        (pattern('^"$'), '"""'),
        (pattern(r"^\\$"), '"\\"'),
        (pattern(r"^\n$"), '"\n"'),
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
        (pattern(r"^[\w-\.]+$"), '"a-b.c"'),  # as JavaScript reads it
    ],
)
def test_json_is_allowed(llm, byte_tokens, schema, text):
    assert allows(llm, byte_tokens, schema, text)


def of(properties, defs=None, **others):
    """An object that has all of these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "$defs": defs or {}, **others}


def to(*path):
    return {"$ref": "/".join(("#/$defs", *path))}


INTEGER = {"type": "integer"}
COLOR, NAMED, AGED = {"enum": ["red", 7]}, of({"n": STRING}), of({"a": INTEGER})
TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": to("Tree")}}, "title": "Tree"}
V1_ENUM = {"allOf": [{"$ref": "#/definitions/C"}], "default": 7}
DOUBLING = {  # 2⁴⁰ objects
    "allOf": [to("0"), to("0")],
    "$defs": {f"{i}": {"allOf": [to(f"{i + 1}"), to(f"{i + 1}")]} for i in range(40)} | {"40": AGED},
}
SAME_NAMES = of({"a": to("x", "n"), "b": to("y", "n")}, {"x": {"n": COLOR}, "y": {"n": INTEGER}})


@pytest.mark.parametrize(
    "schema, yes, no",
    [
        # what pydantic writes for Any, list, dict, a class that holds itself, and (1.x) an enumeration with a default
        (of({"x": {"title": "X", "default": None}}), [{"x": 5}, {"x": [None]}], [{}]),
        (of({"x": {"type": "array", "items": {}}}), [{"x": []}, {"x": [1, "a", {"b": 2}]}], [{"x": 5}]),
        (of({"x": {"type": "object", "additionalProperties": {}}}), [{"x": {"a": 1}}], [{"x": []}]),
        ({"$defs": {"Tree": TREE}, **to("Tree")}, [{"kids": [{"kids": []}, {}]}], [{"kids": [5]}]),
        (of({"c": V1_ENUM}, definitions={"C": COLOR}), [{"c": 7}], [{"c": {}}]),
        # several types, as strict schemas of OpenAI's API have them
        ({"type": ["string", "null"], "enum": ["a", None]}, ["a", None], ["b"]),
        ({**AGED, "type": ["object", "null"]}, [None, {"a": 1}], [{"b": 1}]),
        ({"type": ["array", "null"], "items": INTEGER, "maxItems": 1}, [None, [1]], [["a"], [1, 2]]),
        # a name that a rule has already, a path of an escaped name, and the schema itself
        (of({"c": AGED, "d": to("c")}, {"c": COLOR}), [{"c": {"a": 1}, "d": 7}], [{"c": {"a": 1}, "d": {"a": 1}}]),
        (SAME_NAMES, [{"a": "red", "b": 5}], [{"a": 7, "b": "red"}]),
        (of({"a": to("root")}, {"root": COLOR}), [{"a": 7}], [7]),
        ({"type": "array", "items": to("a~1b%20c"), "$defs": {"a/b c": COLOR}}, [[7, "red"]], [[8]]),
        ({"type": "array", "items": {"$ref": "#"}}, [[[], [[]]]], [[5]]),
        # objects of several parts
        ({"allOf": [NAMED, to("A")], "$defs": {"A": AGED}}, [{"n": "x", "a": 1}], [{"n": "x"}, {"a": 1}]),
        (of({"z": INTEGER}, allOf=[{"allOf": [NAMED, AGED]}]), [{"n": "x", "a": 1, "z": 2}], [{"z": 2}]),
    ],
)
def test_schemas_that_llama_cpp_takes_for_others(llm, byte_tokens, schema, yes, no):
    for value in yes:
        assert allows(llm, byte_tokens, schema, json.dumps(value)), value
    for value in no:
        assert not allows(llm, byte_tokens, schema, json.dumps(value)), value


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/none", "$defs": {}},
        {"allOf": [STRING, {"minLength": 3}]},
        {"type": "array", "prefixItems": [INTEGER], "items": STRING},
        of({"a": False}),
        DOUBLING,
    ],
    ids=["far", "none", "text", "tuple", "nothing", "doubling"],
)
def test_schemas_that_are_refused(llm, schema):
    """llama_cpp would answer with any object, or with another."""
    with refuses(InputError, "response_format"):
        format = {"type": "json_object", "schema": schema}
        llm.create_chat_completion([{"role": "user", "content": "x"}], response_format=format, max_tokens=1)


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


@pytest.mark.parametrize(
    "regex, yes, no",
    [
        (r"^\d{3}-\d{4}$", ["555-0199"], ["55a", "5550"]),
        (r"^\w+\.\w+$", ["a_1.Z"], ["a-", "a.."]),
        (r"^[\w.-]+@[\w\-.]+$", ["a.b-c@d-e.f"], ["a b", "a@@"]),
        (r"^[+-]?[\d,]*$", ["+1,000", "-", ""], ["+-", "1.0"]),
        (r"^\S+\s\S$", ["a b"], [" b"]),
        (r"^\D\W$", ["a-"], ["1", "aa"]),
        (r"^[^\s\d]+$", ["a-b"], ["a b", "a1"]),
        (r"^[ -~]+$", ["say: hi!", 'say "hi"', "a\\b"], ["é", "a\nb"]),
        (r'^"a"$', ['"a"'], ["a"]),
        (r'^[a"]\\$', ['"\\', "a\\"], ["ab"]),
        (r"^a\nb\t?$", ["a\nb", "a\nb\t"], ["anb"]),
        (r"^[\r\n]+$", ["\n\r"], ["n", "a"]),
        (r"^\x41\u00e9\/$", ["Aé/"], ["x", "A/"]),
        (r"^[à-ü\]\^]+$", ["é]^"], ["e"]),
        (r"^(?:ab)+?c$", ["ababc"], ["c", "aab"]),
    ],
)
def test_patterns(llm, byte_tokens, regex, yes, no):
    """Found: an escape was no grammar, and a quote or a backslash no JSON."""
    for value in yes:
        assert re.fullmatch(regex, value)
        assert allows(llm, byte_tokens, pattern(regex), json.dumps(value, ensure_ascii=False)), value
    for value in no:
        assert not allows(llm, byte_tokens, pattern(regex), json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize(
    "regex", ["a", "^a", "a$", r"^a\$", r"^\ba$", r"^(a)\1$", r"^\p{L}$", "^[z-a]$", "^[]$", "^(?=a)$", "^a$|^b$", 5]
)
def test_patterns_that_are_refused(regex):
    with pytest.raises(InputError) as info:
        Completion({"prompt": "x", "response_format": {"type": "json_object", "schema": pattern(regex)}}, "model")
    assert "response_format" in str(info.value)


@pytest.mark.parametrize("schema", [{"type": "string", "maxLength": 5000}, pattern("^\ud800$")], ids=["deep", "half"])
def test_a_schema_whose_grammar_cannot_be_used_is_named(schema):
    """Found: the error named a grammar, which nobody had sent."""
    with refuses(InputError, "json_schema"):
        Completion({"prompt": "x", "json_schema": schema}, "model")


def test_chat_handlers_use_them(llm, byte_tokens):
    wanted = {"type": "json_object", "schema": {"type": "string", "maxLength": 6}}
    asked = {"logit_bias": {byte_tokens[b"\n"]: 100}, "max_tokens": 40, "response_format": wanted}
    answer = llm.create_chat_completion([{"role": "user", "content": "hello"}], **asked)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), str)
