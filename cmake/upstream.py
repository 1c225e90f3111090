#!/usr/bin/env python3
"""Other releases of llama-cpp-python: builds and tests against each, or moves the project to one.

    upstream.py check [VERSION ...] [-- CMAKE_OPTION ...]   the newest three, or those named; prints a table
    upstream.py move VERSION                                changes the pins and carries the patches over, in place

git's three-way merge carries a patch over. The base is the pinned release's file; the sides are that file patched, and
the other release's file. A hunk moves with its context. Where the context changed, lines that we add stay next to the
changed neighbour, and a count that we increase is increased from the new value. Any other conflict is an error that
names the file.

A check moves a copy of the working tree and builds that, so it tests what `move` would leave. The patches and the
pinned build stay unchanged. build/upstream/VERSION holds the copy (source), its build (cmake), that release's Python
half (venv) and the log.

`make upstream-check` runs the check. Needs git, cmake and ninja, and of Python only the standard library and pip; the
tests take everything but llama-cpp-python from the environment that runs the script.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import fetch_llama_cpp as fetch

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "native" / "patches"
BUILD = ROOT / "build" / "upstream"
PINNED_DOWNLOADS = ROOT / "build" / "native" / "download"

NEWEST = 3

# the files that name the pinned release: pyproject.toml, which the build reads, and three copies
PINS = ("_pydeltamem_startup.py", "docs/how-to/install.md", "docs/tutorial/index.md", "pyproject.toml")

# the tests that depend on llama.cpp or its bindings; the others test our own files, or need the pinned release
TESTS = (
    "tests/test_golden.py",
    "tests/test_memory.py",
    "tests/test_llama.py",
    "tests/test_checkpoints.py",
    "tests/test_conversation.py",
    "tests/test_conversation_files.py",
    "tests/test_conversation_streams.py",
    "tests/test_several_conversations.py",
    "tests/test_with_others.py",
    "tests/test_unsupported.py",
    "tests/test_pack.py",
)

COLUMNS = ("release", "sha256", "patches", "build", "native tests", "Python tests")


class StepError(Exception):
    """A step failed. The table shows the text."""


#
# releases
#


def newest_releases(count: int) -> list[str]:
    command = [sys.executable, "-m", "pip", "index", "versions", "llama-cpp-python"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    match = re.search(r"^Available versions: (.+)$", result.stdout, re.MULTILINE)
    if not match:
        sys.stderr.write(result.stdout)
        raise fetch.FetchError(
            "pip could not list the releases of llama-cpp-python (its messages are above): "
            "make its index reachable, or name the releases."
        )
    return match[1].split(", ")[:count]


def source_distribution(version: str) -> Path:
    if version == fetch.VERSION:
        return fetch.download(PINNED_DOWNLOADS)
    return fetch.download(BUILD / "download", None, version)


#
# patches
#


def patched_files(patch: Path) -> list[str]:
    return re.findall(r"^diff --git a/(\S+) ", patch.read_text(encoding="utf-8"), re.MULTILINE)


def resolve(theirs: list[str], base: list[str], ours: list[str]) -> list[str] | None:
    """The merged lines of a conflict; None if there is no rule for it."""
    if ours[: len(base)] == base:
        return theirs + ours[len(base) :]
    if ours[len(ours) - len(base) :] == base:
        return ours[: -len(base)] + theirs

    # GGML_OP_COUNT == 101 becomes 102, so 98 becomes 99
    number = re.compile(r"\d+")
    texts = ["".join(lines) for lines in (theirs, base, ours)]
    if len({number.sub("#", text) for text in texts}) > 1:
        return None
    counts = zip(*(map(int, number.findall(text)) for text in texts))
    counted = iter([str(their + our - before) for their, before, our in counts])
    return [number.sub(lambda match: next(counted), texts[0])]


def merge(theirs: Path, base: Path, ours: Path) -> tuple[bytes, int]:
    """The merged file, and how many hunks `resolve` placed. Raises ValueError if it cannot."""
    size = 40  # length of the markers: no line of the files begins with so many of their characters
    command = ["git", "merge-file", "--stdout", "--diff3", f"--marker-size={size}", theirs, base, ours]
    done = subprocess.run(command, capture_output=True)
    if done.returncode > 127:  # else the number of conflicts
        raise ValueError
    output = done.stdout.decode()

    merged, sides, n_resolved = [], None, 0
    for line in output.splitlines(keepends=True):
        marker = line[0] if line[:size] == line[0] * size and line[0] in "<|=>" else ""
        if marker == "<":
            sides = [[]]
        elif marker in ("|", "=") and sides:
            sides.append([])
        elif marker == ">" and sides:
            resolved = resolve(*sides)
            if resolved is None:
                raise ValueError
            merged += resolved
            n_resolved += 1
            sides = None
        else:
            (merged if sides is None else sides[-1]).append(line)
    return "".join(merged).encode(), n_resolved


def carry_over(patches: list[Path], pinned: Path, other: Path) -> tuple[dict[str, str], int]:
    """The patches for the tree `other`, by file name, from those for `pinned`; and how many hunks `resolve` placed."""
    # the user's git configuration must not change the patches
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1")

    carried, n_resolved = {}, 0
    with tempfile.TemporaryDirectory() as aside:
        theirs, base, ours = (Path(aside).resolve() / name for name in ("theirs", "base", "ours"))

        def git(*arguments: str) -> str:
            command = ["git", "-c", "core.autocrlf=false", *arguments]
            return subprocess.run(command, cwd=theirs, env=env, check=True, capture_output=True, text=True).stdout

        for patch in patches:
            for name in patched_files(patch):
                for tree, source in ((theirs, other), (base, pinned), (ours, pinned)):
                    if not (source / name).exists():
                        raise StepError(f"{patch.name} does not fit {name}, which is not there")
                    if not (tree / name).exists():
                        write(tree / name, (source / name).read_bytes())
            git("init", "-q")
            git("add", "--all")
            before = git("write-tree").strip()

            fetch.apply_patches(ours, [patch])
            for name in patched_files(patch):
                try:
                    merged, n = merge(theirs / name, base / name, ours / name)
                except ValueError:
                    raise StepError(f"{patch.name} does not fit {name}") from None
                n_resolved += n
                write(theirs / name, merged)
                write(base / name, (ours / name).read_bytes())
            git("add", "--all")
            carried[patch.name] = git("diff", "--cached", "--unified=0", "--full-index", before)
    return carried, n_resolved


def carry_over_to(archive: Path) -> tuple[dict[str, str], int]:
    patches = sorted(PATCHES.glob("*.patch"))
    with tempfile.TemporaryDirectory() as aside:
        pinned, other = Path(aside, "pinned"), Path(aside, "other")
        fetch.extract(source_distribution(fetch.VERSION), pinned)
        fetch.extract(archive, other)
        return carry_over(patches, pinned, other)


def pins_moved_to(version: str, sha256: str) -> dict[str, str]:
    """The files that name the pinned release, by name, with the text that names the other one."""
    moved = {}
    for name in PINS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if fetch.VERSION not in text:
            raise StepError(f"{name} does not name {fetch.VERSION}")
        moved[name] = text.replace(fetch.VERSION, version).replace(fetch.SHA256, sha256)
    return moved


def write(path: Path, data: bytes) -> None:
    """Writes a file if it differs: one that stays the same keeps its modification time and is not compiled again."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


