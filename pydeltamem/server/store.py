"""Sessions in a database, by SQLAlchemy: SQLite by default, or PostgreSQL.

One row a session, with its memory file and what is known of its text; one row a turn, with the memory before it, so
that the turn can be taken back. A commit writes both in one transaction and compares the version: whoever was second
gets `Conflict`. A lease makes one turn at a time of those of several processes; whoever is killed loses it when it
expires, by the clock of the database.

A PostgreSQL that goes away gives `StoreAway` until it is back. Connections that broke are replaced.

The memory before a turn is its state, [L, H, r, r] float32 as bytes. A text is its tokens, whether they wrote, and
segments, as safetensors (`pydeltamem.server.session`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import platformdirs
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, IntegrityError

from ..errors import DeltaMemError, InputError

FORMAT = 1  # of the tables
N_CONNECTIONS = 8  # to a PostgreSQL, of one process
_RESTS = 0.5  # seconds that a PostgreSQL that went away is not asked again

T = TypeVar("T")

_tables = sa.MetaData()

_about = sa.Table(
    "about",
    _tables,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
)

_sessions = sa.Table(
    "sessions",
    _tables,
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

_turns = sa.Table(
    "turns",
    _tables,
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
_leases = sa.Table(
    "leases",
    _tables,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("ends", sa.Double, nullable=False),  # seconds since 1970
)


class StoreError(DeltaMemError):
    """The store cannot be reached, is full, or is of another format."""


class StoreAway(StoreError):
    """The database cannot be reached now, and will be asked again."""


class SessionDamaged(StoreError):
    """What the store has of a session cannot be read."""


def told(error: object) -> str:
    """An error as clients may read it: where the store is, the log tells."""
    if isinstance(error, StoreAway):
        return "the store cannot be reached: try again in a moment"
    if isinstance(error, StoreError) and not isinstance(error, SessionDamaged):
        return "the store fails: the log of the server says why"
    return str(error)


class Conflict(DeltaMemError):
    """Another process has changed or holds the session."""


class Identity(NamedTuple):
    """Which commit of which session: one that is deleted and made again counts from 1 again, but was made at another
    time, to the microsecond.
    """

    version: int  # 0: never committed
    created: datetime.datetime | None


NOTHING = Identity(0, None)  # of a session that was never committed


@dataclass(frozen=True)
class Turn:
    """One turn, and how to take it back.

    Attributes:
        number: from 1.
        chat: which chat of the session it belongs to: another text has another one.
        position: tokens of the text before it; -1: the text has others now.
        tokens: tokens ever written before it.
        state: the memory before it; None: no longer kept.
        digests: of its messages, as `history.digests`.
        messages: themselves, if the store keeps them.
    """

    number: int
    chat: str
    position: int
    tokens: int
    state: bytes | None
    digests: tuple[str, ...]
    messages: tuple[dict[str, Any], ...] | None = None
    created: datetime.datetime = field(default_factory=lambda: now())


@dataclass(frozen=True)
class Record:
    """A session as it was committed.

    Attributes:
        version: counts commits; 0: never committed.
        turns: number of turns.
        tokens: tokens ever written into the memory.
        adapter: names the adapter that the memory belongs to.
        memory: a memory file; empty: nothing was written.
        text: what is known of the text; empty: nothing.
        chat: as `Turn.chat`, of the present text.
        history: its turns, ascending.
    """

    owner: str
    name: str
    version: int = 0
    created: datetime.datetime = field(default_factory=lambda: now())
    updated: datetime.datetime = field(default_factory=lambda: now())
    turns: int = 0
    tokens: int = 0
    adapter: str = ""
    memory: bytes = b""
    text: bytes = b""
    chat: str = ""
    history: tuple[Turn, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the memory."""
        return len(self.memory)

    @property
    def identity(self) -> Identity:
        """Which commit it is."""
        return Identity(self.version, self.created) if self.version else NOTHING


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
        self._away: tuple[float, str] = 0.0, ""  # until when it is not asked again, by time.monotonic, and why
        self._is_open = False
        try:
            backend = _parsed(self.url).get_backend_name()
            if backend not in ("sqlite", "postgresql"):
                raise InputError(f"--store {self.shown}: a store is {_SUPPORTED}: {backend} is not supported")
            self._is_sqlite = backend == "sqlite"
            self._file = _sqlite_file(self.url) if self._is_sqlite else None
            options: dict[str, Any] = _to_server(self.url)
            if self._is_sqlite:
                options = {"connect_args": {"timeout": 10, "check_same_thread": False}}
                if self._file is None:  # in memory, each connection has a database of its own: threads take turns
                    options |= {"poolclass": sa.QueuePool, "pool_size": 1, "max_overflow": 0}
            self._engine = sa.create_engine(self.url, **options)
        except ImportError as error:
            raise InputError(
                f"--store {self.shown}: a package for it is missing ({error}): pip install 'pydeltamem[postgres]', "
                f"and give {_SUPPORTED}"
            ) from error
        except sa.exc.ArgumentError as error:
            raise InputError(
                f"--store {self.shown}: not a database that SQLAlchemy can open ({error}): give {_SUPPORTED}"
            ) from error
        if self._is_sqlite:
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(writes=True)
        # a statement is a transaction by itself: BEGIN and COMMIT would be two more round trips to a PostgreSQL
        self._alone = self._engine if self._is_sqlite else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._consistent = self._engine  # SQLite's transactions are so anyway
        if not self._is_sqlite:
            self._consistent = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._take_lease, self._prolong_leases = _lease_statements(is_sqlite=self._is_sqlite)
        if self._file is not None and not os.path.exists(self._file):
            if must_exist:
                raise StoreError(f"{self._file}: there is no such store: check the name (--store)")
            if not url:
                os.makedirs(os.path.dirname(self._file), exist_ok=True)
        try:
            self.ping()
        except StoreError as error:
            if not may_be_away or not isinstance(error, StoreAway):
                self._engine.dispose()
                raise

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
        url = sa.make_url(self.url)
        hidden = {key: "***" for key in url.query if "pass" in key and key != "passfile"}
        return url.update_query_dict(hidden).render_as_string(hide_password=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            if not _is_away(error, is_sqlite=self._is_sqlite):
                raise StoreError(f"{self.shown}: the store fails: {reason}") from error
            if self._is_sqlite or _waited(error):  # it is there
                raise StoreAway(f"{self.shown}: somebody keeps the store locked: {reason}") from error
            self._away = time.monotonic() + _RESTS, f"{self.shown}: the store cannot be reached: {reason}"
            raise StoreAway(self._away[1]) from error

    def _transaction(
        self,
        work: Callable[[sa.Connection], T],
        *,
        writes: bool = False,
        alone: bool = False,
        consistent: bool = False,
    ) -> T:
        """What `work` returns, in a transaction. Where a connection broke, `work` is called again on a new one: it must
        bear that its first transaction came through. `alone`: each of its statements may be a transaction by itself.
        `consistent`: all of its statements see the same commits.
        """
        until, reason = self._away
        if until > time.monotonic():
            raise StoreAway(reason)
        with self._errors():
            if not self._is_open:
                self._open()
            engine = self._writing if writes else self._engine
            if not self._is_sqlite and (alone or consistent):
                engine = self._alone if alone else self._consistent
            try:
                with engine.begin() as connection:
                    return work(connection)
            except sa.exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            with engine.begin() as connection:
                return work(connection)

    def _open(self) -> None:
        """Makes the tables, unless they are there. Raises StoreError if they, or the file, are another program's."""
        if self._file is not None:
            _check_file(self._file)
        with self._engine.begin() as connection:
            self._is_open = self._has_tables(connection)
        if self._is_open:  # nothing is written, so a store that somebody keeps locked can be read
            return
        with self._writing.begin() as connection:
            if not self._is_sqlite:  # several servers may begin at once
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
                self._check_schema(connection)
            is_new = not sa.inspect(connection).has_table(_turns.name)
            _tables.create_all(connection)
            if not self._is_sqlite:
                _tune_postgresql(connection, is_new=is_new)
            if connection.scalar(_FORMAT) is None:
                connection.execute(_about.insert().values(key="format", value=str(FORMAT)))
            self._check_format(connection)
        self._is_open = True

    def _has_tables(self, connection: sa.Connection) -> bool:
        """Whether our tables are there, as this version makes them."""
        inspector = sa.inspect(connection)
        if not set(_tables.tables) <= set(inspector.get_table_names()):
            return False
        if not self._is_sqlite:
            self._check_schema(connection)
        self._check_format(connection)
        return self._is_sqlite or not _narrow(connection)

    def _check_format(self, connection: sa.Connection) -> None:
        found = connection.scalar(_FORMAT)
        if found != str(FORMAT):
            raise StoreError(f"{self.shown}: a store of format {found}, and this version reads format {FORMAT}")

    def _check_schema(self, connection: sa.Connection) -> None:
        """Raises StoreError if another program has tables of our names in a PostgreSQL, where it may have others."""
        inspector = sa.inspect(connection)
        clash = sorted(set(inspector.get_table_names()) & set(_tables.tables))
        is_ours = False
        if _about.name in clash:
            columns = {column["name"] for column in inspector.get_columns(_about.name)}
            is_ours = columns == set(_about.c.keys()) and connection.scalar(_FORMAT) is not None
        if clash and not is_ours:
            raise StoreError(
                f"{self.shown}: another program has a table {clash[0]} there, and nothing was changed: name another one"
            )

    def ping(self) -> None:
        """Asks the database whether it is there."""
        self._transaction(lambda connection: connection.execute(sa.select(1)), alone=True)

    def close(self) -> None:
        """Closes its connections. Closing twice is fine."""
        self._engine.dispose()
        if self._folder is not None:
            self._folder.cleanup()

    #
    # reading
    #

    def get(self, owner: str, name: str) -> Record | None:
        """A session, None if there is none."""

        def read(connection: sa.Connection) -> Record | None:
            row = connection.execute(sa.select(_sessions).where(*_is(owner, name))).mappings().first()
            if row is None:
                return None
            turns = connection.execute(
                sa.select(_turns).where(_turns.c.session == row["id"]).order_by(_turns.c.number)
            ).mappings()
            return _record(row, tuple(map(_turn, turns)))

        return self._transaction(read, consistent=True)

    def identity(self, owner: str, name: str) -> Identity:
        """Which commit of a session the store has; version 0 if there is none."""
        return self._transaction(lambda connection: _identity(connection, owner, name), alone=True)

    def list(self, owner: str | None = None) -> list[Record]:
        """Sessions, of one owner or of all, the latest first: without memories, texts and turns."""
        columns = [column for column in _sessions.c if column.name not in ("memory", "text")]
        size = sa.func.length(_sessions.c.memory).label("size")
        query = sa.select(*columns, size).order_by(_sessions.c.updated.desc(), _sessions.c.name)
        if owner is not None:
            query = query.where(_sessions.c.owner == owner)
        rows = self._transaction(lambda connection: connection.execute(query).mappings().all(), alone=True)
        return [_Listed(**_fields(row), listed_size=row["size"]) for row in rows]

    def count(self, owner: str | None = None) -> int:
        """Number of sessions, of one owner or of all."""
        query = sa.select(sa.func.count()).select_from(_sessions)
        if owner is not None:
            query = query.where(_sessions.c.owner == owner)
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
        changes = None if known is None else _changes_of(known, history)
        record = replace(record, updated=at or now(), history=tuple(history))

        def write(connection: sa.Connection) -> None:
            id = self._write_session(connection, record)
            _write_turns(connection, id, _changes_here(connection, id, history) if changes is None else changes)
            if holder:
                connection.execute(
                    _leases.delete().where(*_is(record.owner, record.name, _leases), _leases.c.holder == holder)
                )

        committed = replace(record, version=record.version + 1)
        try:
            if changes is not None and changes.is_a_turn and not self._is_sqlite:
                self._transaction(lambda connection: _write_a_turn(connection, record, changes, holder), alone=True)
            else:
                self._transaction(write, writes=True)
        except Conflict:
            if not self._has(committed):
                raise
        return committed

    def _has(self, record: Record) -> bool:
        """Whether this commit was made: its time to the microsecond tells it from any other."""
        query = sa.select(_sessions.c.version, _sessions.c.updated).where(*_is(record.owner, record.name))
        row = self._transaction(lambda connection: connection.execute(query).first())
        return row is not None and tuple(row) == (record.version, record.updated)

    def _write_session(self, connection: sa.Connection, record: Record) -> int:
        """Writes the row of a session, in place of the version before. Returns its id. Raises Conflict."""
        values = {key: getattr(record, key) for key in _CHANGE}
        if record.version == 0:
            try:
                made = connection.execute(
                    _sessions.insert().values(
                        owner=record.owner, name=record.name, version=1, created=record.created, **values
                    )
                )
            except IntegrityError as error:
                raise Conflict(f"session {record.name}: there is one of this name already") from error
            return int(made.inserted_primary_key[0])  # type: ignore[index]
        changed = connection.scalar(
            _sessions.update()
            .where(
                *_is(record.owner, record.name),
                _sessions.c.version == record.version,
                _sessions.c.created == record.created,
            )
            .values(version=record.version + 1, **values)
            .returning(_sessions.c.id)
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
        statement = _sessions.delete().where(*_is(owner, name))
        return self._transaction(lambda connection: connection.execute(statement).rowcount, writes=True, alone=True) > 0

    def rename(self, owner: str, name: str, new: str) -> bool:
        """Gives a session another name. False if there is none. Raises Conflict if the name is taken."""
        statement = _sessions.update().where(*_is(owner, name)).values(name=new, version=_sessions.c.version + 1)

        def write(connection: sa.Connection) -> int:
            try:
                return connection.execute(statement).rowcount
            except IntegrityError as error:
                raise Conflict(f"session {new}: there is one of this name") from error

        return self._transaction(write, writes=True, alone=True) > 0

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
            return _identity(connection, owner, name)

        return self._transaction(take, writes=True, alone=True)

    def prolong(self, holder: str, seconds: float, sessions: Collection[tuple[str, str]]) -> None:
        """Prolongs the leases that a holder has on sessions, which are given by owner and name."""
        new = {"by": holder, "seconds": seconds, "sessions": list(sessions)}
        self._transaction(lambda connection: connection.execute(self._prolong_leases, new), writes=True, alone=True)

    def release(self, owner: str, name: str, holder: str) -> None:
        """Gives a lease back."""
        statement = _leases.delete().where(*_is(owner, name, _leases), _leases.c.holder == holder)
        self._transaction(lambda connection: connection.execute(statement), writes=True, alone=True)

    def vacuum(self) -> None:
        """Gives the space of what was deleted back to the file system."""
        # of processes that were killed
        ended = _leases.delete().where(_leases.c.ends < _clock(is_sqlite=self._is_sqlite))
        self._transaction(lambda connection: connection.execute(ended), writes=True)
        tables = "" if self._is_sqlite else ", ".join(_tables.tables)  # a PostgreSQL may have those of others
        engine = self._engine.execution_options(vacuums=True) if self._is_sqlite else self._alone
        with self._errors(), engine.begin() as connection:
            connection.exec_driver_sql(f"VACUUM {tables}")


@dataclass(frozen=True)
class _Listed(Record):
    """A record without its memory, which knows how large that is."""

    listed_size: int = 0

    @property
    def size(self) -> int:
        return self.listed_size


def default_url() -> str:
    """The store in the user's data folder."""
    folder = Path(platformdirs.user_data_dir("deltamem", appauthor=False))
    return f"sqlite:///{folder / 'sessions.db'}"


def now() -> datetime.datetime:
    """The present time, UTC, without a time zone, as databases keep it."""
    return datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)


_SQLITE = b"SQLite format 3\0"  # how its files begin
_SUPPORTED = "sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"


def _parsed(url: str) -> sa.URL:
    """Raises InputError for what is no address. It may hold a password anywhere, so what follows the scheme is not
    shown.
    """
    try:
        return sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # of a port that is no number
        scheme, separator, _ = url.partition("://")
        shown = f"{scheme}://…" if separator else "***" if "@" in url or "pass" in url else url
        raise InputError(
            f"--store {shown}: not an address of a database: give {_SUPPORTED}, with @ : / of a password as %40 %3A %2F"
        ) from None


def _sqlite_file(url: str) -> str | None:
    """The file of a SQLite store; None: it is in memory."""
    parsed = sa.make_url(url)
    name = parsed.database or ":memory:"
    if name.startswith("file:") and "uri" in parsed.query:
        name = url2pathname(urlsplit(name).path)
        if parsed.query.get("mode") == "memory":
            return None
    return None if name == ":memory:" else name


def _check_file(path: str) -> None:
    """Raises StoreError if a file is there that is no SQLite database, or that of another program. It stays as it is,
    to the last byte, and no file comes beside it: so it is only read, and a journal left as it is.
    """
    if not os.path.exists(path):
        return
    if os.path.isfile(path) and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            begins = file.read(len(_SQLITE))
        if begins not in (b"", _SQLITE):  # SQLite takes a file of one byte for an empty one
            raise StoreError(f"{path}: not a SQLite database, and was not changed: name another file")
    # without a log, reading as if nobody wrote needs no other file; otherwise the log has to be read, too
    ways = ["mode=ro", "mode=rw"] if os.path.exists(f"{path}-wal") else ["immutable=1", "mode=rw"]
    for way in ways:
        try:
            uri = f"{Path(path).absolute().as_uri()}?{way}"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as connection:
                is_ours = _is_ours(connection)
            break
        except sqlite3.Error as error:
            if way == ways[-1]:
                raise StoreError(
                    f"{path}: cannot be read as a store, and was not changed: {error}: name another file"
                ) from error
    if not is_ours:
        raise StoreError(f"{path}: the database of another program, which was not changed: name another file")


def _is_ours(connection: sqlite3.Connection) -> bool:
    """Whether a SQLite database has our mark, or is empty."""
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    columns = {column[1] for column in connection.execute(f"PRAGMA table_info({_about.name})")}
    if columns != set(_about.c.keys()):
        return not names
    return connection.execute(f"SELECT value FROM {_about.name} WHERE key = 'format'").fetchone() is not None


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins transactions
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    options = connection.get_execution_options()
    if options.get("vacuums"):  # which no transaction can do
        return
    # one that begins by reading and then writes would fail at once if another process wrote in between
    writes = options.get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_LOCK = 0x64656C74  # of PostgreSQL's advisory locks: who makes the tables
_FORMAT = sa.select(_about.c.value).where(_about.c.key == "format")


def _narrow(connection: sa.Connection) -> list[str]:
    """Tables of a PostgreSQL whose tokens are of 32 bits, as the first versions made them."""
    inspector = sa.inspect(connection)
    types = {
        table.name: next(each["type"] for each in inspector.get_columns(table.name) if each["name"] == "tokens")
        for table in (_sessions, _turns)
    }
    return [name for name, type in types.items() if not isinstance(type, sa.BigInteger)]


def _tune_postgresql(connection: sa.Connection, *, is_new: bool) -> None:
    for name in _narrow(connection):
        connection.exec_driver_sql(f"ALTER TABLE {name} ALTER COLUMN tokens TYPE bigint")
    if is_new:  # states are random to a compressor, which would try each time
        for column in (_sessions.c.memory, _turns.c.state):
            connection.exec_driver_sql(
                f"ALTER TABLE {column.table.name} ALTER COLUMN {column.name} SET STORAGE EXTERNAL"
            )


def _to_server(url: str) -> dict[str, Any]:
    """Options of the engine for a PostgreSQL: so many connections, and a database that fell silent is noticed. What the
    URL says goes first.
    """
    patience = {
        "connect_timeout": 5,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,  # ms
        # a server that fell silent in the middle of a commit must not hold its rows, nor a table that somebody keeps
        # locked the threads of a server
        "options": "-c idle_in_transaction_session_timeout=10s -c lock_timeout=10s -c tcp_keepalives_idle=5 "
        "-c tcp_keepalives_interval=2",
    }
    given = sa.make_url(url).query
    arguments = {key: value for key, value in patience.items() if key not in given}
    return {"pool_size": N_CONNECTIONS, "max_overflow": 0, "connect_args": arguments}


def _is_away(error: Exception, *, is_sqlite: bool) -> bool:
    """Whether a database may do later what failed now: a PostgreSQL that is down, begins, ends, is full, or broke a
    deadlock; a SQLite that another process keeps locked.
    """
    if is_sqlite:
        return "is locked" in str(getattr(error, "orig", ""))
    return isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)) or (
        isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    )


