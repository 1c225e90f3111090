"""What `make docs` adds to MkDocs: pages generated from the sources, and checks of what the pages name.

Generates the pages of the command line, from the parser of each subcommand, and of the C API, from its header. Takes
pages from outside of docs/ into the site, such as the model card. In all pages and in the README files it checks links
out of docs/ and into it, paths and tests in `code`, make targets, and every `deltamem` command, which its parser must
accept. A missing name is a warning, so `mkdocs build --strict` fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import html
import importlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pydeltamem.cli.main import SUBCOMMANDS
from pydeltamem.cli.parser import Parser, sentence

log = get_plugin_logger("pages")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HEADER = ROOT / "native" / "llama_deltamem" / "llama-deltamem.h"

# pages outside of the site, read in place
OUTSIDE = (
    "README.md", "CONTRIBUTING.md", "pydeltamem/models/README.md", "examples/tiny/README.md", "recipes/README.md",
    "tests/golden/README.md", "tools/README.md",
)  # fmt: skip

# those of them that the site has too, and where
SHOWN = {
    "pydeltamem/models/README.md": "reference/models.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:native|pydeltamem(?!/lib)|convert|recipes|tests|tools|deploy|cmake|docs|examples)/[\w./-]*")
TEST = re.compile(r"(test_\w+)(?:\[.*\])?")
NAME_IN_FILE = re.compile(r"`([A-Za-z_][\w.]*)` (?:in|of) `([\w./-]+\.\w+)`")
MAKE = re.compile(r"make ([a-z][a-z0-9-]*)")
MAKE_LINE = re.compile(r"^ {4}(make .*)$", re.MULTILINE)
COMMAND = re.compile(r"^ {4}(?:[A-Z_]+=\S+ )*(deltamem .*?)(?: {2,}#.*)?$", re.MULTILINE)


def on_pre_build(config: MkDocsConfig) -> None:
    for name in OUTSIDE:
        path = ROOT / name
        for problem in problems(path.read_text(encoding="utf-8"), path):
            log.warning("%s: %s", name, problem)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"reference/command-line.md": command_line(), "reference/c-api.md": c_api()}
    for name, place in SHOWN.items():
        pages[place] = linked((ROOT / name).read_text(encoding="utf-8"), ROOT / name, DOCS / place)
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by is not None:
        return markdown
    path = DOCS / page.file.src_uri
    for problem in problems(markdown, path):
        log.warning("%s: %s", page.file.src_uri, problem)
    return linked(markdown, path, path)


#
# checks
#


def problems(markdown: str, path: Path) -> Iterator[str]:
    """The names on the page at `path` that do not exist, a sentence each."""
    is_outside = DOCS not in path.parents
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    for _, _, target in LINK.findall(prose):
        file = _file_of(target, path)
        # MkDocs itself checks links from page to page
        if file is not None and (is_outside or DOCS not in file.parents):
            heading = target.partition("#")[2]
            if not file.exists():
                yield f"{target} does not exist"
            elif heading and heading not in headings(file):
                yield f"{target}: the page has no such heading"
    for code in CODE.findall(prose):
        if PATH.fullmatch(code) and not (ROOT / code).exists():
            yield f"{code} does not exist"
        if (test := TEST.fullmatch(code)) and test[1] not in tests():
            yield f"no test is called {test[1]}"
    for code in [*CODE.findall(prose), *MAKE_LINE.findall(prose)]:
        if (target := MAKE.match(code)) and target[1] not in targets():
            yield f"the Makefile has no target {target[1]}"
    for name, file in NAME_IN_FILE.findall(prose):
        if (ROOT / file).is_file() and name.rpartition(".")[2] not in (ROOT / file).read_text(encoding="utf-8"):
            yield f"{file} has no {name}"
    for command in COMMAND.findall(markdown):
        problem = command_problem(command)
        if problem:
            yield f"{command}: {problem}"


def _file_of(target: str, page: Path) -> Path | None:
    """The file that a link of a page means, which may be the page; None for the web."""
    name = target.partition("#")[0]
    return None if "://" in name else (page.parent / name).resolve() if name else page


def linked(markdown: str, path: Path, place: Path) -> str:
    """The page at `path` with links that hold at `place`, where the site has it. The site does not hold the sources: a
    link to one becomes its path.
    """
    return LINK.sub(lambda link: _linked(link, path, place), markdown)


def _linked(link: re.Match[str], path: Path, place: Path) -> str:
    image, text, target = link.groups()
    file, heading = _file_of(target, path), target.partition("#")[2]
    if file is None or file == path or not file.is_relative_to(ROOT):
        return link[0]
    name = file.relative_to(ROOT).as_posix()
    page = DOCS / SHOWN[name] if name in SHOWN else file
    if DOCS in page.parents:
        there = Path(os.path.relpath(page, place.parent)).as_posix()
        return f"{image}[{text}]({there}{'#' if heading else ''}{heading})"
    return f"`{name}`" if text.strip("`") in name else f"{text} (`{name}`)"


@functools.cache
def headings(file: Path) -> frozenset[str]:
    """The headings of a page, as GitHub names them in links."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", LINK.sub(r"\2", text), re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)


