"""Compares `deltamem serve`, with a memory for each client, to llama.cpp's own server: both run, and take turns.

    python tools/server_compare.py --llama-server build/llama-server/bin/llama-server [--parts load,leave,return]

- load: clients ask at once, each in a session of its own here; tokens a second, the time to the first token, and the
  server's processor time a token, which other processes of the machine hardly change (Linux).
- leave: one of four clients goes away in the middle; what the others get before and after. Here alone.
- return: somebody comes back after a long history. Here the memory knows it, and the question is sent alone;
  llama-server gets the history again, and has to decode it.

Ratios are ours to theirs, round by round: the median, and its interval. Cut (Ctrl-C, SIGTERM), it shows what it has.
Prompts are random words, which neither server has seen. Without -m it is the random model of
`deltamem bench --synthetic qwen3-0.6b`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx

from pydeltamem.bench.models import synthetic_files
from pydeltamem.bench.pairs import median_interval
from pydeltamem.runtime.cpus import cpu_name, usable

OURS, THEIRS = "deltamem serve", "llama-server"
WORDS = "time people way water day part number sound most over new work place year live back give name good sentence"
N_TURN = 400  # words of a turn of a long history


@dataclass
class Stream:
    """What a client saw of an answer.

    Attributes:
        first: seconds to the first token.
        times: when each token came, by time.perf_counter.
        n_prompt, n_generated: tokens, as the server counts them.
    """

    first: float = 0.0
    times: list[float] = field(default_factory=list)
    n_prompt: int = 0
    n_generated: int = 0


class Server:
    """A running server. `session`: whether it has sessions."""

    def __init__(self, address: str, pid: int, session: bool) -> None:
        self.pid, self.session = pid, session
        no_reuse = httpx.Limits(max_keepalive_connections=0)  # a server may end one just when it is used again
        self.http = httpx.Client(base_url=address, timeout=3600, limits=no_reuse)

    def cpu(self) -> float:
        """Processor time that it has used, in seconds."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return math.nan

    def stream(self, prompt: str, n: int, session: str, until: Callable[[Stream], bool] | None = None) -> Stream:
        """Asks, and reads the answer; goes away when `until` says so."""
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0.8, "seed": 1, "stream": True}
        headers = {"X-Memory-Session": session} if self.session else {}
        options = {"stream_options": {"include_usage": True}}
        seen, begin = Stream(), time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json={**body, **options}, headers=headers) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                if any(choice.get("text") or choice.get("finish_reason") for choice in chunk["choices"]):
                    seen.first = seen.first or now - begin  # the end comes alone if the answer is empty
                if any(choice.get("text") for choice in chunk["choices"]):
                    seen.times.append(now)
                if chunk.get("usage"):
                    seen.n_prompt = chunk["usage"]["prompt_tokens"]
                    seen.n_generated = chunk["usage"]["completion_tokens"]
                if until is not None and until(seen):
                    break
        return seen


