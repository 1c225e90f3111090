"""HotpotQA (Yang et al., arXiv 1809.09600), distractor setting: two of ten passages answer a question together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .items import Benchmark, Context, Item, Piece, answers_of, records_of
from .metrics import exact, first_line, hotpot_f1


def read(path: Path) -> list[Item]:
    items = []
    for i, record in enumerate(records_of(path)):
        pieces = tuple(Piece(f"{title}: {' '.join(map(str.strip, said))}") for title, said in _passages(record))
        items.append(
            Item(
                str(record.get("id") or record["_id"]),
                str(record.get("type") or ""),
                f"Question: {record['question']}\nAnswer:",
                answers_of(record["answer"]),
                i,
                Context(pieces, "ten passages"),
                query=record["question"],
            )
        )
    return items


def _passages(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Titles and sentences: lists of both, as Hugging Face has them, or pairs, as published."""
    context = record["context"]
    if isinstance(context, dict):
        return list(zip(context["title"], context["sentences"], strict=True))
    return [(title, sentences) for title, sentences in context]


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    said = first_line(answer)
    return {"exact": exact(said, item.answers), "f1": hotpot_f1(said, item.answers[0])}


HOTPOTQA = Benchmark(
    name="hotpotqa",
    summary="ask what two of ten passages say together",
    source="HotpotQA, hotpotqa.github.io, hotpot_dev_distractor_v1.json, CC BY-SA 4.0",
    file="eval/hotpot_dev_distractor_100.jsonl.gz",
    read=read,
    opening="Below are {title}.",
    task="Answer a question from {title}, with the answer alone, in a few words.",
    score=score,
    n_predict=32,
    clip="last",
)
