"""The `openai` package against a `deltamem serve` process: answers, sessions, errors, and the end of the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from typing import Literal

import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from conftest import ROOT
from pydeltamem.formats.memory_file import MemorySnapshot
from refusals import check_names
from servers import command, process, until

HELLO = [{"role": "user", "content": "My name is Anna."}]
QUESTION = [{"role": "user", "content": "What is my name?"}]
ANNA, BO = "key-of-anna", "key-of-bo"
GREEDY = {"model": "default.gguf", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server with two keys."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys.txt").write_text(f"{ANNA}\n{BO}\n")
    with process(folder, "--api-key-file", folder / "keys.txt", "-np", 2, "--max-body", 20_000) as running:
        yield running.address


@pytest.fixture
def client(address):
    """client(session=None, **options): the openai package's client; a session by its base URL."""
    made = []

    def make(session=None, kind=openai.OpenAI, **options):
        path = "/v1" if session is None else f"/sessions/{session}/v1"
        made.append(kind(base_url=address + path, **{"api_key": ANNA, "max_retries": 0, **options}))
        return made[-1]

    yield make
    for one in made:
        if isinstance(one, openai.OpenAI):
            one.close()


def said(answer):
    return answer.choices[0].message.content


def memory(answer):
    """What the answer says of the session: a field that the openai package does not know."""
    return answer.model_extra["memory"]


#
# answers
#


def test_chat(client):
    answer = client().chat.completions.create(messages=HELLO, **GREEDY)
    assert said(answer) and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client().models.list()] == ["default.gguf"]
    assert client().models.retrieve("default.gguf").id == "default.gguf"


def test_a_stream(client):
    whole = client().chat.completions.create(messages=HELLO, **GREEDY)
    stream = client().chat.completions.create(
        messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == said(whole)
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_asynchronous(client):
    async def both():
        async with client("async", openai.AsyncOpenAI) as one:
            answers = await asyncio.gather(
                one.chat.completions.create(messages=HELLO, **GREEDY),
                client("async-too", openai.AsyncOpenAI).chat.completions.create(messages=HELLO, **GREEDY),
            )
            chat = [*HELLO, {"role": "assistant", "content": said(answers[0])}, *QUESTION]
            stream = await one.chat.completions.create(messages=chat, stream=True, **GREEDY)
            return answers, "".join([part.choices[0].delta.content or "" async for part in stream])

    answers, text = asyncio.run(both())
    assert said(answers[0]) == said(answers[1]) and "Anna" in text


def test_the_response_itself(client):
    with client().chat.completions.with_streaming_response.create(messages=HELLO, stream=True, **GREEDY) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream") and response.headers["x-request-id"]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    raw = client().chat.completions.with_raw_response.create(messages=HELLO, **GREEDY)
    assert raw.parse()._request_id == raw.headers["x-request-id"]


def test_completions(client):
    answer = client().completions.create(prompt="My name is", logprobs=1, **GREEDY)
    assert answer.choices[0].text and answer.choices[0].logprobs.token_logprobs
    stream = client().completions.create(prompt="My name is", stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in stream) == answer.choices[0].text


def test_log_probabilities(client):
    answer = client().chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == said(answer)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


def test_embeddings(client):
    """The package asks for base64 by itself."""
    answer = client().embeddings.create(model="default.gguf", input=["one", "two"])
    vectors = np.array([entry.embedding for entry in answer.data])
    floats = client().embeddings.create(model="default.gguf", input=["one", "two"], encoding_format="float")
    np.testing.assert_allclose(vectors, [entry.embedding for entry in floats.data], atol=1e-6)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)


class Place(BaseModel):
    """Where somebody lives."""

    city: Literal["Lima", "Oslo"]
    sure: bool


