"""Kills of replicas, PostgreSQL and HAProxy under load, and whether every turn that was told is there, once.

    python tools/fleet_kills.py [--minutes 20] [--clients 24] [--kills 50] [--database-kills 5] [--balancer-kills 5]

Two replicas of `deltamem serve`, one PostgreSQL and one HAProxy. Each client talks in a session of its own and sends a
turn again until it is answered, as any client does. Afterwards each session is played alone, on a server of its own:

- lost: a turn that was told, and whose version the store does not have;
- twice: the memory has other tokens than the turns, or another state than that of the session alone;
- two at once: two replicas used a session at the same time, by their logs.

It prints after each kill for how long nobody, and for how long somebody, was not served. It fails at the first three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fleet import HAProxy, PostgreSQL, Replica, fleet
from pydeltamem import DeltaMemLlama
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.models import default_files
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.store import Store

WORDS = ["my name is", "Ada", "I live in", "Lima", "a dog that", "likes rain", "what do you know", "of me", "please"]
# Answers are given, in letters that no token joins: where two tokens are as likely, the other requests of a batch would
# decide by the order in which floats are summed. The memory is the model's own.
ANSWER = "qxzxqz"
BOUND = 0.1  # of what the last turn changed in the state: what the order of sums may make in hundreds of turns


@dataclass
class Client:
    """One conversation: what was asked and told, and when.

    Attributes:
        turns: of each turn the messages, and the tokens of the answer.
        versions: that were told.
        served: when a turn was asked for and when its answer was there, by time.time.
        errors: how often a turn had to be sent again, by what came.
        told: tokens written, of the last turn.
    """

    name: str
    turns: list[tuple[list[dict[str, str]], int]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    served: list[tuple[float, float]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    told: int = 0

    def run(self, address: str, is_over: Callable[[], bool], rest: float) -> None:
        draw, messages = random.Random(self.name), []
        with httpx.Client(base_url=address, timeout=60) as http:
            while not is_over():
                if len(messages) >= 12:  # another chat; the memory goes on
                    messages = []
                words = " ".join(draw.choices(WORDS, k=draw.randint(2, 10)))
                messages = [*messages, {"role": "user", "content": f"{words} {len(self.turns)}"}]
                begin = time.time()
                n = draw.randint(2, 6)
                body = self.answer(http, {"messages": messages, **greedy(n)})
                self.served.append((begin, time.time()))
                said, memory = body["choices"][0]["message"]["content"], body["memory"]
                self.turns.append((messages, n))
                self.versions.append(memory["version"])
                self.told = memory["tokens_written"]
                messages = [*messages, {"role": "assistant", "content": said}]
                time.sleep(draw.uniform(0, 2 * rest))

    def answer(self, http: httpx.Client, asked: dict[str, Any]) -> Any:
        """The answer to a turn, which is sent until there is one."""
        while True:
            try:
                answer = http.post(f"/sessions/{self.name}/v1/chat/completions", json=asked)
                if answer.status_code == 200:
                    return answer.json()
                kind = f"{answer.status_code} {error_code(answer)}"
            except httpx.TransportError as error:
                kind = type(error).__name__
            self.errors[kind] = self.errors.get(kind, 0) + 1
            time.sleep(0.2)


def greedy(n: int) -> dict[str, Any]:
    return {"temperature": 0, "grammar": f'root ::= "{ANSWER[:n]}"', "max_tokens": n}


def error_code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError):
        return "of the balancer"


@dataclass
class Kill:
    """What was killed, which process, and when."""

    what: str
    name: str
    at: float


def kill_all(
    plan: Sequence[str],
    every: float,
    draw: random.Random,
    database: PostgreSQL,
    replicas: Sequence[Replica],
    balancer: HAProxy,
) -> list[Kill]:
    """Kills by plan, and starts again what was killed."""
    kills, starting = [], []
    for what in plan:
        time.sleep(draw.uniform(0.7, 1.3) * every)
        if what == "replica":
            target: Any = draw.choice([one for one in replicas if one.is_running])
        else:
            target = database if what == "PostgreSQL" else balancer
        target.kill()
        kills.append(Kill(what, getattr(target, "name", what), time.time()))
        print(f"{len(kills):3} {what}", flush=True)
        time.sleep(draw.uniform(0.5, 3) if what == "PostgreSQL" else 0.3)
        if what == "replica":
            target.begin()
        else:
            thread = threading.Thread(target=target.start)
            thread.start()
            starting.append(thread)
    for thread in starting:
        thread.join()
    return kills


#
# what came out
#


def held(replica: Replica, kills: Sequence[Kill]) -> tuple[list[tuple[str, float, float]], list[str]]:
    """From its log: the times in which a replica used a session, and what it cannot have done. A kill ends those that
    go on.
    """
    ended = sorted(kill.at for kill in kills if kill.name == replica.name)
    begun: dict[str, float] = {}
    spans, wrong = [], []
    for line in replica.log.read_text(errors="replace").splitlines():
        try:
            said = json.loads(line)
            name, when, message = said["session"], said["time"], said["message"]
        except (ValueError, KeyError, TypeError):  # of another kind, or cut by a kill
            continue
        if message == "a session is held":
            if name in begun:
                spans.append((name, begun[name], min(at for at in ended if at >= begun[name])))
            begun[name] = when
        elif message == "a session is given back" and name not in begun:
            wrong.append(
                f"{replica.name} gave {name} back at {when:.3f}, and its log does not say since when it had it"
            )
        elif message == "a session is given back":
            spans.append((name, begun.pop(name), when))
    for name, when in begun.items():
        spans.append((name, when, min((at for at in ended if at >= when), default=when)))
    return spans, wrong


def two_at_once(one: Sequence[tuple[str, float, float]], two: Sequence[tuple[str, float, float]]) -> list[str]:
    """The times in which both used a session."""
    by_name: dict[str, list[tuple[float, float, int]]] = {}
    for i, spans in enumerate((one, two)):
        for name, begin, end in spans:
            by_name.setdefault(name, []).append((begin, end, i))
    found = []
    for name, spans in by_name.items():
        spans.sort()
        latest = [0.0, 0.0]
        for begin, end, i in spans:
            if latest[1 - i] > begin:
                found.append(f"{name}: for {latest[1 - i] - begin:.3f} s, at {begin:.3f}")
            latest[i] = max(latest[i], end)
    return found


def without_service(kills: Sequence[Kill], clients: Sequence[Client]) -> dict[str, list[tuple[float, float]]]:
    """For each kind of kill and each kill: seconds until somebody was answered who asked or waited, and until all who
    waited at the kill were.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for kill in kills:
        ends = sorted(end for client in clients for _, end in client.served if end > kill.at)
        waited = [end for client in clients for begin, end in client.served if begin <= kill.at < end]
        if ends:
            last = max(waited, default=kill.at) - kill.at
            found.setdefault(kill.what, []).append((ends[0] - kill.at, last))
    return found


