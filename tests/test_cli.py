"""The command line: deltamem generate, its options, and one clear sentence for every bad input."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
from llama_cpp import Llama

from pydeltamem import __version__
from pydeltamem.cli import rpc_server
from pydeltamem.cli.main import SUBCOMMANDS, main
from pydeltamem.cli.model_options import add_sampling_arguments, sampling
from pydeltamem.cli.parser import Parser, unescaped
from pydeltamem.errors import ModelError
from pydeltamem.formats.memory_file import read_memory_file
from pydeltamem.models import default_files
from refusals import check_names, refused, refuses

PLAIN = ["-n", "16", "--temp", "0", "-c", "512", "-t", "1", "-tb", "1"]


def deltamem(*args, **kwargs):
    """Runs the command; stdout and stderr as text."""
    command = [sys.executable, "-m", "pydeltamem.cli", *map(str, args)]
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 300, **kwargs}
    return subprocess.run(command, **options)


@pytest.fixture
def generate(base, adapter):
    """generate(*args): deltamem generate with the golden Qwen3 and its TSW adapter."""

    def run(*args, memory=True, **kwargs):
        model = ["-m", base(), *(["--deltamem", adapter("qwen3", "tsw_qo")] if memory else [])]
        return deltamem("generate", *model, *PLAIN, *args, **kwargs)

    return run


def test_help_and_version():
    result = deltamem("--help")
    assert result.returncode == 0
    for command in ("convert", "inspect", "generate", "chat"):
        assert command in result.stdout
    assert deltamem("--version").stdout == f"deltamem {__version__}\n"
    assert "--save-memory" in deltamem("generate", "--help").stdout


def shell(line, *args):
    """Runs a line of the shell in which "$@" is the command; Python buffers its output, as it does by default."""
    command = ["/bin/sh", "-c", line, "sh", sys.executable, "-m", "pydeltamem.cli", *map(str, args)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=300
    )


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "recall", "qa"])
def test_ctrl_c_ends_loading_at_once(base, adapter, tmp_path, monkeypatch, command):
    """A callback of llama.cpp, where Python would see it, drops exceptions."""
    found = []

    def loads(*args, **kwargs):
        found.append(signal.getsignal(signal.SIGINT))
        raise ModelError("cannot be loaded")

    for module in ("pydeltamem.llama", "pydeltamem.evals.reader"):
        monkeypatch.setattr(importlib.import_module(module), "DeltaMemLlama", loads)
    model = ["-m", str(base()), "--deltamem", str(adapter("qwen3", "tsw_qo"))]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        questions = tmp_path / "questions"
        questions.write_text('{"context": "A cat.", "qa": [["What is it?", ["a cat"]]]}\n', encoding="utf-8")
        names = {
            "recall": ["eval", "recall"],
            "qa": ["eval", "qa", "--data", str(questions), "-o", str(tmp_path)],
            "generate": ["generate", "-p", "hi"],
        }
        assert main([*names.get(command, [command]), *model]) == 1
        assert found == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full as on Linux")
@pytest.mark.parametrize("args", [["--version"], ["--help"], ["help", "generate"]])
def test_help_that_cannot_be_shown(args):
    result = shell('"$@" >/dev/full', *args)
    assert result.returncode == 1 and result.stderr.startswith("deltamem: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert shell('trap "" PIPE; { "$@"; echo $? >&2; } | true', *args).stderr == "141\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(base, adapter, tmp_path, closed):
    """As under some supervisors: what is read is empty, and what is written goes nowhere."""
    path = tmp_path / "a.memory"
    model = ["-m", base(), "--deltamem", adapter("qwen3", "tsw_qo"), *PLAIN, "--save-memory", path]
    for command, empty in ((["generate", *model, "-p", "hi"], 0), (["generate", *model], 1), (["chat", *model], 0)):
        path.unlink(missing_ok=True)
        result = shell(f'"$@" {closed}', *command)
        assert result.returncode == empty and "Traceback" not in result.stderr
        assert path.exists() == (empty == 0)
    if closed == "2>&-":
        assert shell(f'"$@" {closed}', "generate", *model, "-p", "hi").stdout.startswith("hi")


@pytest.mark.parametrize(
    ("args", "usage"),
    [
        ((), ""),
        (("nothing",), ""),
        (("generate",), "generate"),
        (("generate", "-m", "x", "-c", "-1"), "generate"),
        (("chat", "--bad"), "chat"),
        (("memory",), "memory"),
        (("memory", "nothing"), "memory"),
        (("memory", "show", "--bad"), "memory show"),
        (("eval", "recall", "--bad"), "eval recall"),
        (("inspect", "a", "b"), "inspect"),
    ],
)
def test_usage(in_process, args, usage):
    """The usage is that of the command that did not understand."""
    result = in_process(*args)
    assert result.returncode == 2
    assert result.stderr.startswith(f"usage: deltamem {usage}".rstrip() + " [-h]"), result.stderr


@pytest.mark.parametrize(
    ("args", "wrong", "right"),
    [
        (["generate", "--deltamen", "x", "-m", "y"], "--deltamen", "--deltamem"),
        (["generate", "--modle", "x"], "--modle", "--model"),
        (["chat", "-m", "x", "--seeed=3"], "--seeed", "--seed"),
        (["bench", "--contrl"], "--contrl", "--control"),
        (["memory", "show", "x", "--jsn"], "--jsn", "--json"),
        (["genrate"], "genrate", "generate"),
        (["--hlep"], "--hlep", "--help"),
        (["eval", "hotpotqs", "-o", "x"], "hotpotqs", "hotpotqa"),
        (["sessions", "--store", "x", "lsit"], "lsit", "list"),
        (["generate", "-hf", "x"], "-hf", "-h"),  # not the help itself
        (["chat", "-m", "x", "-np", "4"], "-np", "-n"),
    ],
)
def test_what_is_misspelt_is_named_with_what_was_meant(in_process, args, wrong, right):
    result = in_process(*args)
    assert result.returncode == 2
    check_names(result.stderr.splitlines()[-1], [wrong, right])


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], ["pull", "chat", "bench"]),
        (["eval"], ["recall", "report"]),
        (["sessions", "--store", "x"], ["list", "vacuum"]),
    ],
)
def test_a_command_that_lacks_a_word_lists_what_it_may_be(in_process, args, names):
    result = in_process(*args)
    assert result.returncode == 2
    check_names(result.stderr.splitlines()[-1], names)


def test_names_in_a_list_may_have_spaces(tmp_path, capsys):
    assert main(["eval", "recall", "--tasks", "recall, nothing"]) == 1
    check_names(capsys.readouterr().err.strip(), ["--tasks", "task nothing"])
    with pytest.raises(SystemExit) as info:
        main(["eval", "recall", "--tasks", "recall,,visible"])
    assert info.value.code == 2
    check_names(capsys.readouterr().err.splitlines()[-1], ["--tasks", "recall,,visible"])


def test_ctrl_c_before_a_command_is_read(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pydeltamem.cli.main.Parser", interrupted)
    assert main(["generate"]) == 130


def test_help_as_a_command():
    assert deltamem("help").stdout == deltamem("--help").stdout
    assert deltamem("help", "generate").stdout == deltamem("generate", "--help").stdout
    assert deltamem("help", "memory", "show").stdout == deltamem("memory", "show", "--help").stdout
    assert deltamem("help", "nothing").returncode == 2


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--temp", ["-1", "nan", "inf"]),
        ("--top-k", ["-5", "1.5"]),
        ("--top-p", ["5", "-0.1", "nan"]),
        ("--min-p", ["2", "-1", "nan"]),
        ("--typical", ["1.5", "nan"]),
        ("--repeat-penalty", ["0", "-1", "nan", "inf"]),
        ("--presence-penalty", ["nan", "inf"]),
        ("--frequency-penalty", ["nan"]),
        ("--repeat-last-n", ["-5"]),
        ("--n-predict", ["-7"]),
        ("--seed", ["-2", str(2**32)]),
        ("--ctx-size", ["-1", str(2**32 + 512)]),
        ("--batch-size", ["0", "999999999", str(2**32 + 1)]),
        ("--ubatch-size", ["0", "999999999"]),
        ("--gpu-layers", ["-3"]),
    ],
)
def test_values_out_of_range_are_refused(in_process, option, values):
    for value in values:
        result = in_process("generate", "-m", "none.gguf", "-p", "x", f"{option}={value}")
        assert result.returncode == 2
        says = result.stderr.splitlines()[-1]
        assert option in says and value in says


@pytest.mark.parametrize(
    "args", [["quantize", "a", "b", "q8_0", "-t=-1"], ["rpc-server", "--port", "99999"], ["train", "a", "b", "-o", "c",
    "--write-bias", "nan"], ["serve", "-m", "none.gguf", "--port", "99999"]]
)  # fmt: skip
def test_numbers_of_other_commands_too(in_process, args):
    result = in_process(*args)
    assert result.returncode == 2 and args[-1].split("=")[-1] in result.stderr


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["generate", "-p", "x", "-c", str(2**31 - 1)], "--ctx-size"),
        (["generate", "-p", "x", "-c", "999999999"], "--ctx-size"),
        (["chat", "-c", str(2**31 - 1)], "--ctx-size"),
        (["eval", "recall", "-c", str(2**31 - 1)], "--ctx-size"),
        (["serve", "-c", str(2**30), "-np", "4", "--port", "0"], "--ctx-size"),
        (["serve", "-np", "999999999", "--port", "0"], "--parallel"),
        (["bench", "-p", "999999999", "-n", "0"], "-p"),
        (["bench", "-p", "8", "-n", str(2**31 - 1), "-d", str(2**31 - 1)], "-n"),
        (["bench", "--return", "999999999"], "--return"),
    ],
)
def test_a_context_that_nothing_holds_is_refused(base, adapter, tmp_path, args, name):
    store = ["--store", f"sqlite:///{tmp_path / 'sessions.db'}"] if args[0] == "serve" else []
    result = deltamem(*args, "-m", base(), "--deltamem", adapter("qwen3", "tsw_qo"), *store, "-t", "1", input="")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    check_names(result.stderr.splitlines()[-1], [name])


def test_a_batch_is_no_larger_than_the_context(base):
    from pydeltamem import DeltaMemLlama, InputError

    llm = DeltaMemLlama(base(), n_ctx=512, n_batch=999_999_999, n_ubatch=999_999_999, n_threads=1)
    assert llm.n_batch == 512
    llm.close()
    with refuses(InputError, "n_batch", base()):  # of the model's context, which is known when it is loaded
        DeltaMemLlama(base(), n_ctx=0, n_batch=2**31 - 1, n_threads=1)
    for n_ctx, n_seq_max in ((-1, 1), (2**30, 1), (2**23, 256)):
        with refuses(InputError, "n_ctx", n_ctx):
            DeltaMemLlama(base(), n_ctx=n_ctx, n_seq_max=n_seq_max)


def test_a_context_that_is_rounded_up_is_told(generate):
    result = generate("-p", "hello", "-c", "8", "-n", "1")
    assert result.returncode == 0 and re.search(r"--ctx-size 8\b.* 256 ", result.stderr)
    assert "--ctx-size" not in generate("-p", "hello", "-c", "512", "-n", "1").stderr


def test_a_context_that_the_model_was_not_trained_on_is_told(generate):
    """As llama.cpp's programs do; the golden Qwen3 was trained on 512 tokens."""
    result = generate("-p", "hello", "-c", "513", "-n", "1")
    assert result.returncode == 0 and re.search(r"--ctx-size 513\b.* 512 ", result.stderr)
    for n_ctx in ("0", "512"):
        assert "--ctx-size" not in generate("-p", "hello", "-c", n_ctx, "-n", "1").stderr


