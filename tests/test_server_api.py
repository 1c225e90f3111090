"""The endpoints of the server, their errors and limits (docs/reference/server.md), over HTTP on the application."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_MEAN
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from pydeltamem import DeltaMemLlama, InputError
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server import application as application_module
from pydeltamem.server.answer import Piece
from pydeltamem.server.application import application
from pydeltamem.server.keys import Keys
from pydeltamem.server.lengths import Lengths
from pydeltamem.server.openai import Chat
from pydeltamem.server.records import StoreAway, StoreError
from pydeltamem.server.state import Settings
from servers import BASE, in_thread, service, until

GREEDY = {"temperature": 0, "max_tokens": 8}
HELLO = [{"role": "user", "content": "My name is Ada."}]


@pytest.fixture(scope="module")
def api():
    with in_thread(model="small", base="default.gguf", adapter="default-msw.gguf") as api:
        yield api


@pytest.fixture(scope="module")
def two_keys(tmp_path_factory):
    """A server with two keys, which may send a few requests a minute and small ones only."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("# who may use it\nkey-of-ada\n\nkey-of-bo\n")
    with in_thread(keys=Keys(path)) as api:
        yield api


def ask(api, messages=HELLO, *, path="", headers=None, **body):
    """One chat completion, which succeeds."""
    answer = api.http.post(
        f"{path}/v1/chat/completions", json={"messages": messages, **GREEDY, **body}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer):
    return answer["choices"][0]["message"]["content"]


