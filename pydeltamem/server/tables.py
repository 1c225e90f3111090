"""The tables of a store, and the statements that read and write them.

One row a session, with its memory file and what is known of its text; one row a turn, with the memory before it, so
that the turn can be taken back. The memory before a turn is its state, [L, H, r, r] float32 as bytes. A text is its
tokens, whether they wrote, and segments, as safetensors (`pydeltamem.server.session`).
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from .records import NOTHING, Conflict, Identity, Record, Turn

FORMAT = 1  # of the tables

TABLES = sa.MetaData()

ABOUT = sa.Table(
    "about",
    TABLES,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
)

SESSIONS = sa.Table(
    "sessions",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created", sa.DateTime, nullable=False),
    sa.Column("updated", sa.DateTime, nullable=False),
    sa.Column("turns", sa.Integer, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("adapter", sa.String(64), nullable=False),
    sa.Column("memory", sa.LargeBinary, nullable=False),
    sa.Column("text", sa.LargeBinary, nullable=False),
    sa.Column("chat", sa.String(64), nullable=False),
    sa.UniqueConstraint("owner", "name"),
)

TURNS = sa.Table(
    "turns",
    TABLES,
    sa.Column("session", sa.Integer, sa.ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("created", sa.DateTime, nullable=False),
    sa.Column("chat", sa.String(64), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("state", sa.LargeBinary),
    sa.Column("digests", sa.Text, nullable=False),
    sa.Column("messages", sa.Text),
)

# apart from the sessions: one that was never committed can be leased, too, and these rows are small and change often
LEASES = sa.Table(
    "leases",
    TABLES,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("ends", sa.Double, nullable=False),  # seconds since 1970
)

FOUND_FORMAT = sa.select(ABOUT.c.value).where(ABOUT.c.key == "format")


def is_session(owner: Any, name: Any, table: sa.Table = SESSIONS) -> tuple[Any, Any]:
    """The condition that a row belongs to a session."""
    return table.c.owner == owner, table.c.name == name


#
# leases
#


_LONGEST = 10  # times our own seconds: how long a lease of another process may be


def present_time(*, is_sqlite: bool) -> Any:
    """The present time, in seconds since 1970: the database's, because those of several machines differ."""
    if is_sqlite:
        return sa.bindparam("now", callable_=time.time, type_=sa.Double)
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)


def lease_statements(*, is_sqlite: bool) -> tuple[Any, Any]:
    """How to take a lease, which returns its holder or nothing, and how to prolong several."""
    clock, seconds = present_time(is_sqlite=is_sqlite), sa.bindparam("seconds", type_=sa.Double)
    ends = clock + seconds
    # a lease longer than any: the clock was set back since it was taken; whoever lives prolongs its own in a moment
    is_over = sa.or_(LEASES.c.ends < clock, LEASES.c.ends > clock + _LONGEST * seconds)
    new = (sqlite if is_sqlite else postgresql).insert(LEASES).values(ends=ends)
    take = new.on_conflict_do_update(
        index_elements=["owner", "name"],
        set_={"holder": new.excluded.holder, "ends": new.excluded.ends},
        where=sa.or_(LEASES.c.holder == new.excluded.holder, is_over),
    ).returning(LEASES.c.holder)
    held = sa.tuple_(LEASES.c.owner, LEASES.c.name).in_(sa.bindparam("sessions", expanding=True))
    return take, LEASES.update().where(LEASES.c.holder == sa.bindparam("by"), held).values(ends=ends)


#
# commits
#

CHANGE = ("updated", "turns", "tokens", "adapter", "memory", "text", "chat")  # columns that each commit writes
_CREATE = ("owner", "name", "created")  # and those that the first one writes besides


@dataclass(frozen=True)
class _Changes:
    """What a commit does to the turns of a session.

    Attributes:
        gone: numbers of those that are taken back, or replaced.
        spent: numbers of those whose state is no longer kept.
        new: those that come.
    """

    gone: list[int]
    spent: list[int]
    new: list[Turn]

    @property
    def is_a_turn(self) -> bool:
        """Whether the session goes on by a turn: nearly all commits."""
        return not self.gone and len(self.new) == 1


def changes_of(before: Sequence[Turn], history: Sequence[Turn]) -> _Changes:
    """From the turns as they were committed to these."""
    pairs = enumerate(zip(before, history))
    n = next((i for i, (one, other) in pairs if one is not other), min(len(before), len(history)))
    here = {turn.number: (turn.created, turn.position, turn.state is not None) for turn in before[n:]}
    return _changes(here, history[n:])


def changes_here(connection: sa.Connection, id: int, history: Sequence[Turn]) -> _Changes:
    """From the turns in the database to these."""
    columns = TURNS.c.number, TURNS.c.created, TURNS.c.position, TURNS.c.state.is_not(None)
    rows = connection.execute(sa.select(*columns).where(TURNS.c.session == id))
    return _changes({number: (created, position, kept) for number, created, position, kept in rows}, history)


