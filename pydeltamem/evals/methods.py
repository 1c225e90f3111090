"""Ways to remember: what a model has before it when it is asked.

Every question is asked of the same conversation in the same words. What differs is what the model has before it:

    none      nothing                           window    the last turns that fit into the window
    bm25      the turns that a search finds     full      the whole text
    tsw, …    its memory                        tsw+window, …    its memory and the last turns

All but the memories are the same frozen model with an empty memory that is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .reader import Reader
from .recall import Case
from .world import Turn

if TYPE_CHECKING:
    from rich.console import Console

PLAIN = ("none", "window", "bm25", "full")  # methods without a memory


def last_turns(turns: Sequence[Turn], window: int, reader: Reader) -> list[Turn]:
    """As many of the last turns as fit into the window."""
    kept: list[Turn] = []
    for turn in reversed(turns):
        if reader.n_tokens([turn, *kept]) > window:
            break
        kept.insert(0, turn)
    return kept


def found_turns(turns: Sequence[Turn], question: str, window: int, reader: Reader) -> list[Turn]:
    """The turns that BM25 finds most relevant to the question, as many as fit into the window, in their order.

    What the user said is searched, without the words that are in every text; of turns alike the newer one is taken.
    """
    kept: list[int] = []
    scores = _relevance([user for user, _ in turns], question)
    for i in sorted(range(len(turns)), key=lambda i: (-scores[i], -i)):
        if reader.n_tokens([turns[j] for j in (*kept, i)]) <= window:
            kept.append(i)
    return [turns[i] for i in sorted(kept)]


def _relevance(texts: Sequence[str], question: str) -> npt.NDArray[np.float32]:
    bm25s = bm25s_module()
    *words, asked = bm25s.tokenize([*texts, question], stopwords="en_plus", return_ids=False, show_progress=False)
    if not any(words) or not asked:
        return np.zeros(len(texts), dtype=np.float32)
    search = bm25s.BM25()
    search.index(words, show_progress=False)
    return search.get_scores(asked)


def answer_all(
    cases: Sequence[Case],
    readers: dict[str, Any],
    window: int,
    console: Console,
    only: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Every method's answer to every case."""
    from rich.progress import track

    plain = next(iter(readers.values()))

    def show_text(turns_of: Any) -> Any:
        def answer(case: Case) -> str:
            plain.begin(write=False)
            plain.read(turns_of(case))
            return plain.answer(case.question)

        return answer

    def remember(reader: Any, visible: bool) -> Any:
        def answer(case: Case) -> str:
            kept = last_turns(case.turns, window, reader) if visible else []
            reader.begin(write=True)
            reader.read(case.turns[: len(case.turns) - len(kept)])
            reader.forget_text()
            reader.read(kept)
            return reader.answer(case.question)

        return answer

    shown = {
        "none": lambda case: [],
        "window": lambda case: last_turns(case.turns, window, plain),
        "bm25": lambda case: found_turns(case.turns, case.question, window, plain),
        "full": lambda case: case.turns,
    }
    methods = {name: show_text(shown[name]) for name in PLAIN}
    for name, reader in readers.items():
        methods[name] = remember(reader, visible=False)
        methods[f"{name}+window"] = remember(reader, visible=True)
    unknown = [name for name in only or () if name not in methods]
    if unknown:
        raise InputError(f"--methods: there is no method {unknown[0]}: {', '.join(methods)}")
    chosen = only or list(methods)
    steps = [(name, case) for name in chosen for case in cases]
    answers: dict[str, list[str]] = {name: [] for name in chosen}
    for name, case in track(steps, description="asking", console=console, transient=True):
        answers[name].append(methods[name](case))
    return answers


def bm25s_module() -> Any:
    """The search. Raises InputError if it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise InputError(
            "the method bm25 needs bm25s: pip install 'pydeltamem[eval]', or name other methods by --methods"
        ) from None
    return bm25s