@functools.cache
def tests() -> frozenset[str]:
    """The names of all Python tests."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^\s*def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return frozenset(found)


@functools.cache
def targets() -> frozenset[str]:
    """The named targets of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lists = re.findall(r"^((?:[a-z][a-z0-9-]* ?)+):(?!=)", text, re.MULTILINE)
    return frozenset(name for line in lists for name in line.split())


def command_problem(command: str) -> str | None:
    """Why its parser refuses this command line; None if it accepts it."""
    words = shlex.split(command)
    if "|" in words:
        words = words[: words.index("|")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            if words[1:2] != ["help"] and words[1:] and not words[1].startswith("-"):
                parser(words[1]).parse_args(words[2:])
    except SystemExit as end:
        if end.code:
            return said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
    except KeyError:
        return "there is no such command"
    return None


#
# generated pages
#


@functools.cache
def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a subcommand. Raises KeyError if there is none."""
    module_name, summary = SUBCOMMANDS[name]
    made = Parser(prog=f"deltamem {name}", description=sentence(summary))
    importlib.import_module(module_name).add_arguments(made)
    return made


def command_line() -> str:
    """The page of the command line, in Markdown."""
    lines = [
        "# Command line",
        "",
        "`deltamem help COMMAND` prints what this page says of a command. The options of `generate` and `chat` have",
        "llama.cpp's names. Defaults are in brackets.",
        "",
        "The exit code is 0 after success, 1 after an error, which is one sentence, and 2 after wrong usage. After a",
        "signal it is a shell's: 130 after Ctrl-C, 141 if the reader of the output is gone, 143 after SIGTERM.",
        "",
    ]
    for name in SUBCOMMANDS:
        lines += _command(parser(name), level=2)
    return "\n".join(lines)


def _command(made: argparse.ArgumentParser, level: int) -> list[str]:
    lines = [f"{'#' * level} {made.prog}", "", made.description or "", ""]
    if made.epilog:
        lines += [made.epilog, ""]
    nested = [action for action in made._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        lines += ["```text", _usage(made), "```", ""]
    for group in made._action_groups:
        shown = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, (argparse._HelpAction, *map(type, nested)))
        ]
        if shown:
            title = {"positional arguments": "argument", "options": "option"}.get(group.title or "", group.title)
            lines += [f"| {title} | |", "| --- | --- |", *map(functools.partial(_row, made), shown), ""]
    for action in nested:
        summaries = {choice.dest: choice.help for choice in action._choices_actions}
        for name, command in action.choices.items():
            if not command.description and summaries.get(name):
                command.description = f"{summaries[name][0].upper()}{summaries[name][1:]}."
            lines += _command(command, level + 1)
    return lines


def _usage(made: argparse.ArgumentParser) -> str:
    formatter = made.formatter_class(made.prog, width=90)  # else it has the width of the terminal
    formatter.add_usage(made.usage, made._actions, made._mutually_exclusive_groups)
    return formatter.format_help().strip()


def _row(made: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = made._get_formatter()
    if action.option_strings:
        value = "" if action.nargs == 0 else " " + formatter._format_args(action, action.dest.upper())
        names = [*action.option_strings[:-1], action.option_strings[-1] + value]
    else:
        names = [formatter._format_args(action, action.dest)]
    text = formatter._expand_help(action) if action.help else ""
    shown = ", ".join(f"<code>{_cell(name)}</code>" for name in names)
    return f"| {shown} | {_cell(text)} |"


def _cell(text: str) -> str:
    """As HTML: in a table, Markdown's code shows the backslash that a | needs."""
    return re.sub(r"[|*_\[\]]", lambda mark: f"&#{ord(mark[0])};", html.escape(" ".join(text.split()), quote=False))


def c_api() -> str:
    """The page of the C API, in Markdown: the header, a heading for each of its sections."""
    text = HEADER.read_text(encoding="utf-8")
    head, *sections = re.split(r"(?<=\n\n)//\n// (.+)\n(?=//\n)", text)
    lines = [
        "# C API",
        "",
        "The header `native/llama_deltamem/llama-deltamem.h`, by section. The functions are in the same library as",
        "llama.cpp's.",
        "",
        _c(head),
    ]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        title, _, note = title.partition(": ")
        lines += [f"## {title[0].upper()}{title[1:]}", "", *([f"{note[0].upper()}{note[1:]}.", ""] if note else [])]
        lines += [_c(body)]
    return "\n".join(lines)


def _c(text: str) -> str:
    text = re.sub(r"\A(//\s*\n)+", "", text.strip("\n"))
    return f"```c\n{text}\n```\n"