def _changes(here: dict[int, tuple[datetime.datetime, int, bool]], history: Sequence[Turn]) -> _Changes:
    """Turns differ by when they were made; one changes by its position, and when its state is dropped."""
    there = {turn.number: turn for turn in history}
    gone = [
        number
        for number, (created, position, _) in here.items()
        if number not in there or (there[number].created, there[number].position) != (created, position)
    ]
    spent = [
        number
        for number, (_, _, kept) in here.items()
        if kept and number in there and number not in gone and there[number].state is None
    ]
    return _Changes(gone, spent, [turn for number, turn in there.items() if number not in here or number in gone])


def write_turns(connection: sa.Connection, id: int, changes: _Changes) -> None:
    """Writes the turns of a session, whose id is given."""
    if changes.gone:
        connection.execute(TURNS.delete().where(TURNS.c.session == id, TURNS.c.number.in_(changes.gone)))
    if changes.spent:
        spent = TURNS.c.session == id, TURNS.c.number.in_(changes.spent)
        connection.execute(TURNS.update().where(*spent).values(state=None))
    if changes.new:
        connection.execute(TURNS.insert(), [{"session": id, **_row(turn)} for turn in changes.new])


def write_a_turn(connection: sa.Connection, record: Record, changes: _Changes, holder: str) -> None:
    """A whole commit as one statement of PostgreSQL: its parts happen together, or, without the session, not at all."""
    values = {f"session_{key}": getattr(record, key) for key in (*_CREATE, *CHANGE, "version")}
    values |= {f"turn_{key}": value for key, value in _row(changes.new[0]).items()}
    values |= {"spent": changes.spent, "by": holder}
    try:
        if connection.scalar(_A_TURN if record.version else _FIRST_TURN, values) is None:
            raise Conflict(f"session {record.name}: another process has changed it")
    except IntegrityError as error:
        raise Conflict(f"session {record.name}: there is one of this name already") from error


def _commit_statement(*, is_first: bool) -> Any:
    """What `write_a_turn` sends."""

    def given(table: sa.Table, prefix: str, *names: str) -> dict[str, Any]:
        return {name: sa.bindparam(f"{prefix}_{name}", type_=table.c[name].type) for name in names}

    known = given(SESSIONS, "session", "owner", "name", "version", "created")
    mine = SESSIONS.c.owner == known["owner"], SESSIONS.c.name == known["name"]
    change: Any
    if is_first:
        change = SESSIONS.insert().values(version=1, **given(SESSIONS, "session", *_CREATE, *CHANGE))
    else:
        new = {"version": SESSIONS.c.version + 1, **given(SESSIONS, "session", *CHANGE)}
        same = SESSIONS.c.version == known["version"], SESSIONS.c.created == known["created"]
        change = SESSIONS.update().where(*mine, *same).values(new)
    session = change.returning(SESSIONS.c.id).cte("session")
    id = sa.select(session.c.id).scalar_subquery()
    numbers = sa.bindparam("spent", type_=postgresql.ARRAY(sa.Integer))
    spent = TURNS.update().where(TURNS.c.session == id, TURNS.c.number == sa.any_(numbers)).values(state=None)
    turn = given(TURNS, "turn", *(column.name for column in TURNS.c if column.name != "session"))
    come = TURNS.insert().from_select(["session", *turn], sa.select(session.c.id, *turn.values()))
    lease = LEASES.c.owner == known["owner"], LEASES.c.name == known["name"], LEASES.c.holder == sa.bindparam("by")
    given_back = LEASES.delete().where(*lease, sa.exists(sa.select(session.c.id)))
    parts = [part.cte(name) for part, name in ((spent, "spent"), (come, "come"), (given_back, "given_back"))]
    return sa.select(session.c.id).add_cte(*parts)


_A_TURN, _FIRST_TURN = _commit_statement(is_first=False), _commit_statement(is_first=True)


#
# rows
#


def identity_of(connection: sa.Connection, owner: str, name: str) -> Identity:
    """Which commit of a session is there."""
    row = connection.execute(_IDENTITY, {"of": owner, "called": name}).first()
    return NOTHING if row is None else Identity(*row)


_IDENTITY = sa.select(SESSIONS.c.version, SESSIONS.c.created).where(
    *is_session(sa.bindparam("of"), sa.bindparam("called"))
)


def fields_of(row: Any) -> dict[str, Any]:
    """Of a record, without its memory, text and turns."""
    names = ("owner", "name", "version", "created", "updated", "turns", "tokens", "adapter", "chat")
    return {name: row[name] for name in names}


def record_of(row: Any, history: tuple[Turn, ...]) -> Record:
    """A session by its row."""
    return Record(**fields_of(row), memory=row["memory"], text=row["text"], history=history)


def turn_of(row: Any) -> Turn:
    """A turn by its row."""
    messages = row["messages"]
    return Turn(
        number=row["number"],
        chat=row["chat"],
        position=row["position"],
        tokens=row["tokens"],
        state=row["state"],
        digests=tuple(json.loads(row["digests"])),
        messages=None if messages is None else tuple(json.loads(messages)),
        created=row["created"],
    )


def _row(turn: Turn) -> dict[str, Any]:
    return {
        "number": turn.number,
        "created": turn.created,
        "chat": turn.chat,
        "position": turn.position,
        "tokens": turn.tokens,
        "state": turn.state,
        "digests": json.dumps(turn.digests),
        "messages": None if turn.messages is None else _json(turn.messages),
    }


def _json(messages: Any) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which databases do not take
        return json.dumps(messages)
    return text