def test_a_full_context_is_told(generate):
    full = generate("-p", "hello", "-c", "256", "-n", "-1", "--ignore-eos")
    assert full.returncode == 0 and "256" in full.stderr and "--ctx-size" in full.stderr
    assert "--ctx-size" in generate("-p", "hello", "-c", "256", "-n", "1000", "--ignore-eos").stderr
    assert "--ctx-size" not in generate("-p", "hello", "-c", "256", "-n", "4", "--ignore-eos").stderr


def test_a_model_without_a_memory_is_told(generate):
    assert "memory: none" in generate("-p", "hello", memory=False).stderr
    assert "memory: none" not in generate("-p", "hello").stderr
    assert "memory: none" not in generate("-p", "hello", "--no-memory").stderr


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "-m", "FOLDER", "-p", "x"],
        ["generate", "-m", "BASE", "--deltamem", "FOLDER", "-p", "x"],
        ["generate", "-m", "BASE", "--lora", "FOLDER", "-p", "x"],
        ["generate", "-m", "BASE", "--load-memory", "FOLDER", "-p", "x"],
        ["generate", "-m", "BASE", "-f", "FOLDER"],
        ["generate", "-m", "BASE", "-p", "x", "--grammar-file", "FOLDER"],
        ["generate", "-m", "BASE", "-p", "x", "--save-memory", "FOLDER"],
        ["inspect", "FOLDER"],
        ["pack", "FOLDER", "FOLDER", "-o", "out.gguf"],
        ["quantize", "FOLDER", "out.gguf", "q8_0"],
        ["unpack", "FOLDER", "--base", "a", "--adapter", "b"],
        ["memory", "show", "FOLDER"],
        ["bench", "-m", "FOLDER"],
    ],
)
def test_a_folder_is_called_one(base, tmp_path, args):
    folder = tmp_path / "sub"
    folder.mkdir()
    result = deltamem(*({"FOLDER": folder, "BASE": base()}.get(arg, arg) for arg in args), cwd=tmp_path)
    assert result.returncode == 1
    says = result.stderr.splitlines()[-1]
    assert str(folder) in says
    rest = says.replace(str(folder), "").lower()  # pytest's folder has the name of this test
    assert "folder" in rest or "directory" in rest


