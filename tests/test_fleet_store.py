"""The store over SQLite and over PostgreSQL: commits, leases, and a database that goes away and comes back."""

from __future__ import annotations

import concurrent.futures
import os
import sqlite3
import subprocess
import sys
import threading
import traceback
from dataclasses import replace

import platformdirs
import pytest
import sqlalchemy as sa

from fleet import PostgreSQL, free_port, postgresql_folder, until
from pydeltamem import InputError
from pydeltamem.server.records import Conflict, Record, StoreAway, StoreError, Turn, now
from pydeltamem.server.store import Store
from refusals import refuses

needs_postgresql = pytest.mark.skipif(
    postgresql_folder() is None, reason="no PostgreSQL or HAProxy: `make fleet-tools` installs them"
)


@pytest.fixture(scope="module")
def database():
    """A PostgreSQL of this module."""
    with PostgreSQL() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgresql)])
def url(request, tmp_path):
    """Of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'sessions.db'}"
    database = request.getfixturevalue("database")
    database.sql("DROP SCHEMA public CASCADE")
    database.sql("CREATE SCHEMA public")
    return database.url


@pytest.fixture
def store(url):
    store = Store(url, n_undo=2, keep_messages=True)
    yield store
    store.close()


def turn(number, content="hello"):
    messages = ({"role": "user", "content": content},)
    return Turn(number, "chat", number * 10, number * 100, bytes([number]) * 64, (content,), messages)


def after(record, *more):
    """A record with further turns."""
    history = (*record.history, *more)
    return replace(
        record,
        turns=len(history),
        tokens=100 * len(history),
        adapter="a",
        memory=bytes([len(history)]) * 9000,
        text=b"text",
        chat="chat",
        history=history,
    )


def test_a_commit_is_read_back(store):
    first = store.commit(after(Record("o", "ada"), turn(1)))
    assert store.get("o", "ada") == first and first.version == 1
    second = store.commit(after(first, turn(2, "Zoë 日本")), first)
    assert store.get("o", "ada") == second
    assert store.identity("o", "ada") == second.identity and store.identity("o", "nobody").version == 0
    assert store.get("x", "ada") is None
    assert [(one.name, one.size) for one in store.list("o")] == [("ada", 9000)] and store.list("x") == []
    assert store.list("o", containing="DA") == store.list("o", limit=1) == store.list("o")
    assert store.list("o", containing="%") == store.list("o", containing="b") == []
    assert (store.count(), store.count("x")) == (1, 0)
    assert store.count("o", without=["ada", "bo"]) == 0 and store.count("o", without=["bo"]) == 1


def test_a_long_list_is_whole(store):
    names = [store.commit(Record("o", f"s{i}")).name for i in range(250)]
    listed = store.list("o")
    assert [each.name for each in listed] == names[::-1]
    assert [each.name for each in store.list("o", after=listed[99])] == names[149::-1]


def test_the_second_of_two_commits_is_refused(store):
    first = store.commit(after(Record("", "ada"), turn(1)))
    with pytest.raises(Conflict, match="ada"):
        store.commit(after(Record("", "ada"), turn(1)))
    second = store.commit(after(first, turn(2)))
    with pytest.raises(Conflict, match="ada"):
        store.commit(after(first, turn(2)))
    assert store.get("", "ada") == second


def test_a_commit_made_again_is_made_once(store):
    """Its answer was lost: whoever makes it again, with the same time, is told that it is there."""
    for number in (1, 2):
        record, at = after(store.get("", "ada") or Record("", "ada"), turn(number)), now()
        committed = store.commit(record, at=at)
        assert store.commit(record, at=at) == committed == store.get("", "ada")
        with pytest.raises(Conflict):
            store.commit(record, at=now())


def test_states_are_kept_of_the_latest_turns(store):
    record = Record("", "ada")
    for i in range(1, 5):
        record = store.commit(after(record, turn(i)), record)
    assert [one.state is None for one in store.get("", "ada").history] == [True, True, False, False]
    back = replace(record, turns=2, history=record.history[:2])
    record = store.commit(after(back, turn(3, "other")), record)
    assert store.get("", "ada") == record
    assert store.get("", "ada").history[-1].messages[0]["content"] == "other"


def test_delete_and_rename(store):
    one = store.commit(after(Record("", "ada"), turn(1)))
    store.commit(after(Record("", "bo"), turn(1)))
    with pytest.raises(Conflict, match="bo"):
        store.rename("", "ada", "bo")
    assert store.rename("", "ada", "carl") and not store.rename("", "ada", "dan")
    assert store.identity("", "carl") == (one.version + 1, one.created)
    with pytest.raises(Conflict):  # who had it under its old name
        store.commit(after(one, turn(2)))
    assert store.delete("", "carl") and not store.delete("", "carl")
    assert [one.name for one in store.list()] == ["bo"]
    store.vacuum()


@pytest.mark.parametrize("knows_before", [True, False])  # a statement of its own
def test_a_session_that_is_made_again_is_another(store, knows_before):
    """It has the versions of the first one."""
    first = store.commit(after(Record("", "ada"), turn(1)))
    assert store.delete("", "ada")
    second = store.commit(after(Record("", "ada"), turn(1, "other")))
    assert second.version == first.version and second.identity != first.identity
    assert store.identity("", "ada") == second.identity == store.lease("", "ada", "one", 60)
    with pytest.raises(Conflict, match="ada"):
        store.commit(after(first, turn(2)), first if knows_before else None)
    assert store.get("", "ada") == second
    third = store.commit(after(second, turn(2)), second if knows_before else None)
    assert store.get("", "ada") == third


def test_a_session_is_read_as_of_one_commit(store, url):
    """Its turns are those of its row, although another process commits between the two."""
    first = store.commit(after(Record("", "ada"), turn(1)))
    other, to_do = Store(url, n_undo=2, keep_messages=True), [after(first, turn(2))]

    def commit(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("SELECT") and "FROM sessions" in statement and to_do:
            other.commit(to_do.pop(), first)

    sa.event.listen(sa.Engine, "after_cursor_execute", commit)
    try:
        assert store.get("", "ada") == first and not to_do
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", commit)
    assert store.get("", "ada").turns == 2
    other.close()


def test_half_a_character_is_kept(store):
    """JSON may have one, and a message is kept as it came."""
    record = store.commit(after(Record("", "ada"), turn(1, "\ud83d"), turn(2, "Zoë")))
    assert store.get("", "ada") == record


def test_more_tokens_than_32_bits_count(store):
    record = replace(after(Record("", "ada"), turn(1)), tokens=2**53)
    first = store.commit(record)
    second = store.commit(replace(after(first, replace(turn(2), tokens=2**53)), tokens=2**53), first)
    assert store.get("", "ada") == second


@needs_postgresql
def test_a_postgresql_of_the_first_versions_counts_so_from_now_on(database):
    """Its tokens had 32 bits."""
    database.sql("DROP SCHEMA public CASCADE")
    database.sql("CREATE SCHEMA public")
    Store(database.url).close()
    for table in ("sessions", "turns"):
        database.sql(f"ALTER TABLE {table} ALTER COLUMN tokens TYPE integer")
    store = Store(database.url)
    test_more_tokens_than_32_bits_count(store)
    store.close()


def test_after_a_vacuum_commits_are_whole(store):
    """Its connection is used again, for transactions."""
    record = store.commit(after(Record("", "ada"), turn(1), turn(2)))
    store.vacuum()

    def fail(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("INSERT INTO turns"):
            raise KeyboardInterrupt

    sa.event.listen(sa.Engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            store.commit(after(record, turn(3), turn(4)))
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", fail)
    assert store.get("", "ada") == record


def test_a_vacuum_that_fails_is_an_error_of_the_store(tmp_path):
    """Here a file has as many bytes as it may have."""
    script = (
        "import os, resource, signal; from pydeltamem.server.records import Record, StoreError\n"
        "from pydeltamem.server.store import Store\n"
        "store = Store('sqlite:///sessions.db')\n"
        "for i in range(40): store.commit(Record('', str(i), memory=os.urandom(9000)))\n"
        "for i in range(20): store.delete('', str(i))\n"
        "store.close(); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: store.vacuum()\n"
        "except StoreError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "sessions.db" in done.stdout


def test_a_sqlite_that_somebody_keeps_locked(tmp_path):
    """It is read meanwhile, also by whoever opens it only now; what is to be written is for later."""
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    first = Store(f"{url}?timeout=0.05")
    record = first.commit(after(Record("", "ada"), turn(1)))
    holder = sqlite3.connect(tmp_path / "sessions.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    second = Store(f"{url}?timeout=0.05", must_exist=True)
    assert second.get("", "ada") == record and second.count() == 1
    for store in (first, second):
        with refuses(StoreAway, "sessions.db"):
            store.commit(after(record, turn(2)), record)
        store.close()
    holder.close()


@needs_postgresql
def test_a_table_that_somebody_keeps_locked(database):
    """It holds no thread for ever, and what needs no such table goes on."""
    limits, store = [], Store(database.url)
    engine = sa.create_engine(database.url)

    def note(connection, *_):
        limits.append(connection.connection.driver_connection.execute("SHOW lock_timeout").fetchone()[0])

    sa.event.listen(sa.Engine, "after_cursor_execute", note)
    store.ping()
    sa.event.remove(sa.Engine, "after_cursor_execute", note)
    store.close()
    assert limits and "0" not in limits  # 0: it waits for ever
    store = Store(f"{database.url}?options=-c lock_timeout%3D50ms")
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StoreAway):
            store.count()
        store.ping()
    store.count()
    store.close()
    engine.dispose()


def test_one_holder_at_a_time(store):
    assert store.lease("", "ada", "one", 60).version == 0  # nobody has committed it yet
    assert store.lease("", "ada", "two", 60) is None
    assert store.lease("", "bo", "two", 60).version == 0 and store.lease("x", "ada", "two", 60).version == 0
    committed = store.commit(after(Record("", "ada"), turn(1)), holder="one")  # gives it back
    assert store.lease("", "ada", "two", 60).version == 1
    store.commit(after(committed, turn(2)), holder="one")  # not its own
    assert store.lease("", "ada", "one", 60) is None
    store.release("", "ada", "one")
    assert store.lease("", "ada", "one", 60) is None
    store.release("", "ada", "two")
    assert store.lease("", "ada", "one", 60).version == 2


def test_a_lease_expires_unless_it_is_prolonged(store):
    sessions = [("", "ada"), ("", "bo")]
    for owner, name in (*sessions, ("", "carl")):
        assert store.lease(owner, name, "one", -1).version == 0
    store.prolong("one", 60, sessions)
    assert store.lease("", "ada", "two", 60) is None and store.lease("", "bo", "two", 60) is None
    assert store.lease("", "carl", "two", 60).version == 0  # was not named: nobody knows of it
    store.prolong("one", -1, sessions)
    assert store.lease("", "ada", "two", 60).version == 0
    store.prolong("one", 60, sessions)  # one is lost
    assert store.lease("", "ada", "one", 60) is None and store.lease("", "bo", "two", 60) is None


@needs_postgresql
def test_a_clock_that_was_set_back_holds_no_session(store, url):
    """Found: the session of a process that was killed before was busy until the clock stood there again."""
    assert store.lease("", "ada", "one", 60) is not None
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE leases SET ends = ends + 3600")
    engine.dispose()
    assert store.lease("", "ada", "two", 60) is not None
    assert store.lease("", "ada", "one", 60) is None


def test_whoever_waited_for_a_lease_gets_the_version_that_was_committed_meanwhile(database):
    """Its statement began while the holder's commit was under way, and sees the sessions as they were then."""
    store = Store(database.url)
    name = "waited"
    store.commit(after(Record("", name), turn(1)))
    assert store.lease("", name, "one", 60).version == 1
    engine = sa.create_engine(database.url)
    waits = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        connection.execute(sa.text("UPDATE sessions SET version = 2 WHERE name = :name"), {"name": name})
        connection.execute(sa.text("DELETE FROM leases WHERE name = :name"), {"name": name})
        second = pool.submit(store.lease, "", name, "two", 60)
        until(lambda: connection.scalar(waits) == 1)
        connection.commit()
        assert second.result().version == 2
    engine.dispose()
    store.close()


