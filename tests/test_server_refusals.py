"""Requests that the server refuses, and what it says of them (docs/reference/server.md)."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
from fastapi import Request

from pydeltamem import DeltaMemLlama
from pydeltamem.server.bodies import body_of
from pydeltamem.server.lengths import Lengths
from servers import CLOCK, GREEDY, HELLO, WEATHER, ask, refused


@pytest.mark.parametrize(
    "body, name",
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "contents": "hello"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": {"a": 1}}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": None}]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": "clock"}]}, "function_call"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**30}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"presence_penalty": 10**400}, "presence_penalty"),
        ({"repeat_penalty": -(10**400)}, "repeat_penalty"),
        ({"mirostat_mode": 10**30}, "mirostat_mode"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 129}, "stop"),  # each is looked for after each token, while all others wait
        ({"n": 2}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": "all"}, "stream_options"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": "a"}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": "x"}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"logit_bias": [[5.7, 1]]}, "logit_bias"),
        ({"logit_bias": [[True, 1]]}, "logit_bias"),
        ({"n_predict": "many"}, "n_predict"),
        ({"json_schema": 5}, "json_schema"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"json_schema": {}, "response_format": {"type": "text"}}, "json_schema"),
        ({"json_schema": {}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": 5}, "grammar"),
        ({"grammar": 'root ::= "\ud800"'}, "grammar"),
        ({"grammar": "\0"}, "grammar"),
        ({"grammar": 'root ::= "a"\0 | "b"'}, "grammar"),
        ({"grammar": f"root ::= {'(' * 100_000}"}, "grammar"),  # llama.cpp would use up its stack
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "grammar"),
        ({"grammar": 'root ::= "a"', "tools": [CLOCK], "tool_choice": "required"}, "grammar"),
        ({"grammar": 'root ::= "a"', "tools": [WEATHER, CLOCK], "tool_choice": "required"}, "grammar"),
        ({"mirostat_mode": "x"}, "mirostat_mode"),
        ({"mirostat_mode": 2, "mirostat_tau": "x"}, "mirostat_tau"),
        ({"tools": "hammer"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "axe", "parameters": 5}}]}, "axe"),
        ({"tools": [{"type": "function", "function": {"name": "axe", "parameters": {"type": "x"}}}]}, "axe"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "axe"}}}, "axe"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "allowed_tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "\ud800"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "\ud800"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "axe"}}}, "tool_choice"),
        ({"functions": [], "function_call": {"name": "axe"}}, "function_call"),
        ({"functions": [5]}, "functions"),
        ({"functions": "hammer"}, "functions"),
        ({"functions": [CLOCK["function"]], "function_call": "perhaps"}, "function_call"),
        ({"functions": [CLOCK["function"]], "function_call": {"name": "axe"}}, "function_call"),
        ({"functions": [{"name": "axe", "parameters": 5}]}, "axe"),
        # llama_cpp would use up all memory
        ({"response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 10**6}}}, "schema"),
        ({"response_format": {"type": "json_object", "schema": {"pattern": "^a{1000000}$"}}}, "schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"type": "nothing"}}}, "schema"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        *(
            ({"chat_template_kwargs": {name: []}}, name)
            for name in ("messages", "llm", "llama", "tools", "grammar", "add_generation_prompt", "eos_token", "self")
        ),
        ({"memory": "ada"}, "memory"),
        ({"memory": {"session": "ada", "write": "no"}}, "write"),
    ],
)
def test_a_chat_that_cannot_be_answered(api, body, name):
    """A 400 says what is wrong, also for a stream, and the session stays as it was."""
    session = f"unharmed-{uuid.uuid4().hex}"
    for stream in (False, True):
        asked = {"messages": HELLO, "max_tokens": 4, "stream": stream, **body}
        headers = {"X-Memory-Session": session}
        answer = api.http.post("/v1/chat/completions", content=json.dumps(asked), headers=headers)
        refused(answer, 400, "invalid_value", name)
    refused(api.http.get(f"/v1/memories/{session}"), 404, "session_not_found")


@pytest.mark.parametrize(
    "path, body, name",
    [
        ("/v1/completions", {"prompt": 5}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
        ("/v1/completions", {"prompt": "\ud800", "echo": True}, "prompt"),
        ("/v1/completions", {"prompt": [10**6]}, "1000000"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "logprobs": 100}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "logprobs": "x"}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "json_schema": {}, "grammar": 'root ::= "a"'}, "grammar"),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
        ("/v1/completions", {"prompt": [10**30]}, "token"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "text", "x": "\ud800"}}}, "text.format"),
        ("/v1/responses", {"input": "a", "metadata": {"x": "\ud800"}}, "metadata"),
        ("/v1/responses", {"input": "a", "metadata": [1]}, "metadata"),
        ("/v1/responses", {"input": "a", "metadata": {"x": "y" * 300_000}}, "metadata"),  # a stream repeats it
        ("/v1/responses", {"input": "a", "include": "message.output_text.logprobs"}, "include"),
        ("/v1/responses", {"input": [{"role": "user"}]}, "content"),
        ("/v1/responses", {"input": "a", "top_logprobs": 21}, "top_logprobs"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_object"}}, "grammar": 'root ::= "a"'},
            "grammar",
        ),
        ("/v1/responses", {"input": "a", "temperature": -1}, "temperature"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": [""]}, "input"),
        ("/v1/embeddings", {"input": ["a", "\ud800"]}, "text 1"),
        ("/v1/embeddings", {"input": "a", "dimensions": 16}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": "x"}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/tokenize", {"content": 5}, "content"),
        ("/detokenize", {"tokens": ["a"]}, "token"),
        ("/tokenize", {"content": "a", "add_special": "no"}, "add_special"),
        ("/tokenize", {"content": "a", "parse_special": "no"}, "parse_special"),
        ("/tokenize", {"content": "a", "with_pieces": 1}, "with_pieces"),
        ("/detokenize", {"tokens": 5}, "token"),
        ("/detokenize", {"tokens": [1] * 200_000}, "200000"),
        ("/detokenize", {"tokens": ""}, "token"),
        ("/detokenize", {"tokens": False}, "token"),
        ("/apply-template", {"messages": HELLO, "tools": 5}, "tools"),
        ("/apply-template", {"messages": HELLO, "tools": [CLOCK], "tool_choice": 5}, "tool_choice"),
        ("/apply-template", {"messages": 5}, "messages"),
        ("/apply-template", {"messages": HELLO, "chat_template_kwargs": 5}, "chat_template_kwargs"),
        ("/apply-template", {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "messages"),
    ],
)
def test_other_requests_that_cannot_be_answered(api, path, body, name):
    refused(api.http.post(path, content=json.dumps(body)), 400, "invalid_value", name)


def test_a_prompt_that_is_too_long(api):
    body = {"messages": [{"role": "user", "content": "many words " * 400}]}
    for stream in (False, True):
        answer = api.http.post("/v1/chat/completions", json={**body, "stream": stream})
        refused(answer, 400, "context_length_exceeded", "512")
    texts = ["short", "many words " * 400]
    refused(api.http.post("/v1/embeddings", json={"input": texts}), 400, "context_length_exceeded", "text 1", "512")


DIGITS = "1" * 2_000_000


@pytest.mark.parametrize(
    "path, body, code",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": DIGITS}]}, "context_length_exceeded"),
        ("/v1/completions", {"prompt": DIGITS}, "context_length_exceeded"),
        ("/v1/responses", {"input": DIGITS}, "context_length_exceeded"),
        ("/v1/embeddings", {"input": DIGITS}, "context_length_exceeded"),
        ("/tokenize", {"content": DIGITS}, "invalid_value"),
    ],
)
def test_a_text_that_would_take_hours_to_tokenize(api, path, body, code):
    """llama.cpp takes 25 s for a tenth of it, four times as long for twice as much."""
    refused(api.http.post(path, json=body), 400, code, "2000000")


def test_a_template_of_such_a_text(api):
    body = {"messages": [{"role": "user", "content": DIGITS}]}
    assert DIGITS in api.http.post("/apply-template", json=body).json()["prompt"]


@pytest.mark.parametrize("name", ["default", "byte-level"])
def test_how_many_tokens_a_text_has_at_least(api, base, name):
    """Never more than it has, whatever the text."""
    llm = api.service.llm if name == "default" else DeltaMemLlama(base("qwen3"), vocab_only=True, verbose=False)
    lengths, rng = Lengths(llm), np.random.default_rng(0)
    pieces = [llm.detokenize([token], special=True).decode(errors="replace") for token in range(llm.n_vocab())]
    kinds = [pieces, list("1\n \t<|>aé"), [chr(c) for c in (*range(1, 0xD800), *range(0xE000, 0x11000))]]
    for kind in kinds:
        text = "".join(kind[i] for i in rng.integers(len(kind), size=12_000)).encode()
        n = len(llm.tokenize(text, add_bos=False, special=True))
        assert 0 < lengths.at_least(text) <= n
    assert lengths.at_least(b"1" * 20_000) >= 10_000


DEEP = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "metadata": %s}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 200_000,
        DEEP % b"NaN",
        DEEP % b"-Infinity",
        DEEP % (b"[" * 500 + b"]" * 500),
        DEEP % (b'{"a":' * 300 + b"{" + b"}" * 301),
    ],
)
def test_a_body_that_is_no_json_object(api, content):
    refused(api.http.post("/v1/chat/completions", content=content), 400, "invalid_value")


MANY = b"[[{}]]," * 10_000  # more than is read at once
LARGE = DEEP % b"[%s%%s]" % MANY


@pytest.mark.parametrize(
    "content",
    [
        b"[%s{}]" % MANY,
        LARGE % b"{}" + b"}",
        LARGE[:-2] % b"{}",
        LARGE % b"",
        LARGE % b"NaN",
        LARGE % (b"1" * 5000),
        LARGE % (b"[" * 200 + b"]" * 200),
        LARGE % (b'{"a":' * 200 + b"{" + b"}" * 201),
    ],
)
def test_a_large_body_that_is_no_json_object(api, content):
    refused(api.http.post("/v1/chat/completions", content=content), 400, "invalid_value")


@pytest.mark.anyio
async def test_a_large_body_is_read_as_a_small_one():
    fields = b'"x\\u00e9\\"": ["\\ud800", -1.5e-3, null, true, false, 1%s, {}, [], ""], "y": {"a": 1, "a": 2}' % (
        b"0" * 400
    )
    deep = b"[" * 190 + b"]" * 190
    for content in (b'{%s, "z": %s}' % (fields, deep), b'{%s, "z": [%s%s]}' % (fields, MANY, deep)):

        async def receive(body=content):
            return {"type": "http.request", "body": body}

        assert await body_of(Request({"type": "http", "headers": []}, receive)) == json.loads(content)


@pytest.mark.parametrize("value", [b"[],", b"1,"])
def test_more_values_than_a_request_needs(api, value):
    """Found: eight megabytes of brackets took seconds to read, and gigabytes of memory, while all others waited."""
    content = LARGE % (value * 1_100_000 + b"0")
    refused(api.http.post("/v1/chat/completions", content=content), 413, "body_too_large")


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": "a", "logit_bias": "large"}),
        ("/v1/completions", {"prompt": "a", "temperature": "large"}),
        ("/v1/completions", {"prompt": "a", "grammar": "large"}),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "large"}}),
        ("/v1/completions", {"prompt": "a", "json_schema": {"$ref": "large"}}),
        ("/v1/completions", {"prompt": "a", "json_schema": {"type": "string", "pattern": "large"}}),
        ("/v1/completions", {"prompt": "a", "memory": {"session": "large"}}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [CLOCK], "tool_choice": {"function": {"name": "large"}}}),
        ("/v1/responses", {"input": [{"type": "large"}]}),
        ("/v1/embeddings", {"input": "a", "dimensions": "large"}),
    ],
)
@pytest.mark.parametrize("large", [[0] * 50_000, {str(i): [0] for i in range(20_000)}, "x" * 50_000, [["^"] * 50_000]])
def test_a_refusal_repeats_little_of_what_was_sent(api, path, body, large):
    """Found: a logit_bias that is none came back as a whole."""
    content = json.dumps(body).replace('"large"', json.dumps(large))
    assert len(refused(api.http.post(path, content=content), 400, "invalid_value").content) < 1000


def test_what_is_not_there(api):
    refused(api.http.get("/v1/nothing"), 404, "not_found", "GET /v1/nothing")
    answer = refused(api.http.get("/v1/chat/completions"), 405, "invalid_request", "GET /v1/chat/completions")
    assert answer.headers["allow"] == "POST"
    refused(api.http.get("/v1/models/other"), 404, "not_found", "other", "small")
    refused(api.http.get("/v1/memories/nobody"), 404, "session_not_found", "nobody")
    refused(api.http.get("/v1/memories/"), 404, "not_found", "/v1/memories/")  # no redirect, which a proxy may break


@pytest.mark.parametrize(
    "path, meant",
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/sessions/ada/responses", "/sessions/ada/v1/responses"),
        ("/v1/tokenize", "/tokenize"),
    ],
)
def test_an_endpoint_with_another_version(api, path, meant):
    refused(api.http.post(path, json={}), 404, "not_found", path, f" {meant}?")
    assert "?" not in api.http.post(f"{path}/x", json={}).json()["error"]["message"]


NAMES = ["../x", "..", ".", "a/b", "a" * 129, " ", "a b", "a\\b", "a%2Fb", "c:\\x", "a\n", "\0"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_paths(api, name):
    body = {"messages": HELLO, **GREEDY, "memory": {"session": name}}
    refused(api.http.post("/v1/chat/completions", json=body), 400, "invalid_value", "session")
    if name.isprintable() and name.strip():
        header = {"X-Memory-Session": name}
        refused(api.http.post("/v1/chat/completions", json={"messages": HELLO}, headers=header), 400, "invalid_value")
    ask(api, path="/sessions/named")
    refused(api.http.post("/v1/memories/named/fork", json={"id": name}), 400, "invalid_value")


@pytest.mark.parametrize("name", ["..%2Fx", "%2e%2e", "a%2Fb", "a" * 129, "a%20b", "%00", "a%0A"])
def test_names_in_paths_that_are_paths(api, name):
    for path in (f"/sessions/{name}/v1/chat/completions", f"/v1/memories/{name}/reset"):
        answer = api.http.post(path, json={"messages": HELLO})
        assert answer.status_code in (400, 404, 405), (path, answer.text)
    assert not any("/" in entry["id"] or ".." in entry["id"] for entry in api.http.get("/v1/memories").json()["data"])
