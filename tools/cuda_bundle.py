"""`make cuda-bundle`: packs what `make cuda-check` needs into one archive, for a GPU machine without a network.

    python tools/cuda_bundle.py build/cuda-bundle [--python 3.12] [--machine x86_64]

On the other machine, which has nvcc, CMake, ninja, and a Python with PyTorch:

    tar xf deltamem-cuda-check.tar.xz && python3 deltamem-cuda-check/run.py [--minutes 10] [-- CMake options]

The archive holds the files of this repository that the check reads, llama.cpp's sources with our patches, without the
backends that it does not build, and the wheels that our package and its tests need. PyTorch and numpy are not among
them. The random models are made there. Nothing is installed there: run.py unpacks the wheels into its own folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "deltamem-cuda-check"
N_BYTES = 60_000_000  # of the archive
LARGEST = 5_000_000  # of a file of the repository

sys.path.insert(0, str(ROOT / "cmake"))
import fetch_llama_cpp  # noqa: E402

# what the check reads of the repository, as git names it
OURS = re.compile(
    r"(CMakeLists\.txt|LICENSE|pyproject\.toml|_pydeltamem_startup\.py|cmake/.*|convert/.*|examples/tiny/.*|native/.*"
    r"|pydeltamem/(?!models/smollm2).*|tests/[^/]*\.py|tests/(golden|native)/.*|tools/(cuda_check|cuda_bundle_run|native_context)\.py)"
)
BACKENDS = ("ggml-cpu", "ggml-cuda", "ggml-rpc")  # that the check builds
THERE = ("numpy", "torch")  # what comes with PyTorch


def our_files(tracked: list[str]) -> list[str]:
    """The files that go into the archive. The patches do not: the sources have them already."""
    return [path for path in tracked if OURS.fullmatch(path) and not path.endswith(".patch")]


def is_needed(path: str) -> bool:
    """Whether the check builds a file of llama.cpp's tree."""
    match = re.match(r"ggml/src/(ggml-[^/]+)/", path)
    return match is None or match[1] in BACKENDS


def requirements() -> list[str]:
    """What our package and its CUDA tests need from pip, as pyproject.toml pins it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None  # a package has some
    needed = [*re.findall(r'^\s*"([^"]+)"', block[1], re.MULTILINE), "pytest>=8", "typing_extensions", "diskcache"]
    return [one for one in needed if not one.startswith(("llama-cpp-python", *THERE))]


def add_sources(tree: Path) -> None:
    """llama.cpp's sources, patched, as `cmake/fetch_llama_cpp.py` takes a tree."""
    patches = sorted((ROOT / "native" / "patches").glob("*.patch"))
    downloads = ROOT / "build" / "native" / "download"
    fetch_llama_cpp.prepare(tree, patches, downloads)
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not is_needed(path.relative_to(tree).as_posix()):
            path.unlink()


def add_wheels(folder: Path, python: str, machine: str) -> None:
    """The wheels for a Python release, such as 3.12, on Linux."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip"]
    platforms = [f"--platform=manylinux{version}_{machine}" for version in ("2014", "_2_28")]
    download = ["download", "-q", "--only-binary", ":all:", "--python-version", python, *platforms, "-d", folder]
    subprocess.run([*pip, *download, *requirements()], check=True)
    for path in folder.iterdir():
        if path.name.lower().startswith(THERE):
            path.unlink()
    # its Python files alone: the library is built there
    archive = fetch_llama_cpp.download(ROOT / "build" / "native" / "download")
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, archive]
    settings = [f"-Ccmake.define.{name}=OFF" for name in ("LLAMA_BUILD", "LLAVA_BUILD")]
    subprocess.run([*pip, *build, *settings, "-Cwheel.py-api=py3"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the archive goes")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the other machine (%(default)s)")
    parser.add_argument("--machine", default="x86_64", help="its processor (%(default)s)")
    args = parser.parse_args()
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as aside:
        bundle = Path(aside) / NAME
        for path in our_files(listed.splitlines()):
            target = bundle / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target)
            if target.stat().st_size > LARGEST:
                raise SystemExit(f"{path}: larger than {LARGEST:,} bytes: leave it out of the archive")
        (bundle / "native" / "patches").mkdir(parents=True, exist_ok=True)
        shutil.copytree(bundle / "convert", bundle / "pydeltamem" / "convert")  # as the package has it
        add_sources(bundle / "llama.cpp")
        add_wheels(bundle / "wheels", args.python, args.machine)
        (bundle / "tools" / "cuda_bundle_run.py").rename(bundle / "run.py")
        (bundle / "PYTHON").write_text(f"{args.python}\n{args.machine}\n", encoding="utf-8")
        archive = args.folder / f"{NAME}.tar.xz"
        with tarfile.open(Path(aside) / archive.name, "w:xz", preset=6) as tar:
            tar.add(bundle, NAME)
        size = (Path(aside) / archive.name).stat().st_size
        if size > N_BYTES:
            raise SystemExit(f"{archive.name} has {size:,} bytes, more than {N_BYTES:,}: leave something out of it")
        (Path(aside) / archive.name).replace(archive)
    print(f"{archive}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
