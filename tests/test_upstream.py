"""Moving to another llama-cpp-python: patches carried over, pins, the count of patched lines. Builds nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import patch_count
import upstream
from conftest import ROOT
from refusals import refuses

fetch = upstream.fetch

NAME = "src/llama-graph.cpp"
LINES = [f"line {i}\n" for i in range(30)]


def make_tree(folder: Path, text: str) -> Path:
    (folder / NAME).parent.mkdir(parents=True)
    (folder / NAME).write_text(text)
    return folder


def changed(lines: list[str]) -> str:
    """What the patch makes of a file: a hook after one line, another line replaced."""
    lines = list(lines)
    lines[lines.index("line 20\n")] = "LINE 20\n"
    lines.insert(lines.index("line 10\n") + 1, "hook\n")
    return "".join(lines)


@pytest.fixture
def pinned(tmp_path):
    return make_tree(tmp_path / "pinned", "".join(LINES))


@pytest.fixture
def patch(tmp_path, pinned):
    """Without context and with full hashes, as native/patches."""
    repository = make_tree(tmp_path / "repository", "".join(LINES))
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    (repository / NAME).write_text(changed(LINES))
    command = ["git", "-c", "diff.noprefix=false", "diff", "-U0", "--full-index"]
    path = tmp_path / "patches" / "0001-hook.patch"
    path.parent.mkdir()
    path.write_bytes(subprocess.run(command, cwd=repository, check=True, stdout=subprocess.PIPE).stdout)
    return path


def test_patches_for_the_pinned_release_stay_as_they_are(pinned, patch):
    assert upstream.carry_over([patch], pinned, pinned) == ({patch.name: patch.read_text()}, 0)


def test_hunks_go_where_their_surroundings_went(tmp_path, pinned, patch):
    lines = ["new\n"] * 7 + LINES[:15] + ["more\n"] * 3 + LINES[15:]
    other = make_tree(tmp_path / "other", "".join(lines))
    carried, n_resolved = upstream.carry_over([patch], pinned, other)

    assert n_resolved == 0
    assert (other / NAME).read_text() == "".join(lines), "the tree is only read"
    moved = tmp_path / patch.name
    moved.write_text(carried[patch.name])
    fetch.apply_patches(other, [moved])  # compares the hashes too
    assert (other / NAME).read_text() == changed(lines)
    assert patch_count.count(carried[patch.name]) == patch_count.count(patch.read_text())


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("line 10 of another kind\nand more\n", "line 10 of another kind\nand more\nhook\n"),
        ("", "hook\n"),
    ],
)
def test_added_lines_stay_beside_a_neighbour_that_changed(tmp_path, pinned, patch, text, result):
    lines = "".join(LINES)
    other = make_tree(tmp_path / "other", lines.replace("line 10\n", text))
    carried, n_resolved = upstream.carry_over([patch], pinned, other)

    assert n_resolved == 1
    (tmp_path / patch.name).write_text(carried[patch.name])
    fetch.apply_patches(other, [tmp_path / patch.name])
    assert (other / NAME).read_text() == lines.replace("line 10\n", result).replace("line 20\n", "LINE 20\n")


@pytest.mark.parametrize(
    ("theirs", "base", "ours", "merged"),
    [
        (["T\n"], ["b\n"], ["b\n", "+\n"], ["T\n", "+\n"]),
        (["T\n"], ["b\n"], ["+\n", "b\n"], ["+\n", "T\n"]),
        (["t\n"], [], ["+\n"], ["t\n", "+\n"]),
        (["N == 98, 98\n"], ["N == 101, 101\n"], ["N == 102, 102\n"], ["N == 99, 99\n"]),
        (["T\n"], ["b\n", "c\n"], ["b\n", "+\n", "c\n"], None),
        (["T\n"], ["b\n"], ["O\n"], None),
        (["M == 98\n"], ["N == 101\n"], ["N == 102\n"], None),
    ],
)
def test_conflicts_are_resolved_where_the_lines_say_how(theirs, base, ours, merged):
    assert upstream.resolve(theirs, base, ours) == merged


@pytest.mark.parametrize("line", ["line 20 of another kind\n", ""])
def test_a_line_that_both_sides_change_is_named(tmp_path, pinned, patch, line):
    other = make_tree(tmp_path / "other", "".join(LINES).replace("line 20\n", line))
    with refuses(upstream.StepError, "0001-hook.patch", "src/llama-graph.cpp"):
        upstream.carry_over([patch], pinned, other)


def test_a_file_that_git_cannot_merge_is_named(tmp_path, pinned, patch):
    other = make_tree(tmp_path / "other", "\0" + "".join(LINES))  # binary to git
    with refuses(upstream.StepError, "0001-hook.patch", "src/llama-graph.cpp"):
        upstream.carry_over([patch], pinned, other)


def test_a_file_that_is_gone_is_named(tmp_path, pinned, patch):
    other = tmp_path / "other"
    other.mkdir()
    with refuses(upstream.StepError, "0001-hook.patch", "src/llama-graph.cpp"):
        upstream.carry_over([patch], pinned, other)


def test_every_file_that_names_the_pinned_release_is_moved():
    folders = ("cmake", "convert", "docs", "native", "pydeltamem", "tests", "tools", ".ci")
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    suffixes = ("", ".c", ".cmake", ".cpp", ".h", ".md", ".py", ".toml", ".txt")
    paths = [path for path in paths if path.suffix in suffixes and "lib" not in path.relative_to(ROOT).parts]
    naming = {path.relative_to(ROOT).as_posix() for path in paths if fetch.VERSION.encode() in path.read_bytes()}
    naming.discard("docs/how-to/upgrade-llama-cpp.md")  # the message says which releases were tested
    assert naming == set(upstream.PINS)

    moved = upstream.pins_moved_to("9.8.7", "f" * 64)
    assert set(moved) == naming
    for text in moved.values():
        assert "9.8.7" in text
        assert fetch.VERSION not in text and fetch.SHA256 not in text
    assert "f" * 64 in moved["pyproject.toml"]


def test_newest_releases_come_from_pip(monkeypatch):
    def answer(text):
        return lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, text)

    listing = "llama-cpp-python (9.0.2)\nAvailable versions: 9.0.2, 9.0.1, 8.9.0, 8.8.0\n  INSTALLED: 8.9.0\n"
    monkeypatch.setattr(upstream.subprocess, "run", answer(listing))
    assert upstream.newest_releases(3) == ["9.0.2", "9.0.1", "8.9.0"]
    monkeypatch.setattr(upstream.subprocess, "run", answer("ERROR: no index\n"))
    with refuses(fetch.FetchError, "llama-cpp-python"):
        upstream.newest_releases(3)


def test_a_failed_step_stands_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "BUILD", tmp_path)
    archive = tmp_path / "archive"
    archive.write_bytes(b"")
    monkeypatch.setattr(upstream, "source_distribution", lambda version: archive)

    def refuse(archive):
        raise upstream.StepError("0001-hook.patch does not fit src/llama-graph.cpp")

    monkeypatch.setattr(upstream, "carry_over_to", refuse)
    one = upstream.Check("9.8.7", [])
    assert not one.run()
    assert upstream.table([one.row]).splitlines()[-1] == (
        "| 9.8.7 | e3b0c44298fc | **no**: 0001-hook.patch does not fit src/llama-graph.cpp | – | – | – |"
    )


def test_a_check_copies_what_is_there_now(tmp_path, monkeypatch):
    """In the folder of the last check, with the libraries that it built. A module that is gone must not be found."""
    repository, patches = tmp_path / "repository", tmp_path / "repository" / "native" / "patches"
    patches.mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    for name in ("old.py", "pin.py", "convert/one.py", "native/patches/0001.patch"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(f"{name}\n")
    monkeypatch.setattr(upstream, "ROOT", repository)
    monkeypatch.setattr(upstream, "PATCHES", patches)
    monkeypatch.setattr(upstream, "BUILD", tmp_path)
    monkeypatch.setattr(upstream, "pins_moved_to", lambda version, sha256: {"pin.py": "moved\n"})
    monkeypatch.setattr(upstream, "carry_over_to", lambda archive: ({"0001.patch": "carried\n"}, 0))
    one = upstream.Check("9.8.7", [])
    one.copy_tree(tmp_path / "archive", "f" * 64)
    library = one.source / "pydeltamem" / "lib" / "libllama.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (repository / "old.py").rename(repository / "new.py")
    one.copy_tree(tmp_path / "archive", "f" * 64)

    copied = {path.relative_to(one.source).as_posix(): path for path in one.source.rglob("*") if path.is_file()}
    assert set(copied) == {
        "new.py", "pin.py", "convert/one.py", "pydeltamem/convert/one.py", "pydeltamem/lib/libllama.so",
        "native/patches/0001.patch",
    }  # fmt: skip
    assert copied["pin.py"].read_text() == "moved\n"
    assert copied["native/patches/0001.patch"].read_text() == "carried\n"


#
# the count of patched lines
#

DIFF = """\
diff --git a/sql.txt b/sql.txt
index 1..2 100644
--- a/sql.txt
+++ b/sql.txt
@@ -3,2 +3 @@ heading
--- a comment that looks like a header
-two
+++ three
@@ -9,0 +9,2 @@
+four
+
--- a/context.txt
+++ b/context.txt
@@ -1,3 +1,3 @@
 same
