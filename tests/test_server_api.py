"""The endpoints of the server (docs/reference/server.md), over HTTP on the application: answers and sessions."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_MEAN

from pydeltamem import DeltaMemLlama
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.answer import Piece
from pydeltamem.server.openai import Chat
from pydeltamem.server.store import Store
from servers import (
    BASE,
    CLOCK,
    GREEDY,
    HELLO,
    WEATHER,
    about,
    ask,
    chunks,
    in_thread,
    refused,
    said,
    service,
    state,
    until,
)

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


def test_whole_numbers_with_a_point(api):
    """JSON has one kind of number."""

    def answer(**options):  # its probabilities differ in the last digits with what was decoded already
        (choice,) = ask(api, **options)["choices"]
        scored = choice["logprobs"]["content"]
        return choice["message"], [(each["token"], len(each["top_logprobs"])) for each in scored]

    options = {"temperature": 2, "seed": 5, "top_k": 9, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    with_points = {name: n if name == "logprobs" else float(n) for name, n in options.items()}
    assert answer(**with_points) == answer(**options)
    body = {"input": "a", "max_output_tokens": 3.0}
    assert api.http.post("/v1/responses", json=body).json()["max_output_tokens"] == 3


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


def test_a_call_with_half_a_character(api):
    """Found: an answer whose call has an escape for one could not be sent, and was committed all the same."""
    text = '<tool_call>{"name": "clock", "arguments": {"a": "\\ud83d"}}</tool_call>'
    body = {"tools": [CLOCK], "max_tokens": 80, "grammar": f"root ::= {json.dumps(text)}"}
    (call,) = ask(api, **body)["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": "\ud83d"}
    deltas = [part["choices"][0]["delta"] for part in chunks(api, messages=HELLO, **body)]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert streamed["function"] == call["function"]


@pytest.mark.parametrize(
    "call",
    ['{"name": "clock", "arguments": {"a": NaN}}', '{"name": "\\ud83d"}', f'{{"arguments": {"[" * 10**5}}}'],
)
def test_what_is_no_call_stays_text(call):
    content = f"<tool_call>{call}</tool_call>"
    message = Chat({"messages": HELLO, "tools": [CLOCK]}, "model").message(content)
    assert message == {"role": "assistant", "content": content}


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


def test_pieces_of_tokens_hold_nobody_else(api, monkeypatch):
    """Found: other streams stood still for seconds while a long text was shown in pieces."""
    begun, over, detokenize = threading.Event(), threading.Event(), DeltaMemLlama.detokenize

    def slow(self, tokens, **options):
        begun.set()
        assert over.wait(60)
        return detokenize(self, tokens, **options)

    monkeypatch.setattr(DeltaMemLlama, "detokenize", slow)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(api.http.post, "/tokenize", json={"content": "a", "with_pieces": True})
        try:
            assert begun.wait(60)
            assert api.http.get("/v1/models").status_code == 200
        finally:
            over.set()
        assert asked.result().json()["tokens"][-1]["piece"]


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


def test_the_file_of_a_session_says_what_any_memory_file_says(api, make_llm):
    """Fields of the memory itself, such as how many tokens it has, are the session's."""
    ask(api, path="/sessions/says")
    mine = MemorySnapshot.from_bytes(api.http.get("/v1/memories/says/file").content).metadata
    llm = make_llm()
    theirs = MemorySnapshot.from_bytes(llm.memory.copy().to_bytes()).metadata
    assert mine.keys() == theirs.keys()
    assert mine["tokens_written"] == str(about(api, "says")["tokens"]) != theirs["tokens_written"]


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


def test_a_session_of_another_adapter(tmp_path):
    """Found: embeddings were made with its memory all the same."""
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    with in_thread(lambda: service(adapter="tsw", store=Store(url))) as api:
        ask(api, path="/sessions/ada")
        learned = state(api, "ada")
    with in_thread(lambda: service(store=Store(url))) as api:
        for request in BY_SESSION:
            refused(api.http.post(**request), 400, "invalid_value", "ada", "adapter")
        assert (state(api, "ada") == learned).all()  # for a server that has its adapter
        api.http.post("/v1/memories/ada/reset")
        for request in BY_SESSION:
            assert api.http.post(**request).status_code == 200


BY_SESSION = [
    {"url": "/sessions/ada/v1/chat/completions", "json": {"messages": HELLO, **GREEDY}},
    {"url": "/sessions/ada/v1/completions", "json": {"prompt": "hello", **GREEDY}},
    {"url": "/sessions/ada/v1/responses", "json": {"input": "hello"}},
    {"url": "/sessions/ada/v1/embeddings", "json": {"input": "hello"}},
]


def test_without_an_adapter_there_are_no_sessions():
    """Found: embeddings took no notice of the session."""
    with in_thread(lambda: service(adapter=None)) as plain:
        assert said(ask(plain))
        for request in BY_SESSION:
            refused(plain.http.post(**request), 400, "no_adapter", "ada", "adapter")
        assert plain.http.get("/v1/memories").json()["data"] == []
        assert plain.http.get("/v1/models").json()["data"][0]["adapter"] is None