def sent_again(clients: Sequence[Client]) -> dict[str, int]:
    """How often turns were sent again, by what came."""
    errors: dict[str, int] = {}
    for client in clients:
        for kind, n in client.errors.items():
            errors[kind] = errors.get(kind, 0) + n
    return dict(sorted(errors.items()))


async def alone(client: Client, model: Path, folder: Path) -> tuple[int, int, Any, float]:
    """Turns, tokens written and state of a session that plays the turns alone, and what the last one changed."""
    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
    llm = DeltaMemLlama(str(model), deltamem_path=default_files()[1]["msw"], **options)
    async with AsyncDeltaMem(llm, Store(f"sqlite:///{folder / client.name}.db")) as service:
        for i, (messages, n) in enumerate(client.turns):
            if i == len(client.turns) - 1 and i > 0:
                before = await service.snapshot(client.name)
            await service.chat(messages, session=client.name, **greedy(n)).whole()
        record = await service.get(client.name)
        state = (await service.snapshot_of(record)).state
        change = float(np.abs(state - before.state).max()) if len(client.turns) > 1 else 1.0
        return record.turns, record.tokens, state, change


def compare(client: Client, store: Store, model: Path, folder: Path) -> tuple[list[str], float]:
    """What is wrong with a session, and the difference of its state as a part of what the last turn changed."""
    wrong = []
    record = store.get("", client.name)
    if record is None:
        return [f"{client.name}: lost"], 0.0
    if record.version != client.versions[-1]:
        wrong.append(f"{client.name}: told version {client.versions[-1]}, the store has {record.version}")
    if sorted(set(client.versions)) != client.versions:
        wrong.append(f"{client.name}: lost: a version was told again")
    turns, tokens, state, change = asyncio.run(alone(client, model, folder))
    if record.turns != len(client.turns) or turns != record.turns:
        wrong.append(f"{client.name}: {record.turns} turns, told {len(client.turns)}, alone {turns}")
    if not record.tokens == client.told == tokens:
        wrong.append(f"{client.name}: {record.tokens} tokens written, told {client.told}, alone {tokens}")
    difference = float(np.abs(MemorySnapshot.from_bytes(record.memory).state - state).max()) / change
    if difference > BOUND:
        wrong.append(f"{client.name}: its state differs by {difference:.3f} of a turn")
    return wrong, difference


