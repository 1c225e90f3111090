"""deltamem sessions: list, export, import, delete and vacuum, on a store of this test."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import sys

import numpy as np
import pytest

from pydeltamem import MemorySnapshot
from pydeltamem.cli import main
from pydeltamem.server.records import Record
from pydeltamem.server.session import imported
from pydeltamem.server.store import Store
from refusals import check_names


def snapshot(seed, **metadata):
    state = np.random.default_rng(seed).standard_normal((2, 1, 8, 8)).astype(np.float32)
    return MemorySnapshot(state, {"adapter": "ab" * 32, "tokens_written": str(10 + seed), **metadata})


@pytest.fixture
def store(tmp_path):
    """A store of ada and bo, without keys, and of a diary of each of two keys."""
    store = Store(f"sqlite:///{tmp_path / 'sessions.db'}")
    for seed, (owner, name) in enumerate([("", "ada"), ("", "bo"), ("1" * 64, "diary"), ("12" * 32, "diary")]):
        store.commit(dataclasses.replace(imported(Record(owner, name), snapshot(seed)), turns=seed))
    store.commit(Record("", "empty"))
    yield store
    store.close()


@pytest.fixture
def sessions(store, capsys):
    """sessions(*arguments): exit code, standard output, standard error."""

    def run(*arguments):
        code = main.main(["sessions", "--store", store.url, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_list(sessions, store):
    code, out, _ = sessions("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(each["session"], each["owner"]) for each in found] == [
        ("empty", ""), ("diary", "121212121212"), ("diary", "111111111111"), ("bo", ""), ("ada", ""),
    ]  # fmt: skip
    size = len(store.get("", "bo").memory)
    assert found[3] == {
        "session": "bo", "owner": "", "version": 1, "turns": 1, "tokens": 11, "bytes": size,
        "updated": f"{store.get('', 'bo').updated.isoformat(timespec='seconds')}Z",
    }  # fmt: skip
    code, out, _ = sessions("list")
    assert code == 0
    rows = [line for line in out.splitlines() if " bo " in line]
    assert len(rows) == 1 and str(size) in rows[0]


def test_the_store_may_stand_behind_the_action(sessions, store, tmp_path, capsys):
    for before in ([], ["--store", f"sqlite:///{tmp_path / 'other.db'}"]):
        assert main.main(["sessions", *before, "list", "--store", store.url]) == 0
        assert capsys.readouterr().out == sessions("list")[1]


def test_a_list_has_names_as_they_are(sessions, store):
    """Whatever a terminal's width is taken to be."""
    names = ["a" * 128, "日本-العربية-Zoë"]
    for name in names:
        store.commit(Record("1" * 64, name, tokens=123_456_789))
    _, out, _ = sessions("list")
    for name in names:
        (line,) = [line for line in out.splitlines() if name in line]
        assert "123456789" in line


