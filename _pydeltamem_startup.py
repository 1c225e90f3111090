"""Lets llama-cpp-python find the library of pydeltamem, whichever of the two is imported first.

pydeltamem.pth imports this whenever Python starts, so it is small, and does nothing until llama_cpp is imported. It
tells llama_cpp by its own loader and not by the environment, which child processes would inherit.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's, whose import would slow every start of Python
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import CDLL
    from pathlib import Path
    from types import ModuleType
    from typing import Any

# pyproject.toml's pin, whose bindings mirror the structs of the llama.cpp that our library is; a test compares the two
LLAMA_CPP_VERSION = "0.3.36"


class _Finder:
    """Finds the module of llama_cpp that loads libraries, and puts `_load` before its function."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name != "llama_cpp._ctypes_extensions":
            return None
        import functools
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.load_shared_library = functools.partial(_load, module.load_shared_library)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _load(load: Callable[[str, Path], CDLL], name: str, folder: Path) -> CDLL:
    """As llama_cpp's load_shared_library, from the folder that _folder() gives."""
    folder = _folder(name, folder)
    library = load(name, folder)
    if name == "llama" and hasattr(library, "llama_deltamem_adapter_load"):
        _load_modules(load, library, folder)
    return library


def _folder(name: str, folder: Path) -> Path:
    """Where llama_cpp would look into its own folder, ours is taken: always once pydeltamem is imported, before that
    only if llama_cpp brought no library. LLAMA_CPP_LIB_PATH is obeyed.
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec
    from pathlib import Path

    own = Path(sys.modules["llama_cpp"].__path__[0]).absolute() / "lib"
    package = find_spec("pydeltamem")
    if Path(folder) != own or package is None or package.origin is None:
        return folder
    ours = Path(package.origin).resolve().parent / "lib"
    has_own = _holds(own, name)
    if has_own and "pydeltamem" not in sys.modules:
        return folder
    try:
        installed = version("llama_cpp_python")
    except PackageNotFoundError:  # not by pip
        installed = LLAMA_CPP_VERSION
    if installed != LLAMA_CPP_VERSION:
        if has_own:
            return folder
        raise ImportError(
            f"llama-cpp-python {installed} has no library of its own, and that of pydeltamem is for "
            f"{LLAMA_CPP_VERSION}: pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
        )
    if name == "llama" and not _holds(ours, name):
        if (ours.parents[1] / "pyproject.toml").exists():  # a program in a clone, where `pip install .` leaves none
            raise ImportError(
                f"{ours}: is missing, and Python found the source of pydeltamem before an installed package: "
                "run in another folder, or build it here by make"
            )
        raise ImportError(f"{ours}: the library of pydeltamem is missing: reinstall pydeltamem, which builds it")
    return ours if _holds(ours, name) else folder


def _load_modules(load: Callable[[str, Path], CDLL], library: CDLL, folder: Path) -> None:
    """Where ggml's backends are modules, as in a wheel, has ggml load the best for this machine from the folder. By
    itself it would look beside Python and in the working directory.
    """
    if hasattr(library, "ggml_backend_cpu_reg"):  # linked
        return
    import ctypes
    import os

    base, ggml = load("ggml-base", folder), load("ggml", folder)
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    base.ggml_log_set(quiet, None)  # it would print which it loads
    try:
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    finally:
        base.ggml_log_set(None, None)
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    if not ggml.ggml_backend_dev_by_type(0):  # GGML_BACKEND_DEVICE_TYPE_CPU
        raise RuntimeError(f"{folder} holds no ggml-cpu that runs on this processor")


def _holds(folder: Path, name: str) -> bool:
    files = (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.dll")
    return any((folder / file).exists() for file in files)


sys.meta_path.insert(0, _Finder)
