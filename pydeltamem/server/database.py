"""The database of a store, by SQLAlchemy: SQLite or PostgreSQL. How it is opened, and what its errors mean.

A PostgreSQL that goes away gives `StoreAway` until it is back. Connections that broke are replaced.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from ..errors import InputError
from .records import StoreAway, StoreError
from .tables import ABOUT, FORMAT, FOUND_FORMAT, SESSIONS, TABLES, TURNS

N_CONNECTIONS = 8  # to a PostgreSQL, of one process
_READ_ONLY = "25006"  # SQLSTATE of a PostgreSQL that takes no writes
_RESTS = 0.5  # seconds that a PostgreSQL that went away is not asked again

T = TypeVar("T")


class Database:
    """Where the tables are.

    Args: as of `Store`.

    Attributes:
        is_sqlite: SQLite; otherwise PostgreSQL.
        shown: the address without a password.

    Methods raise StoreError if the database fails or is that of another program, which stays as it is, StoreAway if it
    cannot be reached.
    """

    def __init__(self, url: str, *, may_be_away: bool, must_exist: bool) -> None:
        self.url = url
        self._away: tuple[float, str] = 0.0, ""  # until when it is not asked again, by time.monotonic, and why
        self._is_open = False
        try:
            backend = _parsed(self.url).get_backend_name()
            if backend not in ("sqlite", "postgresql"):
                raise InputError(f"--store {self.shown}: a store is {_SUPPORTED}: {backend} is not supported")
            self.is_sqlite = backend == "sqlite"
            self._file = _sqlite_file(self.url) if self.is_sqlite else None
            options: dict[str, Any] = _to_server(self.url)
            if self.is_sqlite:
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
        if self.is_sqlite:
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(writes=True)
        # a statement is a transaction by itself: BEGIN and COMMIT would be two more round trips to a PostgreSQL
        self._alone = self._engine if self.is_sqlite else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._consistent = self._engine  # SQLite's transactions are so anyway
        if not self.is_sqlite:
            self._consistent = self._engine.execution_options(isolation_level="REPEATABLE READ")
        if must_exist and self._file is not None and not os.path.exists(self._file):
            raise StoreError(f"{self._file}: there is no such store: check the name (--store)")
        try:
            self.ping()
        except StoreError as error:
            if not may_be_away or not isinstance(error, StoreAway):
                self._engine.dispose()
                raise

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
            if not _is_away(error, is_sqlite=self.is_sqlite):
                raise StoreError(f"{self.shown}: the store fails: {reason}") from error
            if self.is_sqlite or _waited(error):  # it is there
                raise StoreAway(f"{self.shown}: somebody keeps the store locked: {reason}") from error
            if _sqlstate(error) == _READ_ONLY:  # another one can be written now: connections find it anew
                self._engine.dispose()
            self._away = time.monotonic() + _RESTS, f"{self.shown}: the store cannot be reached: {reason}"
            raise StoreAway(self._away[1]) from error

    def transaction(
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
            if not self.is_sqlite and (alone or consistent):
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
            if not self.is_sqlite:  # several servers may begin at once
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
                self._check_schema(connection)
            is_new = not sa.inspect(connection).has_table(TURNS.name)
            TABLES.create_all(connection)
            if not self.is_sqlite:
                _tune_postgresql(connection, is_new=is_new)
            if connection.scalar(FOUND_FORMAT) is None:
                connection.execute(ABOUT.insert().values(key="format", value=str(FORMAT)))
            self._check_format(connection)
        self._is_open = True

    def _has_tables(self, connection: sa.Connection) -> bool:
        """Whether our tables are there, as this version makes them."""
        inspector = sa.inspect(connection)
        if not set(TABLES.tables) <= set(inspector.get_table_names()):
            return False
        if not self.is_sqlite:
            self._check_schema(connection)
        self._check_format(connection)
        return self.is_sqlite or not _narrow(connection)

    def _check_format(self, connection: sa.Connection) -> None:
        found = connection.scalar(FOUND_FORMAT)
        if found != str(FORMAT):
            raise StoreError(f"{self.shown}: a store of format {found}, and this version reads format {FORMAT}")

    def _check_schema(self, connection: sa.Connection) -> None:
        """Raises StoreError if another program has tables of our names in a PostgreSQL, where it may have others."""
        inspector = sa.inspect(connection)
        clash = sorted(set(inspector.get_table_names()) & set(TABLES.tables))
        is_ours = False
        if ABOUT.name in clash:
            columns = {column["name"] for column in inspector.get_columns(ABOUT.name)}
            is_ours = columns == set(ABOUT.c.keys()) and connection.scalar(FOUND_FORMAT) is not None
        if clash and not is_ours:
            raise StoreError(
                f"{self.shown}: another program has a table {clash[0]} there, and nothing was changed: name another one"
            )

    def ping(self) -> None:
        """Asks the database whether it is there."""
        self.transaction(lambda connection: connection.execute(sa.select(1)), alone=True)

    def close(self) -> None:
        """Closes its connections. Closing twice is fine."""
        self._engine.dispose()

    def vacuum(self) -> None:
        """Gives the space of what was deleted back to the file system."""
        tables = "" if self.is_sqlite else ", ".join(TABLES.tables)  # a PostgreSQL may have those of others
        engine = self._engine.execution_options(vacuums=True) if self.is_sqlite else self._alone
        with self._errors(), engine.begin() as connection:
            connection.exec_driver_sql(f"VACUUM {tables}")


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
    """Raises StoreError if its folder is missing, or a file is there that is no SQLite database, or that of another
    program. It stays as it is, to the last byte, and no file comes beside it: so it is only read, and a journal left
    as it is.
    """
    if not os.path.exists(path):
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise StoreError(f"{path}: no folder {folder}: make it, or name another file (--store)")
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
    columns = {column[1] for column in connection.execute(f"PRAGMA table_info({ABOUT.name})")}
    if columns != set(ABOUT.c.keys()):
        return not names
    return connection.execute(f"SELECT value FROM {ABOUT.name} WHERE key = 'format'").fetchone() is not None


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


def _narrow(connection: sa.Connection) -> list[str]:
    """Tables of a PostgreSQL whose tokens are of 32 bits, as the first versions made them."""
    inspector = sa.inspect(connection)
    types = {
        table.name: next(each["type"] for each in inspector.get_columns(table.name) if each["name"] == "tokens")
        for table in (SESSIONS, TURNS)
    }
    return [name for name, type in types.items() if not isinstance(type, sa.BigInteger)]


def _tune_postgresql(connection: sa.Connection, *, is_new: bool) -> None:
    for name in _narrow(connection):
        connection.exec_driver_sql(f"ALTER TABLE {name} ALTER COLUMN tokens TYPE bigint")
    if is_new:  # states are random to a compressor, which would try each time
        for column in (SESSIONS.c.memory, TURNS.c.state):
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
    """Whether a database may do later what failed now: a PostgreSQL that is down, begins, ends, is full, broke a
    deadlock, or became a standby; a SQLite that another process keeps locked.
    """
    if is_sqlite:
        return "is locked" in str(getattr(error, "orig", ""))
    if _sqlstate(error) == _READ_ONLY:
        return True
    return isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)) or (
        isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    )


def _waited(error: Exception) -> bool:
    """Whether a PostgreSQL gave up waiting for a lock."""
    return _sqlstate(error) == "55P03"


def _sqlstate(error: Exception) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state
