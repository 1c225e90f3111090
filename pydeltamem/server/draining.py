"""The server of the application: how it listens, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from typing import Any

import uvicorn

from . import supervisor
from .application import GRACE, LAST


def server_of(app: Any, *, drain: float, is_followed: bool) -> uvicorn.Server:
    """A server of the application.

    Args:
        drain: seconds that it answers on after SIGTERM.
        is_followed: whether another one at the same socket follows.
    """

    class Draining(supervisor.Relay if is_followed else uvicorn.Server):  # type: ignore[misc]
        """At the first SIGTERM answers for a while, and tells balancers to send no more. At the end it cuts answers
        before uvicorn cancels their requests, so that they end in order.
        """

        def handle_exit(self, sig: int, frame: Any) -> None:
            running = app.state.server
            if sig != signal.SIGTERM or not drain or running.is_draining:
                super().handle_exit(sig, frame)
                return
            running.is_draining = True
            timer = threading.Timer(drain, super().handle_exit, (sig, frame))
            timer.daemon = True
            timer.start()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            cut = asyncio.get_running_loop().call_later(GRACE, app.state.server.cut)
            await super().shutdown(sockets)
            cut.cancel()
            if app.state.server.lost is not None:
                os._exit(supervisor.AGAIN)  # Python would wait for the thread that does not come back

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE + LAST,
        timeout_keep_alive=75,  # longer than clients and proxies keep theirs: who closes first is not asked meanwhile
    )
    return Draining(config)