@needs_postgresql
def test_a_turn_is_three_statements(database):
    """The lease, the version, the commit: each is a transaction, which nothing begins and ends."""
    store, said = Store(database.url), []
    record, name = Record("", "three"), "three"

    def note(connection, cursor, statement, parameters, context, executemany):
        said.append((statement.split()[0], connection.connection.driver_connection.autocommit))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for number in range(1, 5):
            said.clear()
            assert store.lease("", name, "one", 60).version == number - 1
            record = store.commit(after(record, turn(number)), record, holder="one")
            assert said == [("INSERT", True), ("SELECT", True), ("WITH", True)]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert store.get("", name) == record
    assert store.lease("", name, "two", 60).version == 4
    store.close()


@pytest.mark.parametrize("n_turns", [0, 3])
def test_a_turn_that_comes_second_writes_nothing(store, n_turns):
    record = Record("", "ada")
    for number in range(1, n_turns + 1):
        record = store.commit(after(record, turn(number)), record)
    first = store.commit(after(record, turn(n_turns + 1, "first")), record)
    assert store.lease("", "ada", "two", 60).version == n_turns + 1
    with pytest.raises(Conflict, match="ada"):
        store.commit(after(record, turn(n_turns + 1, "second")), record, holder="two")
    assert store.get("", "ada") == first
    assert store.lease("", "ada", "one", 60) is None  # it is still held


