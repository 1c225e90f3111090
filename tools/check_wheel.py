#!/usr/bin/env python3
"""Checks a built wheel: its tag and contents; then installs it where there is no compiler, and computes there.

python tools/check_wheel.py dist/pydeltamem-0.1.0-py3-none-manylinux_2_35_x86_64.whl

pip takes dependencies as wheels only, from the folder of the wheel too: llama-cpp-python's lies there (`make wheel`).
A wheel with a ggml-cpu for each kind of processor computes the golden cases by every one that runs here, from the best
downwards. With qemu-x86_64 (Debian: qemu-user), processors that this one is not load it too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"
OLDER = {"Haswell": "haswell", "SandyBridge": "sandybridge", "Nehalem": "sse42"}  # numpy runs on no older ones
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")

LOAD = """
import pathlib
import pydeltamem
from pydeltamem import DeltaMemLlama
from pydeltamem.runtime import library
import pydeltamem.convert

folder = pathlib.Path(pydeltamem.__file__).parent
path = pathlib.Path(library.llama_cpp.llama_cpp._lib._name)
assert "site-packages" in folder.parts, folder
assert path.parent == folder / "lib", path
library.llama_cpp.llama_backend_init()
maps = pathlib.Path("/proc/self/maps")
if maps.exists():
    assert {root!r} not in maps.read_text(), "a library of the source tree is loaded"
print(path, library.llama_cpp.llama_print_system_info().decode())
"""

# prints the file of the ggml-cpu that computes
WHICH = """
import pydeltamem.runtime.library
print(*{line.split()[-1] for line in open("/proc/self/maps") if "ggml-cpu" in line})
"""

# A memory that another ggml-cpu saved before is loaded unchanged, and reads the same text nearly as it did there: the
# weights are Q8_0, whose products round differently.
MEMORY = """
import numpy as np, pathlib
from importlib.resources import files
from pydeltamem import Conversation, DeltaMemLlama

models = files("pydeltamem") / "models"
llm = DeltaMemLlama(models / "default.gguf", deltamem_path=models / "default-msw.gguf", n_ctx=256, verbose=False)
kept = pathlib.Path("state.npy")
with Conversation(llm, memory_file="ada.memory", temp=0, n_predict=16) as ada:
    if kept.exists():
        assert np.array_equal(llm.memory.state, np.load(kept)), "the memory file changed"
    ada.say("Let me tell you that Grace is my sister.")
    ada.say("I live in Lima.")
    ada.clear()
    answer = ada.say("How is my sister called?")
    np.save(kept, llm.memory.state)
llm.reset()
llm.memory.reset()
llm.eval(llm.tokenize("I live in Lima and Grace is my sister.".encode()))
read = pathlib.Path("read.npy")
if not read.exists():
    np.save(read, llm.memory.state)