def test_a_file_is_called_one(base, tmp_path):
    result = deltamem("convert", base(), "--base", base(), "-o", tmp_path / "out.gguf")
    refused(result, base())
    assert "file" in result.stderr.replace(str(base()), "")


@pytest.mark.parametrize(
    ("args", "option", "keyword"),
    [
        (["-m", "BASE", "-t", "9999"], "--threads", "n_threads"),
        (["-m", "BASE", "--save-memory", "a.memory"], "--deltamem", "deltamem_path"),
        (["-m", "ADAPTER"], "--deltamem", "deltamem_path"),
        (["-m", "ADAPTER"], "--model", "model_path"),
    ],
)
def test_options_go_by_the_names_of_the_command_line(base, adapter, tmp_path, args, option, keyword):
    names = {"BASE": base(), "ADAPTER": adapter("qwen3", "tsw_qo")}
    result = deltamem("generate", *(names.get(arg, arg) for arg in args), "-p", "x", cwd=tmp_path)
    refused(result, option)
    assert keyword not in result.stderr


@pytest.mark.parametrize("command", ["bench", "tune", "demo"])
def test_an_adapter_that_is_given_for_the_model_is_called_one(adapter, command):
    path = adapter("qwen3", "tsw_qo")
    for args in ([], ["--deltamem", path]):
        refused(deltamem(command, "-m", path, *args), path, "--deltamem", "--model")


