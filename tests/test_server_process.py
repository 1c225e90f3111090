"""`deltamem serve` as a process: it listens before the model is loaded, ends in order, and keeps streams alive."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn

from pydeltamem import DeltaMemLlama
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.application import Settings, application
from pydeltamem.server.store import Store

HELLO = {"messages": [{"role": "user", "content": "My name is Ada."}], "temperature": 0}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def process(tmp_path, *options):
    """A server of the package's model: the process and a client for it."""
    port = free_port()
    base, adapters = default_files()
    command = [
        *(sys.executable, "-m", "pydeltamem.cli", "serve", "-m", str(base), "--deltamem", str(adapters["msw"])),
        *("-t", "1", "-tb", "1", "-c", "1024", "-np", "2", "--port", str(port), "--no-page"),
        *("--store", f"sqlite:///{tmp_path / 'sessions.db'}", *options),
    ]
    log = open(tmp_path / "log", "a+")  # noqa: SIM115 - closed below
    server = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield server, client
    finally:
        server.kill()
        server.wait()
        log.close()


def wait_until_ready(client, seconds=120):
    end, seen = time.monotonic() + seconds, []
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            answer = client.get("/health")
            seen.append((answer.status_code, answer.json()["status"]))
            if answer.status_code == 200:
                return seen
        time.sleep(0.05)
    raise TimeoutError(f"not ready: {seen[-3:]}")


def events(response):
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_terminated_it_ends_what_runs_and_commits(tmp_path):
    with process(tmp_path) as (server, client):
        assert wait_until_ready(client)[-1] == (200, "ok")
        asked = {**HELLO, "stream": True, "max_tokens": 200, "grammar": "root ::= [a-z ]*"}
        with client.stream("POST", "/sessions/ada/v1/chat/completions", json=asked) as response:
            chunks = events(response)
            next(chunks), next(chunks)
            server.send_signal(signal.SIGTERM)
            last = list(chunks)[-1]
        assert last["choices"][0]["finish_reason"] in ("length", "stop")
        assert last["memory"]["version"] == 1
        assert server.wait(60) == 0
    store = Store(f"sqlite:///{tmp_path / 'sessions.db'}")
    assert store.get("", "ada").tokens == last["memory"]["tokens_written"]
    store.close()


def test_who_goes_away_frees_the_slot(tmp_path):
    with process(tmp_path) as (_, client):
        wait_until_ready(client)

        def used():
            lines = client.get("/metrics").text.splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith("deltamem_slots_used "))

        asked = {**HELLO, "stream": True, "max_tokens": 900, "grammar": "root ::= [a-z ]*"}
        with client.stream("POST", "/sessions/ada/v1/chat/completions", json=asked) as response:
            chunks = events(response)
            next(chunks), next(chunks)
        end = time.monotonic() + 20
        while used() > 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert used() == 0
        while client.get("/v1/memories/ada").status_code == 404 and time.monotonic() < end:
            time.sleep(0.01)
        ada = client.get("/v1/memories/ada").json()
        assert ada["turns"] == 1 and ada["tokens"] < 900  # what was said so far counts


def test_what_it_refuses_to_start_with(tmp_path):
    def run(*options):
        base = default_files()[0]
        command = [sys.executable, "-m", "pydeltamem.cli", "serve", "-m", str(base), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    for options, named in (
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--api-key-file", str(tmp_path / "none")), str(tmp_path / "none")),
        (("--store", "nosuch://x"), "nosuch://x"),
        (("--deltamem", str(tmp_path / "none.gguf")), "none.gguf"),
    ):
        done = run(*options)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert named in done.stderr


@pytest.fixture
def here(tmp_path):
    """here(**settings): the application in a thread of this process, with its service and a client."""
    stack = contextlib.ExitStack()

    def start(**settings):
        base, adapters = default_files()

        def load():
            llm = DeltaMemLlama(
                base, deltamem_path=adapters["msw"], n_ctx=1024, n_seq_max=2, n_threads=1, n_threads_batch=1
            )
            return AsyncDeltaMem(llm, Store(f"sqlite:///{tmp_path / 'sessions.db'}"))

        app = application(Settings(load=load, **settings))
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
        server.install_signal_handlers = lambda: None
        thread = threading.Thread(target=server.run)
        thread.start()
        stack.callback(thread.join, 30)
        stack.callback(setattr, server, "should_exit", True)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        wait_until_ready(client)
        return app.state.server.service, client

    with stack:
        yield start


def test_a_prompt_that_takes_long_keeps_its_stream_alive(here):
    service, client = here(heartbeat=0.1)
    service.worker.call(lambda: time.sleep(1))  # in place of a long prompt
    comments = 0
    asked = {**HELLO, "stream": True, "max_tokens": 3}
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        for line in response.iter_lines():
            if line.startswith(":"):
                comments += 1
            if '"content": " ' in line:
                break
    assert comments >= 3


def test_a_stuck_decode_is_not_healthy(here):
    service, client = here()
    stop = threading.Event()
    service.worker.call(stop.wait)
    time.sleep(1.1)  # the last answer is remembered for a second
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "stuck")
    stop.set()
    time.sleep(1.1)
    assert client.get("/health").status_code == 200