def chunks(api, path="/v1/chat/completions", **body):
    """What a stream sends, without its end."""
    with api.http.stream("POST", path, json={"stream": True, **GREEDY, **body}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(answer, status, code, *names):
    """An answer is OpenAI's error object and names these."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "code"} and error["code"] == code, error
    for name in names:
        assert name in error["message"], error
    return answer


def state(api, session):
    answer = api.http.get(f"/v1/memories/{session}/file")
    assert answer.status_code == 200, answer.text
    return MemorySnapshot.from_bytes(answer.content).state


def about(api, session):
    answer = api.http.get(f"/v1/memories/{session}")
    assert answer.status_code == 200, answer.text
    return answer.json()


#
# answers
#


def test_health_and_models(api):
    assert api.http.get("/health").json() == {"status": "ok"}
    (model,) = api.http.get("/v1/models").json()["data"]
    assert (model["id"], model["base"], model["adapter"]) == ("small", "default.gguf", "default-msw.gguf")
    assert api.http.get("/sessions/ada/v1/models").json() == api.http.get("/v1/models").json()
    assert api.http.get("/v1/models/small").json() == api.http.get("/sessions/ada/v1/models/small").json() == model
    for path in ("/health", "/health/live"):  # as balancers ask
        answer = api.http.head(path)
        assert answer.status_code == 200 and not answer.content


def test_chat(api):
    answer = ask(api, max_tokens=4, grammar="root ::= [a-z ] root")
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "small"
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    used = answer["usage"]
    assert choice["finish_reason"] == "length" and used["completion_tokens"] == 4
    assert used["total_tokens"] == used["prompt_tokens"] + 4
    assert answer["memory"]["session"] is None
    assert answer["memory"]["tokens_written"] >= used["prompt_tokens"]


def test_options_under_other_names(api):
    answer = ask(
        api, max_tokens=None, max_completion_tokens=3, response_format={"type": "text"}, grammar="root ::= [a-z ] root"
    )
    assert answer["usage"]["completion_tokens"] == 3
    forty = 'root ::= "' + "a b " * 20 + '"'
    answer = ask(api, max_tokens=-1, grammar=forty, chat_template_kwargs={"enable_thinking": False}, top_k=None)
    assert answer["choices"][0]["finish_reason"] == "stop"  # to its end, as with llama-server


def test_content_in_parts(api):
    parts = [{"role": "user", "content": [{"type": "text", "text": "My name "}, {"type": "text", "text": "is Ada."}]}]
    assert said(ask(api, parts)) == said(ask(api))


@pytest.mark.parametrize("path", ["", "/sessions/streamed"])
def test_a_stream_says_the_same(api, path):
    whole = ask(api, seed=3, temperature=0.9)
    parts = chunks(
        api, f"{path}/v1/chat/completions", messages=HELLO, seed=3, temperature=0.9,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [part["choices"][0]["delta"].get("content") or "" for part in parts[:-1]]
    assert "".join(deltas) == said(whole)
    reasons = [part["choices"][0]["finish_reason"] for part in parts[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole["choices"][0]["finish_reason"]]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert parts[-2]["memory"]["session"] == ("streamed" if path else None)
    assert len({part["id"] for part in parts}) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_event_holds_any_text(api, path):
    """Line breaks would end an event, quotes and backslashes its JSON. A busy machine sends fewer, longer events."""
    grammar = r'root ::= "\"a\\" "\n\n" "data: {}\r\t" "\x01é"'
    asked = {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    parts = chunks(api, path, **asked, grammar=grammar, max_tokens=100)
    choices = [choice for part in parts for choice in part["choices"]]
    texts = [choice["delta"].get("content") or "" if "chat" in path else choice["text"] for choice in choices]
    assert "".join(texts) == '"a\\\n\ndata: {}\r\t\x01é'


def test_a_stream_without_usage(api):
    assert all("usage" not in part for part in chunks(api, messages=HELLO))


def test_a_seed_gives_the_same_text_twice(api):
    texts = [said(ask(api, seed=seed, temperature=2.0, max_tokens=24)) for seed in (1, 2, 1, 2)]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


@pytest.mark.parametrize("stop", ["end", ["never said", "end"]])
def test_stop(api, stop):
    grammar = 'root ::= "at the end it stops"'
    answer = ask(api, grammar=grammar, stop=stop, max_tokens=64)
    assert said(answer) == "at the " and answer["choices"][0]["finish_reason"] == "stop"
    parts = chunks(api, messages=HELLO, grammar=grammar, stop=stop, max_tokens=64)
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == "at the "


def test_characters_of_several_tokens(api):
    text = "Übergrößen für 日本語 🙂🙃"
    parts = chunks(
        api, messages=HELLO, grammar=f'root ::= "{text}"', max_tokens=100, stream_options={"include_usage": True}
    )
    deltas = [part["choices"][0]["delta"].get("content") or "" for part in parts[:-1]]
    assert "".join(deltas) == text and parts[-1]["usage"]["completion_tokens"] > len(text)
    assert said(ask(api, grammar=f'root ::= "{text}"', max_tokens=100)) == text


def test_log_probabilities(api):
    (choice,) = ask(api, logprobs=True, top_logprobs=3)["choices"]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).strip() == choice["message"]["content"].strip()
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0
        likeliest = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert entry["logprob"] == pytest.approx(likeliest[0])  # greedy
    streamed = [part["choices"][0]["logprobs"] for part in chunks(api, messages=HELLO, logprobs=True, top_logprobs=3)]
    assert [entry["token"] for part in streamed if part for entry in part["content"]] == [e["token"] for e in entries]


@pytest.mark.parametrize(
    "body",
    [
        {"grammar": 'root ::= "😀🙂" "x"'},  # characters of several tokens
        {"grammar": 'root ::= "a!!!b!!c"', "stop": ["!!!!"]},  # what might be a stop string, and is not
        {"grammar": 'root ::= "ab!!!"', "stop": ["!!!!"]},  # and at the end
        {"grammar": 'root ::= "ab end c"', "stop": ["end"]},
        {"grammar": 'root ::= "😀🙂"', "max_tokens": 2},  # half a character
        {"grammar": 'root ::= "a < b <tool x"', "tools": "some"},
        {"grammar": 'root ::= "a < b <tool"', "tools": "some"},
        {"grammar": """root ::= "At once. <tool_call>{\\"name\\": \\"clock\\"}</tool_call>" """, "tools": "some"},
        {"tools": "some", "tool_choice": "required"},
        {"tools": "some", "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"functions": "some", "function_call": {"name": "weather"}},
    ],
)
def test_a_stream_has_all_log_probabilities(api, body):
    """Found: a chat's stream lost those of tokens whose text was not certain yet."""
    some = {"tools": [WEATHER, CLOCK], "functions": [WEATHER["function"], CLOCK["function"]]}
    body = {"max_tokens": 40, "logprobs": True, "top_logprobs": 1, **body}
    body |= {key: some[key] for key in some if key in body}
    (whole,) = ask(api, **body)["choices"]
    choices = [part["choices"][0] for part in chunks(api, messages=HELLO, **body)]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == [entry["token"] for entry in whole["logprobs"]["content"]]
    np.testing.assert_allclose(
        [entry["logprob"] for entry in entries],
        [entry["logprob"] for entry in whole["logprobs"]["content"]],
        rtol=1e-3,
        atol=1e-4,
    )
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


def test_the_bytes_of_parts_of_characters(api):
    """Found: the letters of `bytes:\\xf0`, as such a token is named."""
    text = "a\U0001f642\u00e9"
    (choice,) = ask(api, logprobs=True, top_logprobs=2, grammar=f'root ::= "{text}"', max_tokens=20)["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) > len(text)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"] == text


def test_completions(api):
    answer = api.http.post("/v1/completions", json={"prompt": "My name", "logprobs": 2, **GREEDY}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion" and choice["text"]
    assert "".join(choice["logprobs"]["tokens"]).strip() == choice["text"].strip()
    assert all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"])
    tokens = api.http.post("/tokenize", json={"content": "My name", "add_special": True}).json()["tokens"]
    for prompt in (tokens, ["My name"], [tokens]):
        other = api.http.post("/v1/completions", json={"prompt": prompt, **GREEDY}).json()
        assert other["choices"][0]["text"] == choice["text"]
    echoed = api.http.post("/v1/completions", json={"prompt": "My name", "echo": True, **GREEDY}).json()
    assert echoed["choices"][0]["text"] == "My name" + choice["text"]
    parts = chunks(api, "/v1/completions", prompt="My name")
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    parts = chunks(api, "/v1/completions", prompt="My name", echo=True, stream_options={"include_usage": True})
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == "My name" + choice["text"]
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == answer["usage"]
    scored = {"prompt": "My name", "echo": True, "logprobs": 2}
    for body in (scored, {"prompt": tokens, "echo": True}):
        refused(api.http.post("/v1/completions", json={**GREEDY, **body}), 400, "invalid_value", "echo")
    ask(api, path="/sessions/completed")  # a session goes on with a text as with a chat
    answer = api.http.post("/sessions/completed/v1/completions", json={"prompt": "My name", **GREEDY}).json()
    assert answer["memory"]["version"] == 2


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "weather"}}, "required"])
def test_a_tool_that_must_be_called(api, choice):
    tools = [WEATHER, CLOCK] if isinstance(choice, dict) else [WEATHER]
    answer = ask(api, tools=tools, tool_choice=choice, max_tokens=40)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"warm"}
    parts = chunks(api, messages=HELLO, tools=tools, tool_choice=choice, max_tokens=40)
    calls = [call for part in parts for call in part["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather" and calls[0]["id"]
    arguments = "".join(call["function"].get("arguments", "") for call in calls)
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PLACE = {"type": "function", "function": {"name": "place", "parameters": CITY}}
OLD = {"functions": [PLACE["function"]], "function_call": {"name": "place"}}


@pytest.mark.parametrize("body", [{"tools": [PLACE], "tool_choice": "required"}, OLD])
def test_a_tool_call_that_is_cut(api, body):
    """Its arguments are not whole, and finish_reason says so."""
    (whole,) = ask(api, **body, max_tokens=4)["choices"]
    call = whole["message"].get("function_call") or whole["message"]["tool_calls"][0]["function"]
    with pytest.raises(ValueError):
        json.loads(call["arguments"])
    parts = chunks(api, messages=HELLO, **body, max_tokens=4)
    assert whole["finish_reason"] == parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_whole_tool_call_before_the_end_of_a_cut_answer(api):
    body = {"tools": [CLOCK], "grammar": f'root ::= "{CALL}" "and so on " [a-z ]+', "max_tokens": 60}
    (whole,) = ask(api, **body)["choices"]
    assert whole["message"]["tool_calls"][0]["function"]["name"] == "clock"
    parts = chunks(api, messages=HELLO, **body)
    assert whole["finish_reason"] == parts[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("is_forced", [False, True])
def test_the_old_fields_of_tools(api, is_forced):
    """`functions` and `function_call` have answers of their own kind, which may come back as messages."""
    body = {"functions": [WEATHER["function"], CLOCK["function"]], "max_tokens": 60}
    body |= {"function_call": {"name": "weather"}} if is_forced else {"grammar": f'root ::= "{CALL}"'}
    name = "weather" if is_forced else "clock"
    path = f"/sessions/old-{name}"
    first = ask(api, path=path, **body)
    (choice,) = first["choices"]
    message = choice["message"]
    assert "tool_calls" not in message and message["content"] is None and choice["finish_reason"] == "function_call"
    assert message["function_call"]["name"] == name and json.loads(message["function_call"]["arguments"]) is not None
    parts = chunks(api, messages=HELLO, **body)
    deltas = [part["choices"][0]["delta"] for part in parts]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert not any("tool_calls" in delta for delta in deltas)
    assert [call["name"] for call in calls if "name" in call] == [name]
    assert "".join(call["arguments"] for call in calls) == message["function_call"]["arguments"]
    assert parts[-1]["choices"][0]["finish_reason"] == "function_call"
    result = {"role": "function", "name": name, "content": "warm"}
    second = ask(api, [*HELLO, message, result], path=path, functions=body["functions"], function_call="none")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    assert second["memory"]["version"] == about(api, path.rpartition("/")[2])["turns"] == 2
    as_tools = {"role": "assistant", "content": None, "tool_calls": [{"function": message["function_call"]}]}
    one, other = (
        api.http.post("/apply-template", json={"messages": [*HELLO, said, answer]}).json()["prompt"]
        for said, answer in ((message, result), (as_tools, {**result, "role": "tool"}))
    )
    assert one == other


def test_one_of_several_tools_must_be_called(api):
    answer = ask(api, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=60)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "clock") and json.loads(call["function"]["arguments"]) is not None


CALL = '<tool_call>\\n{\\"name\\": \\"clock\\", \\"arguments\\": {}}\\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, None, ["clock"]),
        (f"At once. {CALL}", "At once.", ["clock"]),
        ("1 < 2", "1 < 2", []),  # what might begin a call and does not
        ("1 <", "1 <", []),
        ("<tool_call>{no json}</tool_call>", "<tool_call>{no json}</tool_call>", []),
    ],
)
def test_an_answer_may_call_a_tool(api, text, content, names):
    """A stream holds back what may be a call, and passes on a call as a whole."""
    body = {"tools": [CLOCK], "max_tokens": 80, "grammar": f'root ::= "{text}"'}
    (choice,) = ask(api, **body)["choices"]
    assert [call["function"]["name"] for call in choice["message"].get("tool_calls", ())] == names
    assert choice["finish_reason"] == ("tool_calls" if names else "stop")
    assert (choice["message"]["content"] or "").strip() == (content or "")
    parts = chunks(api, messages=HELLO, **body)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == (content or "")
    assert [c["function"]["name"] for delta in deltas for c in delta.get("tool_calls", ())] == names
    assert parts[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    "pieces", [("At", " once. <", "tool_call>"), ("At", " ", "once. <tool_call>"), ("At once. <tool_call>",)]
)
@pytest.mark.parametrize("logprobs", [False, True])
def test_no_space_before_a_call_is_lost(pieces, logprobs):
    """Found: a piece that ended in what may begin a call lost the space at its beginning."""
    chat = Chat({"messages": HELLO, "tools": [CLOCK], "stream": True, "logprobs": logprobs}, "model")
    called = '{"name": "clock", "arguments": {}}</tool_call>'
    answer = SimpleNamespace(finish_reason="stop", n_prompt=1, n_cached=0, n_generated=1, committed=None)

    async def stream():
        for text in (*pieces, called):
            yield Piece(text)

    async def said():
        return [json.loads(chunk)["choices"][0]["delta"] async for chunk in chat.chunks(answer, stream())]

    deltas = asyncio.run(said())
    assert "".join(delta.get("content") or "" for delta in deltas) == "At once. "
    assert [c["function"]["name"] for delta in deltas for c in delta.get("tool_calls", ())] == ["clock"]