def test_keywords_go_by_their_names_in_python(base, adapter):
    from pydeltamem import AdapterError, DeltaMemLlama, InputError, ModelError

    llm = DeltaMemLlama(base(), n_ctx=256)
    for kind, name, call in (
        (InputError, "n_threads", lambda: DeltaMemLlama(base(), n_threads=9999)),
        (ModelError, "deltamem_path", lambda: DeltaMemLlama(adapter("qwen3", "tsw_qo"))),
        (AdapterError, "deltamem_path", lambda: llm.memory.state),
    ):
        with refuses(kind, name) as info:
            call()
        assert "--" not in str(info.value)
    llm.close()


def test_generate(generate):
    result = generate("-p", "hello")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hello") and len(result.stdout) > len("hello\n")
    assert re.fullmatch(r"prompt: \d+ tokens, [\d.]+ tokens/s; generated: \d+ tokens, [\d.]+ tokens/s\n", result.stderr)
    bare = generate("-p", "hello", "--no-display-prompt", "--no-perf")
    assert bare.stdout == result.stdout[len("hello") :] and bare.stderr == ""
    assert "generated: 7 tokens" in generate("-p", "hello", "-n", "7", "--ignore-eos").stderr


def test_a_prompt_with_two_beginnings_is_told():
    model = ["-m", default_files()[0], "--no-perf", "-t", "1", "-n", "1", "-c", "256", "--no-memory"]
    told = deltamem("generate", *model, "-p", "<s><s>hello").stderr.splitlines()
    assert len(told) == 1 and "begins a text" in told[0] and ".py" not in told[0]
    assert deltamem("generate", *model, "-p", "<s>hello").stderr == ""