TOOL = openai.pydantic_function_tool(Place, name="remember_place")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "remember_place"}}])
def test_a_tool(client, choice):
    asked = {"messages": HELLO, "tools": [TOOL], "tool_choice": choice, **GREEDY, "max_tokens": 100}
    answer = client().chat.completions.parse(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Place)
    with client().chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_structured_answer(client):
    answer = client().chat.completions.parse(
        messages=HELLO, response_format=Place, **{**GREEDY, "max_tokens": 100, "seed": 1}
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


#
# sessions
#


def test_sessions(client, address):
    """By base URL, header or body; each recalls its own, with nothing of the text sent again."""
    header = client(default_headers={"X-Memory-Session": "by-header"})
    ways = {
        "by-path": lambda messages, **more: client("by-path").chat.completions.create(messages=messages, **more),
        "by-header": lambda messages, **more: header.chat.completions.create(messages=messages, **more),
        "by-body": lambda messages, **more: client().chat.completions.create(
            messages=messages, extra_body={"memory": {"session": "by-body"}}, **more
        ),
    }
    names = dict(zip(ways, ("Anna", "Omar", "Vera")))
    for session, ask in ways.items():
        answer = ask([{"role": "user", "content": f"My name is {names[session]}."}], **GREEDY)
        assert memory(answer)["session"] == session and memory(answer)["version"] == 1
    for session, ask in ways.items():
        assert names[session] in said(ask(QUESTION, **GREEDY))
    listed = client()._client.get(f"{address}/v1/memories", headers={"Authorization": f"Bearer {ANNA}"}).json()
    assert {entry["id"] for entry in listed["data"]} >= set(ways)


def test_a_chat_of_several_turns(client):
    one, chat, written = client("long"), [], 0
    for text in ("My name is Anna.", "I live in Lima.", "What is my name?"):
        chat.append({"role": "user", "content": text})
        answer = one.chat.completions.create(messages=chat, **GREEDY)
        assert memory(answer)["tokens_written"] > written
        written = memory(answer)["tokens_written"]
        chat.append(answer.choices[0].message.model_dump(exclude_none=True))
    assert "Anna" in said(answer) and memory(answer)["version"] == 3
    # each token once: as many as the text has
    assert written == answer.usage.total_tokens
    again = one.chat.completions.create(messages=chat[:-1], **GREEDY)
    assert memory(again)["tokens_written"] == written and said(again) == said(answer)


def test_a_key_has_its_own_sessions(client):
    client("secret").chat.completions.create(messages=HELLO, **GREEDY)
    other = client("secret", api_key=BO).chat.completions.create(messages=QUESTION, **GREEDY)
    assert memory(other)["version"] == 1 and "Anna" not in said(other)


def test_the_programs_of_the_page(keeping):
    """docs/how-to/serve.md: its Python that speaks to a server runs as it stands."""
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "OpenAI(" in block]
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("http://127.0.0.1:8080", keeping).replace('api_key="-"', f'api_key="{ANNA}"'), {})


#
# errors
#


def test_errors(client):
    create = client().chat.completions.create
    with pytest.raises(openai.BadRequestError) as info:
        create(messages=HELLO, **{**GREEDY, "temperature": -1})
    assert info.value.code == "invalid_value" and info.value.request_id and "temp" in info.value.message
    with pytest.raises(openai.BadRequestError):
        create(messages=HELLO, stream=True, response_format={"type": "xml"}, **GREEDY)
    with pytest.raises(openai.AuthenticationError) as info:
        client(api_key="wrong").chat.completions.create(messages=HELLO, **GREEDY)
    assert info.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client().files.list()
    with pytest.raises(openai.APIStatusError) as info:
        create(messages=[{"role": "user", "content": "x" * 30_000}], **GREEDY)
    assert info.value.status_code == 413


def test_a_rate_limit(tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text(ANNA)
    with process(tmp_path, "--api-key-file", keys, "--requests-per-minute", 2) as running:
        with openai.OpenAI(base_url=f"{running.address}/v1", api_key=ANNA, max_retries=0) as one:
            for _ in range(2):
                one.models.list()
            with pytest.raises(openai.RateLimitError) as info:
                one.models.list()
        assert info.value.code == "rate_limited" and int(info.value.response.headers["retry-after"]) > 1


#
# the process
#


def test_a_restart_and_an_end_in_the_middle(tmp_path):
    """SIGTERM: what runs ends, and is committed; the next process goes on from there."""
    with process(tmp_path) as running:
        url = f"{running.address}/sessions/ada/v1"
        with openai.OpenAI(base_url=url, api_key="-") as one:
            stream = one.chat.completions.create(
                messages=HELLO, stream=True, model="-", max_tokens=300, extra_body={"grammar": "root ::= [a-z ] root"}
            )
            next(part for part in stream if part.choices[0].delta.content)
            running.popen.terminate()
            last = list(stream)[-1]
            assert last.choices[0].finish_reason == "length" and memory(last)["version"] == 1
        assert running.end() in (0, -signal.SIGTERM)  # uvicorn ends by the signal that ended it
    with process(tmp_path) as running:
        address = running.address
        headers = {"X-Memory-Session": "ada"}
        kept = httpx.get(f"{address}/v1/memories/ada").json()
        assert kept["version"] == 1 and kept["tokens"] == memory(last)["tokens_written"]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="-", default_headers=headers) as one:
            answer = one.chat.completions.create(messages=QUESTION, **GREEDY)
        assert memory(answer)["version"] == 2


