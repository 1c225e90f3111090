"""Which library is loaded, for every order of imports, and which one child processes load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from pydeltamem.errors import DecodeError
from pydeltamem.runtime import library

LIB_DIR = library.LIB_DIR
IS_OURS = "import llama_cpp; llama_cpp.llama_cpp._lib.llama_deltamem_adapter_load; "
CLEAN = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**CLEAN, **environment})


@pytest.mark.parametrize("first", ["pydeltamem", "llama_cpp"])
def test_the_order_of_imports_does_not_matter(first):
    second = {"pydeltamem": "llama_cpp", "llama_cpp": "pydeltamem"}[first]
    result = python("-c", f"import {first}, {second}; {IS_OURS} pydeltamem.DeltaMemLlama")
    assert result.returncode == 0, result.stderr


def test_modules_of_llama_cpp_run():
    result = python("-c", "import runpy; runpy.run_module('llama_cpp.llama_grammar', run_name='other')")
    assert result.returncode == 0, result.stderr


def test_child_processes_are_told_nothing():
    """Another llama-cpp-python that they import would load our library by its own bindings."""
    show = "import os; print(os.environ.get('LLAMA_CPP_LIB_PATH'))"
    code = f"import subprocess, sys, pydeltamem; {IS_OURS} subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    result = python("-c", code)
    assert result.stdout == "None\n", result.stderr


def test_a_named_folder_is_obeyed(tmp_path):
    result = python("-c", "import llama_cpp", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert "FileNotFoundError" in result.stderr


def fake(tmp_path, version, library):
    """A llama-cpp-python in tmp_path, with or without a library of its own, that prints which one it would load."""
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    if library:
        (package / "lib" / "libllama.so").touch()
    (package / "__init__.py").write_text("from . import llama_cpp\n")
    (package / "_ctypes_extensions.py").write_text("def load_shared_library(name, folder):\n    print(folder)\n")
    (package / "llama_cpp.py").write_text(
        "import pathlib\n"
        "from llama_cpp._ctypes_extensions import load_shared_library\n"
        "load_shared_library('llama', pathlib.Path(__file__).absolute().parent / 'lib')\n"
    )
    info = tmp_path / f"llama_cpp_python-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    return package / "lib"


@pytest.mark.parametrize(
    ("imported", "version", "library", "takes"),
    [
        ("llama_cpp", library.LLAMA_CPP_VERSION, False, "ours"),
        ("llama_cpp", library.LLAMA_CPP_VERSION, True, "its own"),  # a program that knows nothing of us
        ("pydeltamem, llama_cpp", library.LLAMA_CPP_VERSION, True, "ours"),
        ("pydeltamem, llama_cpp", library.LLAMA_CPP_VERSION, False, "ours"),
        ("pydeltamem, llama_cpp", "0.1.0", True, "its own"),  # bindings that do not fit our library
        ("pydeltamem, llama_cpp", "0.1.0", False, "nothing"),
        ("llama_cpp", "0.1.0", False, "nothing"),
    ],
)
def test_which_library(tmp_path, imported, version, library, takes):
    own = fake(tmp_path, version, library)
    result = python("-c", f"import {imported}", PYTHONPATH=f"{tmp_path}{os.pathsep}{LIB_DIR.parent.parent}")
    if takes == "nothing":
        assert result.returncode and not result.stdout
        assert "ImportError" in result.stderr and version in result.stderr
    else:
        assert result.stdout == f"{LIB_DIR if takes == 'ours' else own}\n", result.stderr


# stands for a library whose backends are modules, as in a wheel: functions of ctypes, which print what they are given
MODULES = """
from types import SimpleNamespace as Library

def load_shared_library(name, folder):
    if name == "llama":
        return Library(llama_deltamem_adapter_load=None, **LINKED)
    print(name, folder)
    if name == "ggml-base":
        return Library(ggml_log_set=lambda callback, data: print("log", callback is None))
    return Library(
        ggml_backend_load_all_from_path=lambda path: print("modules", path.decode()),
        ggml_backend_dev_by_type=Function(),
    )

class Function:
    def __call__(self, kind):
        return CPU if kind == 0 else None
"""


def import_modules(tmp_path, cpu, linked):
    fake(tmp_path, library.LLAMA_CPP_VERSION, False)
    text = MODULES.replace("CPU", repr(cpu)).replace("LINKED", repr(linked))
    (tmp_path / "llama_cpp" / "_ctypes_extensions.py").write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = f"{tmp_path}{os.pathsep}{LIB_DIR.parent.parent}"
    command = [sys.executable, "-c", "import llama_cpp"]
    return subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env={**CLEAN, "PYTHONPATH": path})


def test_backends_that_are_modules_are_loaded_from_the_folder_of_the_library(tmp_path):
    """Wherever the program runs, and without ggml's lines on what it loads."""
    result = import_modules(tmp_path, cpu=1, linked={})
    assert result.returncode == 0, result.stderr
    *loaded, first, modules, last = result.stdout.splitlines()
    assert {line.split()[0] for line in loaded} == {"ggml", "ggml-base"}
    assert all(line.endswith(f" {LIB_DIR}") for line in loaded)
    assert (first, modules, last) == ("log False", f"modules {LIB_DIR}", "log True")