@contextlib.contextmanager
def running(command: Sequence[object], session: bool) -> Iterator[Server]:
    """A server that is ready. What it prints is shown if it ends."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=log, stderr=log)
        server = Server(f"http://127.0.0.1:{port}", process.pid, session)
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if server.http.get("/health").status_code == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} ended with {process.returncode}: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            server.http.close()
            process.terminate()
            process.wait(60)


def common(args: argparse.Namespace, n_slots: int) -> list[object]:
    """Options of both."""
    threads = ["-t", args.threads, "-tb", args.threads]
    return ["-m", args.model, "-np", n_slots, "-b", 512, "-ub", 512, *threads, "-fa", args.flash_attn]


def ours(args: argparse.Namespace, n_slots: int, n_ctx: int, folder: str) -> list[object]:
    """The command of our server, with so many slots of so many tokens."""
    command = [sys.executable, "-m", "pydeltamem.cli", "serve", *common(args, n_slots), "--deltamem", args.deltamem]
    return [*command, "-c", n_ctx, "--store", f"sqlite:///{folder}/sessions.db", "--no-page", "--log-level", "error"]


@contextlib.contextmanager
def both(args: argparse.Namespace, n_slots: int, n_ctx: int, folder: str) -> Iterator[dict[str, Server]]:
    """Both servers, with the same slots, batches and threads."""
    theirs = [args.llama_server, *common(args, n_slots), "-c", n_slots * n_ctx]
    with running(ours(args, n_slots, n_ctx, folder), True) as one, running(theirs, False) as other:
        yield {OURS: one, THEIRS: other}


def words(draw: random.Random, n: int) -> str:
    return " ".join(draw.choices(WORDS.split(), k=n))


def ratio(values: Sequence[float]) -> str:
    low, high, confidence = median_interval(values)
    return f"{median(values):.3f} ({low:.3f} to {high:.3f}, {confidence:.0%} of {len(values)})"


def load(args: argparse.Namespace, folder: str) -> None:
    """Clients at once: tokens a second of all, the mean time to the first token, and processor time a token."""
    draw = random.Random(0)
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    with both(args, max(args.clients), 1024, folder) as servers, ThreadPoolExecutor(max(args.clients)) as pool:

        def run(name: str, prompts: Sequence[str], label: str) -> tuple[float, ...]:
            server, cpu, begin = servers[name], servers[name].cpu(), time.perf_counter()
            asked = [
                pool.submit(server.stream, prompt, args.tokens, f"{label}-{i}") for i, prompt in enumerate(prompts)
            ]
            streams = [each.result() for each in asked]
            seconds, n = time.perf_counter() - begin, sum(seen.n_generated for seen in streams)
            first = sum(seen.first for seen in streams) / len(streams)
            return n / seconds, first, 1000 * (server.cpu() - cpu) / n

        with contextlib.suppress(KeyboardInterrupt):
            for name in servers:
                run(name, [words(draw, args.prompt) for _ in range(max(args.clients))], "warm")
            for i, n in itertools.product(range(args.rounds), args.clients):
                prompts = [words(draw, args.prompt) for _ in range(n)]
                for name in (OURS, THEIRS) if i % 2 else (THEIRS, OURS):
                    found.setdefault((name, n), []).append(run(name, prompts, f"{i}-{n}"))
    print(f"\n{args.tokens} tokens after prompts of {args.prompt} words")
    print(f"{'clients':7}  {'':25}  {'here':>8}  {'there':>8}  here / there")
    for n in args.clients:
        here, there = found.get((OURS, n)), found.get((THEIRS, n))
        if here is None or there is None:
            continue
        for k, what in enumerate(("tokens a second", "first token, seconds", "processor, ms a token")):
            one, other = (median(run[k] for run in side) for side in (here, there))
            ratios = ratio([a[k] / b[k] for a, b in zip(here, there)])
            print(f"{n:7}  {what:25}  {one:8.3f}  {other:8.3f}  {ratios}", flush=True)


def leave(args: argparse.Namespace, folder: str) -> None:
    """One of four goes away in the middle: tokens of the others in the second before and after."""
    draw = random.Random(1)
    rates, waits = [], []
    with running(ours(args, 4, 1024, folder), True) as server, ThreadPoolExecutor(3) as pool:
        for i in range(args.rounds):
            prompts = [words(draw, 8) for _ in range(4)]
            n = 3 * args.tokens
            others = [pool.submit(server.stream, prompt, n, f"{i}-{k}") for k, prompt in enumerate(prompts[1:])]
            server.stream(prompts[0], n, f"{i}-leaves", lambda seen: len(seen.times) >= args.tokens)
            at = time.perf_counter()
            for times in (other.result().times for other in others):
                before, after = sum(at - 1 < t <= at for t in times), sum(at < t <= at + 1 for t in times)
                pauses = list(itertools.pairwise(times))
                usual = [b - a for a, b in pauses if b < at]
                near = [b - a for a, b in pauses if a < at + 1 and b > at]
                if before and usual and near:
                    rates.append(after / before)
                    waits.append(max(near) / median(usual))
    print(f"\none of four clients goes away, {args.rounds} rounds")
    print(f"tokens of each other in the second after / before: {ratio(rates)}")
    print(f"its longest wait for a token in the second after / the median before: {ratio(waits)}", flush=True)


def come_back(args: argparse.Namespace, folder: str) -> None:
    """After a long history: the time to the first token, by memory and by reading the history again."""
    draw, question = random.Random(2), "What do you know of me?"
    n_ctx = -(-(args.history + 512) // 256) * 256
    with both(args, 1, n_ctx, folder) as servers:
        here, there = servers[OURS], servers[THEIRS]
        written, n_words, begin = 0, 0, time.perf_counter()
        while written < args.history:  # each turn is a text of its own, which is gone with the next
            written += here.stream(words(draw, N_TURN), 1, "ada").n_prompt
            n_words += N_TURN
        seconds = time.perf_counter() - begin
        here.stream(question, 1, "ada")
        by_memory, again = [], []
        for _ in range(args.returns):
            by_memory += [here.stream(f"{words(draw, 1)} {question}", 1, "ada").first for _ in range(6)]
            seen = there.stream(f"{words(draw, n_words * args.history // written)} {question}", 1, "")
            again.append(seen.first)
    print(f"\nsomebody comes back after {args.history:,} tokens")
    print(f"here: {written:,} tokens in the memory, read in turns in {seconds:.0f} s; the question alone,")
    print(f"  first token after {median(by_memory):.3f} s ({min(by_memory):.3f} to {max(by_memory):.3f})")
    print(f"there: {seen.n_prompt:,} tokens again, first token after {', '.join(f'{s:.1f}' for s in again)} s")
    least, most = min(again) / max(by_memory), max(again) / min(by_memory)
    print(f"sooner: {median(again) / median(by_memory):.0f} times ({least:.0f} to {most:.0f})", flush=True)


PARTS = {"load": load, "leave": leave, "return": come_back}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True, metavar="FILE", help="make llama-server builds it")
    parser.add_argument("-m", "--model", metavar="GGUF", help="(a random one, of Qwen3-0.6B's shape)")
    parser.add_argument("--deltamem", metavar="GGUF", help="its adapter")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help="(%(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="(1 4 8)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of an answer (%(default)s)")
    parser.add_argument("--prompt", type=int, default=48, metavar="WORDS", help="of a question (%(default)s)")
    parser.add_argument("--history", type=int, default=8000, metavar="TOKENS", help="(%(default)s)")
    parser.add_argument("--returns", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=usable(), metavar="N", help="(%(default)s)")
    parser.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="off", help="(%(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with it
    if not Path(args.llama_server).is_file():
        parser.error(f"--llama-server {args.llama_server}: no such file: make llama-server builds it")
    if (args.model is None) != (args.deltamem is None):
        parser.error("-m and --deltamem go together")
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    if args.model is None:
        args.model, args.deltamem = synthetic_files("qwen3-0.6b", "q4_k_m", "f16", 8, 1)
    print(f"{cpu_name()}, {args.threads} threads, flash attention {args.flash_attn}; {Path(args.model).name}")
    for name in args.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
