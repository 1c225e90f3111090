"""LoCoMo: questions about very long conversations of two people (Maharana et al., arXiv 2402.17753), categories 1 to 4.

A context is a conversation with the date of each session; the latest sessions that fit are shown. Questions of category
2 ask for an approximate date. Sampled as published: temperature 0.4, top-k 10, top-p 0.9, seed 42 + index. The
published answers are transformers', which applies the temperature first, and not last as llama.cpp does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .items import Benchmark, Context, Item, Piece, answers_of, text_of
from .metrics import first_line, locomo_f1, stemmer
from .sampling import cooled_first

KINDS = {1: "multi-hop", 2: "temporal", 3: "open", 4: "single-hop"}
DATE = " Say the date, as nearly as the conversation tells it."


def read(path: Path) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(json.loads(text_of(path)), 1):
        context = _context(record["conversation"])
        for place, asked in enumerate(record["qa"]):
            category = int(asked["category"])
            if category in KINDS:
                question = str(asked["question"])
                items.append(
                    Item(
                        f"{record.get('sample_id', number)}-{place}",
                        KINDS[category],
                        f"Question: {question}{DATE if category == 2 else ''}\nShort answer:",
                        answers_of(asked["answer"]),
                        len(items),
                        context,
                        {"category": category},
                        query=question,
                    )
                )
    return items


def _context(conversation: dict[str, Any]) -> Context:
    pieces = []
    names = [name for name in conversation if name.startswith("session_") and not name.endswith("date_time")]
    for name in sorted(names, key=lambda name: int(name.rpartition("_")[2])):
        head = f"[{conversation[f'{name}_date_time']}]"
        for turn in conversation[name]:
            seen = f" (shares a picture: {turn['blip_caption']})" if turn.get("blip_caption") else ""
            pieces.append(Piece(f"{turn['speaker']}: {turn['text']}{seen}", head))
    return Context(tuple(pieces), f"a conversation of {conversation['speaker_a']} and {conversation['speaker_b']}")


def _sampling(index: int, seed: int) -> dict[str, Any]:
    return cooled_first(0.4, top_k=10, top_p=0.9, min_p=0.0, seed=seed + index)


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    said = first_line(answer).lower()
    return {"f1": locomo_f1(said, item.answers[0], item.about["category"])}


LOCOMO = Benchmark(
    name="locomo",
    summary="ask about very long conversations of two people",
    source="LoCoMo, snap-research/locomo on GitHub, data/locomo10.json, CC BY-NC 4.0",
    file="locomo10.json",
    read=read,
    opening="Below is {title}, with the date of each part.",
    task="Answer a question about {title} in a few words, with words of theirs where you can.",
    score=score,
    n_predict=50,
    sampling=_sampling,
    clip="last",
    check=stemmer,
)