def test_backends_that_are_linked_are_not_loaded(tmp_path):
    result = import_modules(tmp_path, cpu=1, linked={"ggml_backend_cpu_reg": None})
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_no_module_for_this_processor(tmp_path):
    result = import_modules(tmp_path, cpu=None, linked={})
    assert result.returncode and str(LIB_DIR) in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: ")


def test_starting_python_loads_nothing():
    result = python("-c", "import sys; print(sorted({'pydeltamem', 'llama_cpp', 'numpy'} & set(sys.modules)))")
    assert result.stdout == "[]\n", result.stderr


def test_without_llama_cpp_it_is_named():
    result = python("-c", "import sys; sys.modules['llama_cpp'] = None; import pydeltamem")
    assert result.stderr.splitlines()[-1].startswith("ModuleNotFoundError") and "llama_cpp" in result.stderr


def test_another_version_of_the_bindings_is_refused():
    result = python("-c", "import llama_cpp; llama_cpp.__version__ = '0.0.1'; import pydeltamem")
    said = result.stderr.splitlines()[-1]
    assert "LibraryError" in said and "0.0.1" in said and f"llama-cpp-python=={library.LLAMA_CPP_VERSION}" in said


LACKS = """
import importlib.machinery, sys, types
llama_cpp = types.ModuleType("llama_cpp")
llama_cpp.__path__, llama_cpp.__version__ = [], {version!r}
llama_cpp.llama_cpp = types.SimpleNamespace(_lib=types.SimpleNamespace(_name="libllama.so"))

class Finder:  # of a llama_cpp whose library is another llama.cpp
    def find_spec(name, path=None, target=None):
        spec = importlib.machinery.ModuleSpec(name, Finder)
        return spec if name in ("llama_cpp", "llama_cpp.llama_cpp") else None

    def create_module(spec):
        return llama_cpp if spec.name == "llama_cpp" else types.ModuleType(spec.name)

    def exec_module(module):
        if module.__name__ == "llama_cpp.llama_cpp":
            module._lib = llama_cpp.llama_cpp._lib

sys.meta_path.insert(0, Finder)
import pydeltamem.errors, pydeltamem.runtime.library
"""


def test_a_named_folder_whose_library_lacks_the_memory(tmp_path):
    result = python("-c", LACKS.format(version=library.LLAMA_CPP_VERSION), LLAMA_CPP_LIB_PATH=str(tmp_path))
    said = result.stderr.splitlines()[-1]
    assert "LibraryError" in said and "LLAMA_CPP_LIB_PATH" in said and str(tmp_path) in said, result.stderr


def test_a_package_without_its_library(tmp_path, monkeypatch):
    """llama-cpp-python has none of its own, and ours is gone."""
    fake(tmp_path, library.LLAMA_CPP_VERSION, library=False)
    code = "import pathlib; is_file = pathlib.Path.exists; "
    code += (
        "pathlib.Path.exists = lambda path: path.suffix != '.so' and is_file(path); import pydeltamem.runtime.library"
    )
    result = python("-c", code, PYTHONPATH=str(tmp_path))
    said = result.stderr.splitlines()[-1]
    assert "LibraryError" in said and str(LIB_DIR) in said, result.stderr


@pytest.mark.parametrize("has_own", [False, True])
def test_the_source_without_a_library_is_found_before_the_installed_package(tmp_path, has_own):
    """By a program that runs in a clone, where `pip install .` leaves no library."""
    fake(tmp_path, library.LLAMA_CPP_VERSION, has_own)
    clone = tmp_path / "clone"
    shutil.copytree(LIB_DIR.parent, clone / "pydeltamem", ignore=shutil.ignore_patterns("lib", "models"))
    (clone / "pyproject.toml").touch()
    (clone / "try.py").write_text("import _pydeltamem_startup, pydeltamem, llama_cpp")
    path = f"{tmp_path}{os.pathsep}{LIB_DIR.parent.parent}"
    command = [sys.executable, "-S", "try.py"]  # -S: no editable install
    result = subprocess.run(command, capture_output=True, text=True, cwd=clone, env={**CLEAN, "PYTHONPATH": path})
    said = result.stderr.splitlines()[-1]
    assert "ImportError" in said and str(clone) in said and "another folder" in said, result.stderr


def test_errors_that_were_held_and_explain_nothing_are_logged(llm, caplog):
    with library.errors_held() as lines:
        llama = library.llama_cpp
        assert not llama.llama_model_load_from_file(b"no-such.gguf", llama.llama_model_default_params())
        assert any("no-such.gguf" in line for line in lines) and "no-such.gguf" not in caplog.text
    assert "no-such.gguf" in caplog.text and {record.levelname for record in caplog.records} >= {"ERROR"}


def test_a_decode_error_of_our_own_stays_as_it_is():
    with pytest.raises(DecodeError, match=r"^mine$"), library.decoding():
        raise DecodeError("mine")
