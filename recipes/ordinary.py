"""Writes ordinary requests and the frozen model's answers to them. Training keeps these answers unchanged.

    python recipes/ordinary.py smollm2 build/smollm2/ordinary.jsonl

The requests: those written by hand (recipes/ordinary/requests.jsonl.gz: letters, poems, plans, with demands on their
form), questions of the published data, later messages of our chats, and a few made of parts. The answers are sampled.
Training learns the frozen model's distribution along them, so it does not matter whether they are good, or cut.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from documents import drawable
from mixture import DATA, HERE, lines
from pydeltamem.evals.asker import Ask, Asker, Shared
from pydeltamem.formats import kinds
from pydeltamem.formats.atomic import replacing

TOGETHER = 16  # answers that are decoded together
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


def requests(data: Path, seed: int) -> list[str]:
    draw = random.Random(seed)
    made = [item["prompt"] for item in lines(HERE / "ordinary" / "requests.jsonl.gz")]
    questions = [item["question"] for item in drawable(lines(data / "train" / "nq_oracle.jsonl.gz"))]
    made += [f"{question[0].upper()}{question[1:]}?" for question in draw.sample(questions, 220)]
    natural = lines(HERE / "natural" / "train.jsonl.gz")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF, or its name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--longest", type=int, default=192, help="tokens of an answer; longer ones are cut (%(default)s)"
    )
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    asked = requests(args.data, args.seed)
    quoted = quoting(asked, (item["prompt"] for item in lines(args.data / "eval" / "ifeval.jsonl")))
    if quoted:
        raise SystemExit(f"{len(quoted)} requests quote IFEval, such as: {quoted[0]}")
    asker = Asker(args.model, n_ctx=1024, threads=args.threads, parallel=TOGETHER, unpack="rest")
    with replacing(args.out, kinds.CONVERSATIONS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i in range(0, len(asked), 8 * TOGETHER):
            some = asked[i : i + 8 * TOGETHER]
            options = {"n_predict": args.longest, "temp": 0.7, "top_p": 0.95, "seed": args.seed + i}
            for request, answer in zip(some, asker.answer([Ask(Shared(), text, options) for text in some])):
                file.write(json.dumps({"prompt": request, "answer": answer.strip()}, ensure_ascii=False) + "\n")
    asker.close()


if __name__ == "__main__":
    main()