def test_the_result_of_a_tool_goes_on(api):
    """The call comes back as a message of the chat, and the session goes on from it."""
    first = ask(api, path="/sessions/tool", tools=[WEATHER], tool_choice="required", max_tokens=40)
    message = first["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "warm"}
    second = ask(api, [*HELLO, message, result], path="/sessions/tool", tools=[WEATHER], tool_choice="none")
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    assert second["memory"]["version"] == about(api, "tool")["turns"] == 2 and said(second)


def test_structured_output(api):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Lima", "Oslo"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    answer = json.loads(said(ask(api, response_format=wanted, max_tokens=60)))
    assert set(answer) == {"city", "sure"} and answer["city"] in ("Lima", "Oslo") and isinstance(answer["sure"], bool)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("field", ["response_format", "json_schema"])
def test_a_schema_in_either_field(api, path, field):
    """Found: llama-server's json_schema was ignored, and so was any format of a completion."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Lima", "Oslo"]}}, "required": ["city"]}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}} if field == "response_format" else schema
    asked = {"messages": HELLO} if "chat" in path else {"prompt": "My name is Ada."}
    answer = api.http.post(path, json={**asked, **GREEDY, "max_tokens": 60, field: wanted}).json()["choices"][0]
    text = answer["message"]["content"] if "chat" in path else answer["text"]
    assert json.loads(text)["city"] in ("Lima", "Oslo")


def test_a_completion_that_is_any_object(api):
    asked = {"prompt": "{", "response_format": {"type": "json_object"}, **GREEDY}
    assert api.http.post("/v1/completions", json=asked).json()["choices"][0]["text"].lstrip().startswith("{")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_number_of_tokens_in_the_words_of_llama_server(api, path):
    """Found: n_predict was ignored, and an answer went on to the end of the context."""
    asked = {"messages": HELLO, "prompt": "a", "temperature": 0, "grammar": "root ::= [a-z] root", "n_predict": 3}
    assert api.http.post(path, json=asked).json()["usage"]["completion_tokens"] == 3


def test_a_token_that_is_excluded(api):
    """llama-server's false, and its list of pairs. Found: false was no bias at all."""
    asked = {"prompt": "My name is", "logprobs": 0, **GREEDY, "max_tokens": 1}

    def first(**body):
        answer = api.http.post("/v1/completions", json={**asked, **body}).json()["choices"][0]
        return answer["text"], api.http.post("/tokenize", json={"content": answer["text"]}).json()["tokens"][-1]

    text, token = first()
    for never in ({str(token): False}, [[token, False]], [[token, -100]]):
        assert first(logit_bias=never)[0] != text


def test_embeddings(api):
    def embed(**body):
        return api.http.post("/v1/embeddings", json={"input": ["one", "two"], **body}).json()

    answer = embed()
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5) and answer["usage"]["prompt_tokens"] > 0
    packed = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in embed(encoding_format="base64")["data"]]
    np.testing.assert_allclose(packed, vectors, atol=1e-6)
    assert embed(dimensions=len(vectors[0]))["data"] == answer["data"]
    ask(api, path="/sessions/embedded")
    before = about(api, "embedded")
    np.testing.assert_allclose(embed(encoding_format=None)["data"][0]["embedding"], vectors[0], atol=1e-6)
    with_memory = embed(memory={"session": "embedded"})["data"][0]["embedding"]
    assert not np.allclose(with_memory, vectors[0], atol=1e-6)
    assert about(api, "embedded") == before


def test_embeddings_are_of_the_model_as_it_is_served():
    """Found: its LoRA adapter, its devices and RPC servers, and how it turns positions were left out."""
    options = {"rope_freq_scale": 0.25, "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with DeltaMemLlama(BASE, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN, **options) as llm:
        expected = llm.embed("one two three", normalize=True)
    with in_thread(lambda: AsyncDeltaMem(DeltaMemLlama(BASE, n_seq_max=2, **options))) as api:
        answer = api.http.post("/v1/embeddings", json={"input": "one two three"}).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-6)


def test_what_llama_server_says_of_itself(api, two_keys, narrow, monkeypatch):
    props, llm = api.http.get("/props").json(), api.service.llm
    assert props["total_slots"] == 2 and props["default_generation_settings"]["n_ctx"] == llm.n_ctx()
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    assert props["model_path"] == "default.gguf" and props["model_alias"] == "small" and "llama" in props["build_info"]
    assert props["chat_template"] == llm.metadata["tokenizer.chat_template"]
    assert api.http.post("/tokenize", json={"content": props["eos_token"]}).json()["tokens"] == [llm.token_eos()]
    for path in ("/props", "/slots"):
        refused(two_keys.http.get(path), 401, "invalid_api_key")
    free = {"id": 0, "n_ctx": narrow.service.llm.n_ctx(), "speculative": False, "is_processing": False}
    assert narrow.http.get("/slots", params={"fail_on_no_slot": 1}).json() == [free]
    go_on = threading.Event()
    monkeypatch.setattr(narrow.service.llm._engine, "stepped", lambda seconds: go_on.wait(60))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(narrow.http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 4})
        try:
            until(lambda: narrow.http.get("/slots").json() == [{**free, "is_processing": True}])
            refused(narrow.http.get("/slots", params={"fail_on_no_slot": 1}), 503, "no_slot")
        finally:
            go_on.set()
        assert asked.result().status_code == 200


def test_tokens_and_template(api):
    text = "My name is Ada 🙂."
    tokens = api.http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [token["id"] for token in tokens] == api.http.post("/tokenize", json={"content": text}).json()["tokens"]
    joined = b"".join(piece.encode() if isinstance(piece := token["piece"], str) else bytes(piece) for token in tokens)
    assert joined.decode().strip() == text
    back = api.http.post("/detokenize", json={"tokens": [token["id"] for token in tokens]}).json()["content"]
    assert back.strip() == text
    prompt = api.http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    assert "My name is Ada." in prompt
    assert api.http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    absent = {"content": "<|im_start|>", "add_special": None, "parse_special": None, "with_pieces": None}
    asked = {"content": "<|im_start|>"}
    assert api.http.post("/tokenize", json=absent).json() == api.http.post("/tokenize", json=asked).json()