def test_of_many_holders_at_once_one_gets_the_lease(url):
    stores, got = [Store(url) for _ in range(6)], []
    begin = threading.Barrier(len(stores))

    def take(i):
        begin.wait()
        if stores[i].lease("", "ada", str(i), 60) is not None:
            got.append(i)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    for store in stores:
        store.close()


def test_a_store_of_a_newer_format_is_refused(url):
    Store(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE about SET value = '99'")
    engine.dispose()
    with pytest.raises(StoreError, match="99"):
        Store(url)


# databases that are not ours

FOREIGN = {
    "bookmarks": "CREATE TABLE bookmarks (address TEXT)",
    "sessions": "CREATE TABLE sessions (id TEXT, user TEXT)",
    "about": "CREATE TABLE about (author TEXT)",
    "marked otherwise": "CREATE TABLE about (key TEXT, value TEXT); INSERT INTO about VALUES ('author', 'Ada')",
    "a view": "CREATE VIEW seven AS SELECT 7",
}


def contents(folder):
    """All files, with their bytes. The index of a log is no part of a database."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}


@pytest.mark.parametrize("made", FOREIGN.values(), ids=FOREIGN)
def test_the_sqlite_database_of_another_program_stays_as_it_is(tmp_path, made):
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.executescript(made)
    connection.close()
    before = contents(tmp_path)
    for options in ({}, {"must_exist": True}):
        with refuses(StoreError, tmp_path / "other.db"):
            Store(f"sqlite:///{tmp_path / 'other.db'}", **options)
    assert contents(tmp_path) == before


def test_so_does_one_with_a_log(tmp_path):
    """Its program was killed: what it wrote is in the log, which nobody but it may take into the database."""
    script = (
        "import os, sqlite3; connection = sqlite3.connect('other.db', isolation_level=None); "
        "connection.execute('PRAGMA journal_mode=WAL'); connection.execute('CREATE TABLE bookmarks (a)'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    before = contents(tmp_path)
    assert before["other.db-wal"]
    with refuses(StoreError, tmp_path / "other.db"):
        Store(f"sqlite:///{tmp_path / 'other.db'}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("data", [b"a", b"this is a text\n" * 1000, b"SQLite format 3\0" + b"x" * 5000])
def test_a_file_that_is_no_database_stays_as_it_is(tmp_path, data):
    (tmp_path / "some.file").write_bytes(data)
    with refuses(StoreError, tmp_path / "some.file"):
        Store(f"sqlite:///{tmp_path / 'some.file'}")
    assert contents(tmp_path) == {"some.file": data}


def test_a_folder_is_no_store(tmp_path):
    with refuses(StoreError, tmp_path):
        Store(f"sqlite:///{tmp_path}")


def test_a_folder_that_is_missing(tmp_path):
    folder = tmp_path / "missing"
    with refuses(StoreError, f"{folder}:"):
        Store(f"sqlite:///{folder / 'sessions.db'}")


def test_a_data_folder_that_cannot_be_made(tmp_path, monkeypatch):
    """As for a user without a home: found as an OSError, which did not name the option."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda *_, **__: str(file / "deltamem"))
    with refuses(StoreError, file / "deltamem", "--store"):
        Store()


def test_a_sqlite_that_is_closed_is_one_file(tmp_path):
    """Whoever copies it has all commits."""
    path, copy = tmp_path / "sessions.db", tmp_path / "copy.db"
    store = Store(f"sqlite:///{path}", keep_messages=True)
    committed = store.commit(after(Record("", "ada"), turn(1)))
    store.close()
    assert os.listdir(tmp_path) == ["sessions.db"]
    copy.write_bytes(path.read_bytes())
    store = Store(f"sqlite:///{copy}", must_exist=True)
    assert store.get("", "ada") == committed
    store.close()


def test_a_store_that_must_exist(tmp_path):
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    for address in (url, f"sqlite:///file:{tmp_path / 'sessions.db'}?uri=true"):
        with refuses(StoreError, tmp_path / "sessions.db"):
            Store(address, must_exist=True)
    assert not os.listdir(tmp_path)
    Store(url).close()
    Store(url, must_exist=True).close()


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "sessions.db").touch()
    store = Store(f"sqlite:///{tmp_path / 'sessions.db'}")
    store.commit(after(Record("", "ada"), turn(1)))
    store.close()


