"""Turns a second with a decode that costs nothing: the ceiling that the store sets, and where the time goes.

    python tools/fleet_turns.py [--seconds 5] [--rounds 3] [--clients 24] [--profile]

Each replica is a process with the service of `deltamem serve`, without HTTP. Its answers are stand-ins: they take no
time, and leave what a turn of a 4B model leaves: a memory and a state of 9 KB each, and a text of 512 tokens. Leases,
locks, threads and commits are the real ones, on a PostgreSQL of their own with fsync. 1 and 2 replicas take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet import PostgreSQL
from pydeltamem import DeltaMemLlama
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.service import Answer
from pydeltamem.server.session import Begun, live_session
from pydeltamem.server.store import Record, Store, Turn

MEMORY, TEXT = os.urandom(36 * 64 * 4), os.urandom(512 * 5)
START = 8  # seconds that replicas have to load
DIGESTS = ("0" * 64, "1" * 64)


class StandIn(Answer):
    """A turn that is decoded at once."""

    def _render(self) -> None:
        """There is nothing to decode."""

    async def _decode(self) -> None:
        if self._stored is not None:
            key = self._stored.owner, self._stored.name
            self._live, self._stored = live_session(self.service.llm, self._stored, self.service.adapter), None
            self.service._keep(key, self._live)
        assert self._live is not None and self._live.record is not None  # of a session
        record, turns = self._live.record, self._live.turns
        number = record.turns + 1
        turn = Turn(number, "chat", record.tokens, record.tokens, MEMORY, DIGESTS)
        self._begun = Begun([], None, 0, turn, 0, turns, "chat", self._live.text.position)
        self._record = replace(
            record, turns=number, tokens=record.tokens + 64, adapter=self.service.adapter, memory=MEMORY, text=TEXT,
            chat="chat", history=(*turns, turn),
        )  # fmt: skip
        self._started.set_result(None)


async def talk(service: AsyncDeltaMem, name: str, until: float) -> int:
    """Turns of one client until then."""
    n = 0
    while time.time() < until:
        answer = StandIn(service, [], None, name, "", True, {})
        await answer.whole()
        n += 1
    return n


async def replica(url: str, name: str, clients: int, begin: float, seconds: float) -> tuple[int, float]:
    """Turns of a replica, and the CPU seconds that it spent."""
    base, adapters = default_files()
    llm = DeltaMemLlama(base, deltamem_path=adapters["msw"], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    async with AsyncDeltaMem(llm, Store(url), n_live=clients) as service:
        await asyncio.gather(*(talk(service, f"{name}-{i}", time.time() + 0.2) for i in range(clients)))
        await asyncio.sleep(max(0.0, begin - time.time()))
        end, spent = time.time() + seconds, time.process_time()
        n = sum(await asyncio.gather(*(talk(service, f"{name}-{i}", end) for i in range(clients))))
        return n, time.process_time() - spent


@dataclass
class Rate:
    """Turns a second, and CPU milliseconds a turn: of the replicas and of PostgreSQL."""

    turns: float
    ours: float
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


def measure(database: PostgreSQL, n: int, clients: int, seconds: float) -> Rate:
    """n replicas at once."""
    begin, spent = time.time() + START, spent_by(database)
    command = [sys.executable, __file__, "--url", database.url, "--seconds", seconds, "--begin", begin]
    running = [
        subprocess.Popen(
            [*map(str, command), "--name", str(time.time_ns()), "--clients", str(clients // n)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(n)
    ]
    said = [each.communicate()[0].split() for each in running]
    if any(each.returncode for each in running):
        raise RuntimeError("a replica failed")
    turns = sum(int(each[0]) for each in said)
    ours = sum(float(each[1]) for each in said)
    return Rate(turns / seconds, 1000 * ours / turns, 1000 * (spent_by(database) - spent) / turns)


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
    return Rate(n / seconds, 1000 * ours / n, 1000 * spent / n)


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
    for hidden in ("--url", "--name"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.url:
        print(*asyncio.run(replica(args.url, args.name, args.clients, args.begin, args.seconds)))
        return 0
    rates: dict[str, list[Rate]] = {"store alone": [], "1 replica": [], "2 replicas": []}
    with PostgreSQL() as database:
        if args.profile:
            profile(database)
            return 0
        for _ in range(args.rounds):
            rates["store alone"].append(store_alone(database, args.seconds))
            for n, what in ((1, "1 replica"), (2, "2 replicas")):
                rates[what].append(measure(database, n, args.clients, args.seconds))
        print("              turns/s: median (least to most)   CPU ms a turn: replica, PostgreSQL")
        for what, each in rates.items():
            turns = [rate.turns for rate in each]
            spread = f"({min(turns):.0f} to {max(turns):.0f})"
            ours, theirs = (statistics.median(getattr(rate, key) for rate in each) for key in ("ours", "database"))
            print(f"{what:12} {statistics.median(turns):16.0f} {spread:24} {ours:14.2f} {theirs:11.2f}")
        size = database.sql("SELECT pg_total_relation_size('sessions'), pg_total_relation_size('turns')")
        rows = database.sql(
            "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM turns), pg_current_wal_lsn() - '0/0'"
        )
        print("bytes of sessions and turns:", size, "rows and WAL bytes:", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
