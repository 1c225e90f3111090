"""Consoles that cannot show every character, locales that are not UTF-8, and file names that are not text."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pydeltamem.cli.main import SUBCOMMANDS
from pydeltamem.formats.memory_file import read_memory_file
from pydeltamem.models import default_files

MODEL, MEMORIES = default_files()
ADAPTER = MEMORIES["tsw"]
PLAIN = ["-n", "4", "--temp", "0", "-c", "256", "-t", "1", "-tb", "1"]

CONSOLES = {
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    # without the UTF-8 that Python uses for the C locale since 3.7
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


def deltamem(*args, console=None, **kwargs):
    """Runs the command; stdout and stderr as bytes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "LANG"))}
    command = [sys.executable, "-m", "pydeltamem.cli", *args]
    environment |= CONSOLES.get(console, {"LC_ALL": "C.UTF-8"})
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, **kwargs)


def right(result):
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    return result.stdout


COMMANDS = [[], *([name] for name in SUBCOMMANDS), ["memory", "show"], ["eval", "recall"]]


@pytest.mark.parametrize(("command", "console"), [*((it, "ascii") for it in COMMANDS), ([], "cp1252"), ([], "C")])
def test_help(command, console):
    assert b"usage: deltamem" in right(deltamem(*command, "--help", console=console))


@pytest.mark.parametrize("console", CONSOLES)
def test_wrong_usage(console):
    result = deltamem("generate", "--größe", console=console)
    assert result.returncode == 2 and b"usage: deltamem generate" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("console", ["ascii", "C"])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-m", MODEL, "--deltamem", ADAPTER, *PLAIN, "-p", "Größe 東京", "--save-memory", "MEMORY"],
        ["generate", "-m", MODEL, "--deltamem", ADAPTER, *PLAIN, "-f", "FILE", "--save-memory", "MEMORY"],
        ["chat", "-m", MODEL, "--deltamem", ADAPTER, *PLAIN, "-sys", "Größe 東京", "--save-memory", "MEMORY"],
    ],
)
def test_text_is_read_alike_everywhere(tmp_path, command, console):
    (tmp_path / "prompt").write_text("Größe 東京", encoding="utf-8")
    states = []
    for name in (None, console):
        path = tmp_path / f"{name}.memory"
        args = [{"MEMORY": path, "FILE": tmp_path / "prompt"}.get(arg, arg) for arg in command]
        right(deltamem(*args, console=name, input="schön\n".encode()))
        states.append(read_memory_file(path)[0])
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("console", CONSOLES)
def test_tables(tmp_path, console):
    path = tmp_path / "a.memory"
    right(deltamem("generate", "-m", MODEL, "--deltamem", ADAPTER, *PLAIN, "-p", "hello", "--save-memory", path))
    for command in (["inspect", ADAPTER], ["memory", "show", path], ["memory", "diff", path, path], ["architectures"]):
        assert right(deltamem(*command, console=console))
    demo = ["demo", "--strategy", "msw", "--facts", "1", "--seed", "1", "--delay", "0"]
    assert b"right" in right(deltamem(*demo, console=console))


def test_a_prompt_that_is_no_text():
    result = deltamem("generate", "-m", MODEL, *PLAIN, "-p", b"a\xff")
    assert result.returncode == 2 and b"-p" in result.stderr and b"Traceback" not in result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder whose name is not UTF-8, with a model, an adapter and a memory in it."""
    folder = os.fsencode(tmp_path) + b"/gr\xf6\xdfe"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    os.symlink(MODEL, folder + b"/model.gguf")
    os.symlink(ADAPTER, folder + b"/adapter.gguf")
    return folder + b"/"


@pytest.mark.parametrize("console", [None, "C"])
def test_a_folder_whose_name_is_no_text(folder, console):
    def run(*args, **kwargs):
        return right(deltamem(*args, console=console, **kwargs))

    model, adapter, memory = folder + b"model.gguf", folder + b"adapter.gguf", folder + b"a.memory"
    used = ["-m", model, "--deltamem", adapter, *PLAIN]
    with open(folder + b"prompt", "w") as file:
        file.write("hello")
    run("generate", *used, "-f", folder + b"prompt", "--save-memory", memory)
    run("generate", *used, "-p", "hello", "--load-memory", memory)
    run("chat", *used, "--memory", memory, input=b"hello\n/save " + folder + b"b.memory\n/load " + memory + b"\n")
    assert os.path.exists(folder + b"b.memory")
    for file in (model, adapter, memory):
        run("inspect", file)
        run("inspect", file, "--json")
    run("memory", "show", memory)
    run("memory", "diff", memory, folder + b"b.memory")
    run("memory", "copy", memory, folder + b"c.memory")
    run("memory", "export", memory, folder + b"a.npz")
    run("memory", "export", memory, folder + b"a.json")
    run("pack", model, adapter, "-o", folder + b"packed.gguf")
    run("generate", "-m", folder + b"packed.gguf", *PLAIN, "-p", "hello")
    run("unpack", folder + b"packed.gguf", "--base", folder + b"base.gguf", "--adapter", folder + b"again.gguf")
    run("quantize", model, folder + b"small.gguf", "q4_0", "--allow-requantize")
    run("bench", "-m", model, "--deltamem", adapter, "-p", "8", "-n", "2", "--pairs", "2", "--rss", "0", "-t", "1",
        "--json", folder + b"bench.json")  # fmt: skip


def test_an_error_about_a_file_whose_name_is_no_text(folder):
    result = deltamem("generate", "-m", folder + b"none.gguf", "-p", "hello")
    assert result.returncode == 1 and b"none.gguf" in result.stderr and b"Traceback" not in result.stderr
