"""Keeps a server alive whose layers are on other machines (`deltamem serve --rpc`).

llama.cpp ends a process that loses an RPC server. So the server is a process of its own, and this one holds the socket
that both listen at. When the server ends, this one answers 503 until all RPC servers are there again and another server
listens. Sessions are in the store, so nothing is lost but turns that were not committed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.responses import JSONResponse

from ..errors import InputError, RpcServerAway
from ..runtime import remote
from ..runtime.children import environment
from .logs import log

AGAIN = 75  # the exit status of a server that is to begin again: EX_TEMPFAIL
_ASKS = 1.0  # seconds after which RPC servers that were away are asked again
_ANSWERS = 0.3  # seconds that whoever is connected has to send a request, where another server follows
_ENDS = 45.0  # seconds that a server has to end once it has lost its model
_BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before the next server, by how many had not loaded their model


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises InputError if that cannot be."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family = min(each[0] for each in found)  # IPv4 where a name has both
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
        raise InputError(f"{host}:{port}: cannot listen there: {reason}") from error


def supervise(listener: socket.socket, endpoints: Sequence[str]) -> int:
    """Serves until it is told to end. Returns the exit status of the server. The command line is this process' own."""
    with listener:
        return _Supervisor(listener, endpoints).run()


class _Supervisor:
    def __init__(self, listener: socket.socket, endpoints: Sequence[str]) -> None:
        self.listener, self.endpoints = listener, endpoints
        self.server: subprocess.Popen[bytes] | None = None
        self.told: int | None = None  # the signal that ends it

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        n_failed = 0
        while True:
            with _answering_503(self.listener):
                self._rest(_BACKOFF[min(n_failed, len(_BACKOFF) - 1)])
                self._wait_for_rpc_servers()
                if self.told is not None:
                    return 0 if self.told == signal.SIGTERM else 128 + self.told
                self.server, ours = self._begin()
                _heard(ours)  # it would listen, or is over
            with contextlib.suppress(OSError):  # it is over
                ours.sendall(b"1")  # this process accepts no more; who comes meanwhile waits in the socket's queue
            n_failed += 1
            if _heard(ours):  # it has its model
                n_failed = 0
                _heard(ours)
            status = self.server.wait()
            ours.close()
            if self.told is not None and status == AGAIN:  # it lost its model at the end
                return 0
            if self.told is not None or 0 <= status != AGAIN:
                return status if status >= 0 else 128 - status
            log.warning("the server ended with status %d and begins again", status)

    def _begin(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """A server, and a socket whose other end it has."""
        ours, its = socket.socketpair()
        with its:
            given = self.listener.fileno(), its.fileno()
            command = [sys.executable, "-m", "pydeltamem.cli", *sys.argv[1:], "--supervised", "{},{}".format(*given)]
            # in a session of its own: a Ctrl-C comes to this process, which passes it on once
            server = subprocess.Popen(command, env=environment(), pass_fds=given, start_new_session=True)
        if self.told is not None:  # since the last look
            server.send_signal(self.told)
        return server, ours

    def _wait_for_rpc_servers(self) -> None:
        said = ""
        for endpoint in self.endpoints:
            while self.told is None:
                try:
                    remote.require(endpoint)
                except RpcServerAway as error:
                    if said != str(error):
                        said = str(error)
                        log.warning("%s", said)
                    self._rest(_ASKS)
                else:
                    break

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.told is None and time.monotonic() < end:
            time.sleep(0.1)

    def _end(self, number: int, _: Any) -> None:
        self.told = number
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(number)


def _heard(ours: socket.socket) -> bool:
    """Waits until the server says something. False if it is over."""
    try:
        return bool(ours.recv(1))
    except OSError:  # it had not read all
        return False


@contextlib.contextmanager
def _answering_503(listener: socket.socket) -> Iterator[None]:
    """Answers all requests so in the block, in a thread."""
    options: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "timeout_keep_alive": 1}
    server = Relay(uvicorn.Config(_away, lifespan="off", ws="none", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


async def _away(scope: Any, receive: Any, send: Any) -> None:
    """The application while there is no server."""
    while (await receive()).get("more_body"):
        pass  # to close a connection before all is read would take the answer back
    headers = {"Retry-After": "1", "Connection": "close"}  # the next request is for the server
    if scope["path"] == "/health/live":  # to start this process again would not help
        response = JSONResponse({"status": "ok"}, 200, headers)
    elif scope["path"] == "/health":
        response = JSONResponse({"status": "rpc server away"}, 503, headers)
    else:
        about = {"type": "unavailable_error", "code": "rpc_unavailable"}
        message = "an RPC server is away, or the model is loaded again: try again in a moment"
        response = JSONResponse({"error": {"message": message, **about}}, 503, headers)
    await response(scope, receive, send)


class Relay(uvicorn.Server):
    """A server that another one at the same socket follows: whoever is connected already is answered before it ends."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for each in self.servers:
            each.close()
        await asyncio.sleep(_ANSWERS)
        await super().shutdown(sockets)


#
# in the server
#


@contextlib.contextmanager
def supervised(given: str, is_loaded: Callable[[], bool]) -> Iterator[socket.socket]:
    """The socket that a server is to listen at which `_Supervisor` began, once that one has left it. Tells it when the
    model is loaded, and ends the server when the supervisor is gone.
    """
    listener, its = (socket.socket(fileno=int(fd)) for fd in given.split(","))

    def watch() -> None:
        with contextlib.suppress(OSError):
            while not is_loaded():
                time.sleep(0.05)
            its.sendall(b"1")
            its.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(OSError):  # `watch` ends this process
        its.sendall(b"1")
        its.recv(1)
    threading.Thread(target=watch, daemon=True).start()
    yield listener


def end_soon() -> None:
    """Ends this process after a while, whatever hangs."""
    timer = threading.Timer(_ENDS, os._exit, (AGAIN,))
    timer.daemon = True
    timer.start()
