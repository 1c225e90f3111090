"""Mixed load on `deltamem serve` for a while: memory of the process, errors, and times.

    python tools/server_soak.py [--minutes 60] [--clients 16] [--sessions 10000]

Clients say, regenerate, edit, fork, forget, go away in the middle and send wrong requests, over HTTP. The store begins
with many sessions. Once a minute it prints what the process occupies, and how long requests and the server's steps
take: half of them at most p50, all but a hundredth at most p99. It fails if an answer has an error that no client
caused, or the server ends.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from fleet import Replica
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.server.records import Record
from pydeltamem.server.session import imported
from pydeltamem.server.store import Store

WORDS = ["my name is", "Ada", "I live in", "Lima", "a dog that", "likes rain", "what do you know", "of me"]


class Counts:
    """What the clients saw."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: dict[str, int] = {}
        self.wrong: list[str] = []
        self.seconds: list[float] = []

    def note(self, kind: str, seconds: float) -> None:
        with self.lock:
            self.done[kind] = self.done.get(kind, 0) + 1
            self.seconds.append(seconds)

    def fail(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


def fill(server: Replica, n: int) -> None:
    """Makes n sessions with the memory that one turn of a session leaves."""
    with httpx.Client(base_url=server.address, timeout=60) as http:
        http.post("/sessions/first/v1/chat/completions", json=chat(["hello"], 4)).raise_for_status()
        snapshot = MemorySnapshot.from_bytes(http.get("/v1/memories/first/file").content)
    record = imported(Record("", "x"), snapshot)
    store = Store(server.store)
    for i in range(n):
        store.commit(replace(record, name=f"filled{i}"))
    store.close()


def chat(said: list[str], n: int, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return {"messages": messages, "max_tokens": n, "temperature": 0.7, **more}


def client(i: int, server: Replica, until: float, counts: Counts) -> None:
    """One client with three sessions."""
    draw = random.Random(i)
    said: dict[str, list[str]] = {f"c{i}-{k}": [] for k in range(3)}
    with httpx.Client(base_url=server.address, timeout=120) as http:
        while time.time() < until and server.is_running:
            name = draw.choice(list(said))
            kind = draw.choice(["say"] * 6 + ["again", "new", "fork", "undo", "leave", "wrong", "read", "list"])
            begin = time.perf_counter()
            try:
                act(http, draw, kind, name, said)
            except Exception as error:
                counts.fail(f"{kind}: {error!r}")
            counts.note(kind, time.perf_counter() - begin)


def act(http: httpx.Client, draw: random.Random, kind: str, name: str, said: dict[str, list[str]]) -> None:
    url, words = f"/sessions/{name}/v1/chat/completions", " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))
    history = said[name][-12:]
    if kind == "list":
        http.get("/v1/memories/" + name)
    elif kind == "fork":
        http.post(f"/v1/memories/{name}/fork", json={"id": f"{name}-fork{draw.randrange(50)}"})
    elif kind == "undo":
        answer = http.post(f"/v1/memories/{name}/undo")
        if answer.status_code == 200:
            said[name] = []
    elif kind == "wrong":
        assert http.post(url, json={"messages": "none"}).status_code == 400
        assert http.post("/sessions/a%2Fb/v1/chat/completions", json=chat(["x"], 1)).status_code in (400, 404)
    elif kind == "leave":
        with http.stream("POST", url, json=chat([words], 60, stream=True)) as response:
            for _ in zip(response.iter_lines(), range(draw.randint(1, 9))):
                pass
        said[name] = []
    else:
        history = [] if kind == "new" else history[:-2] if kind == "again" else history
        history = [*history, words] if len(history) % 2 == 0 else [words]
        more = {"memory": {"write": False}} if kind == "read" else {}
        answer = http.post(url, json=chat(history, draw.randint(1, 24), **more))
        if answer.status_code in (409, 429):  # a reply that was left may still be going on
            return
        answer.raise_for_status()
        said[name] = [*history, answer.json()["choices"][0]["message"]["content"]]


def resident(pid: int) -> float:
    """Megabytes that the process occupies."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024


class Steps:
    """How long the server's steps take, by its metrics."""

    def __init__(self, server: Replica) -> None:
        self._server = server
        self._before = self._read()

    def quantiles(self, *shares: float) -> list[float]:
        """Milliseconds that these shares of the steps since the last call took at most; within a bucket of the
        histogram by its length.
        """
        now = self._read()
        counts = {end: n - self._before[end] for end, n in now.items()}
        self._before = now
        return [self._quantile(counts, share) for share in shares]

    def _read(self) -> dict[float, float]:
        """Steps that took at most as many seconds."""
        text = httpx.get(f"{self._server.address}/metrics", timeout=60).text
        return {
            float(sample.labels["le"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "deltamem_step_seconds_bucket"
        }

    def _quantile(self, counts: dict[float, float], share: float) -> float:
        wanted = share * max(counts.values())
        for (low, n_low), (high, n_high) in itertools.pairwise([(0.0, 0.0), *sorted(counts.items())]):
            if n_high >= wanted and n_high > n_low:
                return 1000 * (low + (min(high, 60) - low) * (wanted - n_low) / (n_high - n_low))
        return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=10_000)
    args = parser.parse_args()
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/sessions.db"
        with Replica(Path(folder), "server", store, "-np", 4, "--log-level", "error") as server:
            play(args, server, counts)
            if not server.is_running or server.end() != 0:
                counts.fail("the server ended")
        print(server.log.read_text(errors="replace")[-5000:], end="")
    print(counts.done)
    for error in counts.wrong[:10]:
        print(error)
    return 1 if counts.wrong else 0


def play(args: argparse.Namespace, server: Replica, counts: Counts) -> None:
    """The load, and a line a minute."""
    fill(server, args.sessions)
    until, steps = time.time() + 60 * args.minutes, Steps(server)
    threads = [threading.Thread(target=client, args=(i, server, until, counts)) for i in range(args.clients)]
    for thread in threads:
        thread.start()
    print(" " * 21 + "------ requests ------  --- steps ----")
    print("minute  resident MB   number  p50 ms  p99 ms  p50 ms  p99 ms  errors", flush=True)
    while any(thread.is_alive() for thread in threads):
        time.sleep(60)
        with counts.lock:
            seconds, counts.seconds = sorted(counts.seconds), []
        if seconds and server.is_running:
            p50, p99 = 1000 * statistics.median(seconds), 1000 * seconds[int(0.99 * len(seconds))]
            minute = args.minutes - (until - time.time()) / 60
            step50, step99 = steps.quantiles(0.5, 0.99)
            row = f"{minute:6.1f}  {resident(server.popen.pid):11.1f}  {len(seconds):7}  {p50:6.0f}  {p99:6.0f}"
            print(f"{row}  {step50:6.1f}  {step99:6.1f}  {len(counts.wrong):6}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
