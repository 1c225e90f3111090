"""Questions about one paragraph each: XQuAD in English (Artetxe et al., arXiv 1910.11856), or any file of SQuAD."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .items import Benchmark, Context, Item, Piece, answers_of, json_lines, text_of
from .metrics import exact, f1, first_line


def read(path: Path) -> list[Item]:
    items: list[Item] = []
    for context, asked in _paragraphs(text_of(path)):
        pieces = tuple(Piece(sentence) for sentence in re.split(r"(?<=[.!?])\s+", context.strip()))
        of_items = Context(pieces, "a paragraph")
        for question, answers in asked:
            items.append(
                Item(
                    str(len(items)),
                    "",
                    f"Question: {question}\nAnswer:",
                    answers_of(answers),
                    len(items),
                    of_items,
                    query=question,
                )
            )
    return items


def _paragraphs(text: str) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Paragraphs with questions and answers: a line each, or as SQuAD is published."""
    if '"paragraphs"' in text:
        found: Any = [paragraph for article in json.loads(text)["data"] for paragraph in article["paragraphs"]]
        return [
            (p["context"], [(q["question"], [a["text"] for a in q["answers"]]) for q in p["qas"] if q["answers"]])
            for p in found
        ]
    return [(line["context"], [(question, answers) for question, answers in line["qa"]]) for line in json_lines(text)]


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    said = first_line(answer)
    return {"f1": f1(said, item.answers), "exact": exact(said, item.answers)}


QA = Benchmark(
    name="qa",
    summary="ask about a paragraph",
    source="XQuAD, google-deepmind/xquad on GitHub, xquad.en.json, CC BY-SA 4.0",
    file="eval/xquad_en.jsonl.gz",
    read=read,
    opening="Below is {title}.",
    task="Answer a question about {title}, with the answer alone, in a few of its words.",
    score=score,
    n_predict=32,
)
