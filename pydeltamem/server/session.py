"""A session in use: its text on the engine, and what of it the store keeps.

Everything here runs in the thread of the worker, which alone touches texts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import InputError, MemoryFileError
from ..formats.memory_file import MemorySnapshot
from ..llama import DeltaMemLlama
from ..memory import Memory
from ..runtime.history import REPLY, TOKEN, Checkpoint, Checkpoints, Log, Position, n_common
from ..runtime.text import Text
from . import history
from .history import Message
from .records import Record, SessionDamaged, Turn

RAW = "raw"  # in place of the first message: a text that is no chat

# What going back finds without decoding again, of each text in use. Turns have checkpoints of their own.
N_LAST, N_BYTES = 17, 1 << 20

_N_RUNS = 16  # of known messages in a chat: all others wait while they are looked for


@dataclass
class Live:
    """A session, or a text that belongs to none.

    Attributes:
        record: as it was committed; None: belongs to no session.
        text: on the engine.
        chat: the present chat of the text: the digest of its first message, and the turn that began it.
        turns: committed turns.
    """

    record: Record | None
    text: Text
    chat: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass
class Begun:
    """A turn whose prompt is ready for the engine.

    Attributes:
        tokens: to decode, at least one.
        known: which of them do not write; None: all write.
        n_past: tokens of the prompt that are in the text.
        turn: as it will be committed, without its messages.
        n_kept: messages of the present chat that belong to the turns before it.
        kept: the turns before it.
        before: text and memory before it.
    """

    tokens: list[int]
    known: Any
    n_past: int
    turn: Turn
    n_kept: int
    kept: tuple[Turn, ...]
    chat: str
    before: Position


def new_text(llm: DeltaMemLlama) -> Text:
    """A text with an empty memory."""
    text = llm._engine.text()
    text.exact = True
    text.renew()
    checkpoint = text.position.checkpoint
    one = () if checkpoint is None else (checkpoint._replace(kept=True),)
    text.position = text.position._replace(checkpoints=Checkpoints((), one, N_BYTES, N_LAST))
    return text


def about_memories(llm: DeltaMemLlama) -> dict[str, str]:
    """What the memory files of this model and its adapter say of them."""
    return Memory(llm, llm._text)._source


#
# a turn
#


def begin_chat(
    live: Live, messages: Sequence[Message], prompt: Sequence[int], render: Callable[[Sequence[Message]], Sequence[int]]
) -> Begun:
    """Takes the text to where the prompt goes on, by the rule of one write (docs/how-to/serve.md).

    - Messages that continue the text: only what is new is decoded, and written.
    - Messages that go back in it: text and memory go back.
    - Any other: another text, and the memory goes on. What it has read already is not written again.
    """
    text = live.text
    first = history.first_digest(messages)
    n = min(n_common(text.tokens, prompt), len(prompt) - 1)
    is_same = live.chat.rpartition("-")[0] == first and not _is_ambiguous(live, messages)
    if is_same:
        return _go_on(live, prompt, n, history.digests(messages))
    system = history.n_system(messages)
    n = min(n, history.begins(render, messages, system) if system < len(messages) else n)
    begun = _begin_another(live, prompt, n, first)
    known = {digest for turn in live.turns for digest in turn.digests}
    marks = history.fewer_runs(history.known_messages(messages, known), _N_RUNS)
    if any(marks):
        mask = history.known_tokens(prompt, messages, marks, lambda i: history.begins(render, messages, i))
        begun.known = mask[n:]
    return begun


def begin_raw(live: Live, prompt: Sequence[int]) -> Begun:
    """As `begin_chat`, for a prompt that is no chat: its tokens tell whether it continues the text."""
    n = min(n_common(live.text.tokens, prompt), len(prompt) - 1)
    if n > 1 and live.chat.rpartition("-")[0] == RAW:
        return _go_on(live, prompt, n, None)
    return _begin_another(live, prompt, min(n, 1), RAW)


def _is_ambiguous(live: Live, messages: Sequence[Message]) -> bool:
    """Whether a request of one message may begin another chat that opens like the present one. Then the memory goes on:
    to take back a whole chat because somebody says hello again would lose it.
    """
    n_turns = sum(turn.chat == live.chat for turn in live.turns)
    return len(messages) == history.n_system(messages) + 1 and n_turns > 1


def _go_on(live: Live, prompt: Sequence[int], n: int, digests: Sequence[str] | None) -> Begun:
    """Goes on with the present text, from its first n tokens. `digests`: of the messages; None: a text that is no chat.

    Messages tell which turns are replaced, because the tokens of an answer may differ from those that its text has.
    """
    text, before = live.text, live.text.position
    mine = [turn for turn in live.turns if turn.chat == live.chat]
    end = max(before.n_tokens, before.n)
    if digests is None:
        replaced = [turn for turn, after in zip(mine, [*(turn.position for turn in mine[1:]), end]) if after > n]
    else:
        read = [digest for turn in mine for digest in turn.digests]
        m = next((i for i, (one, other) in enumerate(zip(read, digests)) if one != other), min(len(read), len(digests)))
        ends = itertools.accumulate(len(turn.digests) for turn in mine)
        replaced = [turn for turn, after in zip(mine, ends) if after > m]
    kept = live.turns[: len(live.turns) - len(replaced)]
    first = replaced[0] if replaced else _turn_after(live, live.chat, end, kept)
    if n < end:
        n = max(before.ingest(n), min(n, before.floor))  # an ingest in segments is read as a whole
        text.n_tokens = n
        # a turn that began after this is no longer in the text; the memory before it is kept, for undo
        kept = tuple(replace(t, position=-1) if t.chat == live.chat and t.position > n else t for t in kept)
    turn = Turn(first.number, live.chat, first.position if first.position <= n else -1, first.tokens, first.state, ())
    n_kept = sum(len(each.digests) for each in kept if each.chat == live.chat)
    return Begun(list(prompt[n:]), None, n, turn, n_kept, kept, live.chat, before)


def _begin_another(live: Live, prompt: Sequence[int], n: int, first: str) -> Begun:
    before = live.text.position
    chat = f"{first}-{_next(live.turns)}"
    turn = _turn_after(live, chat, n, live.turns)
    live.text.begin(n)
    live.text.lost_kv()  # what is not written again reads the memory of now, as it would if it had lost its slot
    return Begun(list(prompt[n:]), None, 0, turn, 0, live.turns, chat, before)


def _next(turns: Sequence[Turn]) -> int:
    return (turns[-1].number if turns else 0) + 1


def _turn_after(live: Live, chat: str, n: int, kept: Sequence[Turn]) -> Turn:
    position = live.text.position
    checkpoint = position.checkpoint
    state = None if checkpoint is None else checkpoint.state.tobytes()
    return Turn(_next(kept), chat, n, position.n_written, state, ())


def finished(
    live: Live, begun: Begun, about: dict[str, str], messages: Sequence[Message], reply: Message | None
) -> Record:
    """The record after a turn: text and memory as they are now. `about`: as `about_memories`."""
    assert live.record is not None  # belongs to a session
    said = [*messages, *([reply] if reply is not None else [])]
    turn = replace(
        begun.turn,
        digests=tuple(history.digests(said)[begun.n_kept :]),
        messages=tuple(map(dict, said[begun.n_kept :])),
    )
    live.text.catch_up()
    position = live.text.position
    assert position.checkpoint is not None  # there is a memory
    return replace(
        live.record,
        turns=turn.number,
        tokens=position.n_written,
        adapter=about["adapter"],
        memory=_memory_file(position.checkpoint.state, about, live.record, position.n_written),
        text=packed_text(position),
        chat=begun.chat,
        history=(*begun.kept, turn),
    )


#
# what the store keeps of a text
#


def packed_text(position: Position) -> bytes:
    """A text as safetensors: its tokens and how they were read, and the memory where it began."""
    n, log = position.n, position.log
    arrays = {"tokens": log.tokens[:n].astype(np.int32), "wrote": log.wrote[:n].astype(np.uint8)}
    if (log.segment[:n] != TOKEN).any() or log.begins[:n].any():
        arrays |= {"segment": log.segment[:n], "begins": log.begins[:n].astype(np.uint8)}
    first = next(iter(position.checkpoints), None)
    about = {"floor": position.floor, "fresh": position.fresh}
    if first is not None:
        arrays["first"] = first.state
        about |= {"first_position": first.position, "first_written": first.n_written}
    metadata = {key: str(value) for key, value in about.items()} | {"since": position.since}
    return safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in arrays.items()}, metadata)


def live_session(llm: DeltaMemLlama, record: Record) -> Live:
    """A session from the store, of the attached adapter (`check_adapter`). Its text is decoded again when it is needed,
    as the first time.

    Raises SessionDamaged.
    """
    text = new_text(llm)
    if record.version == 0 and not record.memory:  # begins as no other session
        return Live(record, text)
    with _undamaged(record):
        state = _state(record, text.slots.shape)
        if record.text:
            arrays = safetensors.numpy.load(record.text)
            text.position = _position(text, arrays, _metadata(record.text), state, record)
        else:
            text.become(state, record.tokens)
    return Live(record, text, record.chat, record.history)


@contextlib.contextmanager
def _undamaged(record: Record) -> Iterator[None]:
    """Reads what the store has of a session within it. Raises SessionDamaged."""
    try:
        yield
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise SessionDamaged(f"session {record.name}: what the store has of it is damaged: {error}") from error


def check_adapter(record: Record, adapter: str) -> None:
    """Raises InputError if the memory of a session belongs to another adapter."""
    if record.version > 0 and record.adapter != adapter:
        raise InputError(
            f"session {record.name}: its memory belongs to another adapter than the attached one: serve that one, or "
            "export and delete the session"
        )


def _state(record: Record, shape: tuple[int, ...]) -> Any:
    if not record.memory:
        return np.zeros(shape, dtype=np.float32)
    return safetensors.numpy.load(record.memory)["state"].reshape(shape)


def _memory_file(state: Any, about: dict[str, str], record: Record, n_written: int) -> bytes:
    created = record.created.isoformat(timespec="seconds") + "Z"
    return MemorySnapshot(state, {**about, "tokens_written": str(n_written), "created": created}).to_bytes()


def _position(text: Text, arrays: dict[str, Any], about: dict[str, str], state: Any, record: Record) -> Position:
    n, n_ctx = len(arrays["tokens"]), text.n_ctx
    if n > n_ctx:  # served with a smaller context now: the text is gone, the memory stays
        text.become(state, record.tokens, about["since"])
        return text.position
    log = Log(n_ctx)
    log.end = n
    log.tokens[:n], log.wrote[:n] = arrays["tokens"], arrays["wrote"]
    log.segment[:n], log.begins[:n] = arrays.get("segment", TOKEN), arrays.get("begins", 0)
    # nothing is in the KV cache: all is decoded again from where the text began, which makes the checkpoints in between
    first: tuple[Checkpoint, ...] = ()
    if "first" in arrays and int(about["first_position"]) < n:
        first = (Checkpoint(int(about["first_position"]), arrays["first"], int(about["first_written"]), True),)
    checkpoints = Checkpoints(first, (Checkpoint(n, state, record.tokens, True),), N_BYTES, N_LAST)
    of_prompts = np.flatnonzero(log.segment[:n] != REPLY)
    return Position(
        log,
        about["since"],
        n_tokens=n,
        n=n,
        n_kv=0,
        floor=min(int(about["floor"]), n),
        fresh=int(about["fresh"]),
        prompted=int(of_prompts[-1]) + 1 if len(of_prompts) else 0,
        n_written=record.tokens,
        epoch=text.position.epoch + 1,
        adapter=text.slots.n_attached,
        checkpoints=checkpoints,
    )


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return metadata


#
# memories
#


def snapshot_of(record: Record, about: dict[str, str], shape: tuple[int, ...]) -> MemorySnapshot:
    """The memory of a session, as a memory file holds it. Raises SessionDamaged."""
    if record.memory:
        return stored_memory(record)
    return MemorySnapshot.from_bytes(_memory_file(np.zeros(shape, dtype=np.float32), about, record, 0))


def stored_memory(record: Record) -> MemorySnapshot:
    """The memory of a session that has one. Raises SessionDamaged."""
    with _undamaged(record):
        return MemorySnapshot.from_bytes(record.memory)


def with_memory(llm: DeltaMemLlama, record: Record, snapshot: MemorySnapshot) -> Record:
    """A session whose memory is replaced. Its text and turns are gone. Raises MemoryFileError if it does not fit."""
    reason = Memory(llm, llm._text)._misfit(snapshot)
    if reason:
        raise MemoryFileError(f"the memory file: {reason}")
    return imported(record, snapshot)


def imported(record: Record, snapshot: MemorySnapshot) -> Record:
    """A session with the memory of a memory file, and no text."""
    return replace(
        record,
        turns=0,
        tokens=snapshot.tokens_written,
        adapter=snapshot.metadata.get("adapter", ""),
        memory=snapshot.to_bytes(),
        text=b"",
        chat="",
        history=(),
    )


def taken_back(record: Record) -> Record:
    """A session without its latest turn. Raises InputError if there is none, or its memory is no longer kept, and
    SessionDamaged.
    """
    if not record.history:
        raise InputError(f"session {record.name}: there is no turn to take back")
    last, kept = record.history[-1], record.history[:-1]
    if last.state is None:
        raise InputError(f"session {record.name}: the memory before turn {last.number} is no longer kept")
    text, chat = b"", ""
    now = stored_memory(record)
    with _undamaged(record):
        if kept and kept[-1].chat == last.chat == record.chat and last.position >= 0:
            chat, text = last.chat, _cut_text(record.text, last.position)
        state = np.frombuffer(last.state, np.float32).reshape(now.state.shape)
        memory = MemorySnapshot(state, {**now.metadata, "tokens_written": str(last.tokens)}).to_bytes()
    return replace(
        record,
        turns=kept[-1].number if kept else 0,
        tokens=last.tokens,
        memory=memory,
        text=text,
        chat=chat,
        history=kept,
    )


def _cut_text(data: bytes, n: int) -> bytes:
    arrays, about = safetensors.numpy.load(data), _metadata(data)
    for key in ("tokens", "wrote", "segment", "begins"):
        if key in arrays:
            arrays[key] = np.ascontiguousarray(arrays[key][:n])
    about["floor"] = str(min(int(about["floor"]), n))
    return safetensors.numpy.save(arrays, about)
