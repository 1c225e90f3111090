"""The Makefile: what it reads elsewhere, and what it makes again after which change. Runs none of its commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fetch_llama_cpp as fetch
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

INSTALL = "pip install -q -c constraints.txt --no-build-isolation"
CONVERT = "deltamem convert"


def would(folder: Path, *arguments: str, **environment: str) -> str:
    """The commands that make would run."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "DELTAMEM"))}
    command = ["make", "--dry-run", *arguments]
    env = {**variables, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=True, env=env).stdout


@pytest.fixture
def clone(tmp_path):
    """A clone in which all is installed and the demo's adapter is converted. Its name has a space."""
    folder = tmp_path / "a clone"
    then = time.time() - 1000
    for name in (
        "Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt", "LICENSE", "licenses/LICENSE-llama.cpp",
        "pydeltamem.pth", "pydeltamem/version.py", "pydeltamem/formats/adapter.py", "convert/adapter.py",
        "native/patches/0001-ggml-deltamem-operator.patch", "cmake/fetch_llama_cpp.py", "examples/tiny/base.gguf",
        f".venv/.llama-cpp-python-{fetch.VERSION}", ".venv/.tools", ".venv/.installed", "build/demo/adapter.gguf",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in ("Makefile", "pyproject.toml"):
            shutil.copyfile(ROOT / name, folder / name)
        else:
            (folder / name).touch()
        then += 1
        os.utime(folder / name, (then, then))
    (folder / ".venv" / "bin").mkdir()
    (folder / ".venv" / "bin" / "python").write_text("#!/bin/sh\n")
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    return folder


def test_nothing_changed_makes_nothing(clone):
    (clone / "cmake" / "upstream.py").touch()  # no part of a build
    assert INSTALL not in would(clone)
    assert CONVERT not in would(clone, "build/demo/adapter.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml",
        "constraints.txt",
        "pydeltamem/version.py",
        "licenses/LICENSE-llama.cpp",
        "native/patches/0001-ggml-deltamem-operator.patch",
        "cmake/fetch_llama_cpp.py",
    ],
)
def test_what_a_build_copies_is_installed_again(clone, name):
    os.utime(clone / name)
    assert INSTALL in would(clone)


@pytest.mark.parametrize("name", ["convert/adapter.py", "pydeltamem/formats/adapter.py", "examples/tiny/base.gguf"])
def test_a_changed_converter_converts_again(clone, name):
    os.utime(clone / name)
    assert INSTALL not in would(clone)
    assert CONVERT in would(clone, "build/demo/adapter.gguf")


def test_an_environment_whose_python_is_gone_is_made_anew(clone):
    """As after an upgrade of the system: .venv has links to a Python that is not there any more."""
    python = clone / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    said = would(clone)
    assert "-m venv --clear .venv" in said
    assert "llama-cpp-python==" in said and INSTALL in said


def test_another_release_installs_its_python_half(clone):
    """Without its library: else pip compiles all of it when the package asks for it."""
    stamp = clone / ".venv" / f".llama-cpp-python-{fetch.VERSION}"
    stamp.rename(stamp.with_name(".llama-cpp-python-0.0.1"))
    os.utime(clone / "pyproject.toml")  # which names the release
    said = would(clone)
    half = said.index('-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" .venv/bin/python -m pip install --no-cache-dir')
    assert half < said.index(INSTALL)


def test_a_python_that_is_too_old_makes_no_environment(clone):
    """The next run, with a newer one, would take that environment."""
    shutil.rmtree(clone / ".venv")
    command = ["make", ".venv/bin/python", f'PYTHON="{sys.executable}"', "OLDEST=99"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode != 0 and sys.executable in done.stderr and "3.99" in done.stderr
    assert not (clone / ".venv").exists()


OTHERS = ("sanitize", "tsan", "cuda-compile", "vulkan-check", "test-stock", "wheel")


@pytest.mark.parametrize("target", OTHERS)
def test_other_builds_take_the_source_that_the_package_was_built_from(clone, target):
    build = clone / "build" / "native"
    (build / "download").mkdir(parents=True)
    assert "SOURCE" not in would(clone, target) and "--source" not in would(clone, target), "there is none"

    downloaded = build / "download" / fetch.SDIST
    downloaded.touch()
    assert f'"{downloaded}"' in would(clone, target)

    named = clone.parent / "a tree"
    named.mkdir()
    (build / "CMakeCache.txt").write_text(f"// where\nDELTAMEM_LLAMA_CPP_SOURCE:PATH={named}\n")
    assert f'"{named}"' in would(clone, target)


def test_a_build_that_is_gone_is_made_as_pip_makes_it(clone):
    assert "-G Ninja" in would(clone, "test-native")
    (clone / "build" / "native").mkdir()
    (clone / "build" / "native" / "CMakeCache.txt").touch()
    assert "-G " not in would(clone, "test-native"), "it may have been made with another generator"


def test_another_release_unpacks_llama_server_anew(clone):
    unpacked = clone / "build" / "llama-server" / f".release-{fetch.VERSION}"
    unpacked.parent.mkdir(parents=True)
    unpacked.touch()
    assert "tar " not in would(clone, "llama-server")
    unpacked.rename(unpacked.with_name(".release-0.0.1"))
    assert "tar " in would(clone, "llama-server")


def test_it_reads_pyproject():
    rule = "read:; @echo $(RELEASE) 3.$(OLDEST)\n"  # from standard input: macOS's make has no --eval
    command = ["make", "--silent", "-f", "Makefile", "-f", "-", "read"]
    done = subprocess.run(command, cwd=ROOT, input=rule, capture_output=True, text=True, check=True)
    release, oldest = done.stdout.split()
    assert release == fetch.VERSION and f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()


def test_help_lists_every_target_that_says_what_it_does():
    command = ["make", "--silent", "help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    described = re.findall(r"^(\S+):.* ## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert described and [line.split(maxsplit=1) for line in said.splitlines()] == [list(pair) for pair in described]
