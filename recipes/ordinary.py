"""Writes ordinary requests and the frozen model's answers to them. Training keeps these answers unchanged.

    python recipes/ordinary.py smollm2 build/smollm2/ordinary.jsonl

The requests: those written by hand (recipes/ordinary/requests.jsonl.gz: letters, poems, plans, with demands on their
form), questions of the published data, later messages of our chats, and a few made of parts. The answers are sampled.
Training learns the frozen model's distribution along them, so it does not matter whether they are good, or cut.

recipes/ordinary/answers.jsonl.gz holds SmolLM2's to `--ours --longest 640`, an hour of one core, for mixture.py.

The answers so far are in OUT.part. The same command goes on from there when it was interrupted, to the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from documents import drawable
from mixture import DATA, HERE, lines
from pydeltamem.errors import DeltaMemError, InputError
from pydeltamem.evals.asker import Ask, Asker, Shared
from pydeltamem.evals.items import digest, digest_of_model
from pydeltamem.formats import kinds
from pydeltamem.formats.atomic import replacing
from pydeltamem.formats.lock import held
from pydeltamem.hub import model_file

TOGETHER = 16  # answers that are decoded together
BATCH = 8 * TOGETHER  # requests that are asked, and whose answers are kept, at once
DRAWN_FROM = 11_670  # conversations by hand: those added later would change the draw, and the answers are made
ROW = 7  # words in a row that no request may share with IFEval
SUBJECTS = (
    "the sea, photosynthesis, black holes, democracy, bread, bicycles, the printing press, gravity, volcanoes, coffee,"
    " honesty, the internet, whales, chess, antibiotics, rivers, autumn, mountains, robots, friendship, inflation,"
    " vaccines, glass, poetry, rain, trains, time zones, bees, dreams, music, language, maps, salt, cats, libraries,"
    " fire, mirrors, paper, tides, sleep"
)
REQUESTS = (
    "Write a short poem about {s}.", "Explain {s} to a child.", "Give me three facts about {s}.",
    "Write a haiku about {s}.", "List five words that come to mind with {s}.",
    "Write two sentences about {s}, without using the letter z.",
    "Write a title for an essay on {s} in all capital letters.", "Say in one sentence why {s} matters.",
    "Write a paragraph about {s} and end it with the words: That is all.", "Answer in JSON: name and category of {s}.",
)  # fmt: skip
PHRASES = ("Good morning", "Where is the station?", "I like apples", "Thank you very much", "It is raining")


def in_a_row(text: str) -> set[tuple[str, ...]]:
    """All runs of ROW words, in lower case."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + ROW]) for i in range(len(words) - ROW + 1)}


def quoting(made: Iterable[str], asked: Iterable[str]) -> list[str]:
    """Those requests that have ROW words in a row with something that a benchmark asks."""
    theirs: set[tuple[str, ...]] = set().union(*map(in_a_row, asked))
    return [text for text in made if in_a_row(text) & theirs]


def requests(data: Path | None, seed: int) -> list[str]:
    """All requests. `data`: the folder of the published data; None: without its questions, not ours to ship."""
    draw = random.Random(seed)
    made = [item["prompt"] for item in lines(HERE / "ordinary" / "requests.jsonl.gz")]
    if data is not None:
        questions = [item["question"] for item in drawable(lines(data / "train" / "nq_oracle.jsonl.gz"))]
        made += [f"{question[0].upper()}{question[1:]}?" for question in draw.sample(questions, 220)]
    natural = lines(HERE / "natural" / "train.jsonl.gz")[:DRAWN_FROM]
    later = [m["content"] for x in natural for m in x["messages"][2:] if m["role"] == "user" and len(m["content"]) > 25]
    made += draw.sample(later, 200)
    for subject in SUBJECTS.split(", "):
        made += [request.format(s=subject) for request in draw.sample(REQUESTS, 4)]
    for _ in range(40):
        a, b = draw.randrange(2, 60), draw.randrange(2, 60)
        made.append(f"What is {a} {draw.choice(('plus', 'times', 'minus'))} {b}?")
    made += [f"Translate into {to}: {text}" for to in ("French", "Spanish", "German", "Italian") for text in PHRASES]
    draw.shuffle(made)
    return made


def answer_all(asked: Sequence[str], setup: Mapping[str, Any], open_model: Callable[[], Asker], out: Path) -> None:
    """Writes all requests with their answers to `out`, and goes on from what an interrupted run has left.

    Args:
        setup: what decides the answers: "seed" and "longest", and what identifies model and requests.

    Raises InputError if what was left is of another setup, or another process is at it.
    """
    part = out.with_name(f"{out.name}.part")
    with open(part, "a+b") as file, held(part):
        file.seek(0)
        done = _left(file.read(), setup, part)
        file.truncate(sum(map(len, done)))
        if not done:
            done = [_line({"setup": setup})]
            _append(file, done)
        asker: Asker | None = None
        try:
            for i in range(len(done) - 1, len(asked), BATCH):
                asker = asker or open_model()
                some = asked[i : i + BATCH]
                options = {
                    "n_predict": setup["longest"], "temp": 0.7, "top_p": 0.95, "seed": setup["seed"] + i,
                }  # fmt: skip
                answers = asker.answer([Ask(Shared(), text, options) for text in some])
                new = [_line({"prompt": text, "answer": answer.strip()}) for text, answer in zip(some, answers)]
                _append(file, new)
                done += new
        finally:
            if asker is not None:
                asker.close()
        with replacing(out, kinds.CONVERSATIONS) as temporary:
            temporary.write_bytes(b"".join(done[1:]))
        part.unlink()


def _left(data: bytes, setup: Mapping[str, Any], part: Path) -> list[bytes]:
    """The lines of the setup and of whole batches; none if not even the setup was written."""
    first = _line({"setup": setup})
    if not data.startswith(first) and not first.startswith(data):
        raise InputError(f"{part}: holds answers of another model, or to other options or requests: remove it")
    lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    return lines[: 1 + (len(lines) - 1) // BATCH * BATCH] if lines else []


def _append(file: Any, lines: Iterable[bytes]) -> None:
    file.write(b"".join(lines))
    file.flush()
    os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF, or its name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ours", action="store_true", help="leave out the questions of the published data")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--longest", type=int, default=192, help="tokens of an answer; longer ones are cut (%(default)s)"
    )
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    asked = requests(None if args.ours else args.data, args.seed)
    quoted = quoting(asked, (item["prompt"] for item in lines(args.data / "eval" / "ifeval.jsonl")))
    if quoted:
        raise SystemExit(f"{len(quoted)} requests quote IFEval, such as: {quoted[0]}")
    try:
        setup = {
            "model": digest_of_model(model_file(args.model)), "requests": digest(json.dumps(asked)), "seed": args.seed,
            "longest": args.longest,
        }  # fmt: skip

        def open_model() -> Asker:
            return Asker(args.model, n_ctx=1024, threads=args.threads, parallel=TOGETHER, unpack="rest")

        answer_all(asked, setup, open_model, args.out)
    except DeltaMemError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