def test_a_reply_that_ends_within_a_character_shows_it(generate):
    one = generate("-p", "a", "--no-display-prompt", "--grammar", 'root ::= "\N{GRINNING FACE}"', "-n", "1")
    assert one.returncode == 0 and one.stdout == "\N{REPLACEMENT CHARACTER}\n"


def test_prompt_from_a_file_and_from_standard_input(generate, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("hello", encoding="utf-8")
    expected = generate("-p", "hello").stdout
    assert generate("-f", path).stdout == expected
    assert generate(input="hello").stdout == expected
    path.write_bytes(b"hello\r\n")  # as an editor, or echo, ends it
    assert generate("-f", path).stdout == generate(input="hello\n").stdout == expected


def test_line_ends_of_a_prompt_stay(generate, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"hello\r\nthere\n\n")
    plain = {"encoding": None, "errors": None}
    for result in (generate("-f", path, **plain), generate(input=path.read_bytes(), **plain)):
        assert result.stdout.startswith(b"hello\r\nthere\n"), result.stderr
        assert result.stdout == generate("-p", "hello\\r\\nthere\\n", **plain).stdout


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (r"a\nb", "a\nb"),
        (r"\r\t\'\"\\n", "\r\t'\"\\n"),
        (r"\x41\xc3\xa4", "Aä"),
        (r"\q \xg1 \x4 \N \0 \u00e4", r"\q \xg1 \x4 \N \0 \u00e4"),
        ("东\\", "东\\"),
    ],
)
def test_escapes_of_llama_cpp(generate, given, text):
    """Those of string_process_escapes; as there, --no-escape leaves them as they are."""
    assert unescaped(given) == text
    if given == r"a\nb":
        assert generate("-p", given).stdout.startswith(text)
        assert generate("-p", given, "--no-escape").stdout.startswith(given)
        stopped = generate("-p", "hello", "--no-display-prompt", "-r", r"\x20", "--grammar", r'root ::= "one two"')
        assert stopped.stdout == "one\n"


def test_escapes_that_are_no_text(base):
    refused(deltamem("generate", "-m", base(), "-p", r"a\xff"), r"a\\xff")


