"""Layers on other machines, by llama.cpp's RPC backend: `deltamem rpc-server` there, `--rpc HOST:PORT,...` here.

    DeltaMemLlama("base.gguf", deltamem_path="adapter.gguf", rpc_servers="10.0.0.2:50052")

A layer's state lives where the layer does. Use this package's server: a stock rpc-server lacks the operator.
llama.cpp's protocol has no password and no encryption: never run a server on a network that others can reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from typing import Any

from ..errors import InputError, LibraryError, RpcServerAway
from .devices import ggml, local_devices

DEFAULT_PORT = 50052

_connected: set[str] = set()
_callbacks: list[Any] = []  # which ggml calls for good
# of a connection: a machine that is gone without a word is noticed after 20 s, instead of never
_PATIENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 20_000}


def connect(endpoints: str) -> None:
    """Makes the devices of RPC servers devices of this process. Models loaded afterwards may have layers there.

    Args:
        endpoints: `host:port`, several with commas. A connected one stays connected.

    Raises InputError if an endpoint is malformed, RpcServerAway if nobody listens there, LibraryError if the library
    has no RPC.
    """
    for endpoint in parsed(endpoints):
        if endpoint in _connected:
            continue
        require(endpoint)  # llama.cpp aborts the process if nobody answers
        add_server = _function("ggml_backend_rpc_add_server", ctypes.c_void_p, [ctypes.c_char_p])
        server = add_server(endpoint.encode())
        if not server:
            raise InputError(f"{endpoint}: the RPC server there has no devices")
        register = ggml().ggml_backend_register
        register.restype, register.argtypes = None, [ctypes.c_void_p]
        register(server)
        _connected.add(endpoint)


def parsed(endpoints: str) -> list[str]:
    """Each `host:port`. Raises InputError if one is malformed."""
    if not isinstance(endpoints, str):
        raise InputError(f"rpc_servers is host:port, several with commas, not {endpoints!r}")
    found = [part.strip() for part in endpoints.split(",") if part.strip()]
    for endpoint in found:
        _parse(endpoint)
    return found


def require(endpoint: str) -> None:
    """Raises RpcServerAway if nobody listens there."""
    try:
        socket.create_connection(_parse(endpoint), timeout=5).close()
    except OSError as error:
        raise RpcServerAway(f"{endpoint}: no RPC server answers there: {error.strerror or error}") from error


def watch_connections(endpoints: str) -> int:
    """Has the system notice when a machine is gone without a word, as by a cable: llama.cpp would wait for its answer
    for ever. Call this once a model is loaded. Returns the number of connections.
    """
    n, peers = 0, set()
    for host, port in map(_parse, parsed(endpoints)):
        peers |= {about[4][:2] for about in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # closed by now, or no connection
            fd = int(name)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as connection:
                if connection.getpeername()[:2] in peers:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in _PATIENCE.items():
                        if hasattr(socket, option):
                            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
                    n += 1
    return n


def when_lost(callback: Callable[[str], None]) -> None:
    """Calls a function, with llama.cpp's reason, where llama.cpp would end this process: above all when it loses an RPC
    server. The thread that called llama.cpp does not come back from there, so the process should end soon.
    """

    def lost(reason: bytes) -> None:
        callback(reason.decode(errors="replace"))
        threading.Event().wait()

    function = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lost)
    _callbacks.append(function)
    ggml().ggml_set_abort_callback(function)


def serve(host: str, port: int, n_threads: int) -> None:
    """Serves this machine's GPUs, or its CPU if it has none, until it is stopped. Returns only if it cannot start.

    Raises InputError if nothing can listen there, LibraryError if the library has no RPC.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            address = probe.getsockname()[0]  # llama.cpp takes no names
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port}: cannot listen there: {reason}") from error
    devices = local_devices()
    start = _function(
        "ggml_backend_rpc_start_server",
        None,
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)],
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the loop runs in C, where Python cannot see a Ctrl-C
    start(f"{address}:{port}".encode(), None, n_threads, len(devices), (ctypes.c_void_p * len(devices))(*devices))


def _parse(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{endpoint!r} is no RPC server: give host:port, like 10.0.0.2:{DEFAULT_PORT}")
    return host, int(port)


def _function(name: str, result: Any, arguments: list[Any]) -> Callable[..., Any]:
    """A function of the RPC backend, which ggml looks up by name."""
    lib = ggml()
    lib.ggml_backend_reg_by_name.restype, lib.ggml_backend_reg_by_name.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    find = lib.ggml_backend_reg_get_proc_address
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
    backend = lib.ggml_backend_reg_by_name(b"RPC")
    if not backend:
        raise LibraryError("this library was built without RPC: build it with -DGGML_RPC=ON")
    return ctypes.CFUNCTYPE(result, *arguments)(find(backend, name.encode()))
