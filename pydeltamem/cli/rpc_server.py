"""`deltamem rpc-server`: runs layers for other machines, with this one's RAM and processors."""

from __future__ import annotations

import argparse

from ..runtime.cpus import usable
from ..runtime.remote import DEFAULT_PORT, serve
from .parser import at_least, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=at_least(1, 65535), default=DEFAULT_PORT, metavar="N", help="port (%(default)s)")
    parser.add_argument(
        "-t", "--threads", type=positive, default=max(1, usable() // 2), metavar="N",
        help="threads if there is no GPU (half of the usable CPUs)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"Whoever reaches {args.host}:{args.port} can use this process and its RAM: keep it off open networks.",
            flush=True,
        )
    serve(args.host, args.port, args.threads)
    return 1  # serve printed why
