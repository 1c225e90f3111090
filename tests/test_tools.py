"""Commands for developers (tools/, recipes/), most of which no test runs: what they import is there."""

from __future__ import annotations

import ast
import importlib

import pytest

from conftest import ROOT

SCRIPTS = {path.stem: path for folder in ("recipes", "tools") for path in sorted((ROOT / folder).glob("*.py"))}


def imported(name: str) -> list[tuple[str, str]]:
    """Module and name of all that a script imports from the package or from another script, in functions too."""
    nodes = list(ast.walk(ast.parse(SCRIPTS[name].read_text(encoding="utf-8"))))
    froms = [
        (node.module or "", alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return [(module, wanted) for module, wanted in froms if module.partition(".")[0] in ("pydeltamem", *SCRIPTS)]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if imported(name)])
def test_what_a_script_imports_is_there(name):
    for module, wanted in imported(name):
        found = importlib.import_module(module)
        if not hasattr(found, wanted):
            importlib.import_module(f"{module}.{wanted}")  # a module of a package