def test_what_is_said_is_in_no_log(tmp_path):
    """At no level."""
    with process(tmp_path, "--log-level", "debug") as running:
        content, grammar = "Swordfish is what I say.", 'root ::= "Barracuda is what it says."'
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 60, "grammar": grammar}
        for stream in (True, False):
            url = f"{running.address}/sessions/ada/v1/chat/completions"
            assert httpx.post(url, json={**asked, "stream": stream}, timeout=60).status_code == 200
        logged = (tmp_path / "server.log").read_text()
    first, *lines = logged.splitlines()
    assert first.startswith(running.address) and all(isinstance(json.loads(line), dict) for line in lines)
    assert '"DEBUG"' in logged and "\\u001b" not in logged
    assert not [word for word in ("Swordfish", "Barracuda", "chat.completion.chunk") if word in logged]


def test_answers_that_take_too_long_at_the_end_are_cut_in_order(tmp_path):
    """SIGTERM: a stream and a whole answer end as after `max_tokens`, and count; who has waited is told so."""
    imports = "from pydeltamem.cli.main import main; from pydeltamem.server import application"
    at_once = f"{imports}; application.GRACE = 0; main()"
    options = command(tmp_path, "--port", 0, "-np", 2)[3:]
    popen = subprocess.Popen([sys.executable, "-c", at_once, *options], stderr=subprocess.PIPE, encoding="utf-8")
    try:
        address = next(line for line in popen.stderr if line.startswith("http://")).split(": ")[0]
        until(lambda: httpx.get(f"{address}/health").status_code == 200)
        asked = {"messages": HELLO, "model": "-", "max_tokens": 900, "extra_body": {"grammar": "root ::= [a-z ] root"}}
        with concurrent.futures.ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as clients:

            def create(session, **more):
                one = openai.OpenAI(base_url=f"{address}/sessions/{session}/v1", api_key="-", max_retries=0)
                return clients.enter_context(one).chat.completions.create(**asked, **more)

            stream = create("ada", stream=True, stream_options={"include_usage": True})
            next(part for part in stream if part.choices[0].delta.content)
            whole = pool.submit(create, "bo")
            until(lambda: "deltamem_slots_used 2.0" in httpx.get(f"{address}/metrics").text)
            waits = pool.submit(create, "carl")
            until(lambda: "deltamem_queue 1.0" in httpx.get(f"{address}/metrics").text)
            popen.terminate()
            *_, last, used = stream
            answer = whole.result()
            with pytest.raises(openai.InternalServerError) as info:
                waits.result()
        _, logged = popen.communicate(timeout=60)
    finally:
        popen.kill()
        popen.wait()
    assert info.value.status_code == 503 and info.value.code == "stopping"
    assert "retry-after" in info.value.response.headers
    assert last.choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    assert memory(last)["version"] == memory(answer)["version"] == 1
    assert 0 < used.usage.completion_tokens < 900 and 0 < answer.usage.completion_tokens < 900
    assert popen.returncode in (0, -signal.SIGTERM) and "Traceback" not in logged
    with process(tmp_path) as running:
        kept = httpx.get(f"{running.address}/v1/memories").json()["data"]
    assert {one["id"]: one["tokens"] for one in kept} == {
        "ada": memory(last)["tokens_written"],
        "bo": memory(answer)["tokens_written"],
    }


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = command(tmp_path, "--port", port)
        done = subprocess.run(refused, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()  # nothing was loaded
    assert line.startswith("deltamem: error: ") and f"127.0.0.1:{port}" in line


@pytest.mark.parametrize(
    "options, names",
    [
        (["--deltamem", "tsw-of-nobody.gguf"], ["tsw-of-nobody.gguf"]),
        (["-ctv", "q8_0"], []),  # without -fa
        (["--host", "0.0.0.0"], ["0.0.0.0", "--api-key-file"]),
        (["--api-key-file", "no-such-file"], ["no-such-file"]),
        (["--cors-origin", "*"], ["--cors-origin", "--api-key-file"]),  # any page could write into memories
        (
            ["--cors-origin", "https://page.example/"],
            ["--cors-origin", "https://page.example/"],
        ),  # no browser sends this
        (["--store", "nosql://x"], ["nosql://x"]),
    ],
)
def test_what_cannot_be_served(tmp_path, options, names):
    """The process ends with an error, so that whoever started it knows."""
    refused = command(tmp_path, "--port", 0, *options, "--log-level", "error")
    done = subprocess.run(refused, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("deltamem: error: ", "deltamem serve: error: "))
    check_names(last, names)


#
# /v1/responses
#

SHORT = {"model": "default.gguf", "temperature": 0, "max_output_tokens": 24}


@pytest.fixture(scope="module")
def keeping(tmp_path_factory):
    """A server that keeps messages, with two keys."""
    folder = tmp_path_factory.mktemp("keeping")
    (folder / "keys.txt").write_text(f"{ANNA}\n{BO}\n")
    with process(folder, "--api-key-file", folder / "keys.txt", "-np", 2, "--keep-messages") as running:
        yield running.address


def state(address, session):
    answer = httpx.get(f"{address}/v1/memories/{session}/file", headers={"Authorization": f"Bearer {ANNA}"})
    return MemorySnapshot.from_bytes(answer.content).state


def test_an_empty_answer_is_not_kept(keeping):
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        empty = one.responses.create(input="Hello.", extra_body={"grammar": "root ::= "}, **SHORT)
        assert empty.output_text == "" and empty.store is False
        with pytest.raises(openai.NotFoundError):
            one.responses.create(input="Who?", previous_response_id=empty.id, **SHORT)


def test_an_answer_to_go_on_from(keeping):
    """As a chat whose history is sent again; and more than once from the same answer."""
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        first = one.responses.create(input=HELLO[0]["content"], instructions="Be brief.", **SHORT)
        second = one.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT)
        again = one.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT)
        one.responses.create(input="Who?", previous_response_id=first.id, **SHORT)
        third = one.responses.create(input="Who?", previous_response_id=second.id, **SHORT)

    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    with openai.OpenAI(base_url=f"{keeping}/sessions/as-chat/v1", api_key=ANNA) as as_chat:
        for response, question in ((first, None), (second, QUESTION[0]), (third, {"role": "user", "content": "Who?"})):
            chat += [] if question is None else [question]
            answer = as_chat.chat.completions.create(messages=chat, **GREEDY)
            chat.append({"role": "assistant", "content": said(answer)})
            assert response.output_text == said(answer) and response.status in ("completed", "incomplete")
            assert memory(response)["tokens_written"] == memory(answer)["tokens_written"]
    np.testing.assert_allclose(state(keeping, third.id), state(keeping, "as-chat"), atol=0.02)  # a KV cache in F16
    assert second.output_text == again.output_text and second.id != again.id
    np.testing.assert_allclose(state(keeping, second.id), state(keeping, again.id), atol=0.02)
    assert (second.previous_response_id, memory(second)["session"]) == (first.id, second.id)
    assert second.usage.input_tokens_details.cached_tokens > 8
    assert second.usage.total_tokens == second.usage.input_tokens + second.usage.output_tokens


