"""Conversations of people with questions about them, for any model.

    natural      90 conversations with 342 questions, written by hand for this and never trained on (natural.jsonl)
    dialogues    task dialogues, asked for the values of their slots: eval/sgd_dev.jsonl.gz, Schema-Guided Dialogue
    personas     chats, asked for facts about the user: train/persona.jsonl.gz, Synthetic-Persona-Chat
    paragraphs   paragraphs with questions: eval/xquad_en.jsonl.gz, XQuAD

All but the first are others' and have their own licences: they are read from a folder. The questions of dialogues
and personas are ours (questions.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .case import Case
from .items import DAMAGED, answers_of, check_texts, text_of, why
from .questions import PERSONAS, SLOTS
from .reader import MAX_ANSWER, Reader
from .scoring import holds
from .world import Turn

MAX_QUESTION = 64  # tokens
PER_CONVERSATION = 4  # questions about one conversation of others, at most
LONGEST = 40  # characters of a slot's value
READ = "I have read it."  # the assistant's reply to a paragraph

Asked = tuple[str, str, tuple[str, ...]]  # kind, question, values
Told = tuple[tuple[Turn, ...], list[Asked]]


@dataclass(frozen=True)
class Corpus:
    """path: in the folder of the data; None: in the package. source: its name and licence. read: makes turns and
    questions of a line. replies: whether the assistant, too, says what is asked for.
    """

    path: str | None
    source: str
    read: Callable[[dict[str, Any]], Told]
    replies: bool = False


def file_of(task: str, data: Path | None) -> Path | None:
    """The file of a task; None if its folder is not named."""
    path = CORPORA[task].path
    if path is None:
        return Path(__file__).with_name("natural.jsonl")
    return None if data is None else data / path


def missing(task: str, data: Path | None) -> str | None:
    """Why the questions of a task cannot be asked, None if they can."""
    path = file_of(task, data)
    if path is None:
        return (
            f"{task}: needs {CORPORA[task].path} ({CORPORA[task].source}): name its folder with --data or DELTAMEM_DATA"
        )
    return None if path.is_file() else f"{path}: is missing ({CORPORA[task].source}): {task} needs it"


def cases(task: str, n: int, seed: int, reader: Reader, data: Path | None) -> Iterator[Case]:
    """The questions of a task, `n` of each kind at most. Conversations that do not fit into the context are left out.

    Raises InputError if its file is missing or damaged.
    """
    path = file_of(task, data)
    reason = missing(task, data)
    if path is None or reason:
        raise InputError(reason)
    corpus, draw = CORPORA[task], random.Random(f"{task} {seed}")
    lines = [(i, line) for i, line in enumerate(text_of(path).split("\n"), 1) if line.strip()]
    if corpus.path is not None:
        draw.shuffle(lines)
    left: dict[str, int] = {}
    for number, line in lines:
        try:
            turns, asked = corpus.read(json.loads(line))
            check_texts(*(text for turn in turns for text in turn))
            check_texts(*(text for _, question, values in asked for text in (question, *values)))
        except DAMAGED as error:
            raise InputError(f"{path}: line {number} is no conversation of {corpus.source}: {why(error)}") from error
        if corpus.path is not None:
            asked = draw.sample(asked, min(PER_CONVERSATION, len(asked)))
        if not turns or not asked or reader.n_tokens(turns) + MAX_QUESTION + MAX_ANSWER > reader.n_ctx:
            continue
        for kind, question, values in asked:
            left.setdefault(kind, n)
            if left[kind] > 0:
                left[kind] -= 1
                yield Case(task, kind, turns, question, values, replies=corpus.replies)
        if corpus.path is not None and not any(left.values()):
            return


def _turns(messages: Sequence[dict[str, str]]) -> tuple[Turn, ...]:
    """Pairs of a user's message and the assistant's reply; none if the roles do not alternate."""
    roles = [message["role"] for message in messages]
    n = len(roles) // 2
    if roles[: 2 * n] != ["user", "assistant"] * n:
        return ()
    said = [message["content"] for message in messages]
    return tuple(zip(said[: 2 * n : 2], said[1 : 2 * n : 2]))


def _natural(record: dict[str, Any]) -> Told:
    asked: list[tuple[str, str, tuple[str, ...]]] = []
    for item in record["questions"]:
        if item["value"] is not None:
            asked.append((record["kind"], item["question"], (item["value"],)))
        else:
            asked.append(("not told", item["question"], ()))
    return _turns(record["messages"]), asked


def _dialogue(record: dict[str, Any]) -> Told:
    """Asks for the last value of each slot. The last value of the user and that of the assistant are both right."""
    latest: dict[tuple[str, str], dict[bool, str]] = {}
    for said in sorted(record["said"], key=lambda said: said["turn"]):
        if (said["service"], said["slot"]) in SLOTS:
            latest.setdefault((said["service"], said["slot"]), {})[said["turn"] % 2 == 0] = said["value"].strip()
    asked = [("", SLOTS[slot], tuple(dict.fromkeys(values.values()))) for slot, values in latest.items()]
    return _turns(record["messages"]), [item for item in asked if all(len(value) <= LONGEST for value in item[2])]


def _persona(record: dict[str, Any]) -> Told:
    """Asks for facts about the user that the user said."""
    turns = _turns(record["messages"])
    said = [user for user, _ in turns]
    asked = []
    for fact in dict.fromkeys(record["user_persona"]):
        if fact in PERSONAS:
            question, values = PERSONAS[fact]
            if any(holds(user, value) for user in said for value in values):
                asked.append(("", question, values))
    return turns, asked


def _paragraph(record: dict[str, Any]) -> Told:
    return ((record["context"], READ),), [("", question, answers_of(answers)) for question, answers in record["qa"]]


CORPORA = {
    "natural": Corpus(None, "this package", _natural),
    "dialogues": Corpus("eval/sgd_dev.jsonl.gz", "Schema-Guided Dialogue, CC BY-SA 4.0", _dialogue, replies=True),
    "personas": Corpus("train/persona.jsonl.gz", "Synthetic-Persona-Chat, CC BY 4.0", _persona),
    "paragraphs": Corpus("eval/xquad_en.jsonl.gz", "XQuAD, CC BY-SA 4.0", _paragraph),
}
