"""Asks a model with a memory the questions of recipes/natural/eval.jsonl, which nothing is trained on: 90 conversations
written by hand, of which the text is thrown away before the questions, or stays.

    python recipes/natural.py smollm2 adapter.gguf --json natural.json

Greedy, native, questions read without writing. An answer is right if it holds the value as a whole word or words; where
nothing was told, if it says so. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from mixture import HERE, lines
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pydeltamem import DeltaMemLlama
from pydeltamem.conversation import chat_prompt
from pydeltamem.evals.statistics import wilson
from pydeltamem.formats.kinds import json_of
from pydeltamem.formats.outputs import output
from pydeltamem.runtime.history import n_common

LONGEST = 40  # tokens of an answer
UNTOLD = r"n't|\bnot\b|\bnever\b|\bno idea\b|\bunknown\b"  # what an answer to what was not told has in it

# What is before the question: whether the memory is there, and whether the text is.
METHODS = {
    "text gone": (True, False),
    "memory and text": (True, True),
    "frozen model, text": (False, True),
    "frozen model, nothing": (False, False),
}


def is_right(answer: str, value: str | None) -> bool:
    said = answer.lower().replace("’", "'")
    if value is None:
        return re.search(UNTOLD, said) is not None
    return re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", said) is not None


class Asker:
    """A model that is asked with or without its memory, and with or without the text."""

    def __init__(self, model: str, adapter: str, threads: int | None):
        self.llm = DeltaMemLlama(model, deltamem_path=adapter, n_ctx=2048, n_threads=threads, n_threads_batch=threads)

    def answers(self, record: dict[str, Any], memory: bool, text: bool) -> Iterator[str]:
        """To each of a conversation's questions."""
        llm, said = self.llm, record["messages"]
        llm.reset()
        llm.memory.reset()
        llm.memory.write = memory
        if memory:
            answered, _ = chat_prompt(llm, said)  # ends with what begins an answer
            asked_on, _ = chat_prompt(llm, [*said, {"role": "user", "content": "?"}])
            llm.eval(answered[: n_common(answered, asked_on)])
        state = llm.memory.state
        for item in record["questions"]:
            llm.reset()
            llm.memory.state = state
            llm.memory.write = False
            asked = {"role": "user", "content": item["question"]}
            prompt, _ = chat_prompt(llm, [*said, asked] if text else [asked])
            llm.eval(prompt)
            given: list[int] = []
            while len(given) < LONGEST and (token := int(np.argmax(llm.logits))) != llm.token_eos():
                given.append(token)
                llm.eval([token])
            yield llm.detokenize(given).decode("utf-8", errors="replace").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF, or its name")
    parser.add_argument("adapter", help="GGUF, checkpoint directory, or its name")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--limit", type=int, help="conversations, of the whole")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N answers of each method")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    records = lines(HERE / "natural" / "eval.jsonl")
    if args.limit:
        records = records[:: max(1, len(records) // args.limit)]
    with output(args.json, json_of("answers", {"asked", "right", "answers"})) as write:
        asker = Asker(args.model, args.adapter, args.threads)
        right: dict[str, Counter[str]] = {method: Counter() for method in args.methods}
        asked: Counter[str] = Counter()
        answers = []
        for method in args.methods:
            for record in track(records, method, console=Console(stderr=True), transient=True):
                for item, answer in zip(record["questions"], asker.answers(record, *METHODS[method])):
                    good, told = is_right(answer, item["value"]), item["value"] is not None
                    for kind in (record["kind"], "told") if told else ("not told",):
                        right[method][kind] += good
                        asked[kind] += method == args.methods[0]
                    answers.append({"method": method, **item, "kind": record["kind"], "said": answer, "right": good})
        table = Table("questions", "n", *args.methods, box=None)
        for kind in [*sorted(asked.keys() - {"told", "not told"}), "told", "not told"]:
            cells = []
            for method in args.methods:
                share, low, high = wilson(right[method][kind], asked[kind])
                cells.append(f"{100 * share:.0f} ({100 * low:.0f}–{100 * high:.0f})")
            table.add_row(kind, str(asked[kind]), *cells)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
        for method in args.methods:
            for row in [row for row in answers if row["method"] == method][: args.show]:
                print(f"{method}: {'+' if row['right'] else '-'} {row['question']} -> {row['said']}")
        write(json.dumps({"asked": asked, "right": right, "answers": answers}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