@pytest.mark.parametrize("width", [44, 80])
def test_a_list_in_a_narrow_terminal(sessions, monkeypatch, width):
    """It folds, and leaves no column out."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("COLUMNS", str(width)), ("LINES", "24"), ("TERM", "dumb")):  # rich wants both
        monkeypatch.setenv(name, value)
    code, out, _ = sessions("list")
    assert code == 0 and "…" not in out
    cells = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    columns = ["".join(row[i].strip() for row in cells) for i in range(7)]
    assert "diary" in columns[0] and "121212121212" in columns[1] and all(columns)


def test_a_memory_goes_out_and_into_another_session(sessions, store, tmp_path):
    file = tmp_path / "bo.memory"
    assert sessions("export", "bo", file)[0] == 0
    assert np.array_equal(MemorySnapshot.load(file).state, snapshot(1).state)

    for name, version in (("ada", 2), ("new", 1)):
        assert sessions("import", name, file)[0] == 0
        record = store.get("", name)
        assert (record.version, record.tokens, record.turns) == (version, 11, 0)
        assert np.array_equal(MemorySnapshot.from_bytes(record.memory).state, snapshot(1).state)

    assert sessions("import", "Zoe\u0308", file)[0] == 0 and store.get("", "Zo\u00eb").version == 1
    assert sessions("export", "diary", file, "--owner", "12")[0] == 0
    assert np.array_equal(MemorySnapshot.load(file).state, snapshot(3).state)
    assert sessions("import", "diary", file, "--owner", "11")[0] == 0
    assert store.get("1" * 64, "diary").tokens == 13


def test_a_damaged_session_is_named(sessions, store, tmp_path):
    store.commit(dataclasses.replace(store.get("", "bo"), memory=b"damaged"))
    code, out, error = sessions("export", "bo", tmp_path / "bo.memory")
    assert (code, out) == (1, "") and not (tmp_path / "bo.memory").exists()
    check_names(error.rstrip("\n"), ["bo"])


def test_delete_and_vacuum(sessions, store, tmp_path):
    assert sessions("delete", "ada", "bo")[0] == 0
    assert sessions("delete", "diary", "--owner", "12")[0] == 0
    assert {(record.owner, record.name) for record in store.list()} == {("1" * 64, "diary"), ("", "empty")}
    assert sessions("vacuum")[0] == 0
    with sqlite3.connect(tmp_path / "sessions.db") as database:
        assert database.execute("PRAGMA freelist_count").fetchone() == (0,)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("export", "carl", "x.memory"), ("carl", "sessions.db")),
        (("export", "empty", "x.memory"), ("empty",)),
        (("export", "diary", "x.memory"), ("diary",)),  # of nobody: it belongs to a key
        (("export", "diary", "x.memory", "--owner", "1"), ("--owner 1", "2")),  # two begin so
        (("export", "diary", "x.memory", "--owner", "9"), ("--owner 9",)),
        (("import", "ada", "other.memory"), ("ada", "other.memory")),  # of another adapter
        (("import", "ada", "none.memory"), ("none.memory",)),
        (("import", "a b/c", "other.memory"), ("a b/c",)),  # HTTP has no such name
        (("delete", "ada", "carl"), ("carl", "sessions.db")),
        (("export", "\udcff", "x.memory"), ()),  # a byte that is no text
        (("delete", "\udcff"), ()),
    ],
)
def test_refused(sessions, store, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    snapshot(5, adapter="cd" * 32).save("other.memory")
    code, out, error = sessions(*arguments)
    assert (code, out) == (1, "")
    check_names(error.rstrip("\n"), names)
    assert not (tmp_path / "x.memory").exists()
    assert store.count() == 5  # not even ada, who is named beside carl, is deleted


def test_the_store_of_the_user_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name, **_: str(tmp_path / "data" / name))
    file = tmp_path / "data" / "deltamem" / "sessions.db"
    assert main.main(["sessions", "list", "--json"]) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [file])
    assert not (tmp_path / "data").exists()
    snapshot(1).save(tmp_path / "a.memory")
    assert main.main(["sessions", "import", "ada", str(tmp_path / "a.memory")]) == 0 and file.is_file()
    capsys.readouterr()
    assert main.main(["sessions", "list", "--json"]) == 0
    assert [each["session"] for each in json.loads(capsys.readouterr().out)] == ["ada"]


ACTIONS = [["list"], ["export", "ada", "out.memory"], ["delete", "ada"], ["vacuum"]]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action[0])
def test_a_store_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys, action):
    monkeypatch.chdir(tmp_path)
    assert main.main(["sessions", "--store", "sqlite:///mistyped.db", *action]) == 1
    out, error = capsys.readouterr()
    assert not out
    check_names(error.rstrip("\n"), ["mistyped.db"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "file"), [("a b/c", "a.memory"), ("ada", "none.memory"), ("..", "a.memory")])
def test_an_import_that_is_refused_makes_no_store(tmp_path, monkeypatch, capsys, name, file):
    monkeypatch.chdir(tmp_path)
    snapshot(1).save("a.memory")
    assert main.main(["sessions", "--store", "sqlite:///new.db", "import", name, file]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.memory"]


@pytest.mark.parametrize("action", [*ACTIONS, ["import", "ada", "a.memory"]], ids=lambda action: action[0])
def test_the_database_of_another_program_stays_as_it_is(tmp_path, monkeypatch, capsys, action):
    monkeypatch.chdir(tmp_path)
    snapshot(1).save("a.memory")
    connection = sqlite3.connect("other.db")
    connection.execute("CREATE TABLE sessions (id TEXT, user TEXT)")
    connection.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main.main(["sessions", "--store", f"sqlite:///{tmp_path / 'other.db'}", *action]) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [tmp_path / "other.db"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_packages_of_the_server(sessions, monkeypatch):
    monkeypatch.delitem(sys.modules, "pydeltamem.server.store")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    code, _, error = sessions("list")
    assert code == 1
    check_names(error.rstrip("\n"), ["pydeltamem[server]"])
