"""Turns a second with a decode that costs nothing: the ceiling that the store sets, and where the time goes.

    python tools/fleet_turns.py [--seconds 5] [--rounds 3] [--clients 24] [--profile]

Each replica is a process with the service of `deltamem serve`. Its answers are stand-ins: they take no time, and leave
what a turn of a 4B model leaves: a memory and a state of 9 KB each, and a text of 512 tokens. Leases, locks, threads
and commits are the real ones, on a PostgreSQL of their own with fsync. 1 and 2 replicas take turns, without HTTP; then
comes one with HTTP and a key, whose clients are a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from fleet import PostgreSQL, free_port
from pydeltamem import DeltaMemLlama
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem, logs
from pydeltamem.server.answer import Answer
from pydeltamem.server.application import application
from pydeltamem.server.keys import Keys
from pydeltamem.server.records import Record, Turn
from pydeltamem.server.session import Begun, live_session
from pydeltamem.server.state import Settings
from pydeltamem.server.store import Store

MEMORY, TEXT = os.urandom(36 * 64 * 4), os.urandom(512 * 5)
START = 8  # seconds that replicas have to load
DIGESTS = ("0" * 64, "1" * 64)
KEY = "a key"
COLUMNS = ("loop", "store", "rest", "database")


class StandIn(Answer):
    """A turn that is decoded at once."""

    def _render(self) -> None:
        """There is nothing to decode."""

    async def _decode(self) -> None:
        if self._stored is not None:
            key = self._stored.owner, self._stored.name
            self._live, self._stored = live_session(self.shared.llm, self._stored), None
            self.shared.keep(key, self._live)
        assert self._live is not None and self._live.record is not None  # of a session
        record, turns = self._live.record, self._live.turns
        number = record.turns + 1
        turn = Turn(number, "chat", record.tokens, record.tokens, MEMORY, DIGESTS)
        self._begun = Begun([], None, 0, turn, 0, turns, "chat", self._live.text.position)
        self._record = replace(
            record, turns=number, tokens=record.tokens + 64, adapter=self.shared.adapter, memory=MEMORY, text=TEXT,
            chat="chat", history=(*turns, turn),
        )  # fmt: skip
        self._started.set_result(None)


class Standing(AsyncDeltaMem):
    """A service whose answers are stand-ins."""

    def chat(
        self, messages: Any, *, session: str | None = None, owner: str = "", write: bool = True, **options: Any
    ) -> Answer:
        return StandIn(self._shared, messages, None, session, owner, write, {})


def service(url: str, clients: int) -> Standing:
    base, adapters = default_files()
    llm = DeltaMemLlama(base, deltamem_path=adapters["msw"], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    return Standing(llm, Store(url), n_live=clients)


async def talk(serving: Standing, name: str, until: float) -> int:
    """Turns of one client until then."""
    n = 0
    while time.time() < until:
        await serving.chat([], session=name).whole()
        n += 1
    return n


async def replica(args: argparse.Namespace) -> list[float]:
    """Turns of a replica, and the CPU seconds that it spent, as `spent_by_threads`."""
    async with service(args.url, args.clients) as serving:
        names = [f"{args.name}-{i}" for i in range(args.clients)]
        await asyncio.gather(*(talk(serving, name, time.time() + 0.2) for name in names))
        await asyncio.sleep(max(0.0, args.begin - time.time()))
        end, spent = time.time() + args.seconds, spent_by_threads()
        n = sum(await asyncio.gather(*(talk(serving, name, end) for name in names)))
        return [n, *(after - before for before, after in zip(spent, spent_by_threads()))]


async def http_replica(args: argparse.Namespace) -> list[float]:
    """As `replica`, but over HTTP, and the turns are counted by who asks."""
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(KEY)
        keys.flush()
        app = application(Settings(load=lambda: service(args.url, args.clients), keys=Keys(keys.name)))
    logs.set_up()  # a line a request, as always
    server = uvicorn.Server(uvicorn.Config(app, port=args.port, log_config=None, access_log=False))
    running = asyncio.create_task(server.serve())
    await asyncio.sleep(max(0.0, args.begin - time.time()))
    spent = spent_by_threads()
    await asyncio.sleep(args.seconds)
    spent = tuple(after - before for before, after in zip(spent, spent_by_threads()))
    await asyncio.sleep(1)
    server.should_exit = True
    await running
    return [0, *spent]


async def http_clients(args: argparse.Namespace) -> list[float]:
    """Turns that clients have within the time."""
    end = args.begin + args.seconds
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]})

    async def one(name: str) -> int:
        head = (
            f"POST /sessions/{name}/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        )
        asked = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
        n, (reader, writer) = 0, await asyncio.open_connection("127.0.0.1", args.port)
        while time.time() < end:
            writer.write(asked)
            about = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in about[:16]:
                raise RuntimeError(about.decode())
            await reader.readexactly(int(about.partition(b"content-length:")[2].split()[0]))
            n += args.begin < time.time() < end
        writer.close()
        return n

    await asyncio.sleep(max(0.0, args.begin - 0.5 - time.time()))
    return [sum(await asyncio.gather(*(one(f"{args.name}-{i}") for i in range(args.clients)))), 0, 0, 0]


def spent_by_threads() -> tuple[float, float, float]:
    """CPU seconds of this process: of the event loop, of the threads that ask the database, and of the others."""
    loop = store = 0.0
    for thread in threading.enumerate():
        spent = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9
        if thread is threading.main_thread():
            loop = spent
        elif thread.name.startswith("deltamem-store"):
            store += spent
    return loop, store, time.process_time() - loop - store


@dataclass
class Rate:
    """Turns a second, and CPU milliseconds a turn: of the replicas' event loops, of their threads that ask the
    database, of their other threads, and of PostgreSQL.
    """

    turns: float
    loop: float
    store: float
    rest: float
    database: float


def spent_by(database: PostgreSQL) -> float:
    """CPU seconds of all processes of a PostgreSQL, those that ended included."""
    assert database.popen is not None  # it runs
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = path.read_text().partition(" ")
            fields = rest.rpartition(")")[2].split()
            if int(pid) == database.popen.pid:
                ticks += sum(map(int, fields[11:15]))
            elif int(fields[1]) == database.popen.pid:
                ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(database: PostgreSQL, n: int, clients: int, seconds: float, *roles: str) -> Rate:
    """n replicas at once, or these processes."""
    begin, spent = time.time() + START, spent_by(database)
    given = {"url": database.url, "seconds": seconds, "begin": begin, "clients": clients // n, "port": free_port()}
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    name = str(time.time_ns())
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *options, "--name", f"{name}-{i}", "--role", role],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, role in enumerate(roles or ("replica",) * n)
    ]
    said = [each.communicate() for each in running]
    for each, (_, error) in zip(running, said):
        if each.returncode:
            raise RuntimeError(f"a process failed: {error[-2000:]}")
    turns, *ours = (sum(values) for values in zip(*(map(float, out.split()) for out, _ in said)))
    loop, store, rest = (1000 * each / turns for each in ours)
    return Rate(turns / seconds, loop, store, rest, 1000 * (spent_by(database) - spent) / turns)


def store_alone(database: PostgreSQL, seconds: float) -> Rate:
    """One thread that takes a lease and commits, and does nothing else."""
    store, n, name = Store(database.url), 0, f"alone-{time.time_ns()}"
    record = Record("", name)
    begin, ours, spent = time.time(), time.process_time(), spent_by(database)
    while time.time() < begin + seconds:
        store.lease("", name, "one", 60)
        turn = Turn(record.turns + 1, "chat", 0, 0, MEMORY, DIGESTS)
        after = replace(record, turns=turn.number, memory=MEMORY, text=TEXT, history=(*record.history, turn))
        record = store.commit(after, record, holder="one")
        n += 1
    store.close()
    ours, spent = time.process_time() - ours, spent_by(database) - spent
    return Rate(n / seconds, 0, 1000 * ours / n, 0, 1000 * spent / n)


def profile(database: PostgreSQL) -> None:
    """Where the time of the store goes."""
    about = cProfile.Profile()
    about.runcall(store_alone, database, 3)
    pstats.Stats(about).sort_stats("tottime").print_stats(25)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--profile", action="store_true")
    hidden: dict[str, Any] = {"--url": str, "--name": str, "--role": str, "--begin": float, "--port": int}
    for name, kind in hidden.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.role:
        roles = {"replica": replica, "http": http_replica, "clients": http_clients}
        print(*asyncio.run(roles[args.role](args)))
        return 0
    plan = {"1 replica": (1,), "2 replicas": (2,), "1, with HTTP": (1, "http", "clients")}
    rates: dict[str, list[Rate]] = {name: [] for name in ("store alone", *plan)}
    with PostgreSQL() as database:
        if args.profile:
            profile(database)
            return 0
        for _ in range(args.rounds):
            rates["store alone"].append(store_alone(database, args.seconds))
            for what, (n, *processes) in plan.items():
                rates[what].append(measure(database, n, args.clients, args.seconds, *processes))
        print(f"{'turns/s: median (least to most)':>45}   CPU ms a turn: event loop, store, other threads, PostgreSQL")
        for what, each in rates.items():
            turns = [rate.turns for rate in each]
            spread = f"({min(turns):.0f} to {max(turns):.0f})"
            spent = [statistics.median(getattr(rate, key) for rate in each) for key in COLUMNS]
            print(f"{what:12} {statistics.median(turns):13.0f} {spread:18}", *(f"{each:13.2f}" for each in spent))
        size = database.sql("SELECT pg_total_relation_size('sessions'), pg_total_relation_size('turns')")
        rows = database.sql(
            "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM turns), pg_current_wal_lsn() - '0/0'"
        )
        print("bytes of sessions and turns:", size, "rows and WAL bytes:", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
