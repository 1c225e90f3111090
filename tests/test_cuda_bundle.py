"""What `make cuda-bundle` packs for a GPU machine without a network. The whole archive is tried by hand (docs)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_bundle

ROOT = Path(__file__).resolve().parent.parent


def test_what_the_patches_change_is_packed():
    patched = [
        path
        for patch in (ROOT / "native" / "patches").glob("*.patch")
        for path in re.findall(r"^diff --git a/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert patched and all(map(cuda_bundle.is_needed, patched))


@pytest.mark.parametrize("backend", ["ggml-cpu", "ggml-cuda", "ggml-rpc"])
def test_backends_that_are_built(backend):
    assert cuda_bundle.is_needed(f"ggml/src/{backend}/CMakeLists.txt")


@pytest.mark.parametrize("backend", ["ggml-vulkan", "ggml-metal", "ggml-sycl"])
def test_backends_that_are_left_out(backend):
    assert not cuda_bundle.is_needed(f"ggml/src/{backend}/{backend}.cpp")


def test_files_of_the_repository():
    """The sources, the tests and the golden data; neither the patches, which are applied, nor what only takes room."""
    folders = ("native", "tests", "tools", "recipes", "docs", "pydeltamem", "convert")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    packed = cuda_bundle.our_files([path.relative_to(ROOT).as_posix() for path in files])
    for path in (
        "native/ggml_deltamem/deltamem-cuda.cu",
        "tests/test_cuda.py",
        "tests/conftest.py",
        "tests/golden/checksums.json",
        "tests/native/CMakeLists.txt",
        "tools/cuda_check.py",
        "tools/cuda_bundle_run.py",
        "tools/native_context.py",
        "convert/adapter.py",
        "pydeltamem/runtime/library.py",
    ):
        assert path in packed
    assert not [path for path in packed if path.endswith(".patch") or path.startswith(("recipes/", "docs/"))]
    limit = cuda_bundle.LARGEST  # above it the command stops
    assert not [path for path in packed if "pydeltamem/lib/" not in path and (ROOT / path).stat().st_size > limit]


def test_packages_that_pytorch_brings_are_left_out():
    names = {re.split(r"[<>=]", one)[0] for one in cuda_bundle.requirements()}
    assert {"gguf", "jinja2", "safetensors", "rich", "pytest"} <= names
    assert not names & {"numpy", "torch", "llama-cpp-python"}


def test_another_python_is_refused(tmp_path):
    shutil.copy(ROOT / "tools" / "cuda_bundle_run.py", tmp_path / "run.py")
    (tmp_path / "PYTHON").write_text("3.1\nx86_64\n")
    run = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True)
    assert run.returncode == 1 and "3.1" in run.stdout and not run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PYTHON", "run.py"]