def test_instructions_replace_those_before(keeping):
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        first = one.responses.create(input="One.", instructions="Be brief.", **SHORT)
        kept = one.responses.create(input="Two.", previous_response_id=first.id, **SHORT)
        longer = one.responses.create(
            input="Two.", previous_response_id=first.id, instructions="Be as long as you can, and polite.", **SHORT
        )
    assert longer.usage.input_tokens > kept.usage.input_tokens > first.usage.input_tokens


def test_a_stream_of_an_answer(keeping):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
            first = await one.responses.create(input=HELLO, **SHORT)
            whole = await one.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT)
            stream = await one.responses.create(input=QUESTION, previous_response_id=first.id, stream=True, **SHORT)
            return whole, [event async for event in stream]

    whole, events = asyncio.run(run())
    kinds = [event.type.removeprefix("response.") for event in events]
    before = ["created", "in_progress", "output_item.added", "content_part.added"]
    after = ["output_text.done", "content_part.done", "output_item.done", whole.status]
    assert kinds == [*before, *["output_text.delta"] * (len(kinds) - 8), *after]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    last = events[-1].response
    assert last.output_text == events[-4].text == whole.output_text and last.id == events[0].response.id
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        assert one.responses.create(input="Go on.", previous_response_id=last.id, **SHORT).output_text


def test_an_answer_as_an_object(keeping):
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        answer = one.responses.parse(input="A place?", text_format=Place, **{**SHORT, "max_output_tokens": 200})
    assert isinstance(answer.output_parsed, Place)