def test_the_prompt_of_a_chat_continues_as_the_chat(api):
    """Found: it had spaces that the template did not write, so its tokens were others."""
    chat = ask(api)
    prompt = api.http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    answer = api.http.post("/v1/completions", json={"prompt": prompt, **GREEDY}).json()
    assert answer["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["choices"][0]["text"] == said(chat)


def test_the_prompt_of_a_template_that_begins_a_text(tmp_path):
    """Found: /v1/completions put a second token of a text's beginning before it."""
    data, path = Path(BASE).read_bytes(), tmp_path / "begins.gguf"
    old, new = (
        b"{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}",
        (b"<s>{%for message in messages%}<|{{ message['role'] }}|>{{ message['content'] |trim }}"),
    )
    assert len(old) == len(new) and data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    added = {"tokenizer.ggml.add_bos_token": True}
    with in_thread(lambda: AsyncDeltaMem(DeltaMemLlama(str(path), kv_overrides=added, verbose=False))) as api:
        chat = ask(api)
        prompt = api.http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
        answer = api.http.post("/v1/completions", json={"prompt": prompt, **GREEDY}).json()
    assert answer["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["choices"][0]["text"] == said(chat)


def test_null_is_as_absent(api):
    tool = {"type": "function", "function": {"name": "clock", "parameters": None}}
    absent = dict.fromkeys(
        ("stop", "seed", "n", "grammar", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "top_p",
         "tool_choice", "functions", "function_call", "response_format", "chat_template_kwargs",
         "max_completion_tokens")
    )  # fmt: skip
    null = {"session": None, "write": None}
    assert said(ask(api, tools=[tool], memory=null, **absent)) == said(ask(api, tools=[CLOCK]))
    assert said(ask(api, memory=None, tools=None)) == said(ask(api))
    answers = [api.http.post("/v1/completions", json={**GREEDY, **body}) for body in ({}, {"prompt": None})]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


#
# sessions
#


def test_which_session_a_request_belongs_to(api):
    """The path comes before the header, and the header before the body."""
    asked = [
        ("in-path", {"path": "/sessions/in-path", "headers": {"X-Memory-Session": "x"}, "memory": {"session": "y"}}),
        ("in-header", {"headers": {"X-Memory-Session": "in-header"}, "memory": {"session": "y"}}),
        ("in-body", {"memory": {"session": "in-body"}}),
    ]
    for name, how in asked:
        assert ask(api, **how)["memory"] == {
            "session": name,
            "version": 1,
            "tokens_written": about(api, name)["tokens"],
        }
    names = {entry["id"] for entry in api.http.get("/v1/memories").json()["data"]}
    assert names >= {name for name, _ in asked} and not names & {"x", "y"}
    for name, _ in asked[1:]:
        np.testing.assert_array_equal(state(api, name), state(api, "in-path"))


def test_a_header_is_utf_8(api):
    """Found: a session of another name, where the bytes are letters in Latin-1 too."""
    for name in ("\u00ea", "\u540d"):
        assert ask(api, headers={"X-Memory-Session": name.encode()})["memory"]["session"] == name
        assert about(api, name)["turns"] == 1
    headers = {"X-Memory-Session": "\u00ea".encode("latin-1")}
    refused(api.http.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers), 400, "invalid_value")


def test_an_unknown_session_begins_empty(api):
    alone = ask(api)
    answer = ask(api, path="/sessions/begins")
    assert said(answer) == said(alone) and answer["memory"]["tokens_written"] == alone["memory"]["tokens_written"]
    assert about(api, "begins")["turns"] == 1


def test_what_was_sent_before_is_not_written_again(api):
    first = ask(api, path="/sessions/again")
    chat = [*HELLO, {"role": "assistant", "content": said(first)}, {"role": "user", "content": "Thank you."}]
    second = ask(api, chat, path="/sessions/again")
    n_prompt = second["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    assert second["memory"]["version"] == 2
    # what a chat of its own with the same messages writes
    assert second["memory"]["tokens_written"] <= n_prompt + second["usage"]["completion_tokens"]
    regenerated = ask(api, chat, path="/sessions/again")
    assert regenerated["memory"] == {**second["memory"], "version": 3} and said(regenerated) == said(second)
    edited = [*chat[:-1], {"role": "user", "content": "I live in Lima."}]
    for name in ("again", "straight"):
        if name == "straight":
            ask(api, path=f"/sessions/{name}")
        ask(api, edited, path=f"/sessions/{name}")
    np.testing.assert_allclose(state(api, "again"), state(api, "straight"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [{"grammar": "root ::= "}, {"max_tokens": 0}])
def test_an_empty_answer_is_no_turn(api, empty):
    path = "/sessions/empty"
    answer = ask(api, path=path, **empty)
    assert said(answer) == "" and answer["memory"] == {"session": "empty", "version": 0, "tokens_written": 0}
    refused(api.http.get("/v1/memories/empty"), 404, "session_not_found", "empty")

    ask(api, path=path, grammar='root ::= "yes"')
    before, memory = about(api, "empty"), state(api, "empty")
    last = chunks(api, f"{path}/v1/chat/completions", messages=[{"role": "user", "content": "Go on."}], **empty)[-1]
    assert last["memory"]["version"] == before["version"] == 1
    assert about(api, "empty") == before
    np.testing.assert_array_equal(state(api, "empty"), memory)
    assert "memory" not in ask(api, **empty)
    api.http.delete("/v1/memories/empty")


def test_a_request_that_does_not_write(api):
    ask(api, path="/sessions/kept")
    before, memory = about(api, "kept"), state(api, "kept")
    answer = ask(api, [{"role": "user", "content": "Who am I?"}], path="/sessions/kept", memory={"write": False})
    assert answer["memory"] == {"session": "kept", "version": 1, "tokens_written": before["tokens"]}
    assert about(api, "kept") == before
    np.testing.assert_array_equal(state(api, "kept"), memory)
    assert ask(api, memory={"session": "not-begun", "write": False})["memory"]["version"] == 0
    refused(api.http.get("/v1/memories/not-begun"), 404, "session_not_found", "not-begun")


def test_list_and_metadata(api):
    for name in ("first", "second", "first"):
        ask(api, path=f"/sessions/{name}")
    listed = [entry["id"] for entry in api.http.get("/v1/memories").json()["data"]]
    assert listed.index("first") < listed.index("second")  # the latest first
    one = about(api, "first")
    assert one["turns"] == 1 and one["bytes"] == len(api.http.get("/v1/memories/first/file").content)
    assert one["created"].endswith("Z") and one["updated"] >= one["created"]
    s = state(api, "first")
    assert one["shape"] == list(s.shape) and len(one["layers"]) == len(s)
    for layer, matrices in zip(one["layers"], s):
        np.testing.assert_allclose(layer["norm"], np.linalg.norm(matrices, axis=(1, 2)), rtol=1e-4)
        np.testing.assert_allclose(layer["singular_values"], np.linalg.svd(matrices)[1], rtol=1e-3, atol=1e-5)


def test_sessions_in_parts(api):
    """Found: a list of many sessions came as a whole only."""
    ask(api, path="/sessions/whole")
    file = api.http.get("/v1/memories/whole/file").content
    for name in ("part-a", "part-b", "part-c"):
        api.http.put(f"/v1/memories/{name}/file", content=file)
    everything = api.http.get("/v1/memories").json()
    assert everything["has_more"] is False
    found, part = [], {"has_more": True}
    while part["has_more"]:
        after = {"after": found[-1]} if found else {}
        part = api.http.get("/v1/memories", params={"limit": 2, **after}).json()
        found += [entry["id"] for entry in part["data"]]
        assert len(part["data"]) == 2 or not part["has_more"]
    assert found == [entry["id"] for entry in everything["data"]]
    assert api.http.get("/v1/memories", params={"after": found[-1]}).json()["data"] == []
    for limit in ("0", "-1", "x", "", "1" * 50, "1.5", "²"):
        refused(api.http.get("/v1/memories", params={"limit": limit}), 400, "invalid_value", "limit")
    refused(api.http.get("/v1/memories", params={"after": "nobody"}), 404, "session_not_found", "nobody")
    refused(api.http.get("/v1/memories", params={"after": "a b"}), 400, "invalid_value", "a b")


def test_fork(api):
    ask(api, path="/sessions/root")
    answer = api.http.post("/v1/memories/root/fork", json={"id": "branch"})
    assert answer.status_code == 200 and answer.json()["id"] == "branch"
    np.testing.assert_array_equal(state(api, "branch"), state(api, "root"))
    before = about(api, "root")
    ask(api, [{"role": "user", "content": "I live in Lima."}], path="/sessions/branch")
    assert about(api, "root") == before and not np.allclose(state(api, "branch"), state(api, "root"))
    refused(api.http.post("/v1/memories/root/fork", json={"id": "branch"}), 409, "session_changed", "branch")
    refused(api.http.post("/v1/memories/nobody/fork", json={"id": "x"}), 404, "session_not_found", "nobody")
    refused(api.http.post("/v1/memories/root/fork", json={}), 400, "invalid_value")


def test_undo_reset_and_delete(api):
    ask(api, path="/sessions/short")
    one = state(api, "short")
    ask(api, [{"role": "user", "content": "I live in Lima."}], path="/sessions/short")
    assert not np.allclose(state(api, "short"), one)
    assert api.http.post("/v1/memories/short/undo").json()["turns"] == 1
    np.testing.assert_allclose(state(api, "short"), one, rtol=1e-5, atol=1e-6)
    assert api.http.post("/v1/memories/short/undo").json()["tokens"] == 0
    refused(api.http.post("/v1/memories/short/undo"), 400, "invalid_value", "short")
    ask(api, path="/sessions/short")
    emptied = api.http.post("/v1/memories/short/reset").json()
    assert emptied["turns"] == emptied["tokens"] == 0 and not state(api, "short").any()
    assert api.http.delete("/v1/memories/short").json()["deleted"] is True
    for method, path in (("GET", ""), ("GET", "/file"), ("DELETE", ""), ("POST", "/undo"), ("POST", "/reset")):
        refused(api.http.request(method, f"/v1/memories/short{path}"), 404, "session_not_found", "short")
    assert ask(api, path="/sessions/short")["memory"]["version"] == 1


def test_a_memory_to_take_along(api):
    ask(api, path="/sessions/taken")
    file = api.http.get("/v1/memories/taken/file").content
    brought = api.http.put("/v1/memories/brought/file", content=file)
    assert brought.status_code == 200 and brought.json()["tokens"] == about(api, "taken")["tokens"]
    np.testing.assert_array_equal(state(api, "brought"), state(api, "taken"))
    answers = [
        said(ask(api, [{"role": "user", "content": "What is my name?"}], memory={"session": name, "write": False}))
        for name in ("taken", "brought")
    ]
    assert answers[0] == answers[1]
    snapshot = MemorySnapshot.from_bytes(file)
    for n in ("9" * 19, str(2**63 - 1)):  # no database counts so far
        untrue = MemorySnapshot(snapshot.state, {**snapshot.metadata, "tokens_written": n}).to_bytes()
        assert api.http.put("/v1/memories/untrue/file", content=untrue).json()["tokens"] == 0
        assert ask(api, path="/sessions/untrue")["memory"]["tokens_written"] > 0
    refused(api.http.put("/v1/memories/brought/file", content=b"no memory"), 400, "memory_file")
    refused(api.http.put("/v1/memories/brought/file", content=file[:-10]), 400, "memory_file")
    np.testing.assert_array_equal(state(api, "brought"), state(api, "taken"))


def test_a_memory_that_is_far_too_large(api, caplog):
    """Clients read nothing of where the server has its files."""
    ask(api, path="/sessions/large")
    snapshot = MemorySnapshot.from_bytes(api.http.get("/v1/memories/large/file").content)
    snapshot = dataclasses.replace(snapshot, state=np.full_like(snapshot.state, 1e38))
    assert api.http.put("/v1/memories/large/file", content=snapshot.to_bytes()).status_code == 200
    body = {"messages": HELLO, **GREEDY}
    answer = refused(api.http.post("/sessions/large/v1/chat/completions", json=body), 500, "not_finite")
    assert str(Path(BASE).parent) not in answer.text and str(Path(BASE).parent) in caplog.text
    assert (state(api, "large") == snapshot.state).all()


def test_the_memory_of_another_adapter(api):
    with in_thread(lambda: service(adapter="tsw")) as other:
        ask(other, path="/sessions/elsewhere")
        file = other.http.get("/v1/memories/elsewhere/file").content
    refused(api.http.put("/v1/memories/elsewhere/file", content=file), 400, "memory_file", "adapter")
    refused(api.http.get("/v1/memories/elsewhere"), 404, "session_not_found")


def test_without_an_adapter_there_are_no_sessions():
    with in_thread(lambda: service(adapter=None)) as plain:
        assert said(ask(plain))
        body = {"messages": HELLO, **GREEDY}
        refused(plain.http.post("/sessions/ada/v1/chat/completions", json=body), 400, "invalid_value", "ada", "adapter")
        assert plain.http.get("/v1/memories").json()["data"] == []
        assert plain.http.get("/v1/models").json()["data"][0]["adapter"] is None


#
# errors
#


@pytest.mark.parametrize(
    "body, name",
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
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
        ({"logprobs": True, "top_logprobs": "a"}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": "x"}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
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
        ("/v1/responses", {"input": "a", "include": "message.output_text.logprobs"}, "include"),
        ("/v1/responses", {"input": "a", "top_logprobs": 21}, "top_logprobs"),
        (
            "/v1/responses",
            {"input": "a", "text": {"format": {"type": "json_object"}}, "grammar": 'root ::= "a"'},
            "grammar",
        ),
        ("/v1/responses", {"input": "a", "temperature": -1}, "temperature"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": [""]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 16}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": "x"}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/tokenize", {"content": 5}, "content"),
        ("/detokenize", {"tokens": ["a"]}, "token"),
        ("/tokenize", {"content": "a", "add_special": "no"}, "add_special"),
        ("/tokenize", {"content": "a", "parse_special": "no"}, "parse_special"),
        ("/tokenize", {"content": "a", "with_pieces": 1}, "with_pieces"),
        ("/detokenize", {"tokens": 5}, "token"),
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


#
# keys and limits
#


def with_key(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, with_key("wrong"), {"Authorization": "key-of-ada"}, with_key("# who may use it"), {"Authorization": "Bearer"}],
)
def test_without_a_key(two_keys, headers):
    for method, path in (
        ("GET", "/v1/models"), ("GET", "/v1/memories"), ("GET", "/v1/memories/ada"), ("DELETE", "/v1/memories/ada"),
        ("GET", "/v1/memories/ada/file"), ("PUT", "/v1/memories/ada/file"), ("POST", "/v1/memories/ada/fork"),
        ("POST", "/v1/memories/ada/undo"), ("POST", "/v1/memories/ada/reset"), ("GET", "/metrics"),
        ("POST", "/v1/chat/completions"), ("POST", "/sessions/ada/v1/completions"), ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/apply-template"),
    ):  # fmt: skip
        answer = refused(two_keys.http.request(method, path, headers=headers), 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert two_keys.http.get("/health").status_code == 200  # for balancers


@pytest.mark.parametrize("content", [None, b"# nobody yet\n\n", b"\xff"])
def test_a_file_without_keys_is_named(tmp_path, content):
    """Otherwise the server would let everybody in."""
    if content is not None:
        (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"keys\.txt"):
        Keys(tmp_path / "keys.txt")


def test_what_editors_and_clients_make_of_keys(tmp_path):
    """A mark at the beginning of the file, a comment that is indented, and letters that are not ASCII."""
    path = tmp_path / "keys.txt"
    path.write_text("\ufeffkey-of-ada\n  # key-of-nobody\n\u00eaabc\n", encoding="utf-8")
    keys = Keys(path)
    assert keys.owner("Bearer key-of-ada") and keys.owner("Bearer # key-of-nobody") is None
    with in_thread(keys=keys, ready=False) as api:
        for key, status in (("\u00eaabc", 200), ("# key-of-nobody", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert api.http.get("/v1/models", headers=headers).status_code == status


def test_sessions_of_another_key_are_invisible(two_keys):
    ada, bo = with_key("key-of-ada"), with_key("key-of-bo")
    ask(two_keys, path="/sessions/diary", headers=ada)
    before = two_keys.http.get("/v1/memories/diary", headers=ada).json()
    assert two_keys.http.get("/v1/memories", headers=bo).json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/file"), ("POST", "/undo"), ("POST", "/reset"), ("DELETE", "")):
        answer = two_keys.http.request(method, f"/v1/memories/diary{path}", headers=bo)
        refused(answer, 404, "session_not_found", "diary")
    forked = two_keys.http.post("/v1/memories/diary/fork", headers=bo, json={"id": "copy"})
    refused(forked, 404, "session_not_found", "diary")
    theirs = ask(two_keys, [{"role": "user", "content": "Who am I?"}], path="/sessions/diary", headers=bo)
    alone = ask(two_keys, [{"role": "user", "content": "Who am I?"}], headers=bo)
    assert said(theirs) == said(alone) and theirs["memory"]["version"] == 1
    assert theirs["memory"]["tokens_written"] == alone["memory"]["tokens_written"]
    assert two_keys.http.get("/v1/memories/diary", headers=ada).json() == before


@pytest.fixture(scope="module")
def narrow():
    """A server with one slot, a queue of one, and small limits."""
    with in_thread(
        lambda: service(slots=1, n_queue=1, n_sessions=2, turn_timeout=0.1), max_body=8000, heartbeat=0.1
    ) as api:
        yield api


def test_a_body_that_is_too_large(narrow):
    content = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]}).encode()
    for body in (content, iter([content[:5000], content[5000:]])):  # with its length, and in chunks
        refused(narrow.http.post("/v1/chat/completions", content=body), 413, "body_too_large", "8000")
    refused(narrow.http.put("/v1/memories/ada/file", content=iter([content])), 413, "body_too_large", "8000")
    assert said(ask(narrow))


def counted(api, name, timeout=60, **labels):
    """A metric of the server; 0 if there is none yet."""
    families = text_string_to_metric_families(api.http.get("/metrics", timeout=timeout).text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_what_never_reaches_an_endpoint_is_counted(narrow):
    before = counted(narrow, "deltamem_errors_total", code="body_too_large")
    narrow.http.post("/v1/chat/completions", content=b"x" * 9000)
    narrow.http.post("/v1/chat/completions", content=iter([b"x" * 9000]))
    assert counted(narrow, "deltamem_errors_total", code="body_too_large") == before + 2


def test_steps_are_measured(narrow):
    before = counted(narrow, "deltamem_step_seconds_count")
    answer = ask(narrow, max_tokens=8, grammar="root ::= [a-z ] root")
    assert answer["usage"]["completion_tokens"] == 8
    assert counted(narrow, "deltamem_step_seconds_count") >= before + 8
    assert counted(narrow, "deltamem_step_seconds_bucket", le="+Inf") == counted(narrow, "deltamem_step_seconds_count")


def test_evictions_are_a_counter():
    with in_thread(lambda: service(slots=1, n_live=1)) as api:
        for i in range(5):  # at least two stay for each slot
            ask(api, path=f"/sessions/s{i}")
        assert counted(api, "deltamem_evictions_total") == 3
        kinds = {f.name: f.type for f in text_string_to_metric_families(api.http.get("/metrics").text)}
        assert kinds["deltamem_evictions"] == "counter"


def test_a_store_that_fails(api, monkeypatch, caplog):
    """A stream says why it ends; balancers send nothing here any more; nothing is counted that is not known."""
    ask(api, path="/sessions/unlucky")
    before, n = about(api, "unlucky"), counted(api, "deltamem_errors_total", code="store_unavailable")

    def fail(*arguments, **options):
        raise StoreError("no space left on the device")

    with monkeypatch.context() as patch:
        for name in ("commit", "ping", "count"):
            patch.setattr(api.service.store, name, fail)
        *parts, last = chunks(api, "/sessions/unlucky/v1/chat/completions", messages=HELLO)
        assert (
            parts and set(last) == {"error"} and last["error"]["code"] == "store_unavailable" and "space" in caplog.text
        )
        assert "space" not in last["error"]["message"]
        answer = api.http.get("/health")
        assert answer.status_code == 503 and answer.json() == {"status": "store unavailable"}
        assert api.http.get("/health/live").status_code == 200  # a new process would do no better
        assert np.isnan(counted(api, "deltamem_sessions"))
    assert counted(api, "deltamem_errors_total", code="store_unavailable") == n + 1
    assert about(api, "unlucky") == before and api.http.get("/health").status_code == 200


@pytest.mark.parametrize("kind", [StoreError, StoreAway])
def test_where_the_store_is_is_for_the_log_only(api, monkeypatch, caplog, kind):
    def fail(*arguments, **options):
        raise kind("postgresql+psycopg://me@db.internal/x: it is not there")

    with monkeypatch.context() as patch:
        for name in ("identity", "get", "list"):
            patch.setattr(api.service.store, name, fail)
        asked = {"messages": HELLO, **GREEDY}
        for answer in (api.http.get("/v1/memories"), api.http.post("/sessions/far/v1/chat/completions", json=asked)):
            refused(answer, 503, "store_unavailable")
            assert "db.internal" not in answer.text
    assert "db.internal" in caplog.text


def test_a_damaged_session_is_named_to_clients(api):
    ask(api, path="/sessions/damaged")
    store = api.service.store
    store.commit(dataclasses.replace(store.get("", "damaged"), memory=b"damaged"))
    answer = api.http.post("/sessions/damaged/v1/chat/completions", json={"messages": HELLO, **GREEDY})
    refused(answer, 503, "store_unavailable", "damaged")
    for method, path in (("GET", ""), ("GET", "/file"), ("POST", "/undo")):
        refused(api.http.request(method, f"/v1/memories/damaged{path}"), 503, "store_unavailable", "damaged")
    api.http.delete("/v1/memories/damaged")


def test_a_database_that_hangs_holds_nothing_but_metrics_of_its_own(api, monkeypatch):
    """Scrapes get what it said last; requests without a session, and /health/live, go on."""
    ask(api, path="/sessions/kept")
    known, over = counted(api, "deltamem_sessions"), threading.Event()
    assert known >= 1
    with monkeypatch.context() as patch, ThreadPoolExecutor(40) as threads:
        patch.setattr(api.service.store, "count", lambda *_: over.wait(60) and 99)
        try:
            scrapes = [threads.submit(counted, api, "deltamem_sessions", timeout=20) for _ in range(40)]
            assert said(ask(api)) and api.http.get("/health/live").status_code == 200
            assert {scrape.result() for scrape in scrapes} == {known}
        finally:
            over.set()
    until(lambda: counted(api, "deltamem_sessions") == known)


def test_an_error_of_the_server_is_for_its_log_only(api, monkeypatch, caplog):
    async def fail(*arguments, **options):
        raise RuntimeError("a detail of /home/ada")

    monkeypatch.setattr(api.service, "list", fail)
    n = counted(api, "deltamem_requests_total", status="500")
    answer = refused(api.http.get("/v1/memories"), 500, "internal")
    assert counted(api, "deltamem_requests_total", status="500") == n + 1
    assert "ada" not in answer.text and "a detail of /home/ada" in caplog.text


def test_a_stream_that_breaks_off(api, monkeypatch, caplog):
    """An error of the server after its first words closes the connection: the client does not take it for the end."""
    chunks_of = Chat.chunks

    async def breaks(self, answer, pieces):
        async for chunk in chunks_of(self, answer, pieces):
            yield chunk
            raise RuntimeError("it breaks off")

    monkeypatch.setattr(Chat, "chunks", breaks)
    with pytest.raises(httpx.RemoteProtocolError):
        chunks(api, messages=HELLO)
    until(lambda: "it breaks off" in caplog.text)
    monkeypatch.undo()
    assert said(ask(api))


def test_a_queue_that_is_full(narrow):
    with ThreadPoolExecutor() as threads:
        with narrow.stalled():
            taken = [threads.submit(ask, narrow) for _ in range(2)]  # the slot and the queue
            until(lambda: narrow.service.worker.n_waiting == 2)
            for stream in (False, True):
                answer = narrow.http.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream})
                refused(answer, 429, "queue_full")
                assert int(answer.headers["retry-after"]) >= 1
        assert all(said(waiting.result()) for waiting in taken)


def test_another_turn_of_the_session_is_running(narrow):
    body = {"messages": HELLO, **GREEDY}
    with ThreadPoolExecutor() as threads:
        with narrow.stalled():
            running = threads.submit(ask, narrow, path="/sessions/busy")
            until(lambda: narrow.service.n_turns("busy"))
            refused(narrow.http.post("/sessions/busy/v1/chat/completions", json=body), 409, "session_busy", "busy")
            refused(narrow.http.post("/v1/memories/busy/reset"), 409, "session_busy", "busy")
        assert running.result()["memory"]["version"] == 1
    narrow.http.delete("/v1/memories/busy")


def test_too_many_sessions(narrow):
    for name in ("one", "two", "one"):
        ask(narrow, path=f"/sessions/{name}")
    body = {"messages": HELLO, **GREEDY}
    refused(narrow.http.post("/sessions/three/v1/chat/completions", json=body), 400, "too_many_sessions", "three")
    refused(narrow.http.post("/v1/memories/one/fork", json={"id": "three"}), 400, "too_many_sessions", "three")
    file = narrow.http.get("/v1/memories/one/file").content
    refused(narrow.http.put("/v1/memories/three/file", content=file), 400, "too_many_sessions", "three")
    for name in ("one", "two"):
        narrow.http.delete(f"/v1/memories/{name}")


def test_a_silent_stream_says_that_it_is_alive(narrow):
    """Proxies end connections on which nothing comes."""
    body = {"messages": HELLO, "stream": True}
    with narrow.stalled(), narrow.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        comments = [line for line, _ in zip(stream.iter_lines(), range(6)) if line.startswith(":")]
        assert len(comments) >= 2


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away(narrow, monkeypatch, streams):
    """Its decode ends within one step, and what was said counts."""
    worker, steps, late = narrow.service.worker, [], []
    decode = worker.llm._engine.slots.decode

    def decoded(jobs, *meanwhile):
        steps.append(jobs)
        late.extend(job for job, _ in worker._active if job.cancelled)
        return decode(jobs, *meanwhile)

    def counts():
        commits, generated = "deltamem_store_commit_seconds_count", {"kind": "generated"}
        return counted(narrow, commits), counted(narrow, "deltamem_tokens_total", **generated)

    before = counts()
    monkeypatch.setattr(worker.llm._engine.slots, "decode", decoded)
    long = {"messages": HELLO, "stream": streams, "max_tokens": 400, "grammar": "root ::= [a-z ] root"}
    body = json.dumps(long).encode()
    head = f"POST /sessions/gone/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((narrow.http.base_url.host, narrow.http.base_url.port)) as client:
        client.sendall(head.encode() + body)
        until(lambda: len(steps) > 5)
    until(lambda: worker.n_active == 0 and not narrow.service._shared.turns)
    n_commits, n_generated = counts()
    assert n_commits == before[0] + 1 and n_generated > before[1] + 5
    assert len(late) <= 1 and len(steps) < 400
    one = about(narrow, "gone")
    assert one["turns"] == 1 and one["tokens"] < 400
    narrow.http.delete("/v1/memories/gone")


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_while_it_waits_for_its_session(api, streams):
    """Found: its stream began nevertheless, and the session had a turn that nobody has read."""
    name = f"waited-for-{streams}"
    body = json.dumps({"messages": HELLO, "stream": streams, "max_tokens": 400, "grammar": "root ::= [a-z ] root"})
    head = f"POST /sessions/{name}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    left = counted(api, "deltamem_requests_total", status="499")
    with ThreadPoolExecutor() as threads:
        with api.stalled():
            first = threads.submit(ask, api, path=f"/sessions/{name}")
            until(lambda: api.service.worker.n_waiting == 1)
            with socket.create_connection((api.http.base_url.host, api.http.base_url.port)) as client:
                client.sendall((head + body).encode())
                until(lambda: api.service.n_turns(name) == 2)
            if streams:
                until(lambda: counted(api, "deltamem_requests_total", status="499") == left + 1)
        assert first.result()["memory"]["version"] == 1
    until(lambda: not api.service._shared.turns)
    assert about(api, name)["version"] == 1


@pytest.mark.parametrize("how", ["complete", "cancelled", "gone"])
def test_a_request_of_an_asgi_server(how):
    """It may say that there is no more of the body, which does not end the answer; it may end the request itself; and
    the client may go before its turn has begun.
    """
    body = {"messages": HELLO, **GREEDY, "max_tokens": 300, "grammar": "root ::= [a-z ] root"}

    async def run():
        app = application(Settings(load=service))
        async with app.router.lifespan_context(app):
            server, came, sent = app.state.server, asyncio.Queue(), []
            while await server.life() != "ok":
                await asyncio.sleep(0.05)
            for data in (json.dumps(body).encode(), b""):
                came.put_nowait({"type": "http.request", "body": data, "more_body": False})

            async def send(message):
                sent.append(message)

            path = "/v1/chat/completions" if how == "gone" else "/sessions/asgi/v1/chat/completions"
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
            worker, hold = server.service.worker, threading.Event()
            if how == "gone":
                worker.call(hold.wait)
            request = asyncio.create_task(app(scope, came.get, send))
            while came.qsize() or not (worker.n_waiting if how == "gone" else worker.n_active):
                await asyncio.sleep(0.01)
            if how == "cancelled":
                request.cancel()
            elif how == "gone":
                came.put_nowait({"type": "http.disconnect"})
                while worker.n_waiting:
                    await asyncio.sleep(0.01)
            hold.set()
            await asyncio.wait([request])
            while server.service._shared.turns:
                await asyncio.sleep(0.01)
            return request.cancelled(), sent, [record.tokens for record in await server.service.list()]

    is_cancelled, sent, n_written = asyncio.run(run())
    assert is_cancelled == (how == "cancelled")
    if how == "cancelled":
        assert len(n_written) == 1 and 0 < n_written[0] < 300  # it was cut, and counts
        return
    answer = json.loads(sent[1]["body"])
    assert answer["usage"]["completion_tokens"] == (300 if how == "complete" else 0)
    assert ("memory" in answer) == bool(n_written) == (how == "complete")


def test_a_client_that_goes_away_before_its_body_is_whole(narrow, caplog):
    """It is no error of the server."""
    before = counted(narrow, "deltamem_errors_total", code="internal")
    address = narrow.http.base_url.host, narrow.http.base_url.port
    with socket.create_connection(address) as client:
        client.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"messages":')
    until(lambda: counted(narrow, "deltamem_requests_total", status="499") == 1)
    assert counted(narrow, "deltamem_errors_total", code="internal") == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_schema_holds_nobody_else(api, monkeypatch):
    """Found: other streams stood still while the grammar of a large schema was made."""
    begun, over = threading.Event(), threading.Event()

    class Slow(Chat):
        def __init__(self, *arguments):
            begun.set()
            assert over.wait(60)
            super().__init__(*arguments)

    monkeypatch.setattr(application_module, "Chat", Slow)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, api)
        try:
            assert begun.wait(60)
            assert api.http.get("/health").status_code == 200
        finally:
            over.set()
        assert said(asked.result())


def test_embeddings_hold_no_thread_that_others_need(monkeypatch):
    """Found: 30 requests of embeddings kept chats and /health waiting until the last of them was done."""
    embed, begun, over, embedded = DeltaMemLlama.embed, threading.Event(), threading.Event(), []

    def slow(self, texts, **options):
        begun.set()
        assert over.wait(60)
        embedded.extend(texts)
        return embed(self, texts, **options)

    monkeypatch.setattr(DeltaMemLlama, "embed", slow)
    n = 40
    with in_thread(lambda: service(n_queue=n)) as api, ThreadPoolExecutor(n + 1) as threads:
        asked = [threads.submit(api.http.post, "/v1/embeddings", json={"input": "a"}) for _ in range(n + 1)]
        try:
            assert begun.wait(60)
            until(lambda: api.app.state.server.embedder.n_asked == n + 1)
            assert said(ask(api)) and api.http.get("/health").status_code == 200
            refused(api.http.post("/v1/embeddings", json={"input": "a"}), 429, "queue_full")
        finally:
            over.set()
        assert {one.result().status_code for one in asked} == {200} and len(embedded) == n + 1
        over.clear()
        begun.clear()
        first = threads.submit(api.http.post, "/v1/embeddings", json={"input": "a"})
        try:
            assert begun.wait(60)
            body = b'{"input": "nobody waits for it"}'
            with socket.create_connection((api.http.base_url.host, api.http.base_url.port)) as client:
                client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
                client.sendall(body)
                until(lambda: api.app.state.server.embedder.n_asked == 2)
            until(lambda: api.app.state.server.embedder.n_asked == 1)
        finally:
            over.set()
        assert first.result().status_code == 200
        assert api.http.post("/v1/embeddings", json={"input": "b"}).status_code == 200
        assert "nobody waits for it" not in embedded


def test_a_piece_comes_while_the_next_is_computed(narrow, monkeypatch):
    """The model does not wait for what passes its words on: it computes the next one meanwhile."""
    slots = narrow.service.worker.llm._engine.slots
    decode, n_decodes, got, waits = type(narrow.service.worker.llm._ctx).decode, [], [], []

    def computed(context, batch):
        n = len(n_decodes)
        n_decodes.append(n)
        if n > 1:  # the first has the prompt, and what it samples is passed on in the second
            waits.append(n)
            until(lambda: len(got) >= n, 20)
        return decode(context, batch)

    monkeypatch.setattr(type(narrow.service.worker.llm._ctx), "decode", computed)
    monkeypatch.setattr(slots, "is_end", lambda token: False)
    body = {"prompt": "one two", "stream": True, "max_tokens": 6, "temperature": 0, "grammar": "root ::= [a-z]+"}
    with narrow.http.stream("POST", "/v1/completions", json={**body, "logprobs": 1}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {") and (choice := json.loads(line[6:])["choices"][0])["text"]:
                got += choice["logprobs"]["tokens"]  # of two, if one line has what came together
    assert len(got) == 6 and waits == [2, 3, 4, 5]


def test_requests_a_minute(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("ada\nbo\n")
    with in_thread(keys=Keys(path), per_minute=3) as api:
        answers = [api.http.get("/v1/models", headers=with_key("ada")) for _ in range(4)]
        assert [answer.status_code for answer in answers[:3]] == [200] * 3
        refused(answers[3], 429, "rate_limited", "3")
        assert int(answers[3].headers["retry-after"]) > 1  # when the first is a minute old
        assert api.http.get("/v1/models", headers=with_key("bo")).status_code == 200


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_changes_no_limit(monkeypatch, hours):
    """Found: keys were shut out for as long as the clock was set back, and let in where it was set forward."""
    with in_thread(per_minute=1) as api:
        assert api.http.get("/v1/models").status_code == 200
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
        answer = refused(api.http.get("/v1/models"), 429, "rate_limited")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("key", [b"tokenizer.chat_template", b"tokenizer.chat_templatx"])
def test_the_log_tells_of_a_model_without_a_chat_template(tmp_path, caplog, key):
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(BASE).read_bytes().replace(b"tokenizer.chat_template", key))
    with in_thread(lambda: AsyncDeltaMem(DeltaMemLlama(str(model), n_ctx=256, n_threads=1, verbose=False))):
        warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (key != b"tokenizer.chat_template")


def test_while_the_model_is_loaded():
    loaded = threading.Event()

    def load():
        assert loaded.wait(60)
        return service()

    with in_thread(load, ready=False) as api:
        answer = api.http.get("/health")
        assert answer.status_code == 503 and answer.json() == {"status": "loading model"}
        for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"):
            answer = refused(api.http.post(path, json={"messages": HELLO}), 503, "loading")
            assert int(answer.headers["retry-after"]) >= 1
        refused(api.http.get("/v1/memories"), 503, "loading")
        assert api.http.get("/v1/models").status_code == api.http.get("/metrics").status_code == 200
        loaded.set()
        until(lambda: api.http.get("/health").status_code == 200)
        assert said(ask(api))


@pytest.mark.parametrize("error", [OSError("no such model"), StoreError("postgresql+psycopg://me@db.internal/x")])
def test_a_model_that_cannot_be_loaded(error):
    def load():
        raise error

    with in_thread(load, ready=False) as api:
        until(lambda: api.http.get("/health").json()["status"] == "failed")
        answer = api.http.get("/health")
        assert answer.status_code == 503 and "db.internal" not in answer.text


def test_a_decoder_that_is_stuck(monkeypatch):
    with in_thread(service) as api:
        can_decode = api.service.can_decode
        monkeypatch.setattr(api.service, "can_decode", lambda: can_decode(0.2))
        with api.stalled():
            until(lambda: api.http.get("/health").status_code == 503)
            assert api.http.get("/health").json() == {"status": "stuck"}
            assert api.http.get("/v1/models").status_code == 200
        until(lambda: api.http.get("/health").status_code == 200)


def test_many_who_ask_for_its_health_take_one_slot(monkeypatch):
    """Found: who has no key could fill the queue of those that have one."""
    with in_thread(service) as api:
        n = {"can_decode": 0, "ping": 0}
        can_decode, ping = api.service.can_decode, api.service.store.ping

        async def counted_decode():
            n["can_decode"] += 1
            await asyncio.sleep(0.5)
            return await can_decode()

        def counted_ping():
            n["ping"] += 1
            time.sleep(0.5)
            ping()

        time.sleep(1)  # what was asked before is too old
        monkeypatch.setattr(api.service, "can_decode", counted_decode)
        monkeypatch.setattr(api.service.store, "ping", counted_ping)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: api.http.get("/health"), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        assert n == {"can_decode": 1, "ping": 1}


PREFLIGHT = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}


def test_pages_of_others_may_not_use_it(api):
    answers = [
        api.http.options("/v1/chat/completions", headers=PREFLIGHT),
        api.http.get("/v1/models", headers={"Origin": "https://page.example"}),
    ]
    assert all("access-control-allow-origin" not in answer.headers for answer in answers)


def test_pages_that_may_use_it():
    with in_thread(origins=("https://page.example",)) as api:
        answer = api.http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = api.http.options("/v1/chat/completions", headers={**PREFLIGHT, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_model_whose_name_has_a_slash():
    with in_thread(model="owner/model", ready=False) as api:
        for name in ("owner/model", "owner%2Fmodel"):
            assert api.http.get(f"/v1/models/{name}").json()["id"] == "owner/model"


def test_pages_may_read_every_answer():
    """Found: of some errors a page learned nothing at all, and of no answer its id."""
    with in_thread(origins=("https://page.example",), max_body=1000) as api:
        headers = {"Origin": "https://page.example"}
        answers = [
            api.http.get("/v1/models", headers=headers),
            refused(api.http.get("/nothing", headers=headers), 404, "not_found"),
            refused(api.http.post("/tokenize", content=b"x" * 2000, headers=headers), 413, "body_too_large"),
        ]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert {"Retry-After", "X-Request-Id"} <= set(answer.headers["access-control-expose-headers"].split(", "))


@pytest.fixture(scope="module")
def private():
    """A server for this machine, as without keys."""
    with in_thread(is_private=True, origins=("https://friend.example",)) as api:
        yield api


def blind_post(api, headers):
    body = json.dumps({"messages": HELLO, **GREEDY})
    headers = {"Content-Type": "text/plain", **headers}
    return api.http.post("/sessions/blind/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://page.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "page.example"},
        {"Host": "["},
        {"Host": "[x]"},
    ],
)
def test_pages_of_others_cannot_write_either(private, headers):
    """Browsers send a page's POST of text without asking first, and a page's name may lead to this machine."""
    refused(blind_post(private, headers), 403, "origin_not_allowed")
    refused(private.http.get("/v1/memories/blind"), 404, "session_not_found", "blind")


def test_pages_of_others_open_no_websocket():
    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    with in_thread(is_private=True, page=lambda app, server: app.router.add_websocket_route("/echo", echo)) as api:
        address = f"{api.http.base_url.netloc.decode()}"
        with connect(f"ws://{address}/echo", origin=f"http://{address}") as own:
            own.send("hello")
            assert own.recv() == "hello"
        with pytest.raises(InvalidStatus), connect(f"ws://{address}/echo", origin="https://page.example"):
            pass


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]"])
def test_pages_of_this_machine_can(private, name):
    assert blind_post(private, {"Host": f"{name}:8080", "Origin": f"http://{name}:8080"}).status_code == 200
    assert blind_post(private, {"Host": name, "Origin": "https://friend.example"}).status_code == 200
    private.http.delete("/v1/memories/blind")


def test_a_request_keeps_its_id(api):
    assert api.http.get("/health", headers={"X-Request-Id": "my-request"}).headers["x-request-id"] == "my-request"
    assert len(api.http.get("/health", headers={"X-Request-Id": "x" * 100}).headers["x-request-id"]) == 32
