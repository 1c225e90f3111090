"""Keys and limits of the server, what fails in it, clients that go away, its health, and pages of others."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from pydeltamem import DeltaMemLlama, InputError
from pydeltamem.server import AsyncDeltaMem, memories, openai
from pydeltamem.server.application import application
from pydeltamem.server.keys import Keys
from pydeltamem.server.openai import Chat
from pydeltamem.server.records import StoreAway, StoreError
from pydeltamem.server.state import Settings
from servers import BASE, GREEDY, HELLO, about, ask, chunks, counted, in_thread, refused, said, service, until, with_key

#
# keys and limits
#


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


def test_a_body_that_is_too_large(narrow):
    content = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]}).encode()
    for body in (content, iter([content[:5000], content[5000:]])):  # with its length, and in chunks
        refused(narrow.http.post("/v1/chat/completions", content=body), 413, "body_too_large", "8000")
    refused(narrow.http.put("/v1/memories/ada/file", content=iter([content])), 413, "body_too_large", "8000")
    assert said(ask(narrow))


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


#
# what fails
#


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


#
# many at once, and clients that go away
#


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
    left = counted(narrow, "deltamem_requests_total", status="499")
    address = narrow.http.base_url.host, narrow.http.base_url.port
    with socket.create_connection(address) as client:
        client.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"messages":')
    until(lambda: counted(narrow, "deltamem_requests_total", status="499") == left + 1)
    assert counted(narrow, "deltamem_errors_total", code="internal") == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


RESPONSES = {"url": "/v1/responses", "json": {"input": "hello", "max_output_tokens": 1}}
TEXTS = {"url": "/v1/embeddings", "json": {"input": ["a", "b"], "encoding_format": "base64"}}
CHAT = {"url": "/v1/chat/completions", "json": {"messages": HELLO, **GREEDY}}
LIKELY = {"url": "/v1/chat/completions", "json": {"messages": HELLO, **GREEDY, "logprobs": True, "top_logprobs": 2}}


@pytest.mark.parametrize(
    "owner, name, request_",
    [
        pytest.param(Chat, "__init__", CHAT, id="a schema"),
        pytest.param(AsyncDeltaMem, "chat", CHAT, id="messages"),
        pytest.param(AsyncDeltaMem, "chat", RESPONSES, id="messages of a response"),
        pytest.param(base64, "b64encode", TEXTS, id="vectors"),
        pytest.param(openai, "likelihoods", LIKELY, id="log probabilities"),
        pytest.param(memories, "about", {"method": "GET", "url": "/v1/memories"}, id="a list of sessions"),
    ],
)
def test_what_takes_a_while_holds_nobody_else(api, monkeypatch, owner, name, request_):
    """Found: other streams stood still while the grammar of a large schema was made, or a long list was written."""
    begun, over, done = threading.Event(), threading.Event(), getattr(owner, name)

    def slow(*arguments, **options):
        begun.set()
        assert over.wait(60)
        return done(*arguments, **options)

    ask(api, path="/sessions/listed")
    monkeypatch.setattr(owner, name, slow)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(api.http.request, **{"method": "POST", **request_})
        try:
            assert begun.wait(60)
            assert api.http.get("/health").status_code == 200
        finally:
            over.set()
        assert asked.result().status_code == 200


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


@pytest.mark.parametrize("what", ["nobody waits", "the server stops"])
def test_embeddings_end_after_a_few_texts(monkeypatch, what):
    """Found: 3,000 texts whose client had left held up all other embeddings for minutes, and the end of the server."""
    embed, begun, over, embedded = DeltaMemLlama.embed, threading.Event(), threading.Event(), []

    def slow(self, texts, **options):
        embedded.extend(texts)
        begun.set()
        assert over.wait(60)
        return embed(self, texts, **options)

    monkeypatch.setattr(DeltaMemLlama, "embed", slow)
    with in_thread() as api, ThreadPoolExecutor() as threads:
        running = api.app.state.server
        address = api.http.base_url.host, api.http.base_url.port
        texts = [f"{letter} " * 200 for letter in "abc"]
        body = json.dumps({"input": texts}).encode()
        try:
            if what == "nobody waits":
                with socket.create_connection(address) as client:
                    client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
                    client.sendall(body)
                    assert begun.wait(60)
                until(lambda: running.embedder.n_asked == 0)
            else:
                asked = threads.submit(api.http.post, "/v1/embeddings", content=body)
                assert begun.wait(60)
                running.cut()
        finally:
            over.set()
        if what == "nobody waits":
            assert api.http.post("/v1/embeddings", json={"input": "d"}).status_code == 200
        else:
            refused(asked.result(), 503, "stopping")
    assert embedded == ([texts[0], "d"] if what == "nobody waits" else texts[:1])


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


#
# its health
#


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


#
# pages of others
#

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
