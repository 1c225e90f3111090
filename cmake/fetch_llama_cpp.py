#!/usr/bin/env python3
"""Downloads the pinned llama.cpp source, applies our patches and writes the tree that CMake builds.

The source is vendor/llama.cpp inside the source distribution of llama-cpp-python, which pip downloads by name: mirrors,
offline caches and pip's own configuration work as for any package. A source distribution on disk, or an unpacked tree,
can be named instead; a tree is copied, never changed.

The patched tree is made in a temporary folder; then the files that differ are copied over the old tree. The others keep
their modification time, so a changed patch recompiles only the files that it changes.

Needs the standard library, git and, to download, pip. On failure it prints one sentence and exits with 1.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def pinned(key: str) -> str:
    """What pyproject.toml says between `key` and the next quote. CMake may run Python 3.9, which has no TOML reader."""
    return re.search(re.escape(key) + '([^"]+)"', PYPROJECT.read_text(encoding="utf-8"))[1]


VERSION = pinned('"llama-cpp-python==')
SHA256 = pinned('llama-cpp-python-sha256 = "')
REQUIREMENT = f"llama-cpp-python=={VERSION}"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"

# What we use of vendor/llama.cpp: the sources of the libraries, a test file (for native/deltamem_architectures), the
# converter, and one vocabulary for tests. The rest is 150 MB of documents and models.
KEEP = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "common",
    "conversion",
    "convert_hf_to_gguf.py",
    "ggml",
    "gguf-py/gguf",
    "include",
    "licenses",
    "models/ggml-vocab-qwen2.gguf",
    "src",
    "tests/test-llama-archs.cpp",
    "tools/mtmd",
    "vendor",
)
STAMP = ".deltamem-source"


class FetchError(Exception):
    """One sentence that says what is wrong and what to do."""


def kept(path: str) -> bool:
    """Whether a path relative to llama.cpp's root is part of the build."""
    return any(path == keep or path.startswith(keep + "/") for keep in KEEP)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        raise FetchError(
            f"The checksum of {path} does not match: its sha256 is {actual} and should be {expected}; {remedy}."
        )


def download(folder: Path, expected: str | None = SHA256, version: str = VERSION) -> Path:
    """The source distribution in `folder`, which pip downloads if it is missing. expected=None accepts any checksum."""
    requirement = f"llama-cpp-python=={version}"
    archive = folder / f"llama_cpp_python-{version}.tar.gz"
    if archive.exists():
        if expected:
            check_sha256(archive, expected, "remove the file and build again")
        return archive

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--dest", aside, requirement]
        # pip asks the package's build backend for its metadata; we have the same one installed
        if importlib.util.find_spec("scikit_build_core"):
            command.insert(-1, "--no-build-isolation")
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            sys.stderr.write(result.stdout)
            raise FetchError(
                f"pip could not download the source distribution of {requirement} (its messages are above); "
                f"make pip's index reachable, or put {archive.name} into {folder}."
            )
        fetched = Path(aside) / archive.name
        if not fetched.exists():
            raise FetchError(f"pip downloaded {requirement}, but not as {archive.name}: use a newer pip.")
        if expected:
            check_sha256(fetched, expected, "pip's index offers another file: use one that mirrors the original")
        fetched.replace(archive)
    return archive


def extract(archive: Path, tree: Path) -> None:
    """Unpacks KEEP of vendor/llama.cpp into `tree`."""
    prefix = re.compile(r"[^/]+/vendor/llama\.cpp/(.+)")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                match = prefix.fullmatch(member.name)
                if not member.isfile() or not match or not kept(match[1]) or ".." in Path(match[1]).parts:
                    continue
                target = tree / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FetchError(f"{archive} cannot be unpacked ({error}): name an intact {SDIST}.") from error


def copy_tree(source: Path, tree: Path) -> None:
    """Copies KEEP of an unpacked llama.cpp, or llama-cpp-python, into `tree`."""
    if (source / "vendor" / "llama.cpp" / "CMakeLists.txt").exists():
        source = source / "vendor" / "llama.cpp"
    if not (source / "ggml" / "CMakeLists.txt").exists():
        raise FetchError(
            f"{source} is no llama.cpp source tree (it has no ggml/CMakeLists.txt): "
            f"name a tree of llama.cpp or of llama-cpp-python {VERSION}, or {SDIST}."
        )
    for keep in KEEP:
        origin = source / keep
        if origin.is_dir():
            shutil.copytree(origin, tree / keep)
        elif origin.exists():
            (tree / keep).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, tree / keep)