def test_a_store_whose_server_was_killed_is_opened(tmp_path):
    """With its log beside it, and by an address of another form."""
    script = (
        "import os; from pydeltamem.server.records import Record; from pydeltamem.server.store import Store; "
        "Store('sqlite:///sessions.db').commit(Record('', 'ada')); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "sessions.db-wal").stat().st_size
    for url in (f"sqlite:///{tmp_path / 'sessions.db'}", f"sqlite:///file:{tmp_path / 'sessions.db'}?uri=true"):
        store = Store(url, must_exist=True)
        assert [record.name for record in store.list()] == ["ada"]
        store.close()


@needs_postgresql
@pytest.mark.parametrize("made", ["sessions (id text)", "about (author text)", "about (key text, value text)"])
def test_a_postgresql_is_shared_unless_names_clash(database, made):
    def tables():
        engine = sa.create_engine(database.url)
        with engine.connect() as connection:
            names = sorted(sa.inspect(connection).get_table_names())
        engine.dispose()
        return names

    database.sql("DROP SCHEMA public CASCADE")
    database.sql("CREATE SCHEMA public")
    database.sql("CREATE TABLE bookmarks (address text)")
    database.sql(f"CREATE TABLE {made}")
    before = tables()
    with refuses(StoreError, made.split()[0]):
        Store(database.url)
    assert tables() == before
    database.sql(f"DROP TABLE {made.split()[0]}")
    for _ in range(2):
        Store(database.url).close()
    assert {"bookmarks", "sessions"} < set(tables())


# in memory


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite:///file:some?mode=memory&uri=true"],
)
def test_threads_share_a_store_in_memory(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(url, must_exist=True)
    names = [f"{i}" for i in range(8)]

    def turns(name):
        record = Record("", name)
        for number in range(1, 6):
            assert store.lease("", name, "one", 60).version == record.version
            record = store.commit(after(record, turn(number)), record, holder="one")
            assert store.get("", name) == record
        return record

    with concurrent.futures.ThreadPoolExecutor(len(names)) as threads:
        assert [record.version for record in threads.map(turns, names)] == [5] * len(names)
    store.vacuum()
    assert sorted(record.name for record in store.list()) == names
    store.close()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("url", ["mysql://me:secret@host/x", "mysql+pymysql://me:secret@host/x", "mssql://host/x"])
def test_other_databases_are_not_supported(url):
    with refuses(InputError, "sqlite:///FILE", "postgresql+psycopg://USER@HOST/NAME") as error:
        Store(url)
    assert "secret" not in str(error.value) and "pip" not in str(error.value)


def test_a_server_database_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r"pydeltamem\[postgres\]"):
        Store("postgresql+psycopg://user:secret@127.0.0.1/x")


