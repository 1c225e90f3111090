"""Kills of RPC servers under load, and whether `deltamem serve --rpc` comes back by itself with every turn once.

    python tools/rpc_kills.py [--kills 20] [--clients 8]

One server, whose layers are on two RPC servers of this machine. Each client talks in a session of its own and sends a
turn again until it is answered. One RPC server at a time is killed (SIGKILL), and started again after 0.5 to 3 s. Then
each session is played alone, in a process that has all layers, and compared as by `fleet_kills.py`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fleet import Replica, RpcServer, until
from fleet_kills import Client, Kill, f32_model, play_alone, verdict


def kill_all(
    n: int, draw: random.Random, servers: Sequence[RpcServer], serving: Replica
) -> tuple[list[Kill], list[float]]:
    """n kills, and after each the seconds from the start of the RPC server until a token can be decoded again."""
    kills: list[Kill] = []
    back: list[float] = []
    for i in range(n):
        time.sleep(draw.uniform(1, 4))
        server = draw.choice(servers)
        server.kill()
        kills.append(Kill("an RPC server", server.endpoint, time.time()))
        until(lambda: not serving.is_ready(), what="the server has not noticed")
        time.sleep(draw.uniform(0.5, 3))
        begin = time.time()
        server.start()
        until(serving.is_ready, what="the server has not come back")
        back.append(time.time() - begin)
        print(f"{i + 1:3} back after {back[-1]:.1f} s", flush=True)
    return kills, back


def play(args: argparse.Namespace, folder: Path) -> int:
    draw, model, store = random.Random(args.seed), f32_model(folder), f"sqlite:///{folder / 'sessions.db'}"
    servers = RpcServer(folder), RpcServer(folder)
    options = "-m", model, "-ctk", "f32", "-ctv", "f32", "-np", 4, "--rpc", ",".join(each.endpoint for each in servers)
    with servers[0], servers[1], Replica(folder, "server", store, *options) as serving:
        over = threading.Event()
        clients = [Client(f"c{i}") for i in range(args.clients)]
        talk = serving.address, over.is_set, args.rest
        threads = [threading.Thread(target=client.run, args=talk) for client in clients]
        for thread in threads:
            thread.start()
        kills, back = kill_all(args.kills, draw, servers, serving)
        time.sleep(5)
        over.set()
        for thread in threads:
            thread.join()
        serving.end()
    wrong = play_alone(clients, kills, store, model, folder)
    print(f"back after the RPC server began: {statistics.median(back):.1f} s, {max(back):.1f} at most")
    return verdict(wrong, "nothing lost, nothing twice")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rest", type=float, default=0.5, help="seconds between two turns of a client, in the mean")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="deltamem-rpc-") as folder:
        return play(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