error = ((llm.memory.state - np.load(read)) ** 2).sum() / (np.load(read) ** 2).sum()
assert error < 1e-3, error
print(f"memory as by the first: {error:.1e}; {answer}")
llm.close()
"""


def check_contents(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("pydeltamem", "py3", "none"), wheel.name
    assert platform != "any", wheel.name

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"pydeltamem-{version}.dist-info"
        tops = {entry.split("/")[0] for entry in names}
        tops.discard("pydeltamem.libs")  # auditwheel's copies of libraries
        assert tops == {"pydeltamem", info, "pydeltamem.pth", "_pydeltamem_startup.py"}, tops

        libraries = [entry for entry in names if entry.startswith("pydeltamem/lib/") and "/converter/" not in entry]
        stems = [entry.rsplit("/", 1)[1].split(".")[0].removeprefix("lib") for entry in libraries]
        assert {"llama", "ggml", "ggml-base"} <= set(stems), libraries
        assert len(stems) == len(set(stems)), libraries
        if any(stem.startswith("ggml-cpu-") for stem in stems):
            assert "ggml-cpu" not in stems, "a ggml-cpu for this machine is there too"

        for path in [ROOT / "LICENSE", *(ROOT / "licenses").iterdir()]:
            shipped = f"{info}/licenses/{path.relative_to(ROOT).as_posix()}"
            assert archive.read(shipped) == path.read_bytes(), shipped

        for path in [*ROOT.glob("pydeltamem/**/*"), *ROOT.glob("convert/*.py")]:
            entry = path.relative_to(ROOT).as_posix()
            if path.is_file() and path.suffix != ".md" and not {"lib", "__pycache__"} & set(entry.split("/")):
                assert entry.replace("convert/", "pydeltamem/convert/", 1) in names, entry

        show_sizes(archive, wheel.stat().st_size)


def show_sizes(archive: zipfile.ZipFile, total: int) -> None:
    """Prints the largest files, as MB in the wheel and unpacked."""
    entries = sorted(archive.infolist(), key=lambda entry: -entry.file_size)
    print(f"{total / 1e6:6.2f} MB, unpacked {sum(entry.file_size for entry in entries) / 1e6:.2f}:")
    for entry in entries:
        if (entry.filename.startswith("pydeltamem/lib/") and entry.file_size > 30_000) or entry.file_size > 1_000_000:
            print(f"{entry.compress_size / 1e6:6.2f} {entry.file_size / 1e6:6.2f}  {entry.filename}")


class Environment:
    """An environment of Python in a folder, whose commands find no compiler, nor anything of the source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "environment", with_pip=True)
        self.python = folder / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        dropped = ("LLAMA_CPP_LIB_PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "CC", "CXX", "CMAKE_ARGS")
        self.variables = {key: value for key, value in os.environ.items() if key not in dropped}
        if os.name != "nt":
            self.variables["PATH"] = str(self.python.parent)
            found = [name for name in COMPILERS if shutil.which(name, path=self.variables["PATH"])]
            assert not found, found

    def run(self, *command: str | Path, emulator: Sequence[str] = ()) -> str:
        """What a command of the environment prints, in the folder. Raises CalledProcessError."""
        first = self.python.with_name(command[0] + (".exe" if os.name == "nt" else ""))
        done = subprocess.run(
            [*emulator, first, *command[1:]], cwd=self.folder, env=self.variables, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(done.stdout)
            done.check_returncode()
        return done.stdout.strip()

    def install(self, *requirements: str, wheels: Path) -> None:
        print(self.run("python", "-m", "pip", "install", "--only-binary=:all:", "--find-links", wheels, *requirements))


def check_loading(environment: Environment) -> None:
    print(environment.run("python", "-c", LOAD.format(root=str(ROOT))))
    for first in ("llama_cpp", "pydeltamem"):  # either import may come first in a program that does nothing else
        load = f"import {first}, llama_cpp; llama_cpp.llama_cpp._lib.llama_deltamem_adapter_load"
        environment.run("python", "-c", load)
    environment.run("deltamem", "--help")
    told = environment.run("deltamem", "demo", "--strategy", "msw", "--seed", "3")
    print("demo:", next(line for line in told.splitlines() if line.startswith("right")))


def check_computing(environment: Environment) -> None:
    """The golden cases and a memory file, by each ggml-cpu that runs here: the best is taken away each time."""
    environment.run("deltamem", "convert", TINY / "adapter", "--base", TINY / "base.gguf", "-o", "tiny.gguf")
    tests = (ROOT / "tests" / "test_golden.py", "-k", "test_conversation or test_backbone")
    while True:
        loaded = environment.run("python", "-c", WHICH)
        golden = environment.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests).splitlines()[-1]
        memory = environment.run("python", "-c", MEMORY)
        print(f"{Path(loaded).name}: golden cases: {golden}; {memory}", flush=True)
        module = Path(loaded)
        if "ggml-cpu-" not in module.name or len(list(module.parent.glob("*ggml-cpu-*"))) == 1:
            return
        if module.name.split(".")[0].endswith("-x64"):
            return  # those that are left do not run here
        module.unlink()


def check_older_processors(environment: Environment) -> None:
    """Emulated ones take the ggml-cpu that is meant for them. ggml loads all to ask which run, so none may do anything
    at that moment that needs its own processor.
    """
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        print("qemu-x86_64 is not installed: no older processor is tried")
        return
    for processor, expected in OLDER.items():
        loaded = Path(environment.run("python", "-c", WHICH, emulator=(emulator, "-cpu", processor)))
        print(f"{processor}: {loaded.name}", flush=True)
        assert loaded.name.split(".")[0].endswith(f"-{expected}"), loaded
        print(environment.run("python", "-c", MEMORY, emulator=(emulator, "-cpu", processor)), flush=True)


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"{' '.join(sys.argv)}: name one wheel, which make wheel leaves in dist/")
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder))
        environment.install(str(wheel), wheels=wheel.parent)
        check_loading(environment)
        if Path("/proc/self/maps").exists():
            if "x86_64" in wheel.name:
                check_older_processors(environment)
            environment.install(f"{wheel}[convert]", "pytest", wheels=wheel.parent)
            check_computing(environment)
    print(f"{wheel.name}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
