"""deltamem memory: show, diff, copy, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pydeltamem import MemorySnapshot
from pydeltamem.cli import main
from pydeltamem.formats.memory_numbers import effective_rank
from refusals import check_names
from test_memory_file import HOLDER

METADATA = {
    "layers": "2,5",
    "adapter": "ab" * 32,
    "adapter_name": "test",
    "architecture": "qwen3",
    "base_name": "Some Base",
    "tokens_written": "1234",
}


def random_state(seed=0, shape=(2, 1, 8, 8)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def memory(tmp_path):
    """memory(name, state, **metadata): the path of a memory file."""

    def make(name, state=None, **metadata):
        MemorySnapshot(random_state() if state is None else state, {**METADATA, **metadata}).save(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, standard output, standard error."""

    def call(*arguments):
        code = main.main(["memory", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_show(memory, run):
    code, out, _ = run("show", memory("a.memory"))
    assert code == 0
    for text in ("test (abababababab)", "qwen3 Some Base", "1,234", "2 layers, 1 head of rank 8", "effective rank"):
        assert text in out
    assert any(shade in out for shade in "░▒▓█") and "…" not in out


@pytest.mark.parametrize("width", [36, 60])
def test_a_narrow_terminal_cuts_nothing(memory, run, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("COLUMNS", str(width)), ("LINES", "24"), ("TERM", "dumb")):  # rich wants both
        monkeypatch.setenv(name, value)
    state = random_state(shape=(2, 4, 8, 8))
    path = memory("a.memory", state, created="2026-01-02T03:04:05+00:00")
    other = memory("b.memory", state + 1)
    for arguments in (("show", path), ("diff", path, other)):
        code, out, _ = run(*arguments)
        assert code == 0 and "…" not in out
        cells = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
        last = "".join(row[-1].strip() for row in cells if len(row) == (2 if arguments[0] == "show" else 6))
        assert ("2026-01-02T03:04:05+00:00" if arguments[0] == "show" else "0.") in last


def test_show_takes_names_for_text(memory, run, tmp_path):
    """Not for rich's markup, which would fail or vanish."""
    code, out, _ = run("show", memory("[b].memory", adapter_name="x[/b] [red]y", base_name=":dog:"))
    assert code == 0 and f"{tmp_path}/[b].memory" in out and "x[/b] [red]y" in out and "qwen3 :dog:" in out


def test_show_lets_no_name_command_a_terminal(memory, run):
    code, out, _ = run("show", memory("a.memory", adapter_name="a\x1b[2Jb", created="\x1b[2J"))
    assert code == 0 and r"a\x1b[2Jb" in out and all(letter.isprintable() for letter in out.replace("\n", ""))


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 1, 5, 5), (2, 1, 16, 16), (1, 2, 1, 1)])
def test_show_any_shape(memory, run, shape):
    for state in (random_state(shape=shape), np.zeros(shape)):
        code, out, _ = run("show", memory("a.memory", state, layers=",".join(map(str, range(shape[0])))))
        assert code == 0 and out


