"""Many sessions of which a few are busy, over the real leases: who waits, and who is refused.

    python tools/fleet_skew.py [--replicas 4] [--sessions 10000] [--clients 64] [--skew 1.1] [--seconds 15] [--turn 0.2]

Replicas are services of `deltamem serve` on one PostgreSQL; a turn is a wait in a slot (tools/fleet_turns.py). Each
client takes a session by Zipf's law, at a replica that the session's hash names, or at any. The busiest session can
have one turn at a time, whatever the number of replicas: it says how much of that session's traffic is served.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fleet import PostgreSQL
from fleet_turns import StandIn
from pydeltamem import DeltaMemLlama
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.holds import SessionBusy
from pydeltamem.server.records import Conflict
from pydeltamem.server.session import snapshot_of
from pydeltamem.server.shared import Shared
from pydeltamem.server.store import Store


class Waiting(StandIn):
    """A turn that takes a slot for a while."""

    slots: dict[Shared, asyncio.Semaphore]
    seconds = 0.2

    async def _decode(self) -> None:
        async with self.slots[self.shared]:
            await asyncio.sleep(self.seconds)
        await super()._decode()
        # another replica can read it
        assert self._record is not None  # made by the stand-in
        shared = self.shared
        empty = replace(self._record, memory=b"")
        memory = snapshot_of(empty, shared.about, shared.llm.memory.shape).to_bytes()
        self._record = replace(self._record, memory=memory, text=b"", history=())


async def run(url: str, args: argparse.Namespace, is_hashed: bool) -> None:
    base, adapters = default_files()

    def replica() -> AsyncDeltaMem:
        llm = DeltaMemLlama(base, deltamem_path=adapters["msw"], n_ctx=512, n_threads=1, verbose=False)
        return AsyncDeltaMem(llm, Store(url), n_live=1024, turn_timeout=args.turn_timeout)

    replicas = [replica() for _ in range(args.replicas)]
    Waiting.slots = {service._shared: asyncio.Semaphore(args.slots) for service in replicas}
    Waiting.seconds = args.turn
    weights = np.arange(1, args.sessions + 1) ** -args.skew
    draw, random_source = np.random.default_rng(1), random.Random(1)
    drawn = iter(draw.choice(args.sessions, 1_000_000, p=weights / weights.sum()).tolist())
    served: list[tuple[int, float]] = []
    refused: Counter[int] = Counter()
    until = time.monotonic() + args.seconds

    async def client() -> None:
        while time.monotonic() < until:
            number, begin = next(drawn), time.monotonic()
            name = f"{is_hashed}-{number}"
            at = zlib.crc32(name.encode()) % len(replicas) if is_hashed else random_source.randrange(len(replicas))
            try:
                await Waiting(replicas[at]._shared, [], None, name, "", True, {}).whole()
            except (SessionBusy, Conflict):
                refused[number] += 1
            else:
                served.append((number, time.monotonic() - begin))

    await asyncio.gather(*(client() for _ in range(args.clients)))
    for service in replicas:
        await service.aclose()
    asked = len(served) + refused.total()
    first = [seconds for number, seconds in served if number == 0]
    rest = [seconds for number, seconds in served if number != 0]
    print(
        f"{'by hash' if is_hashed else 'any':8} {len(served) / args.seconds:8.0f} {100 * refused.total() / asked:8.1f} "
        f"{np.median(rest):11.2f} {np.percentile(rest, 99):5.2f} "
        f"{len(first) / args.seconds:16.2f} {np.median(first):8.2f} {refused[0]:8}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--slots", type=int, default=4, help="of a replica")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--skew", type=float, default=1.1, help="exponent of Zipf's law")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--turn", type=float, default=0.2, help="seconds of a turn in its slot")
    parser.add_argument("--turn-timeout", type=float, default=2)
    args = parser.parse_args(arguments)
    print("balance  turns/s  refused %  others: median, p99 (s)   busiest: turns/s, median (s), refused")
    with PostgreSQL() as database:
        for is_hashed in (True, False):
            asyncio.run(run(database.url, args, is_hashed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
