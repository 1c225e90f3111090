"""Servers for tests: an application in a thread of this process, and `deltamem serve` as a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from pydeltamem import DeltaMemLlama
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.application import application
from pydeltamem.server.state import Settings

BASE, ADAPTERS = default_files()


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
