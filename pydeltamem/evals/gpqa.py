"""GPQA (Rein et al., arXiv 2311.12022): hard questions of science with four choices. Only from a file that you have.

Its authors ask not to publish the questions, so no copy is looked for. Choices are shuffled, by the question.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from .items import Benchmark, Item, records_of

LETTERS = "ABCD"
# A letter by itself: no "D-glucose", no article
_LETTER = r"([A-Db-d]|a(?![ \t]+\w))\b(?![’'-]\w)"
_SAID = [
    re.compile(pattern + _LETTER, re.MULTILINE)
    for pattern in (
        # "The answer is B", "Answer: (B)", "the right choice is option B"
        r"(?i:\b(?:answer|(?:choice|option|letter)(?=\s*(?:is\b|:)))\b[\s:*]*(?:is\b)?[\s:*\"“($]*"
        r"(?:\\boxed\{|(?:choice|option|letter)\b[\s*(]*)?)",
        # first in a line: "B", "(B) …", "Option B", "A because …", no "A photon"
        r"^[^\w\n]*(?i:(?:(?:choice|option|letter)\b|boxed\{)[\s:*(]*)?(?!A[ \t]+(?!(?:is|because|since)\b)[^\W\d])",
        r"\((?=\w\))",
    )
]


def read(path: Path) -> list[Item]:
    items = []
    for i, record in enumerate(records_of(path)):
        right = record["Correct Answer"].strip()
        choices = [right, *(record[f"Incorrect Answer {k}"].strip() for k in (1, 2, 3))]
        random.Random(record["Question"]).shuffle(choices)
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
        items.append(
            Item(
                str(record.get("Record ID") or i),
                str(record.get("High-level domain") or ""),
                f"{record['Question'].strip()}\n\n{listed}\n\nAnswer:",
                (LETTERS[choices.index(right)],),
                i,
            )
        )
    return items


def letter_of(answer: str) -> str:
    """The choice that an answer names; "" if it names none."""
    found = next(filter(None, (said.search(answer) for said in _SAID)), None)
    return found[1].upper() if found else ""


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    return {"accuracy": float(letter_of(answer) == item.answers[0])}


GPQA = Benchmark(
    name="gpqa",
    summary="ask hard questions of science, from a file that you have",
    source="GPQA, Idavidrein/gpqa on Hugging Face, gpqa_diamond.csv, CC BY 4.0",
    file="",
    read=read,
    opening="",
    task="Answer this question with the letter of the right choice alone.",
    score=score,
    n_predict=16,
)