def test_no_memory_is_the_plain_model(generate, base, adapter):
    plain = Llama(str(base()), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = list(itertools.islice(plain.generate(plain.tokenize(b"hello", special=True), temp=0), 16))
    expected = plain.detokenize(tokens).decode(errors="replace")
    plain.close()
    result = generate("-p", "hello", "--no-memory", "--no-display-prompt")
    assert result.stdout == expected + "\n"
    assert generate("-p", "hello", "--no-display-prompt", memory=False).stdout == result.stdout


def test_memory_is_saved_and_loaded(generate, tmp_path):
    first, second = tmp_path / "first.memory", tmp_path / "second.memory"
    result = generate("-p", "the sky is green today", "-n", "0", "--save-memory", first)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the sky is green today\n"
    state = read_memory_file(first)[0]
    assert state.any()
    fresh, loaded = generate("-p", "hello"), generate("-p", "hello", "--load-memory", first, "--save-memory", second)
    assert loaded.returncode == 0, loaded.stderr
    assert (read_memory_file(second)[0] != state).any()
    generate("-p", "hello", "--save-memory", second)
    assert (read_memory_file(second)[0] != state).any()
    assert fresh.stdout.startswith("hello") and loaded.stdout.startswith("hello")
    kept = generate("-p", "hello", "--no-write", "--load-memory", first, "--save-memory", second)
    assert kept.returncode == 0
    assert (read_memory_file(second)[0] == state).all()


def test_sampling_options(generate, tmp_path):
    grammar = tmp_path / "yes.gbnf"
    grammar.write_text('root ::= "yes" | "no"')
    assert generate("-p", "a", "--no-display-prompt", "--grammar-file", grammar).stdout in ("yes\n", "no\n")
    assert generate("-p", "a", "--no-display-prompt", "--grammar", 'root ::= "maybe"').stdout == "maybe\n"
    sampled = ["-p", "hello", "--temp", "1.5", "-n", "24"]
    assert generate(*sampled, "-s", "1").stdout == generate(*sampled, "-s", "1").stdout
    assert generate(*sampled, "-s", "1").stdout != generate(*sampled, "-s", "2").stdout
    whole = generate("-p", "hello", "--no-display-prompt").stdout
    letter = next(char for char in whole if char.isalpha())
    stopped = generate("-p", "hello", "--no-display-prompt", "-r", letter).stdout
    assert stopped == whole[: whole.index(letter)] + "\n"


def test_each_number_of_the_sampling_options_reaches_the_sampler():
    """But those of --repeat-last-n, which the model is loaded with."""
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser)
    usual = sampling(parser.parse_args(["--seed", "1"]), None)
    numbers = [action for action in parser._actions if action.metavar in ("N", "X")]
    assert {"--temperature", "--top-k", "--seed"} <= {action.option_strings[-1] for action in numbers}
    for action in numbers:
        name = action.option_strings[-1]
        changed = sampling(parser.parse_args(["--seed", "1", name, "1" if action.default != 1 else "0.5"]), None)
        if name == "--seed":
            changed = sampling(parser.parse_args(["--seed", "2"]), None)
        assert (changed != usual) == (name != "--repeat-last-n"), name
    for seed in ("-1", str(2**32 - 1)):  # both mean a random one to llama.cpp
        one, other = (sampling(parser.parse_args(["--seed", seed]), None)["seed"] for _ in range(2))
        assert one != other


def test_every_option_is_taken(generate):
    result = generate(
        "-p", "hello", "-b", "64", "-ub", "32", "-ngl", "0", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.1",
        "--typical", "0.9", "--repeat-penalty", "1.1", "--presence-penalty", "0.1", "--frequency-penalty", "0.1",
        "--repeat-last-n", "32", "--ignore-eos", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", "--no-mmap",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hello")


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        ([b"a", b"b", b"c"], [], ["a", "b", "c"]),
        (["é".encode()[:1], "é".encode()[1:] + b"!"], [], ["é!"]),
        (["😀".encode()[:1], "😀".encode()[1:3], "😀".encode()[3:], b"x"], [], ["😀", "x"]),
        ([b"a", b"\xff", b"b", b"\xe2\x82"], [], ["a", "�", "b", "�"]),
        ([b"one ", b"two ", b"three"], ["two"], ["one "]),
        ([b"a E", b"N", b"D b"], ["END"], ["a "]),
        ([b"a E", b"N", b"T b"], ["END"], ["a ", "ENT b"]),
        ([b"a E", b"N"], ["END"], ["a ", "EN"]),
        ([b"x" * 300], [], ["x" * 300]),
    ],
)
def test_text_of_tokens(monkeypatch, pieces, stop, text):
    from pydeltamem.runtime import assembler as module

    monkeypatch.setattr(module, "_piece", lambda vocab, token: pieces[token])
    assembler = module.Assembler(None, stop)
    got = []
    for token in range(len(pieces)):
        got.append(assembler.push(token))
        if assembler.stopped:
            break
    assert [piece for piece in [*got, assembler.finish()] if piece] == text


