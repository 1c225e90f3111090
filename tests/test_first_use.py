"""What a first user meets: misspelt keywords, and how much is printed unasked."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from pydeltamem import DeltaMemLlama, InputError, ModelError
from pydeltamem.models import default_files
from refusals import refuses

MODEL, MEMORIES = default_files()
PLAIN = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("deltamem", "deltamem_path"),
        ("deltamem_file", "deltamem_path"),
        ("nctx", "n_ctx"),
        ("n_thread", "n_threads"),
        ("lora", "lora_path"),
        ("n_seqs_max", "n_seq_max"),
        ("verbos", "verbose"),
    ],
)
def test_unknown_keywords_are_refused_with_the_nearest(wrong, right):
    with refuses(InputError, wrong, right):
        DeltaMemLlama(MODEL, **{wrong: None})


def test_an_unknown_keyword_that_is_near_to_none():
    with refuses(InputError, "xyzzy"):
        DeltaMemLlama(MODEL, xyzzy=1)


def test_every_keyword_of_llama_cpp_is_known():
    import inspect

    from llama_cpp import Llama

    names = [
        parameter.name
        for parameter in inspect.signature(Llama.__init__).parameters.values()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    defaults = {name: inspect.signature(Llama.__init__).parameters[name].default for name in names}
    llm = DeltaMemLlama(MODEL, **{**defaults, **PLAIN, "verbose": False})
    llm.close()


def script(code, *before):
    """Output and errors of Python lines that have a model as `llm`."""
    lines = [*before, "from pydeltamem import DeltaMemLlama, Conversation", f"options = {PLAIN!r}", code]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result


USE = (
    f"llm = DeltaMemLlama({str(MODEL)!r}, deltamem_path={str(MEMORIES['msw'])!r}, **options)\n"
    "llm.create_completion('hello', max_tokens=2)\n"
    "llm.create_chat_completion([{'role': 'user', 'content': 'hello'}], max_tokens=2)\n"
    "Conversation(llm).say('hello', n_predict=2)\n"
    "llm.close()"
)


def test_nothing_is_said_without_being_asked():
    result = script(USE)
    assert (result.stdout, result.stderr) == ("", "")


def test_verbose_shows_the_log():
    result = script(f"options['verbose'] = True\n{USE}")
    assert "llama_model_loader" in result.stderr


def test_the_log_goes_to_logging(caplog):
    """At the levels of llama.cpp, whose numbers llama_cpp takes for others."""
    with caplog.at_level(logging.DEBUG, "pydeltamem.llama_cpp"):
        DeltaMemLlama(MODEL, **PLAIN).close()
    records = [record for record in caplog.records if record.name == "pydeltamem.llama_cpp"]
    loader = [record for record in records if "llama_model_loader" in record.getMessage()]
    assert loader and {record.levelno for record in loader} == {logging.INFO}
    assert not any("\n" in record.getMessage() for record in records)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_the_log_is_as_detailed_as_logging_says(caplog, level):
    with caplog.at_level(level, "pydeltamem.llama_cpp"):
        DeltaMemLlama(MODEL, **PLAIN).close()
    assert min(record.levelno for record in caplog.records) == level


def test_the_log_reaches_a_handler_on_stderr():
    """While it loads a model llama_cpp sends what is written to stderr to nowhere."""
    result = script(USE, "import logging", "logging.basicConfig(level=logging.INFO)")
    assert "INFO:pydeltamem.llama_cpp:llama_model_loader" in result.stderr


def test_what_is_raised_is_not_logged_too(tmp_path, caplog, capfd):
    path = tmp_path / "text.gguf"
    path.write_text("no model")
    with refuses(ModelError, path):
        DeltaMemLlama(path)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert capfd.readouterr().err == ""


def test_bench_says_how_large_the_model_is(capsys):
    """llama.cpp has no name for so small a size, and a share of a GB is none."""
    from pydeltamem.cli.main import main

    options = ["-p", "8", "-n", "0", "--pairs", "2", "--rss", "0", "-t", "1"]
    assert main(["bench", "-m", str(MODEL), "--deltamem", str(MEMORIES["tsw"]), *options]) == 0
    said = capsys.readouterr().out
    assert "?B" not in said and " 0.00 " not in said.splitlines()[0]
    assert "2.95 M parameters" in said and "MB" in said.splitlines()[0]
    columns = [name.strip() for name in next(line for line in said.splitlines() if "ratio" in line).split("  ") if name]
    assert len(columns) == len(set(columns))


def test_quantize_says_why_a_model_grew(tmp_path, capsys):
    """From Q4_0, the table of tokens too, to Q4_K_M, which takes Q6_K for some."""
    from pydeltamem.cli.main import main

    small, large = str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")
    assert main(["quantize", str(MODEL), small, "q4_0", "--allow-requantize"]) == 0
    assert "larger" not in capsys.readouterr().out
    assert main(["quantize", small, large, "q5_1", "--allow-requantize"]) == 0
    said = capsys.readouterr().out
    assert "larger" in said and "Q5_1" in said and "Q4_0" in said
