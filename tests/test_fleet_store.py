"""The store over SQLite and over PostgreSQL: commits, leases, and a database that goes away and comes back."""

from __future__ import annotations

import concurrent.futures
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from fleet import PostgreSQL, free_port, postgresql_folder, until
from pydeltamem import InputError
from pydeltamem.server.store import Conflict, Record, Store, StoreAway, StoreError, Turn, now

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
    assert store.version("o", "ada") == 2 and store.version("o", "nobody") == 0
    assert store.get("x", "ada") is None
    assert [(one.name, one.size) for one in store.list("o")] == [("ada", 9000)] and store.list("x") == []
    assert (store.count(), store.count("x")) == (1, 0)


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
    with pytest.raises(Conflict):  # who had it under its old name
        store.commit(after(one, turn(2)))
    assert store.delete("", "carl") and not store.delete("", "carl")
    assert [one.name for one in store.list()] == ["bo"]
    store.vacuum()


def test_one_holder_at_a_time(store):
    assert store.lease("", "ada", "one", 60) == 0  # nobody has committed it yet
    assert store.lease("", "ada", "two", 60) is None
    assert store.lease("", "bo", "two", 60) == 0 and store.lease("x", "ada", "two", 60) == 0
    committed = store.commit(after(Record("", "ada"), turn(1)), holder="one")  # gives it back
    assert store.lease("", "ada", "two", 60) == 1
    store.commit(after(committed, turn(2)), holder="one")  # not its own
    assert store.lease("", "ada", "one", 60) is None
    store.release("", "ada", "one")
    assert store.lease("", "ada", "one", 60) is None
    store.release("", "ada", "two")
    assert store.lease("", "ada", "one", 60) == 2


def test_a_lease_expires_unless_it_is_prolonged(store):
    sessions = [("", "ada"), ("", "bo")]
    for owner, name in (*sessions, ("", "carl")):
        assert store.lease(owner, name, "one", -1) == 0
    store.prolong("one", 60, sessions)
    assert store.lease("", "ada", "two", 60) is None and store.lease("", "bo", "two", 60) is None
    assert store.lease("", "carl", "two", 60) == 0  # was not named: nobody knows of it
    store.prolong("one", -1, sessions)
    assert store.lease("", "ada", "two", 60) == 0
    store.prolong("one", 60, sessions)  # one is lost
    assert store.lease("", "ada", "one", 60) is None and store.lease("", "bo", "two", 60) is None


@needs_postgresql
def test_whoever_waited_for_a_lease_gets_the_version_that_was_committed_meanwhile(database):
    """Its statement began while the holder's commit was under way, and sees the sessions as they were then."""
    store = Store(database.url)
    name = "waited"
    store.commit(after(Record("", name), turn(1)))
    assert store.lease("", name, "one", 60) == 1
    engine = sa.create_engine(database.url)
    waits = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        connection.execute(sa.text("UPDATE sessions SET version = 2 WHERE name = :name"), {"name": name})
        connection.execute(sa.text("DELETE FROM leases WHERE name = :name"), {"name": name})
        second = pool.submit(store.lease, "", name, "two", 60)
        until(lambda: connection.scalar(waits) == 1)
        connection.commit()
        assert second.result() == 2
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
            assert store.lease("", name, "one", 60) == number - 1
            record = store.commit(after(record, turn(number)), record, holder="one")
            assert said == [("INSERT", True), ("SELECT", True), ("WITH", True)]
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert store.get("", name) == record
    assert store.lease("", name, "two", 60) == 4
    store.close()


@pytest.mark.parametrize("n_turns", [0, 3])
def test_a_turn_that_comes_second_writes_nothing(store, n_turns):
    record = Record("", "ada")
    for number in range(1, n_turns + 1):
        record = store.commit(after(record, turn(number)), record)
    first = store.commit(after(record, turn(n_turns + 1, "first")), record)
    assert store.lease("", "ada", "two", 60) == n_turns + 1
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


def test_a_server_database_without_its_package(monkeypatch):
    import sys

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


def again(ask):
    """Asks until the store is there."""
    for _ in range(100):
        try:
            return ask()
        except StoreAway:
            threading.Event().wait(0.1)
    return ask()