def test_nobody_there_is_an_error_unless_it_may_be():
    url = f"postgresql+psycopg://user:secret@127.0.0.1:{free_port()}/x"
    with pytest.raises(StoreAway) as error:
        Store(url)
    assert "secret" not in str(error.value)
    store = Store(url, may_be_away=True)
    for ask in (store.ping, store.count, lambda: store.lease("", "ada", "one", 60)):
        with pytest.raises(StoreAway, match="127"):
            ask()
    store.close()


@pytest.mark.parametrize(
    "address", ["user@127.0.0.1:{}/x?password=secret", "user:secret@127.0.0.1:{}/x?sslpassword=secret"]
)
def test_an_address_is_shown_without_passwords(address):
    with pytest.raises(StoreAway) as error:
        Store(f"postgresql+psycopg://{address.format(free_port())}")
    assert "127.0.0.1" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("url", [
    "postgresql+psycopg://user:secret@host:port/x", "postgresql+psycopg://user:other:secret/x",
    "postgresql+psycopg//user:secret@host/x", "host=db password=secret",
])  # fmt: skip
def test_what_is_no_address_is_refused_without_its_password(url):
    with refuses(InputError, "--store") as error:
        Store(url)
    assert "secret" not in "".join(traceback.format_exception(error.value))


@needs_postgresql
def test_a_database_that_was_away_is_used_again():
    """Also one that was not there at first; and connections that broke are no error."""
    with PostgreSQL() as database:
        database.kill()
        store = Store(database.url, may_be_away=True)
        with pytest.raises(StoreAway):
            store.ping()
        database.start()
        again(store.ping)
        record = store.commit(after(Record("", "ada"), turn(1)))
        database.kill()
        with pytest.raises(StoreAway):
            store.commit(after(record, turn(2)))
        database.start()
        again(store.ping)
        assert store.get("", "ada") == record
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        second = store.commit(after(record, turn(2)))
        assert store.get("", "ada") == second
        store.close()