def test_an_answer_that_is_not_kept(keeping, client):
    """Nothing of it is stored, so nobody goes on from it; it may go on from another one."""
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as one:
        first = one.responses.create(input=HELLO, **SHORT)
        before = state(keeping, first.id)
        left = one.responses.create(input=QUESTION, previous_response_id=first.id, store=False, **SHORT)
        assert (
            left.output_text == one.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT).output_text
        )
        np.testing.assert_array_equal(state(keeping, first.id), before)
        assert first.store and not left.store
        with pytest.raises(openai.NotFoundError) as raised:
            one.responses.create(input=QUESTION, previous_response_id=left.id, **SHORT)
        check_names(raised.value.body["message"], ["previous_response_id", left.id])
        one.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            one.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT)
    one = client()  # a server that keeps no messages
    answer = one.responses.create(input=HELLO, **SHORT)
    assert answer.output_text and not answer.store
    with pytest.raises(openai.NotFoundError) as raised:
        one.responses.create(input=QUESTION, previous_response_id=answer.id, **SHORT)
    check_names(raised.value.body["message"], ["previous_response_id", answer.id, "--keep-messages"])


def test_log_probabilities_of_an_answer(client):
    """Those of the same chat, in the answer, and in the events of a stream, which have names."""
    one, include = client(), ["message.output_text.logprobs"]
    chat = one.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **GREEDY)
    expected = [(e.token, [top.token for top in e.top_logprobs]) for e in chat.choices[0].logprobs.content]
    answer = one.responses.create(input=HELLO, include=include, top_logprobs=2, metadata={"a": "b"}, **SHORT)

    def listed(entries):
        return [(entry.token, [top.token for top in entry.top_logprobs]) for entry in entries]

    assert listed(answer.output[0].content[0].logprobs) == expected
    assert answer.top_logprobs == 2 and answer.metadata == {"a": "b"}
    events = list(one.responses.create(input=HELLO, include=include, top_logprobs=2, stream=True, **SHORT))
    deltas = [entry for event in events if event.type.endswith("delta") for entry in event.logprobs]
    assert listed(deltas) == listed(events[-4].logprobs) == expected
    assert listed(events[-1].response.output[0].content[0].logprobs) == expected
    assert one.responses.create(input=HELLO, **SHORT).output[0].content[0].logprobs == []
    with one.responses.with_streaming_response.create(input=HELLO, stream=True, **SHORT) as response:
        lines = [line for line in response.iter_lines() if line.startswith("event: ")]
    assert lines[0] == "event: response.created" and lines[-1] in (
        "event: response.completed",
        "event: response.incomplete",
    )


def test_an_answer_of_a_session(client):
    """The session goes on, by its name."""
    one = client("of-responses")
    one.responses.create(input=HELLO, **SHORT)
    answer = one.responses.create(input=QUESTION, **SHORT)
    assert (memory(answer)["session"], memory(answer)["version"], answer.store) == ("of-responses", 2, False)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"input": []}, ["input"]),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, ["input", "function_call_output"]),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, ["input", "input_image"]),
        ({"tools": [{"type": "web_search"}]}, ["tools"]),
        ({"background": True}, ["background"]),
        ({"instructions": 1}, ["instructions"]),
        ({"text": {"format": {"type": "xml"}}}, ["text.format", "xml"]),
        ({"text": 1}, ["text"]),
        ({"max_output_tokens": -2}, ["max_output_tokens", "-2"]),
        ({"store": 1}, ["store", "1"]),
    ],
)
def test_what_responses_refuses(client, asked, names):
    with pytest.raises(openai.BadRequestError) as raised:
        client().post("/responses", cast_to=object, body={"input": "Hello", **asked})
    check_names(raised.value.body["message"], names)


def test_an_answer_of_somebody_else(keeping):
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as anna:
        first = anna.responses.create(input=HELLO, **SHORT)
    for path, kind in (("/v1", openai.NotFoundError), ("/sessions/bo/v1", openai.BadRequestError)):
        with openai.OpenAI(base_url=keeping + path, api_key=BO) as bo, pytest.raises(kind) as raised:
            bo.responses.create(input=QUESTION, previous_response_id=first.id, **SHORT)
        check_names(raised.value.body["message"], ["previous_response_id"])
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=BO) as bo, pytest.raises(openai.NotFoundError):
        bo.responses.delete(first.id)
    with openai.OpenAI(base_url=f"{keeping}/v1", api_key=ANNA) as anna, pytest.raises(openai.NotFoundError) as raised:
        anna.responses.delete("as-chat")
    check_names(raised.value.body["message"], ["as-chat"])