def _waited(error: Exception) -> bool:
    """Whether a PostgreSQL gave up waiting for a lock."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == "55P03"


def _is(owner: Any, name: Any, table: sa.Table = _sessions) -> tuple[Any, Any]:
    return table.c.owner == owner, table.c.name == name


#
# leases
#


def _clock(*, is_sqlite: bool) -> Any:
    """The present time, in seconds since 1970: the database's, because those of several machines differ."""
    if is_sqlite:
        return sa.bindparam("now", callable_=time.time, type_=sa.Double)
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)


def _lease_statements(*, is_sqlite: bool) -> tuple[Any, Any]:
    """How to take a lease, which returns its holder or nothing, and how to prolong several."""
    clock = _clock(is_sqlite=is_sqlite)
    ends = clock + sa.bindparam("seconds", type_=sa.Double)
    new = (sqlite if is_sqlite else postgresql).insert(_leases).values(ends=ends)
    take = new.on_conflict_do_update(
        index_elements=["owner", "name"],
        set_={"holder": new.excluded.holder, "ends": new.excluded.ends},
        where=sa.or_(_leases.c.holder == new.excluded.holder, _leases.c.ends < clock),
    ).returning(_leases.c.holder)
    held = sa.tuple_(_leases.c.owner, _leases.c.name).in_(sa.bindparam("sessions", expanding=True))
    return take, _leases.update().where(_leases.c.holder == sa.bindparam("by"), held).values(ends=ends)


