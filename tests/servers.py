"""Servers for tests: an application in a thread of this process, and `deltamem serve` as a process of its own; and what
tests ask an application.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from pydeltamem import DeltaMemLlama
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.application import application
from pydeltamem.server.state import Settings

BASE, ADAPTERS = default_files()

GREEDY = {"temperature": 0, "max_tokens": 8}
HELLO = [{"role": "user", "content": "My name is Ada."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def service(*, slots: int = 2, adapter: str | None = "msw", n_ctx: int = 512, **options: Any) -> AsyncDeltaMem:
    """The model of the package, ready for turns. `options`: of AsyncDeltaMem."""
    llm = DeltaMemLlama(
        BASE,
        deltamem_path=None if adapter is None else ADAPTERS[adapter],
        n_ctx=n_ctx,
        n_seq_max=slots,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    return AsyncDeltaMem(llm, **options)


@contextlib.contextmanager
def in_thread(load: Callable[[], AsyncDeltaMem] = service, *, ready: bool = True, **settings: Any) -> Iterator[Api]:
    """A server in a thread. `settings`: of Settings. `ready`: wait for the model."""
    app = application(Settings(load=load, **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            if ready:
                until(lambda: client.get("/health").status_code == 200)
            yield Api(client, app)
    finally:
        server.should_exit = True
        thread.join(60)


class Api:
    """A running server as a test uses it: `http` for requests, `app` to look inside."""

    def __init__(self, http: httpx.Client, app: FastAPI) -> None:
        self.http, self.app = http, app

    @property
    def service(self) -> AsyncDeltaMem:
        return self.app.state.server.service

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Nothing is decoded in the block."""
        begun, over = threading.Event(), threading.Event()
        self.service.worker.call(lambda: (begun.set(), over.wait(60)))
        assert begun.wait(60)
        try:
            yield
        finally:
            over.set()


class Process:
    """A running `deltamem serve`."""

    def __init__(self, address: str, popen: subprocess.Popen[bytes]) -> None:
        self.address, self.popen = address, popen

    def end(self) -> int:
        """Tells it to end (SIGTERM). Returns its exit status."""
        self.popen.terminate()
        return self.popen.wait(60)


def command(folder: Path, *options: object) -> list[str]:
    """`deltamem serve` with the model of the package and its sessions in a folder."""
    model = ["-m", BASE, "--deltamem", ADAPTERS["msw"], "-c", 1024, "-t", 1, "-tb", 1]
    store = ["--store", f"sqlite:///{folder / 'sessions.db'}"]
    return [sys.executable, "-m", "pydeltamem.cli", "serve", *map(str, [*model, *store, *options])]


@contextlib.contextmanager
def process(folder: Path, *options: object) -> Iterator[Process]:
    """A `deltamem serve` that is ready. What it logs goes to server.log in the folder."""
    log, port = folder / "server.log", free_port()
    with log.open("w") as out:
        popen = subprocess.Popen(command(folder, "--port", port, *options), stdout=out, stderr=out)
    running = Process(f"http://127.0.0.1:{port}", popen)
    try:
        until(lambda: _is_healthy(running.address) or popen.poll() is not None)
        assert popen.poll() is None, log.read_text()
        yield running
    finally:
        running.end()
    assert "Traceback" not in log.read_text(), log.read_text()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.02)


#
# what tests ask
#


def ask(
    api: Api, messages: list[Any] = HELLO, *, path: str = "", headers: dict[str, str] | None = None, **body: Any
) -> Any:
    """One chat completion, which succeeds."""
    answer = api.http.post(
        f"{path}/v1/chat/completions", json={"messages": messages, **GREEDY, **body}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any) -> str:
    """The text of a chat completion."""
    return answer["choices"][0]["message"]["content"]


def chunks(api: Api, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    """What a stream sends, without its end."""
    with api.http.stream("POST", path, json={"stream": True, **GREEDY, **body}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(answer: httpx.Response, status: int, code: str, *names: str) -> httpx.Response:
    """An answer is OpenAI's error object and names these."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "code"} and error["code"] == code, error
    for name in names:
        assert name in error["message"], error
    return answer


def state(api: Api, session: str) -> np.ndarray:
    """The state of a session's memory."""
    answer = api.http.get(f"/v1/memories/{session}/file")
    assert answer.status_code == 200, answer.text
    return MemorySnapshot.from_bytes(answer.content).state


def about(api: Api, session: str) -> Any:
    """What the server says of a session."""
    answer = api.http.get(f"/v1/memories/{session}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def with_key(key: str) -> dict[str, str]:
    """The header of a request."""
    return {"Authorization": f"Bearer {key}"}


def counted(api: Api, name: str, timeout: float = 60, **labels: str) -> float:
    """A metric of the server; 0 if there is none yet."""
    families = text_string_to_metric_families(api.http.get("/metrics", timeout=timeout).text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