def shown(path, **environment):
    """Standard output of a process that may use colour."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", **environment}
    result = subprocess.run(
        [sys.executable, "-m", "pydeltamem.cli", "memory", "show", path],
        capture_output=True, encoding="utf-8", env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_show_in_colour(memory):
    out = shown(memory("a.memory"))
    assert out.count("▀") == 2 * 4 * 8 and "\x1b[38;" in out


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_show_without_colour(memory, environment):
    """Half blocks of one colour would show nothing."""
    out = shown(memory("a.memory"), **environment)
    assert "▀" not in out and any(shade in out for shade in "░▒▓█")


def test_show_as_json(memory, run):
    state = random_state()
    described = json.loads(run("show", memory("a.memory", state), "--json")[1])
    assert described["shape"] == [2, 1, 8, 8] and [row["layer"] for row in described["layers"]] == [2, 5]
    np.testing.assert_allclose(described["layers"][1]["norms"], [np.linalg.norm(state[1, 0])], rtol=1e-6)
    assert 1 < described["layers"][1]["effective_ranks"][0] < 8
    np.testing.assert_allclose(
        described["layers"][1]["singular_values"][0], np.linalg.svd(state[1, 0], compute_uv=False), rtol=1e-5
    )


def test_large_values_are_numbers_of_json(memory, run):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    state = np.full((2, 1, 8, 8), -3e38, np.float32)
    path = memory("huge.memory", state)
    rows = json.loads(run("show", path, "--json")[1], parse_constant=refuse)["layers"]
    norm = 8 * float(np.float32(3e38))
    for row in rows:
        np.testing.assert_allclose([row["norms"][0], row["singular_values"][0][0]], norm, rtol=1e-12)
        np.testing.assert_allclose(row["effective_ranks"], 1, rtol=1e-6)
    assert run("show", path)[0] == run("diff", path, path)[0] == 0


def test_layers_that_are_no_numbers_of_layers(memory, run):
    path = memory("a.memory", random_state(), layers="9" * 5000 + ",1")
    assert [row["layer"] for row in json.loads(run("show", path, "--json")[1])["layers"]] == [0, 1]
    assert main.main(["inspect", path]) == 0


@pytest.mark.parametrize(("values", "rank"), [([3, 0, 0], 1), ([2, 2, 0], 2), ([1, 1, 1], 3), ([0, 0, 0], 0)])
def test_effective_rank(values, rank):
    assert effective_rank(np.array(values, dtype=np.float32)) == pytest.approx(rank)


def test_diff(memory, run):
    a, state = memory("a.memory"), random_state()
    assert "are identical" in run("diff", a, memory("b.memory"))[1]
    moved = state.copy()
    moved[1] *= 2
    b = memory("b.memory", moved)
    code, out, _ = run("diff", a, b)
    assert code == 0 and "all" in out and "cosine" in out
    difference = json.loads(run("diff", a, b, "--json")[1])
    first, second = difference["layers"]
    assert not difference["identical"]
    assert first["difference"] == 0 and first["cosine"] == pytest.approx(1)
    assert second["relative"] == pytest.approx(0.5) and second["cosine"] == pytest.approx(1)
    assert difference["total"]["difference"] == pytest.approx(np.linalg.norm(state[1]), rel=1e-6)
    zero = memory("zero.memory", np.zeros_like(state))
    assert json.loads(run("diff", a, zero, "--json")[1])["total"]["cosine"] == 0


def test_identical_are_equal_bits(memory, run):
    a = memory("a.memory", np.zeros((2, 1, 8, 8)))
    assert "are identical" not in run("diff", a, memory("b.memory", np.full((2, 1, 8, 8), -0.0)))[1]


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"adapter": "cd" * 32, "adapter_name": "second"}, ["second", "cdcdcdcdcdcd", "abababababab"]),
        ({"architecture": "llama"}, ["llama", "qwen3"]),
        ({"layers": "2,6"}, ["2,6", "2,5"]),
        ({"layers": "2,\n\x1b[31m6"}, ["2,5"]),  # on one line, and no command to a terminal
        ({"state": random_state(shape=(2, 1, 4, 4))}, ["(2, 1, 4, 4)", "(2, 1, 8, 8)"]),
    ],
)
def test_diff_of_memories_that_have_nothing_in_common(memory, run, other, names):
    a, b = memory("a.memory"), memory("b.memory", **other)
    code, _, err = run("diff", a, b)
    assert code == 1 and err.rstrip("\n").isprintable()
    check_names(err.rstrip("\n"), [a, b, *names])


def test_copy(memory, run, tmp_path):
    a, b = memory("a.memory"), tmp_path / "b.memory"
    assert run("copy", a, b)[0] == 0
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state())
    assert MemorySnapshot.load(b).metadata["created"] == MemorySnapshot.load(a).metadata["created"]
    code, _, err = run("copy", memory("c.memory", random_state(1)), b)
    assert code == 1
    check_names(err.rstrip("\n"), [b, "--force"])
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state())
    assert run("copy", memory("c.memory", random_state(1)), b, "--force")[0] == 0
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state(1))


@pytest.mark.skipif(os.name != "posix", reason="locks as on POSIX")
def test_copy_where_there_are_no_locks(memory, run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(0, "no locks here")

    source, target = memory("a.memory"), tmp_path / "b.memory"
    monkeypatch.setattr("fcntl.flock", fail)
    assert run("copy", source, target)[0] == 0
    assert MemorySnapshot.load(target).state.tobytes() == MemorySnapshot.load(source).state.tobytes()


def test_copy_to_a_memory_in_use(memory, run):
    a, b = memory("a.memory"), memory("b.memory", random_state(1))
    command = [sys.executable, "-c", HOLDER, str(a)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        code, _, err = run("copy", b, a, "--force")
        holder.communicate(b"")
    assert code == 1
    check_names(err.rstrip("\n"), [a, *([holder.pid] if os.name == "posix" else [])])
    np.testing.assert_array_equal(MemorySnapshot.load(a).state, random_state())


def test_export(memory, run, tmp_path):
    a = memory("a.memory")
    assert run("export", a, tmp_path / "a.npz")[0] == 0 and run("export", a, tmp_path / "a.json")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["state"], random_state())
    assert json.loads((tmp_path / "a.json").read_text())["metadata"]["tokens_written"] == "1234"
    code, _, err = run("export", a, tmp_path / "a.csv")
    assert code == 1 and ".npz" in err and ".json" in err
    check_names(err.rstrip("\n"), [tmp_path / "a.csv"])


@pytest.mark.parametrize(
    "arguments", [["show", "none"], ["diff", "none", "none"], ["copy", "none", "b"], ["export", "none", "b.json"]]
)
def test_a_missing_file(run, arguments):
    code, _, err = run(*arguments)
    assert code == 1 and err.startswith("deltamem: error: none: ") and err.count("\n") == 1