def git_apply(tree: Path, patch: Path, *options: str) -> subprocess.CompletedProcess:
    # Inside a repository, git apply takes paths relative to that repository and silently skips ignored files. The
    # ceiling keeps it from looking above the tree.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(tree.parent)
    env["LC_ALL"] = "C"  # apply_patches reads what it says
    command = [
        "git",
        "-c",
        "core.autocrlf=false",
        "apply",
        "--unidiff-zero",
        "--whitespace=nowarn",
        *options,
        str(patch),
    ]
    try:
        return subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise FetchError("git was not found and is needed to apply the patches: install git.") from error


def blob_id(path: Path) -> str:
    """git's hash of a file's content, as in the index lines of a diff."""
    data = path.read_bytes() if path.exists() else b""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_index_lines(tree: Path, patch: Path, side: int) -> None:
    """Compares files with the `index old..new` lines of a patch, if it has any: side 0 before, 1 after it is applied.

    Hunks without context fit any file that is long enough. Only the index lines reveal another version.
    """
    name = None
    for line in patch.read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r"diff --git a/(\S+) b/(\S+)", line)
        if header:
            name = header[2]
        index = re.fullmatch(r"index ([0-9a-f]+)\.\.([0-9a-f]+)(?: \d+)?", line)
        if index and name and not blob_id(tree / name).startswith(index[side + 1]) and set(index[side + 1]) != {"0"}:
            raise FetchError(
                f"The patch {patch.name} does not apply: {name} is not the file that it was made for; "
                f"use the source of {REQUIREMENT}, or make the patch again."
            )


def apply_patches(tree: Path, patches: list[Path]) -> None:
    tree = tree.resolve()
    for patch in (path.resolve() for path in patches):
        check_index_lines(tree, patch, 0)
        result = git_apply(tree, patch)
        if result.returncode != 0:
            where = re.search(r"patch failed: (\S+)|error: (\S+?): ", result.stdout)
            place = f" at {where[1] or where[2]}" if where else ""
            raise FetchError(
                f"The patch {patch.name} does not apply{place}: make it fit the llama.cpp source, "
                f"or use the source of {REQUIREMENT}."
            )
        # a patch that was applied can be reversed
        if git_apply(tree, patch, "--reverse", "--check").returncode != 0:
            raise FetchError(
                f"The patch {patch.name} left the source as it was: git apply skipped it, use a newer git."
            )
        check_index_lines(tree, patch, 1)


def files_of(tree: Path) -> set[Path]:
    return {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}


def synchronize(fresh: Path, tree: Path) -> list[Path]:
    """Makes `tree` equal to `fresh` and writes only the files that differ. Returns them."""
    tree.mkdir(parents=True, exist_ok=True)
    wanted = files_of(fresh)
    for path in files_of(tree) - wanted:
        (tree / path).unlink()
    written = []
    for path in sorted(wanted):
        target = tree / path
        if target.exists() and filecmp.cmp(fresh / path, target, shallow=False):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / path, target)  # a new modification time
        written.append(path)
    return written


def prepare(
    tree: Path, patches: list[Path], download_dir: Path, source: Path | None = None, expected: str = SHA256
) -> list[Path]:
    """Makes `tree` the patched source if it is not yet. Returns the files that were written."""
    if source is not None and not source.exists():
        raise FetchError(
            f"The llama.cpp source {source} does not exist: correct DELTAMEM_LLAMA_CPP_SOURCE or unset it."
        )

    stamp = None
    if source is None or source.is_file():
        archive = download(download_dir, expected) if source is None else source
        check_sha256(archive, expected, f"name the {SDIST} of {REQUIREMENT}")
        parts = [expected, sha256_of(Path(__file__)), *(patch.name + " " + sha256_of(patch) for patch in patches)]
        stamp = "\n".join(parts) + "\n"
        stamp_file = tree / STAMP
        if stamp_file.exists() and stamp_file.read_text() == stamp:
            return []

    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as aside:
        fresh = Path(aside) / "llama.cpp"
        fresh.mkdir()
        if stamp is None:
            copy_tree(source, fresh)
        else:
            extract(archive, fresh)
        apply_patches(fresh, patches)
        written = synchronize(fresh, tree)  # removes the old stamp first
    if stamp is not None:
        stamp_file.write_text(stamp)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, help="folder for the patched source")
    parser.add_argument("--patches", type=Path, help="folder of *.patch files, applied by name (default: none)")
    parser.add_argument("--download-dir", type=Path, required=True, help="folder that keeps the source distribution")
    parser.add_argument("--source", type=Path, help=f"a source tree, or {SDIST}, instead of a download")
    args = parser.parse_args()
    patches = sorted(args.patches.glob("*.patch")) if args.patches else []
    try:
        written = prepare(args.tree, patches, args.download_dir, args.source)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"llama.cpp of {REQUIREMENT} in {args.tree}: {len(written)} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
