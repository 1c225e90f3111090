"""Sessions in a database: SQLite by default, or PostgreSQL.

A commit writes a session and its turns in one transaction and compares the version: whoever was second gets `Conflict`.
A lease makes one turn at a time of those of several processes; whoever is killed loses it when it expires, by the clock
of the database.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from .database import Database
from .records import NOTHING, Conflict, Identity, Listed, Record, StoreError, Turn, now
from .tables import (
    CHANGE,
    LEASES,
    SESSIONS,
    TURNS,
    changes_here,
    changes_of,
    fields_of,
    identity_of,
    is_session,
    lease_statements,
    present_time,
    record_of,
    turn_of,
    write_a_turn,
    write_turns,
)  # fmt: skip

_TOGETHER = 100  # rows of a list: while C fetches them, no other thread goes on


class Store:
    """Sessions, each under its owner and its name.

    Args:
        url: of SQLAlchemy; `sqlite:///FILE`, `sqlite:///:memory:` or `postgresql+psycopg://…`. None: `default_url()`.
        n_undo: how many of the latest turns can be taken back.
        keep_messages: whether to keep the messages, or only their digests.
        may_be_away: whether a PostgreSQL that is not there yet is no error: it is asked again at each use.
        must_exist: whether a SQLite file that is not there is an error; otherwise it is made.

    Methods raise StoreError if the database fails or is that of another program, which stays as it is, StoreAway if it
    cannot be reached.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        n_undo: int = 8,
        keep_messages: bool = False,
        may_be_away: bool = False,
        must_exist: bool = False,
    ) -> None:
        self.url = url or default_url()
        self.n_undo = n_undo
        self.keep_messages = keep_messages
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not url and not must_exist:
            _make_data_folder()
        self._database = Database(self.url, may_be_away=may_be_away, must_exist=must_exist)
        self._transaction = self._database.transaction
        self._is_sqlite = self._database.is_sqlite
        self._take_lease, self._prolong_leases = lease_statements(is_sqlite=self._is_sqlite)

    @classmethod
    def temporary(cls, **options: Any) -> Store:
        """A store that ends when it is closed."""
        folder = tempfile.TemporaryDirectory(prefix="deltamem-")
        store = cls(f"sqlite:///{Path(folder.name) / 'sessions.db'}", **options)
        store._folder = folder
        return store

    @property
    def is_local(self) -> bool:
        """Whether it is one file, which one server uses: then a session needs no lease."""
        return self._is_sqlite

    @property
    def shown(self) -> str:
        """The address without a password."""
        return self._database.shown

    def ping(self) -> None:
        """Asks the database whether it is there."""
        self._database.ping()

    def close(self) -> None:
        """Closes its connections. Closing twice is fine."""
        self._database.close()
        if self._folder is not None:
            self._folder.cleanup()

    #
    # reading
    #

    def get(self, owner: str, name: str) -> Record | None:
        """A session, None if there is none."""

        def read(connection: sa.Connection) -> Record | None:
            row = connection.execute(sa.select(SESSIONS).where(*is_session(owner, name))).mappings().first()
            if row is None:
                return None
            turns = connection.execute(
                sa.select(TURNS).where(TURNS.c.session == row["id"]).order_by(TURNS.c.number)
            ).mappings()
            return record_of(row, tuple(map(turn_of, turns)))

        return self._transaction(read, consistent=True)

    def identity(self, owner: str, name: str) -> Identity:
        """Which commit of a session the store has; version 0 if there is none."""
        return self._transaction(lambda connection: identity_of(connection, owner, name), alone=True)

    def list(
        self, owner: str | None = None, *, containing: str = "", limit: int | None = None, after: Record | None = None
    ) -> list[Record]:
        """Sessions, of one owner or of all, the latest first: without memories, texts and turns.

        Args:
            containing: a part of their names, in small or capital letters.
            limit: at most this many.
            after: only those after this one.
        """
        columns = [column for column in SESSIONS.c if column.name not in ("memory", "text")]
        size = sa.func.length(SESSIONS.c.memory).label("size")
        query = sa.select(*columns, size).order_by(SESSIONS.c.updated.desc(), SESSIONS.c.name).limit(limit)
        if owner is not None:
            query = query.where(SESSIONS.c.owner == owner)
        if after is not None:
            updated, name = SESSIONS.c.updated, SESSIONS.c.name
            query = query.where(sa.or_(updated < after.updated, sa.and_(updated == after.updated, name > after.name)))
        if containing:  # of other letters than ASCII's, SQLite does not know which is the small one of a capital one
            spelled = {containing, containing.lower(), containing.upper(), containing.title()}
            query = query.where(sa.or_(*(SESSIONS.c.name.icontains(each, autoescape=True) for each in spelled)))

        def read(connection: sa.Connection) -> list[Record]:
            found = connection.execute(query).mappings().partitions(_TOGETHER)
            return [Listed(**fields_of(row), listed_size=row["size"]) for rows in found for row in rows]

        return self._transaction(read, alone=True)

    def count(self, owner: str | None = None, *, without: Sequence[str] = ()) -> int:
        """Number of sessions, of one owner or of all; `without` those of these names."""
        query = sa.select(sa.func.count()).select_from(SESSIONS)
        if owner is not None:
            query = query.where(SESSIONS.c.owner == owner)
        if without:
            query = query.where(SESSIONS.c.name.not_in(without))
        return self._transaction(lambda connection: connection.scalar(query), alone=True) or 0

    #
    # writing
    #

    def commit(
        self,
        record: Record,
        before: Record | None = None,
        *,
        holder: str = "",
        at: datetime.datetime | None = None,
    ) -> Record:
        """Writes a session in place of the version before it. Returns it with its new version.

        `record.history` holds all of its turns. Raises Conflict if the store has another version than `record`.

        Args:
            before: the session as it was committed, if that is known; then only the turns that differ are looked at.
            holder: whose lease ends with the commit.
            at: the time of the commit. A commit that is made again because nobody knows whether the first came through
                gives the same, and is made once.
        """
        keep = record.turns - self.n_undo
        history = [
            turn if turn.state is None and turn.messages is None else self._kept(turn, turn.number > keep)
            for turn in record.history
        ]
        known = before.history if before is not None and before.identity == record.identity else None
        changes = None if known is None else changes_of(known, history)
        record = replace(record, updated=at or now(), history=tuple(history))

        def write(connection: sa.Connection) -> None:
            id = self._write_session(connection, record)
            write_turns(connection, id, changes_here(connection, id, history) if changes is None else changes)
            if holder:
                connection.execute(
                    LEASES.delete().where(*is_session(record.owner, record.name, LEASES), LEASES.c.holder == holder)
                )

        committed = replace(record, version=record.version + 1)
        try:
            if changes is not None and changes.is_a_turn and not self._is_sqlite:
                self._transaction(lambda connection: write_a_turn(connection, record, changes, holder), alone=True)
            else:
                self._transaction(write, writes=True)
        except Conflict:
            if not self._has(committed):
                raise
        return committed

    def _has(self, record: Record) -> bool:
        """Whether this commit was made: its time to the microsecond tells it from any other."""
        query = sa.select(SESSIONS.c.version, SESSIONS.c.updated).where(*is_session(record.owner, record.name))
        row = self._transaction(lambda connection: connection.execute(query).first())
        return row is not None and tuple(row) == (record.version, record.updated)

    def _write_session(self, connection: sa.Connection, record: Record) -> int:
        """Writes the row of a session, in place of the version before. Returns its id. Raises Conflict."""
        values = {key: getattr(record, key) for key in CHANGE}
        if record.version == 0:
            try:
                made = connection.execute(
                    SESSIONS.insert().values(
                        owner=record.owner, name=record.name, version=1, created=record.created, **values
                    )
                )
            except IntegrityError as error:
                raise Conflict(f"session {record.name}: there is one of this name already") from error
            return int(made.inserted_primary_key[0])  # type: ignore[index]
        changed = connection.scalar(
            SESSIONS.update()
            .where(
                *is_session(record.owner, record.name),
                SESSIONS.c.version == record.version,
                SESSIONS.c.created == record.created,
            )
            .values(version=record.version + 1, **values)
            .returning(SESSIONS.c.id)
        )
        if changed is None:
            raise Conflict(f"session {record.name}: another process has changed it")
        return int(changed)

    def _kept(self, turn: Turn, with_state: bool) -> Turn:
        """A turn without what is not kept of it."""
        drops_state = turn.state is not None and not with_state
        drops_messages = turn.messages is not None and not self.keep_messages
        if not drops_state and not drops_messages:
            return turn
        return replace(
            turn,
            state=None if drops_state else turn.state,
            messages=None if drops_messages else turn.messages,
        )

    def delete(self, owner: str, name: str) -> bool:
        """Deletes a session. False if there is none."""
        statement = SESSIONS.delete().where(*is_session(owner, name))
        n, was_lost = self._once(lambda connection: connection.execute(statement).rowcount)
        return n > 0 or was_lost  # it is gone

    def rename(self, owner: str, name: str, new: str) -> bool:
        """Gives a session another name. False if there is none. Raises Conflict if the name is taken."""
        statement = SESSIONS.update().where(*is_session(owner, name)).values(name=new, version=SESSIONS.c.version + 1)

        def write(connection: sa.Connection) -> int:
            try:
                return connection.execute(statement).rowcount
            except IntegrityError as error:
                raise Conflict(f"session {new}: there is one of this name") from error

        n, was_lost = self._once(write)
        return n > 0 or (was_lost and self.identity(owner, new) != NOTHING)

    def _once(self, write: Callable[[sa.Connection], int]) -> tuple[int, bool]:
        """What a statement returns, and whether an answer to it was lost: then it may have come through before."""
        n_sent = 0

        def send(connection: sa.Connection) -> int:
            nonlocal n_sent
            n_sent += 1
            return write(connection)

        return self._transaction(send, writes=True, alone=True), n_sent > 1

    #
    # leases
    #

    def lease(self, owner: str, name: str, holder: str, seconds: float) -> Identity | None:
        """Takes or prolongs the lease of a session, which need not be there yet. Returns which commit of it the store
        has, as `identity`; None if another holder has the lease.
        """
        new = {"owner": owner, "name": name, "holder": holder, "seconds": seconds}

        def take(connection: sa.Connection) -> Identity | None:
            if connection.scalar(self._take_lease, new) is None:
                return None
            # not in the same statement, which sees the sessions as they were when it began: whoever had the lease may
            # have committed since
            return identity_of(connection, owner, name)

        return self._transaction(take, writes=True, alone=True)

    def prolong(self, holder: str, seconds: float, sessions: Collection[tuple[str, str]]) -> None:
        """Prolongs the leases that a holder has on sessions, which are given by owner and name."""
        new = {"by": holder, "seconds": seconds, "sessions": list(sessions)}
        self._transaction(lambda connection: connection.execute(self._prolong_leases, new), writes=True, alone=True)

    def release(self, owner: str, name: str, holder: str) -> None:
        """Gives a lease back."""
        statement = LEASES.delete().where(*is_session(owner, name, LEASES), LEASES.c.holder == holder)
        self._transaction(lambda connection: connection.execute(statement), writes=True, alone=True)

    def vacuum(self) -> None:
        """Gives the space of what was deleted back to the file system."""
        # of processes that were killed
        ended = LEASES.delete().where(LEASES.c.ends < present_time(is_sqlite=self._is_sqlite))
        self._transaction(lambda connection: connection.execute(ended), writes=True)
        self._database.vacuum()


def default_url() -> str:
    """The store in the user's data folder."""
    return f"sqlite:///{_data_folder() / 'sessions.db'}"


def _make_data_folder() -> None:
    folder = _data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{folder}: the folder of the store cannot be made: {error.strerror}: name a file elsewhere (--store)"
        ) from error


def _data_folder() -> Path:
    return Path(platformdirs.user_data_dir("deltamem", appauthor=False))