#
# check
#


class Check:
    """One release; `run` fills in `row`."""

    def __init__(self, version: str, options: list[str]):
        self.version = version
        self.options = options
        self.folder = BUILD / version
        self.source = self.folder / "source"
        self.cmake = self.folder / "cmake"
        self.python = self.folder / "venv" / "bin" / "python"
        self.log = self.folder / "log.txt"
        self.row = dict.fromkeys(COLUMNS, "–")
        self.row["release"] = version

    def run(self) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        column = "sha256"
        try:
            archive = source_distribution(self.version)
            sha256 = fetch.sha256_of(archive)
            self.row[column] = sha256[:12]

            column = "patches"
            self.row[column] = self.copy_tree(archive, sha256)

            column = "build"
            self.row[column] = self.build(archive)

            column = "native tests"
            self.row[column] = self.native_tests()

            column = "Python tests"
            self.install_bindings(archive, sha256)
            self.row[column] = self.python_tests()
        except (StepError, fetch.FetchError) as error:
            self.row[column] = f"**no**: {error}"
            return False
        return True

    def step(self, what: str, *command: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Runs a command and returns its output, which is logged too."""
        print(f"{self.version}: {what}", flush=True)
        arguments = [str(argument) for argument in command]
        # these would select another library, package or source
        others = ("DELTAMEM_LLAMA_CPP_SOURCE", "LLAMA_CPP_LIB_PATH", "PYTHONPATH")
        clean = {key: value for key, value in os.environ.items() if key not in others}
        result = subprocess.run(
            arguments,
            cwd=cwd,
            env={**clean, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(arguments)}\n{result.stdout}\n")
        if result.returncode != 0:
            print("\n".join(result.stdout.splitlines()[-25:]))
            raise StepError(f"{what} failed, see {self.log.relative_to(ROOT)}")
        return result.stdout

    def copy_tree(self, archive: Path, sha256: str) -> str:
        """Copies the working tree with its pins and patches moved."""
        print(f"{self.version}: patches", flush=True)
        carried, n_resolved = carry_over_to(archive)
        moved = pins_moved_to(self.version, sha256)

        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout.decode()
        names = [name for name in listed.split("\0") if name and not name.startswith("native/patches/")]
        files = {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}
        files |= {f"pydeltamem/{name}": files[name] for name in files if name.startswith("convert/")}  # as installed
        files |= {name: text.encode() for name, text in moved.items()}
        files |= {f"native/patches/{name}": text.encode() for name, text in carried.items()}
        for name, data in files.items():
            write(self.source / name, data)
        # what an earlier check copied, and is gone since
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source).as_posix()
            if path.is_file() and name not in files and not name.startswith(("build/", "pydeltamem/lib/")):
                path.unlink()

        before = "".join((PATCHES / name).read_text(encoding="utf-8") for name in carried)
        ours = set(re.findall(r"^index (.+)$", before, re.MULTILINE))
        theirs = re.findall(r"^index (.+)$", "".join(carried.values()), re.MULTILINE)
        differ = sum(index not in ours for index in theirs)
        if not differ:
            return "apply"
        return f"apply; {differ} of {len(theirs)} files differ, {n_resolved} hunks beside changed lines"

    def build(self, archive: Path) -> str:
        self.step(
            "configure",
            *("cmake", "-S", self.source, "-B", self.cmake, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-DDELTAMEM_LLAMA_CPP_SOURCE={archive}",
            "-DSKBUILD_STATE=editable",  # installs into the copy's package, as `make` does into ours
            *self.options,
        )
        self.step("build", "cmake", "--build", self.cmake)
        self.step("install", "cmake", "--install", self.cmake, "--component", "pydeltamem")
        return "yes"

    def native_tests(self) -> str:
        # without the tests of the kernel: it uses nothing of llama.cpp and is the same for each release
        tests = ["ctest", "--test-dir", self.cmake, "--output-on-failure", "--exclude-regex", "^kernel-"]
        output = self.step("native tests", *tests)
        passed, skipped = output.count(" Passed "), output.count("***Skipped")
        return f"{passed} passed" + (f", {skipped} skipped" if skipped else "")

    def install_bindings(self, archive: Path, sha256: str) -> None:
        """An environment with this release's Python half and the copied package; everything else comes from ours."""
        environment = self.folder / "venv"
        stamp = environment / ".installed"
        if stamp.exists() and stamp.read_text() == sha256:
            return
        venv.create(environment, clear=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
        # a folder that a .pth file adds comes last, and Python ignores its .pth files, so the editable install too
        Path(packages, "upstream.pth").write_text(f"{self.source}\n{sysconfig.get_path('purelib')}\n")
        self.step(
            "bindings",
            *(self.python, "-m", "pip", "install", "--no-cache-dir", "--no-build-isolation", archive),
            env={"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"},
        )
        stamp.write_text(sha256)

    def python_tests(self) -> str:
        output = self.step(
            "Python tests",
            *(self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS),
            cwd=self.source,
        )
        summary = output.strip().splitlines()[-1]
        result = ", ".join(re.findall(r"\d+ (?:passed|skipped)", summary))
        if "passed" not in result:
            raise StepError("no test ran")
        return result


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check(versions: list[str], options: list[str]) -> int:
    checks = [Check(version, options) for version in versions or newest_releases(NEWEST)]
    passed = [one.run() for one in checks]
    print("\n" + table([one.row for one in checks]))
    return 0 if all(passed) else 1


#
# move
#


def move(version: str) -> int:
    archive = source_distribution(version)
    carried, n_resolved = carry_over_to(archive)
    for name, text in pins_moved_to(version, fetch.sha256_of(archive)).items():
        write(ROOT / name, text.encode())
    for name, text in carried.items():
        write(PATCHES / name, text.encode())
    print(f"moved from {fetch.VERSION} to {version}, {n_resolved} hunks beside changed lines: see git diff")
    return 0


def main(argv: list[str]) -> int:
    options = []
    if "--" in argv:
        at = argv.index("--")
        argv, options = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="build and test against other releases")
    check_parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: the newest {NEWEST}")
    move_parser = commands.add_parser("move", help="change the pins and the patches to another release")
    move_parser.add_argument("version", metavar="VERSION")
    args = parser.parse_args(argv)
    try:
        return check(args.versions, options) if args.command == "check" else move(args.version)
    except (StepError, fetch.FetchError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
