"""The pages: what `make docs` generates and what it refuses (tools/mkdocs_hooks.py), and the programs on them."""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mkdocs_hooks as hooks
import pydeltamem
from conftest import ROOT
from pydeltamem.cli.main import SUBCOMMANDS
from pydeltamem.evals.benchmarks import BENCHMARKS
from pydeltamem.models import default_files
from pydeltamem.server.application import application
from pydeltamem.server.options import FIELDS
from pydeltamem.server.state import Settings

TUTORIAL = ROOT / "docs" / "tutorial" / "index.md"
HEADER = ROOT / "native" / "llama_deltamem" / "llama-deltamem.h"


@pytest.mark.parametrize(
    "line",
    [
        "See [the notes](../../native/nothing.h).",
        "See [the notes](../../README.md#nothing-that-is-there).",
        "See `native/nothing.h`.",
        "The test is `test_that_nobody_wrote`.",
        "Run `make nothing-at-all`.",
        "    make nothing-at-all           # in a block",
        "See `nothing_at_all` in `pydeltamem/errors.py`.",
        "    deltamem nothing",
        "    deltamem pack base.gguf adapter.gguf                 # without -o",
        "    deltamem chat -m base.gguf --no-such-option",
    ],
)
def test_a_page_that_names_what_does_not_exist(line):
    (problem,) = hooks.problems(f"# Page\n\n{line}\n", TUTORIAL)
    assert any(word in problem for word in re.findall(r"[\w./-]{4,}", line))


@pytest.mark.parametrize(
    "line",
    [
        "See [the header](../../native/llama_deltamem/llama-deltamem.h) and [a site](https://example.org/nothing).",
        "See [the figures](../../README.md#figures) and [what is not there](../../README.md#what-the-memory-is-not).",
        "See `native/llama_deltamem`.",
        "The test is `test_a_page_that_names_what_exists`.",
        "Run `make test`.",
        "    make fuzz FUZZ=1000      # fewer",
        "    make                     # the first target",
        "See `DeltaMemError` in `pydeltamem/errors.py`.",
        "    PIP_NO_INDEX=1 deltamem pull smollm2     # offline",
        "    deltamem pack base.gguf adapter.gguf -o model.gguf",
    ],
)
def test_a_page_that_names_what_exists(line):
    assert list(hooks.problems(f"# Page\n\n{line}\n", TUTORIAL)) == []


@pytest.mark.parametrize(
    ("name", "place", "link", "shown"),
    [
        ("docs/tutorial/index.md", "tutorial/index.md", "[Serve](../how-to/serve.md#keys)", None),
        ("docs/tutorial/index.md", "tutorial/index.md", "[a site](https://example.org)", None),
        (
            "docs/tutorial/index.md", "tutorial/index.md",
            "[card](../../pydeltamem/models/README.md#what-mattered)", "[card](../reference/models.md#what-mattered)",
        ),
        (
            "docs/tutorial/index.md", "tutorial/index.md",
            "[the header](../../native/llama_deltamem/llama-deltamem.h)",
            "the header (`native/llama_deltamem/llama-deltamem.h`)",
        ),
        (
            "pydeltamem/models/README.md", "reference/models.md",
            "![recall](../../docs/images/recall.png)", "![recall](../images/recall.png)",
        ),
        ("pydeltamem/models/README.md", "reference/models.md", "[why](#what-mattered)", None),
        ("CONTRIBUTING.md", "contributing.md", "[CUDA](docs/how-to/cuda.md)", "[CUDA](how-to/cuda.md)"),
        ("CONTRIBUTING.md", "contributing.md", "[tests/golden](tests/golden/README.md)", "`tests/golden/README.md`"),
    ],
)  # fmt: skip
def test_links_of_a_page_in_the_site(name, place, link, shown):
    """Pages that the site takes in are linked; a source file, which it does not hold, is a path."""
    assert hooks.linked(f"See {link}.", ROOT / name, hooks.DOCS / place) == f"See {shown or link}."


def test_the_page_of_the_command_line_has_every_option():
    page = hooks.command_line()
    assert str(Path.home()) not in page  # it is the same whoever builds it
    for name in SUBCOMMANDS:
        section = page.partition(f"## deltamem {name}\n")[2].partition("\n## ")[0]
        actions = [action for action in hooks.parser(name)._actions if action.help != argparse.SUPPRESS]
        options = {option for action in actions for option in action.option_strings} - {"--help"}
        assert section and all(option in section for option in options), name


def test_the_page_of_the_c_api_has_the_whole_header():
    page = hooks.c_api()
    functions = re.findall(r"^LLAMA_API[^(]*?(\w+)\(", HEADER.read_text(encoding="utf-8"), re.MULTILINE)
    assert functions and re.findall(r"^LLAMA_API[^(]*?(\w+)\(", page, re.MULTILINE) == functions
    assert re.findall(r"^## (.*)$", page, re.MULTILINE)[:2] == ["Adapters", "Contexts"]