#
# commits
#

_CHANGE = ("updated", "turns", "tokens", "adapter", "memory", "text", "chat")  # columns that each commit writes
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


def _changes_of(before: Sequence[Turn], history: Sequence[Turn]) -> _Changes:
    """From the turns as they were committed to these."""
    pairs = enumerate(zip(before, history))
    n = next((i for i, (one, other) in pairs if one is not other), min(len(before), len(history)))
    here = {turn.number: (turn.created, turn.position, turn.state is not None) for turn in before[n:]}
    return _changes(here, history[n:])


def _changes_here(connection: sa.Connection, id: int, history: Sequence[Turn]) -> _Changes:
    """From the turns in the database to these."""
    columns = _turns.c.number, _turns.c.created, _turns.c.position, _turns.c.state.is_not(None)
    rows = connection.execute(sa.select(*columns).where(_turns.c.session == id))
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


def _write_turns(connection: sa.Connection, id: int, changes: _Changes) -> None:
    if changes.gone:
        connection.execute(_turns.delete().where(_turns.c.session == id, _turns.c.number.in_(changes.gone)))
    if changes.spent:
        spent = _turns.c.session == id, _turns.c.number.in_(changes.spent)
        connection.execute(_turns.update().where(*spent).values(state=None))
    if changes.new:
        connection.execute(_turns.insert(), [{"session": id, **_row(turn)} for turn in changes.new])


