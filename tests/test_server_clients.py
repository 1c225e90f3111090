"""The `openai` package against a `deltamem serve` process: answers, sessions, errors, and the end of the process."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from typing import Literal

import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from conftest import ROOT
from refusals import check_names
from servers import command, process

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


def test_the_programs_of_the_page(address):
    """docs/how-to/serve.md: its Python that speaks to a server runs as it stands."""
    page = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "OpenAI(" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("http://127.0.0.1:8080", address).replace('api_key="-"', f'api_key="{ANNA}"'), {})


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


def test_a_rate_limit_and_a_retry(tmp_path):
    """The package waits as Retry-After says, and gives up after as many times as it was told."""
    keys = tmp_path / "keys.txt"
    keys.write_text(ANNA)
    with process(tmp_path, "--api-key-file", keys, "--requests-per-minute", 2) as running:
        with openai.OpenAI(base_url=f"{running.address}/v1", api_key=ANNA, max_retries=1) as one:
            for _ in range(2):
                one.models.list()
            with pytest.raises(openai.RateLimitError) as info:
                one.models.list()
        assert info.value.code == "rate_limited" and int(info.value.response.headers["retry-after"]) >= 1


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


@pytest.mark.parametrize(
    "options, names",
    [
        (["--deltamem", "tsw-of-nobody.gguf"], ["tsw-of-nobody.gguf"]),
        (["-ctv", "q8_0"], []),  # without -fa
        (["--host", "0.0.0.0"], ["0.0.0.0", "--api-key-file"]),
        (["--api-key-file", "no-such-file"], ["no-such-file"]),
        (["--store", "nosql://x"], ["nosql://x"]),
    ],
)
def test_what_cannot_be_served(tmp_path, options, names):
    """The process ends with an error, so that whoever started it knows."""
    done = subprocess.run(
        command(tmp_path, *options, "--log-level", "error"), capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("deltamem: error: ")
    check_names(last, names)
