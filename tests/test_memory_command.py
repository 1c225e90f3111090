"""deltamem memory: show, diff, copy, export."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pydeltamem import MemorySnapshot, cli

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
        code = cli.main(["memory", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_show(memory, run):
    code, out, _ = run("show", memory("a.memory"))
    assert code == 0
    for text in ("test (abababababab)", "qwen3 Some Base", "1,234", "2 layers, 1 head of rank 8", "Singular values"):
        assert text in out
    assert any(shade in out for shade in "░▒▓█")


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 1, 5, 5), (2, 1, 16, 16), (1, 2, 1, 1)])
def test_show_any_shape(memory, run, shape):
    for state in (random_state(shape=shape), np.zeros(shape)):
        code, out, _ = run("show", memory("a.memory", state, layers=",".join(map(str, range(shape[0])))))
        assert code == 0 and out


def test_show_in_colour(memory):
    result = subprocess.run(
        [sys.executable, "-m", "pydeltamem.cli", "memory", "show", memory("a.memory")],
        capture_output=True, encoding="utf-8", env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("▀") == 2 * 4 * 8 and "\x1b[" in result.stdout


def test_show_as_json(memory, run):
    state = random_state()
    shown = json.loads(run("show", memory("a.memory", state), "--json")[1])
    assert shown["shape"] == [2, 1, 8, 8] and [row["layer"] for row in shown["layers"]] == [2, 5]
    np.testing.assert_allclose(shown["layers"][1]["norms"], [np.linalg.norm(state[1, 0])], rtol=1e-6)
    np.testing.assert_allclose(
        shown["layers"][1]["singular_values"][0], np.linalg.svd(state[1, 0], compute_uv=False), rtol=1e-5
    )


def test_diff(memory, run):
    a, state = memory("a.memory"), random_state()
    assert "identical" in run("diff", a, memory("b.memory"))[1]
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


@pytest.mark.parametrize("other", [{"adapter": "cd" * 32}, {"architecture": "llama"}, {"layers": "2,6"}])
def test_diff_of_memories_that_have_nothing_in_common(memory, run, other):
    code, _, err = run("diff", memory("a.memory"), memory("b.memory", **other))
    assert code == 1 and "b.memory: the memory of another adapter or of other layers than" in err


def test_diff_of_other_shapes(memory, run):
    code, _, err = run("diff", memory("a.memory"), memory("b.memory", random_state(shape=(2, 1, 4, 4))))
    assert code == 1 and "cannot be compared" in err


def test_copy(memory, run, tmp_path):
    a, b = memory("a.memory"), tmp_path / "b.memory"
    assert run("copy", a, b)[0] == 0
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state())
    assert MemorySnapshot.load(b).metadata["created"] == MemorySnapshot.load(a).metadata["created"]
    code, _, err = run("copy", memory("c.memory", random_state(1)), b)
    assert code == 1 and "b.memory: is there already" in err
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state())
    assert run("copy", memory("c.memory", random_state(1)), b, "--force")[0] == 0
    np.testing.assert_array_equal(MemorySnapshot.load(b).state, random_state(1))


def test_export(memory, run, tmp_path):
    a = memory("a.memory")
    assert run("export", a, tmp_path / "a.npz")[0] == 0 and run("export", a, tmp_path / "a.json")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["state"], random_state())
    assert json.loads((tmp_path / "a.json").read_text())["metadata"]["tokens_written"] == "1234"
    code, _, err = run("export", a, tmp_path / "a.csv")
    assert code == 1 and "ends in .npz or .json" in err


@pytest.mark.parametrize(
    "arguments", [["show", "none"], ["diff", "none", "none"], ["copy", "none", "b"], ["export", "none", "b.json"]]
)
def test_a_missing_file(run, arguments):
    code, _, err = run(*arguments)
    assert code == 1 and err == "deltamem: error: none: no such memory file\n"