def _write_a_turn(connection: sa.Connection, record: Record, changes: _Changes, holder: str) -> None:
    """A whole commit as one statement of PostgreSQL: its parts happen together, or, without the session, not at all."""
    values = {f"session_{key}": getattr(record, key) for key in (*_CREATE, *_CHANGE, "version")}
    values |= {f"turn_{key}": value for key, value in _row(changes.new[0]).items()}
    values |= {"spent": changes.spent, "by": holder}
    try:
        if connection.scalar(_A_TURN if record.version else _FIRST_TURN, values) is None:
            raise Conflict(f"session {record.name}: another process has changed it")
    except IntegrityError as error:
        raise Conflict(f"session {record.name}: there is one of this name already") from error


def _commit_statement(*, is_first: bool) -> Any:
    """What `_write_a_turn` sends."""

    def given(table: sa.Table, prefix: str, *names: str) -> dict[str, Any]:
        return {name: sa.bindparam(f"{prefix}_{name}", type_=table.c[name].type) for name in names}

    known = given(_sessions, "session", "owner", "name", "version", "created")
    mine = _sessions.c.owner == known["owner"], _sessions.c.name == known["name"]
    change: Any
    if is_first:
        change = _sessions.insert().values(version=1, **given(_sessions, "session", *_CREATE, *_CHANGE))
    else:
        new = {"version": _sessions.c.version + 1, **given(_sessions, "session", *_CHANGE)}
        same = _sessions.c.version == known["version"], _sessions.c.created == known["created"]
        change = _sessions.update().where(*mine, *same).values(new)
    session = change.returning(_sessions.c.id).cte("session")
    id = sa.select(session.c.id).scalar_subquery()
    numbers = sa.bindparam("spent", type_=postgresql.ARRAY(sa.Integer))
    spent = _turns.update().where(_turns.c.session == id, _turns.c.number == sa.any_(numbers)).values(state=None)
    turn = given(_turns, "turn", *(column.name for column in _turns.c if column.name != "session"))
    come = _turns.insert().from_select(["session", *turn], sa.select(session.c.id, *turn.values()))
    lease = _leases.c.owner == known["owner"], _leases.c.name == known["name"], _leases.c.holder == sa.bindparam("by")
    given_back = _leases.delete().where(*lease, sa.exists(sa.select(session.c.id)))
    parts = [part.cte(name) for part, name in ((spent, "spent"), (come, "come"), (given_back, "given_back"))]
    return sa.select(session.c.id).add_cte(*parts)


_A_TURN, _FIRST_TURN = _commit_statement(is_first=False), _commit_statement(is_first=True)


#
# rows
#


def _identity(connection: sa.Connection, owner: str, name: str) -> Identity:
    row = connection.execute(_IDENTITY, {"of": owner, "called": name}).first()
    return NOTHING if row is None else Identity(*row)


_IDENTITY = sa.select(_sessions.c.version, _sessions.c.created).where(*_is(sa.bindparam("of"), sa.bindparam("called")))


def _fields(row: Any) -> dict[str, Any]:
    names = ("owner", "name", "version", "created", "updated", "turns", "tokens", "adapter", "chat")
    return {name: row[name] for name in names}


def _record(row: Any, history: tuple[Turn, ...]) -> Record:
    return Record(**_fields(row), memory=row["memory"], text=row["text"], history=history)


def _turn(row: Any) -> Turn:
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