def test_verbose_shows_the_log(generate):
    assert "llama_model_loader" in generate("-p", "hello", "-v").stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-m", "none.gguf", "-p", "x"], "none.gguf: no such model file"),
        (["-m", "text", "-p", "x"], "text: the model cannot be loaded"),
        (["-m", "cut.gguf", "-p", "x"], "cut.gguf: the model cannot be loaded: .*corrupted or incomplete"),
        (["-m", "BASE", "--deltamem", "none.gguf", "-p", "x"], "none.gguf: no such adapter file"),
        (["-m", "BASE", "--deltamem", "text", "-p", "x"], "text.* GGUF"),
        (["-m", "BASE", "--deltamem", "BASE", "-p", "x"], "base-f32.gguf.*not a δ-mem adapter"),
        (["-m", "BASE", "--deltamem", "SMOLLM3", "-p", "x"], "smollm3"),
        (["-m", "BASE", "--deltamem", "TSW", "-p", "x", "--load-memory", "none"], "none: no such memory file"),
        (["-m", "BASE", "--deltamem", "TSW", "-p", "x", "--load-memory", "text"], "text: cut off or not a memory file"),
        (["-m", "tsw.memory", "-p", "x"], "tsw.memory: .*memory file"),
        (["-m", "BASE", "--deltamem", "tsw.memory", "-p", "x"], "tsw.memory: .*memory file"),
        (["-m", "BASE", "--deltamem", "TSW", "-p", "x", "--load-memory", "TSW"], "GGUF file, an adapter"),
        (
            ["-m", "BASE", "--deltamem", "MSW", "-p", "x", "--load-memory", "tsw.memory"],
            "the memory of another adapter",
        ),
        (["-m", "BASE", "-p", "x", "--load-memory", "tsw.memory"], "no adapter is attached"),
        (["-m", "BASE", "-p", "x", "--save-memory", "out.memory"], "no adapter is attached"),
        (
            ["-m", "BASE", "-p", "x", "--deltamem", "TSW", "--save-memory", "no/out.memory"],
            "no/out.memory: .*no folder",
        ),
        (["-m", "BASE", "-p", "x", "--no-memory", "--save-memory", "out.memory"], "--no-memory leaves no memory"),
        (["-m", "BASE", "-p", "x", "--lora", "none.gguf"], "none.gguf: no such LoRA file"),
        (["-m", "BASE", "-p", "x", "--lora", "text"], "text: the LoRA adapter cannot be loaded"),
        (["-m", "BASE", "-p", "x", "--grammar", "root ::= ["], "--grammar: not a valid GBNF grammar"),
        (["-m", "BASE", "-p", "x", "--grammar-file", "none.gbnf"], "none.gbnf: cannot be read"),
        (["-m", "BASE", "-p", "x", "--grammar-file", "empty"], "empty: is empty"),
        (["-m", "BASE", "-f", "none.txt"], "none.txt: cannot be read"),
        (["-m", "BASE", "-f", "binary"], "binary: not a UTF-8 text file"),
        (["-m", "BASE", "-f", "long", "-c", "256"], "tokens, the context holds 256"),
        (["-m", "BASE", "-p", ""], "the prompt is empty"),
        (["-m", "BASE", "-p", "x", "-ctv", "q4_0", "-fa", "off"], "cannot be loaded"),
    ],
)
def test_bad_input(base, adapter, make_llm, tmp_path, args, says):
    (tmp_path / "text").write_text("no such thing\n" * 50)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_text("hello " * 300)
    (tmp_path / "cut.gguf").write_bytes(base().read_bytes()[:900_000])
    make_llm().memory.save(tmp_path / "tsw.memory")
    names = {
        "BASE": base(),
        "TSW": adapter("qwen3", "tsw_qo"),
        "MSW": adapter("qwen3", "msw4_qo"),
        "SMOLLM3": adapter("smollm3", "tsw_qo"),
    }
    result = deltamem("generate", *(names.get(arg, arg) for arg in args), "-n", "4", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(rf"deltamem: error: .*{says}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "out.memory").exists()


def endless(model, memory, *options):
    """`deltamem generate` that ends when somebody ends it."""
    command = [sys.executable, "-m", "pydeltamem.cli.main", "generate", "-m", model, "--deltamem", memory, *options]
    command += ["-p", "hello", "-c", "32768", "--ignore-eos"]
    return subprocess.Popen([str(arg) for arg in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_saves_the_memory(base, adapter, tmp_path):
    path = tmp_path / "a.memory"
    process = endless(base(), adapter("qwen3", "tsw_qo"), "--save-memory", path)
    assert process.stdout.read(40).startswith(b"hello")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert read_memory_file(path)[0].any()


@pytest.mark.skipif(os.name != "posix", reason="pipes as on POSIX")
def test_broken_pipe_is_quiet(base, adapter, tmp_path):
    path = tmp_path / "a.memory"
    process = endless(base(), adapter("qwen3", "tsw_qo"), "--save-memory", path, "--no-perf")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 141
    assert len(err.splitlines()) == 1 and b"--ctx-size" in err  # the model was trained on less
    assert read_memory_file(path)[0].any()


def test_what_follows_two_dashes_is_no_option(tmp_path):
    result = deltamem("inspect", "--", "--no-such-file", cwd=tmp_path)
    refused(result, "--no-such-file")


def test_a_text_may_begin_with_a_dash(generate, base):
    """As for llama.cpp's programs; but not if that is an option, or ends the options."""
    for given in ("-x", "---", "-n is an option", "--no such option"):
        assert generate("-p", given, "-n", "1").stdout.startswith(given)
    text = generate("-p", "a", "--no-display-prompt", "--grammar", 'root ::= "one---two"', "-r", "---").stdout
    assert text == "one\n"
    for given in ("-n", "--no-perf", "--"):
        result = generate("-p", given)
        assert result.returncode == 2 and "-p/--prompt" in result.stderr.splitlines()[-1]


def test_numbers_may_follow_an_option_of_one_letter(generate):
    expected = generate("-p", "hello", "-n", "3", "-s", "-1", "-ngl", "-1").stdout
    assert generate("-p", "hello", "-n3", "-s-1", "-t1").stdout == expected


@pytest.mark.parametrize("share", ["1", "-0.1", "x"])
def test_a_share_is_below_one(in_process, share):
    result = in_process("train", "model", "data", "-o", "out", "--short-first", share)
    assert result.returncode == 2 and share in result.stderr.splitlines()[-1]


def test_the_defaults_of_numbers_can_be_given():
    """What the help text calls the default is a value that the option takes."""

    def options(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for nested in action.choices.values():
                    yield from options(nested)
            elif callable(action.type) and isinstance(action.default, (int, float)):
                yield action

    for name, (module, _) in SUBCOMMANDS.items():
        parser = Parser(prog=name)
        importlib.import_module(module).add_arguments(parser)
        for action in options(parser):
            assert action.type(str(action.default)) == action.default, (name, action.option_strings)


def test_a_prompt_must_come_from_somewhere(base, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["generate", "-m", str(base()), *PLAIN]) == 1
    check_names(capsys.readouterr().err.strip(), ["-p", "-f"])


def test_standard_input_that_is_no_text(generate):
    result = generate(encoding=None, errors=None, input=b"\xff\xfe")
    assert result.returncode == 1 and b"Traceback" not in result.stderr and b"UTF-8" in result.stderr


def test_an_output_that_is_full(base):
    with open("/dev/full", "w") as full:
        result = deltamem("inspect", base(), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    refused(result, "output")


def test_a_packed_model_without_its_memory(base, adapter, generate, tmp_path):
    packed = tmp_path / "packed.gguf"
    assert deltamem("pack", base(), adapter("qwen3", "tsw_qo"), "-o", packed).returncode == 0
    with_memory, without = (deltamem("generate", "-m", packed, *PLAIN, "-p", "hello", *more).stdout
                            for more in ((), ("--no-memory",)))  # fmt: skip
    assert without == generate("-p", "hello", memory=False).stdout != with_memory


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_rpc_server_that_others_reach_says_so(host, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(rpc_server, "serve", lambda *given: served.append(given))
    assert main(["rpc-server", "--host", host, "--port", "50071", "-t", "1"]) == 1  # it does not start
    assert served == [(host, 50071, 1)]
    assert ("0.0.0.0:50071" in capsys.readouterr().out) == (host == "0.0.0.0")
