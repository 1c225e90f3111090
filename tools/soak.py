"""A long chat in a short window: resident memory, time per token and the state's size over time (`make soak`).

    python tools/soak.py --data locomo10.json --model base.gguf --deltamem adapter.gguf --tokens 100000 --out build/soak

The dialogues of the file (LoCoMo: [{"conversation": {"session_1": [{"speaker", "text"}, ...]}}]) are turns of one
conversation; the model replies to some. Writes soak.json and soak.png, and ends with 1 if resident memory grew by
more than a megabyte after the first 5,000 tokens or the state is not finite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pydeltamem import Conversation, DeltaMemLlama

SETTLED = 5_000  # tokens until all that is allocated once is allocated
STEP = 1_000


def turns(path: str) -> Iterator[str]:
    """The messages of all dialogues, again and again."""
    dialogues = json.loads(Path(path).read_text(encoding="utf-8"))
    said = [
        turn["text"]
        for dialogue in dialogues
        for name, session in dialogue["conversation"].items()
        if isinstance(session, list) and name.startswith("session_")
        for turn in session
    ]
    return itertools.cycle(said)


def resident() -> int:
    """Bytes of memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("soak: /proc/self/status has no RssAnon: this needs Linux")


def soak(args: argparse.Namespace) -> list[dict[str, float]]:
    llm = DeltaMemLlama(
        args.model, deltamem_path=args.deltamem, n_ctx=args.window, n_threads=1, n_threads_batch=1, verbose=False
    )
    # decode the largest batch once, so that llama.cpp touches all of its buffers
    llm.eval(([llm.token_eos() + 1] * args.window)[: llm.n_ctx()])
    llm.reset()
    llm.memory.reset()
    conversation = Conversation(llm, system="You are a friend.", n_predict=16, temp=0.8, seed=1)
    samples: list[dict[str, float]] = []
    said = turns(args.data)
    start, n_start = time.perf_counter(), 0
    while (n := conversation.memory.n_written) < args.tokens:
        text = next(said)
        if len(conversation.messages) % 20 == 1:
            conversation.say(text[:400])
        else:
            conversation.add("user", text[:400])
            conversation.add("assistant", next(said)[:400])
        n = conversation.memory.n_written
        if n - n_start >= STEP:
            now = time.perf_counter()
            samples.append(
                {
                    "tokens": n,
                    "resident": resident(),
                    "ms_per_token": 1e3 * (now - start) / (n - n_start),
                    "norm": float(np.linalg.norm(conversation.memory.state)),
                    "text": conversation.n_tokens,
                }
            )
            start, n_start = now, n
            if sys.stderr.isatty():
                print(f"\r{n:,} tokens", end="", file=sys.stderr)
    return samples


def plot(samples: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [sample["tokens"] for sample in samples]
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 7))
    for axis, key, label, scale in (
        (axes[0], "resident", "resident memory, MB", 1e-6),
        (axes[1], "ms_per_token", "ms per token", 1.0),
        (axes[2], "norm", "norm of the state", 1.0),
    ):
        axis.plot(tokens, [scale * sample[key] for sample in samples])
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.15 * axis.dataLim.y1)  # keeps a flat line off the frame
        axis.grid(alpha=0.3)
    axes[2].set_xlabel("tokens written")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--model", required=True, metavar="FILE")
    parser.add_argument("--deltamem", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=1024, help="tokens of context (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), metavar="DIR")
    args = parser.parse_args()
    if args.tokens < SETTLED + 2 * STEP:
        parser.error(
            f"--tokens {args.tokens}: at least {SETTLED + 2 * STEP}, of which the first {SETTLED} do not count"
        )
    if not Path(args.data).is_file():
        parser.error(f"--data {args.data}: no such file: name LoCoMo's locomo10.json")

    samples = soak(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(samples, indent=1))
    plot(samples, args.out / "soak.png")

    settled = [sample for sample in samples if sample["tokens"] >= SETTLED]
    half = len(settled) // 2
    early, late = (np.median([s["ms_per_token"] for s in part]) for part in (settled[:half], settled[half:]))
    growth = settled[-1]["resident"] - settled[0]["resident"]
    finite = all(np.isfinite(sample["norm"]) for sample in samples)
    print(
        f"{samples[-1]['tokens']:,.0f} tokens through a window of {args.window}: resident memory "
        f"{settled[0]['resident'] / 1e6:.1f} MB at {settled[0]['tokens']:,.0f} tokens, {growth / 1e6:+.2f} MB at the "
        f"end; time per token, second half ÷ first half: {late / early:.3f}; "
        f"state {'finite' if finite else 'NOT FINITE'}"
    )
    return 0 if finite and growth <= 1e6 else 1


if __name__ == "__main__":
    sys.exit(main())
