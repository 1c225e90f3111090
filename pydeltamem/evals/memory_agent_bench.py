"""MemoryAgentBench (Hu et al., arXiv 2507.05257): here the split of conflicts, FactConsolidation.

Facts are numbered, and a later one replaces an earlier one. All questions of a row share its context and what it wrote.
"""

from __future__ import annotations

import re
from pathlib import Path

from .items import Benchmark, Context, Item, Piece, answers_of, records_of
from .metrics import exact, f1, holds


def read(path: Path) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(records_of(path)):
        pieces = tuple(Piece(line) for line in record["context"].splitlines() if line.strip())
        context = Context(pieces, "a list of numbered facts")
        ids = (record.get("metadata") or {}).get("qa_pair_ids") or []
        for i, (question, answers) in enumerate(zip(record["questions"], record["answers"], strict=True)):
            name = str(ids[i]) if i < len(ids) else f"{number}_no{i}"
            items.append(
                Item(
                    name,
                    re.sub(r"_?no\d+$", "", name),
                    f"Question: {question}\nAnswer:",
                    answers_of(answers),
                    len(items),
                    context,
                    query=question,
                )
            )
    return items


def score(item: Item, answer: str) -> dict[str, float | list[float]]:
    return {
        "substring": holds(answer, item.answers),
        "exact": exact(answer, item.answers),
        "f1": f1(answer, item.answers),
    }


MEMORY_AGENT_BENCH = Benchmark(
    name="memory-agent-bench",
    summary="ask for facts that later facts replace",
    source="MemoryAgentBench, ai-hyz/MemoryAgentBench on Hugging Face, split Conflict_Resolution, MIT",
    file="eval/mab_conflict_resolution.jsonl.gz",
    read=read,
    opening="Below is your memory, {title}. Of two facts that disagree, the one with the higher number is true.",
    task="Answer a question from your memory only, {title}, with the answer alone. If it is not there, say that you do"
    " not know.",
    score=score,
    n_predict=10,
    clip="thirds",
    max_characters=120_000,
)