-old
+new
 same
\\ No newline at end of file
--- a/gone.txt
+++ /dev/null
@@ -1 +0,0 @@
-last
"""


def test_changed_lines_and_files_are_counted():
    assert patch_count.count(DIFF) == (3 + 2 + 2 + 1, {"sql.txt", "context.txt", "gone.txt"})


def test_the_count_has_limits(tmp_path, capsys):
    def hunk(name, lines):
        return f"--- a/{name}\n+++ b/{name}\n@@ -0,0 +1,{lines} @@\n" + "+x\n" * lines

    patch = tmp_path / "0001.patch"
    patch.write_text(hunk("a", patch_count.MAX_LINES))
    assert patch_count.main(tmp_path) == 0
    patch.write_text(hunk("a", patch_count.MAX_LINES + 1))
    assert patch_count.main(tmp_path) == 1
    patch.write_text("".join(hunk(f"f{i}", 1) for i in range(patch_count.MAX_FILES)))
    assert patch_count.main(tmp_path) == 0
    (tmp_path / "0002.patch").write_text(hunk("f0", 1))  # a file that the first patch changes too
    assert patch_count.main(tmp_path) == 0
    (tmp_path / "0002.patch").write_text(hunk("one more", 1))
    assert patch_count.main(tmp_path) == 1
    assert "13 files of at most 12" in capsys.readouterr().out.splitlines()[-1]


def test_our_patches_are_within_the_limits():
    assert patch_count.main() == 0
