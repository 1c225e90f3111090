"""What a benchmark asks: items, the contexts that they are about, and the files that they are read from."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import InputError, shown, shown_value
from ..formats.gguf_header import Header
from ..formats.sha256 import sha256_of

DATA = "DELTAMEM_DATA"
# What reading a file of another form raises
DAMAGED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, csv.Error)


def why(error: Exception) -> str:
    """What is wrong with a damaged file, in a few words: some errors hold all of it."""
    return shown(error if isinstance(error, UnicodeDecodeError) else repr(error))


T = TypeVar("T")


class Piece(NamedTuple):
    """A part of a context that a search may choose. Pieces with the same head (a date, say) stand under it."""

    text: str
    head: str = ""


@dataclass(frozen=True)
class Context:
    """What several items may be about.

    pieces: in order. title: what a prompt calls it, such as "a conversation".
    """

    pieces: tuple[Piece, ...]
    title: str = "the text"

    def shown(self, which: Iterable[int] | None = None) -> str:
        """The pieces with these indices, in order; None: all."""
        lines: list[str] = []
        head = ""
        for i in range(len(self.pieces)) if which is None else sorted(which):
            piece = self.pieces[i]
            if piece.head != head:
                lines += ["", piece.head] if lines else [piece.head]
                head = piece.head
            lines.append(piece.text)
        return "\n".join(lines)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its benchmark.
        kind: group of items that are counted together too.
        question: what the model is asked after the context.
        answers: what is right.
        index: place in the file, from which the seed of its sampling follows.
        context: None: it needs none.
        about: what scoring needs besides.
        query: what a search looks for; "": the question.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    index: int
    context: Context | None = None
    about: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    query: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: where its questions come from, how they are asked and how answers are scored.

    Attributes:
        name: as on the command line.
        summary: what it asks for, in a few words, for the help.
        source: of the data, with its licence.
        file: where it is in the folder of the data; "": only from a file that the user names.
        read: the items in a file. Raises ValueError, KeyError, TypeError or IndexError if it is no such file.
        opening: what stands before a context. "{title}" is the context's, here and in `task`.
        task: what stands before a question, after the context, if there is one.
        score: metrics of an answer, 0 to 1, the main one first; several values of one metric (instructions of an
            item) are counted each.
        n_predict: most tokens of an answer.
        sampling: of the item with this index and this seed; greedy without it.
        clip: which pieces stay if not all fit: CLIPS of views.py.
        max_characters: of a context; 0: any.
    """

    name: str
    summary: str
    source: str
    file: str
    read: Callable[[Path], list[Item]]
    opening: str
    task: str
    score: Callable[[Item, str], dict[str, float | list[float]]]
    n_predict: int
    sampling: Callable[[int, int], dict[str, Any]] = lambda index, seed: {"temp": 0.0}
    clip: str = "last"
    max_characters: int = 0
    check: Callable[[], object] = lambda: None  # raises InputError if a package is missing


def file_of(benchmark: Benchmark, given: str | None) -> Path:
    """The file of a benchmark. Raises InputError if it is missing.

    given: that file, or the folder of the data; None: the folder that DELTAMEM_DATA names.
    """
    path = Path(given or os.environ.get(DATA) or "")
    if path.is_dir() and benchmark.file and (given or os.environ.get(DATA)):
        path = path / benchmark.file
    if not path.is_file():
        where = f"{path}: is missing" if path.name and not path.is_dir() else "--data: name the file"
        raise InputError(f"{where} ({benchmark.source}): {benchmark.name} needs it")
    return path


def items_of(benchmark: Benchmark, given: str | None) -> list[Item]:
    """The items of a benchmark, in the order of its file (`file_of`). Raises InputError if it is missing or damaged."""
    path = file_of(benchmark, given)
    try:
        items = benchmark.read(path)
        for context in {id(item.context): item.context for item in items if item.context}.values():
            check_texts(context.title, *(text for piece in context.pieces for text in piece))
        for item in items:
            check_texts(item.id, item.kind, item.question, item.query, *item.answers)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: is no file of {benchmark.source}: {why(error)}") from error
    if not items:
        raise InputError(f"{path}: has no question of {benchmark.name} ({benchmark.source})")
    twice = [id for id, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise InputError(f"{path}: has several questions {twice[0]}: give each an id of its own")
    return items


def check_texts(*texts: Any) -> None:
    """Raises ValueError if one is no text that can be asked and written."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{shown_value(text)} is no text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{shown_value(text)} holds half of a character, a surrogate") from None


def text_of(path: Path) -> str:
    """A text file, packed by gzip or not. Raises InputError if it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file: JSON lines, a JSON list, CSV or Parquet (needs pyarrow)."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or name a .jsonl") from None
        try:
            rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        except OSError as error:  # whose text has several lines
            raise InputError(f"{path}: cannot be read as Parquet: is it whole?") from error
        return rows
    text = text_of(path)
    if ".csv" in path.suffixes:
        return list(csv.DictReader(io.StringIO(text)))
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return json_lines(text)


def json_lines(text: str) -> list[Any]:
    """The records of JSON lines. Only a line feed ends one: a string may hold other separators."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def answers_of(given: Any) -> tuple[str, ...]:
    """Right answers: a list of them, or a single one. Raises ValueError if there is none: nothing could be right."""
    found = tuple(str(one) for one in (given if isinstance(given, (list, tuple)) else [given]) if one is not None)
    found = tuple(one for one in found if one.strip())  # an empty one is a part of every answer
    if not found:
        raise ValueError("a question has no right answer")
    return found


def chosen(items: Sequence[Item], limit: int | None, seed: int, shard: tuple[int, int]) -> list[Item]:
    """At most `limit` items, drawn by `seed`, in their order; of these the ones in shard i of n, from 1.

    Items with one context are in one shard.
    """
    drawn = list(items)
    if limit is not None and limit < len(drawn):
        drawn = [drawn[i] for i in sorted(random.Random(seed).sample(range(len(drawn)), limit))]
    place: dict[object, int] = {}
    numbers = [place.setdefault(item.id if item.context is None else id(item.context), len(place)) for item in drawn]
    i, n = shard
    return [item for item, number in zip(drawn, numbers) if number % n == i - 1]


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file. Raises InputError if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def digest_of_model(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a model; of one in parts that of their digests. Raises InputError or ModelError."""
    first, *others = map(digest_of_file, Header.of_model(path).files)
    return hashlib.sha256(" ".join((first, *others)).encode()).hexdigest() if others else first