def print_without_service(kills: Sequence[Kill], clients: Sequence[Client]) -> None:
    print("killed      times  nobody served: median, most   somebody waited: median, most (s)")
    for what, times in without_service(kills, clients).items():
        nobody, somebody = zip(*times)
        figures = [f(each) for each in (nobody, somebody) for f in (statistics.median, max)]
        print(f"{what:10} {len(times):6}   {figures[0]:20.2f} {figures[1]:6.2f} {figures[2]:22.2f} {figures[3]:6.2f}")


def f32_model(folder: Path) -> Path:
    """The package's model in F32: activations of a quantised one are rounded, which makes much of little."""
    model = folder / "f32.gguf"
    command = ["quantize", "--allow-requantize", default_files()[0], model, "f32"]
    done = [sys.executable, "-m", "pydeltamem.cli", *map(str, command)]
    subprocess.run(done, check=True, capture_output=True)
    return model


def play_alone(clients: Sequence[Client], kills: Sequence[Kill], url: str, model: Path, folder: Path) -> list[str]:
    """Plays each session alone, and prints what the kills did to the clients. Returns what is wrong in the store."""
    print(f"{sum(len(client.turns) for client in clients)} turns, {len(kills)} kills; playing each alone", flush=True)
    store = Store(url)
    found = [compare(client, store, model, folder) for client in clients if client.turns]
    store.close()
    print("sent again after:", sent_again(clients))
    print(f"largest difference of a state: {max(d for _, d in found):.1e} of what a turn changes")
    print_without_service(kills, clients)
    return [line for lines, _ in found for line in lines]


def play(args: argparse.Namespace, folder: Path) -> int:
    draw = random.Random(args.seed)
    plan = ["replica"] * args.kills + ["PostgreSQL"] * args.database_kills + ["HAProxy"] * args.balancer_kills
    draw.shuffle(plan)
    model = f32_model(folder)
    options = ("-m", model, "-ctk", "f32", "-ctv", "f32", "-np", 4, "--log-level", "debug")
    with fleet(folder, *options) as (database, replicas, balancer):
        end = time.time() + 60 * args.minutes
        talk = balancer.address, lambda: time.time() > end, args.rest
        clients = [Client(f"c{i}") for i in range(args.clients)]
        threads = [threading.Thread(target=client.run, args=talk) for client in clients]
        for thread in threads:
            thread.start()
        every = 60 * args.minutes / (len(plan) + 1)
        kills = kill_all(plan, every, draw, database, replicas, balancer)
        for thread in threads:
            thread.join()
        spans, odd = zip(*(held(replica, kills) for replica in replicas))
        wrong = [*odd[0], *odd[1], *play_alone(clients, kills, database.url, model, folder)]
    wrong += [f"two at once: {line}" for line in two_at_once(*spans)]
    print(f"sessions used {sum(map(len, spans))} times")
    return verdict(wrong, "nothing lost, nothing twice, never two at once")


def verdict(wrong: Sequence[str], otherwise: str) -> int:
    """Prints what went wrong, or that nothing did. Returns the exit code."""
    for line in wrong:
        print(line)
    print("FAILED" if wrong else otherwise)
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--kills", type=int, default=50, help="of a random replica")
    parser.add_argument("--database-kills", type=int, default=5)
    parser.add_argument("--balancer-kills", type=int, default=5)
    parser.add_argument("--rest", type=float, default=3, help="seconds between two turns of a client, in the mean")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="deltamem-fleet-") as folder:
        return play(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