@needs_postgresql
def test_what_came_through_although_its_answer_was_lost(database):
    """The connection breaks between the two, and the statement is sent again."""
    database.sql("DROP SCHEMA public CASCADE")
    database.sql("CREATE SCHEMA public")
    store, to_break = Store(database.url), []
    for name in ("ada", "bo"):
        store.commit(after(Record("", name), turn(1)))

    def lose(connection, cursor, statement, parameters, context, executemany):
        if to_break and statement.startswith(to_break[0]):
            to_break.clear()
            database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            cursor.execute("SELECT 1")

    sa.event.listen(sa.Engine, "after_cursor_execute", lose)
    try:
        to_break.append("DELETE FROM sessions")
        assert store.delete("", "bo") and not to_break
        to_break.append("UPDATE sessions")
        assert store.rename("", "ada", "carl") and not to_break
        to_break.append("UPDATE sessions")
        assert not store.rename("", "ada", "dan") and not to_break
    finally:
        sa.event.remove(sa.Engine, "after_cursor_execute", lose)
    assert [one.name for one in store.list()] == ["carl"]
    store.close()


@needs_postgresql
def test_a_database_that_became_a_standby_is_away(database):
    """Its connections stay. Another one takes writes in its place, or it again."""
    store = Store(database.url)
    record = store.commit(after(Record("", "standby"), turn(1)))
    database.sql("ALTER DATABASE postgres SET default_transaction_read_only = on")
    try:
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert store.get("", "standby") == record
        with pytest.raises(StoreAway):
            store.commit(after(record, turn(2)), record)
    finally:
        database.sql("BEGIN READ WRITE; ALTER DATABASE postgres RESET default_transaction_read_only; COMMIT")
    second = again(lambda: store.commit(after(record, turn(2)), record))
    assert store.get("", "standby") == second
    store.close()


def again(ask):
    """Asks until the store is there."""
    for _ in range(100):
        try:
            return ask()
        except StoreAway:
            threading.Event().wait(0.1)
    return ask()
