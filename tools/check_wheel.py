#!/usr/bin/env python3
"""Checks a built wheel: its tag and contents, and that it imports and loads elsewhere in a fresh environment.

python tools/check_wheel.py dist/pydeltamem-0.1.0-py3-none-linux_x86_64.whl
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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


def check_contents(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("pydeltamem", "py3", "none"), wheel.name
    assert platform != "any", wheel.name

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"pydeltamem-{version}.dist-info"
        tops = {entry.split("/")[0] for entry in names}
        assert tops == {"pydeltamem", info, "pydeltamem.pth", "_pydeltamem_startup.py"}, tops

        libraries = [entry for entry in names if entry.startswith("pydeltamem/lib/") and "/converter/" not in entry]
        stems = [entry.rsplit("/", 1)[1].split(".")[0] for entry in libraries]
        for stem in ("llama", "ggml", "ggml-base"):
            assert stem in stems or f"lib{stem}" in stems, f"no {stem} in {libraries}"
        assert len(stems) == len(set(stems)), libraries

        for path in [ROOT / "LICENSE", *(ROOT / "licenses").iterdir()]:
            shipped = f"{info}/licenses/{path.relative_to(ROOT).as_posix()}"
            assert archive.read(shipped) == path.read_bytes(), shipped

        others = [ROOT / "pydeltamem" / name for name in ("py.typed", "runtime/architectures.json")]
        for path in [*ROOT.glob("pydeltamem/**/*.py"), *ROOT.glob("convert/*.py"), *others]:
            entry = path.relative_to(ROOT).as_posix()
            assert entry.replace("convert/", "pydeltamem/convert/", 1) in names, entry


def check_loading(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        venv.create(environment, with_pip=True)
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        without_libraries = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
        subprocess.run([*pip, wheel], check=True, env=without_libraries)

        clean = {key: value for key, value in os.environ.items() if key not in ("LLAMA_CPP_LIB_PATH", "PYTHONPATH")}
        subprocess.run([python, "-c", LOAD.format(root=str(ROOT))], check=True, cwd=folder, env=clean)
        for first in ("llama_cpp", "pydeltamem"):  # either import may come first in a program that does nothing else
            load = f"import {first}, llama_cpp; llama_cpp.llama_cpp._lib.llama_deltamem_adapter_load"
            subprocess.run([python, "-c", load], check=True, cwd=folder, env=clean)
        command = python.with_name("deltamem.exe" if os.name == "nt" else "deltamem")
        subprocess.run([command, "--help"], check=True, cwd=folder, env=clean, stdout=subprocess.DEVNULL)


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    check_loading(wheel)
    print(f"{wheel.name}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