def test_the_page_of_python_has_every_public_name():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: pydeltamem\.(\w+)$", page, re.MULTILINE))
    names = {name for name in pydeltamem.__all__ if not hasattr(pydeltamem.errors, name)} - {"__version__"}
    assert shown == names | {"errors"}


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # of endpoints with two methods
def test_the_page_of_the_server_has_every_endpoint():
    page = (ROOT / "docs" / "reference" / "server.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `([A-Z]+) (/[^`]+)`", page, re.MULTILINE))  # but the page at /
    paths = application(Settings(load=lambda: None)).openapi()["paths"]
    served = {(method.upper(), path.removeprefix("/sessions/{session}")) for path in paths for method in paths[path]}
    assert shown == {(method, path) for method, path in served if method != "HEAD"}


def test_the_page_of_the_server_has_every_field_of_an_answer():
    page = (ROOT / "docs" / "reference" / "server.md").read_text(encoding="utf-8")
    chat = page.partition("\n## Chat\n")[2].partition("\n## ")[0]
    fields = {name for row in re.findall(r"^\| (.*?) \|", chat, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert fields >= set(FIELDS)


def test_the_page_of_benchmarks_has_each_with_its_file():
    page = (ROOT / "docs" / "how-to" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (.*?) \|$", page, re.MULTILINE)
    shown = {name: file.strip("`") for name, file in rows if name in BENCHMARKS}
    assert {name: "" if file.startswith("none") else file for name, file in shown.items()} == {
        name: benchmark.file for name, benchmark in BENCHMARKS.items()
    }


def test_the_list_of_doors_is_the_one_that_is_checked():
    checked = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nlayers = [\n")[2].partition("]")[0]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Doors\n")[2].partition("\n## ")[0]
    layers = re.findall(r'"(.*)"', checked)
    assert layers and re.findall(r"^ {4}(\S.*)$", page, re.MULTILINE) == layers


def test_the_demo_prints_what_the_tutorial_says(tmp_path):
    page = TUTORIAL.read_text(encoding="utf-8")
    command, said = re.search(r"^ {4}deltamem (demo .*?)$.*?```text\n(.*?)```", page, re.MULTILINE | re.DOTALL).groups()
    command = [sys.executable, "-m", "pydeltamem.cli", *command.split(), "--delay", "0"]
    env = {**os.environ, "COLUMNS": "110", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert " ".join(said.split()) in " ".join(done.stdout.split())


def test_the_programs_of_the_tutorial_print_what_it_says(tmp_path):
    page = TUTORIAL.read_text(encoding="utf-8")
    programs = re.findall(r'```python title="(\S+)"\n(.*?)```.*?```text\n(.*?)```', page, re.DOTALL)
    assert [name for name, _, _ in programs] == ["tell.py", "ask.py"]
    for name, program, said in programs:
        (tmp_path / name).write_text(program, encoding="utf-8")
        command = [sys.executable, name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == said


@pytest.mark.parametrize(("name", "n_blocks"), [("README.md", 1), ("docs/how-to/converse.md", 3)])
def test_the_programs_of_a_page_run(tmp_path, monkeypatch, name, n_blocks):
    """With the model of the package in place of those that they name."""
    base, adapters = default_files()
    page = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == n_blocks
    program = "\nada = Conversation(llm)\n".join(blocks)  # the first block closes its own
    model = re.compile(r'DeltaMemLlama\((?:model_path=)?"[^"]+", deltamem_path="[^"]+"')
    program, n_models = model.subn(f"DeltaMemLlama({str(base)!r}, deltamem_path={str(adapters['msw'])!r}", program)
    assert n_models == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    try:
        exec(program, names)
        assert names["llm"].memory.state.shape == (4, 4, 8, 8) and (tmp_path / "ada.memory").is_file()
    finally:
        names["llm"].close()


def test_the_figures_of_the_readme_are_those_of_the_pages_that_it_names():
    page, card, performance = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "pydeltamem/models/README.md", "docs/reference/performance.md")
    )
    recall, speed = re.search(
        r"^\*\*Recall\.\*\*(.*?)^\*\*Speed\.\*\*(.*?)^These", page, re.DOTALL | re.MULTILINE
    ).groups()
    recalled = re.findall(r"(\d+) % (\(\d+–\d+\))", recall)
    ratios = re.findall(r"1\.\d+ \(.*?\)", speed)
    assert len(recalled) > 10 and len(ratios) == 4
    assert all(f"{share} {interval}" in card for share, interval in recalled)
    assert all(ratio in performance for ratio in ratios)


@pytest.mark.parametrize("room", ["bench", "evals", "formats", "runtime", "server", "train"])
def test_a_room_says_where_everything_is(room):
    """The first lines of a package name each of its modules, and no other: "name, name   what; name: what"."""
    folder = ROOT / "pydeltamem" / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")), clean=False)
    rows = re.findall(r"^ *(\w+(?:, \w+)*) {2,}(.+)$", text, re.MULTILINE)
    named = [name for names, what in rows for name in (*names.split(", "), *re.findall(r"; (\w+):", what))]
    assert sorted(named) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
