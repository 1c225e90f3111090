"""`deltamem serve`: OpenAI's API with a memory for each session."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import InputError, RpcServerAway
from .model_options import ADAPTER_HELP, DEFER_HELP, MODEL_HELP, add_running_arguments, note, running_options
from .parser import at_least, count, positive, positive_number

if TYPE_CHECKING:
    from ..server.service import AsyncDeltaMem
    from ..server.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser.add_argument_group("model"))
    _add_server(parser.add_argument_group("server"))
    _add_sessions(parser.add_argument_group("sessions"))
    _add_limits(parser.add_argument_group("limits"))


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-m", "--model", required=True, metavar="FILE", help=MODEL_HELP)
    group.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    group.add_argument("--defer-replies", action="store_true", help=DEFER_HELP)
    group.add_argument("--lora", metavar="FILE", help="LoRA adapter GGUF")
    group.add_argument(
        "-c", "--ctx-size", type=count, default=4096, metavar="TOKENS",
        help="tokens of one request's context (%(default)s; 0: the model's)",
    )  # fmt: skip
    group.add_argument(
        "-np", "--parallel", type=positive, default=4, metavar="N", help="slots: requests decoded at once (%(default)s)"
    )
    add_running_arguments(group)
    group.add_argument("--alias", metavar="NAME", help="name of the model in answers (its file's)")


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=at_least(0, 65535), default=8080, metavar="N", help="port (%(default)s; 0: any)")
    group.add_argument("--api-key-file", metavar="FILE", help="API keys, one a line; sessions belong to a key")
    group.add_argument(
        "--drain", type=count, default=0, metavar="SECONDS",
        help="seconds to go on answering after SIGTERM; /health says 503, so a balancer sends no more (%(default)s)",
    )  # fmt: skip
    group.add_argument("--no-page", action="store_true", help="serve no page at /")
    group.add_argument(
        "--cors-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
        help="let pages of this origin use the API, such as https://page.example; with keys, * allows any origin",
    )  # fmt: skip
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="lowest level that is logged (info)",
    )
    group.add_argument("--supervised", metavar="FD,FD", help=argparse.SUPPRESS)  # by whom: `server/supervisor.py`


def _add_sessions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--store",
        metavar="URL",
        help="where sessions are: sqlite:///FILE or postgresql+psycopg://… (a file in the user's data folder)",
    )
    group.add_argument(
        "--keep-messages",
        action="store_true",
        help="store what was said, for the page and /v1/responses; otherwise only digests of it",
    )
    group.add_argument(
        "--undo", type=positive, default=8, metavar="N", help="turns of a session that can be taken back (%(default)s)"
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that wait (%(default)s)")
    group.add_argument(
        "--turn-timeout", type=positive_number, default=10.0, metavar="SECONDS",
        help="seconds that a turn waits for another one of its session (%(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--max-body", type=positive, default=8 << 20, metavar="BYTES", help="bytes of a request (%(default)s)"
    )
    group.add_argument(
        "--max-sessions", type=positive, default=100_000, metavar="N", help="sessions of one key (%(default)s)"
    )
    group.add_argument(
        "--requests-per-minute",
        type=count,
        default=0,
        metavar="N",
        help="requests of one key in a minute (%(default)s: any number)",
    )


def run(args: argparse.Namespace) -> int:
    try:
        from ..server import application, logs, page, state, supervisor
        from ..server.draining import server_of
        from ..server.keys import Keys
        from ..server.store import Store
    except ImportError as error:
        raise InputError(f"a package of the server is missing ({error}): pip install 'pydeltamem[server]'") from error
    from ..hub import adapter_file, model_file
    from ..runtime.remote import parsed, when_lost

    keys = Keys(args.api_key_file)
    _check_access(args, has_keys=bool(keys))
    if args.rpc and not args.supervised:
        logs.set_up(args.log_level)
        endpoints, shared = parsed(args.rpc), supervisor.listening(args.host, args.port)
        note(f"{_url(args.host, shared)}: layers on {args.rpc}")
        return supervisor.supervise(shared, endpoints)
    model = model_file(args.model)
    adapter = None if args.deltamem is None else adapter_file(args.deltamem, model)
    store = Store(args.store, n_undo=args.undo, keep_messages=args.keep_messages, may_be_away=True)
    listener = None if args.supervised else supervisor.listening(args.host, args.port)

    def stop() -> None:
        server.should_exit = True

    settings = state.Settings(
        load=lambda: _service(args, model, adapter, store),
        keys=keys,
        model=args.alias or os.path.basename(model),
        base=os.path.basename(model),
        adapter="" if adapter is None else os.path.basename(adapter),
        max_body=args.max_body,
        per_minute=args.requests_per_minute,
        origins=tuple(args.cors_origin),
        is_private=not keys,
        failed=stop,
        page=None if args.no_page else page.mount,
    )
    logs.set_up(args.log_level)
    app = application.application(settings)

    def lost(reason: str) -> None:
        supervisor.end_soon()
        app.state.server.lose(reason)

    server = server_of(app, drain=args.drain, is_followed=bool(args.supervised))
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends in order, and raises the signal again afterwards
    if args.supervised:
        when_lost(lost)
    with listener or supervisor.supervised(args.supervised, lambda: app.state.server.is_loaded) as given:
        about = "sessions belong to keys" if keys else "no keys, so for this machine only"
        note(f"{_url(args.host, given)}: {about}")
        server.run(sockets=[given])
    failure = app.state.server.failure
    if isinstance(failure, RpcServerAway) and args.supervised:
        return supervisor.AGAIN
    if failure is not None:
        raise failure
    return 0 if server.started else 1


def _check_access(args: argparse.Namespace, has_keys: bool) -> None:
    """Raises InputError if anybody could use a server that has no keys."""
    from ..server.guards import is_loopback

    if not has_keys and not is_loopback(args.host):
        raise InputError(
            f"--host {args.host}: without keys the server listens to this machine only: give --api-key-file"
        )
    if not has_keys and "*" in args.cors_origin:
        raise InputError(
            "--cors-origin *: without keys any page could use the server: name pages, or give --api-key-file"
        )


def _service(args: argparse.Namespace, model: str, adapter: str | None, store: Store) -> AsyncDeltaMem:
    """Loads the model."""
    from ..llama import DeltaMemLlama
    from ..runtime.remote import watch_connections
    from ..server.service import AsyncDeltaMem

    llm = DeltaMemLlama(
        model,
        deltamem_path=adapter,
        defer_replies=args.defer_replies,
        lora_path=args.lora,
        n_ctx=args.ctx_size,
        n_seq_max=args.parallel,
        **{**running_options(args), "n_batch": max(args.batch_size, args.parallel)},
    )
    if args.defer_replies:
        _ = llm.memory.state  # raises if there is no adapter
    if args.rpc:
        watch_connections(args.rpc)
    return AsyncDeltaMem(llm, store, n_queue=args.queue, n_sessions=args.max_sessions, turn_timeout=args.turn_timeout)


def _origin(text: str) -> str:
    """An origin as browsers send it: without a path, in small letters."""
    try:
        parts = urlsplit(text.lower())
    except ValueError:
        parts = urlsplit("")
    if text not in ("*", "null") and text.lower() != f"{parts.scheme}://{parts.hostname and parts.netloc}":
        raise argparse.ArgumentTypeError(f"{text!r} is no origin: it is scheme://host or scheme://host:port")
    return text.lower()


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
