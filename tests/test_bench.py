"""deltamem bench: how its numbers are made, its options, and one clear sentence for every bad input. Never time."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import logging
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

from pydeltamem.bench import floor, ggml_graph, instructions, nodes, operator, pairs, ram, runs, worker
from pydeltamem.bench.pairs import median_interval
from pydeltamem.cli import main
from pydeltamem.errors import AdapterError, DecodeError, InputError, LibraryError, ModelError, OutputError
from pydeltamem.formats.gguf_header import Header
from pydeltamem.models import default_files
from pydeltamem.runtime import library
from pydeltamem.runtime.quantize import file_type
from pydeltamem.runtime.unpacking import multiplies_bf16
from refusals import refused, refuses
from test_cli import deltamem, shell
from test_unsupported import bitnet, rewrite  # noqa: F401 - a fixture

SMALL = ["-t", "1", "--pairs", "2"]


@pytest.fixture
def run_bench(base, adapter):
    """run_bench(*args): deltamem bench with the golden Qwen3 and its TSW adapter."""

    def run(*args, memory=True, **kwargs):
        model = ["-m", base(), *(["--deltamem", adapter("qwen3", "tsw_qo")] if memory else [])]
        return deltamem("bench", *model, *SMALL, *args, **kwargs)

    return run


@pytest.fixture
def options(base):
    return runs.Options(str(base()), 256, 64, 32, 1, 0, False, "f16", "f16")


@pytest.fixture
def runner(options, adapter):
    """runner(with_adapter): a Runner of the golden Qwen3."""
    model = runs.Model(library.llama_cpp, options)
    made = []

    def make(with_adapter=True):
        made.append(runs.Runner(model, str(adapter("qwen3", "tsw_qo")) if with_adapter else None))
        return made[-1]

    yield make
    for one in made:
        one.close()
    model.close()


def check_comparison(result, times, n_pairs):
    """A comparison's numbers follow from the times that the JSON lists; each pair had contexts of its own."""
    a, b = times
    ratios = [x / y for x, y in zip(a, b)]
    assert len(a) == len(b) == n_pairs == result["pairs"] == result["groups"]
    assert result["ratio"] == pytest.approx(statistics.median(ratios))
    assert min(ratios) <= result["low"] <= result["ratio"] <= result["high"] <= max(ratios)


def test_json(run_bench, adapter, tmp_path):
    path = tmp_path / "result.json"
    result = run_bench("-p", "32,8", "-d", "0,40", "-n", "4", "--json", path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "on ÷ off" in result.stdout and "Graphs built in the timed decode runs: 0, 0." in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    found = json.loads(path.read_text(encoding="utf-8"))
    assert [run["n_tokens"] for run in found["prompt"]["runs"]] == [32, 8]
    assert [(run["depth"], run["n_tokens"]) for run in found["decode"]["runs"]] == [(0, 4), (40, 4)]
    for kind in ("prompt", "decode"):
        main = found[kind]["runs"][0]
        for key in ("on", "off", "ratio", "low", "high", "pairs"):
            assert found[kind][key] == main[key]
        for run in found[kind]["runs"]:
            check_comparison(run, (run["ns"]["on"], run["ns"]["off"]), 2)
            for side in ("on", "off"):
                assert run[side] == pytest.approx(run["n_tokens"] * 1e9 / statistics.median(run["ns"][side]))
    assert all(run["graphs_built"] == 0 for run in found["decode"]["runs"])

    memory = found["memory"]
    file = adapter("qwen3", "tsw_qo")
    assert memory["adapter_file_bytes"] == file.stat().st_size
    assert 0 < memory["weights_bytes"] < memory["adapter_file_bytes"]
    assert memory["states_bytes"] == (1 + 16) * 4 * 4 * 8 * 8  # state and checkpoints; layers, float32, rank
    assert memory["prompt"] == 32
    for key, extra in memory["extra"].items():
        assert memory["on"][key] - memory["off"][key] == extra


def test_json_to_standard_output(run_bench):
    result = run_bench("-p", "8", "-n", "0", "--rss", "0", "--json", "-")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "decode" not in found and "on" not in found["memory"]
    assert "prompt 8" in result.stderr


def test_against_another_library(run_bench, tmp_path):
    """The other library runs in its own process: here a copy of ours, so that the test needs no second build."""
    other = tmp_path / "lib"
    shutil.copytree(library.library_folder(), other)
    path = tmp_path / "result.json"
    result = run_bench("-p", "8", "-n", "2", "--rss", "0", "--against", other, "--json", path, "--renew", "1")
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["setup"]["against"]["folder"] == str(other)
    for kind in ("prompt", "decode"):
        run = found[kind]["runs"][0]
        assert set(run["ratios"]) == {"plain/against", "against/plain"}
        for name, ratio in run["ratios"].items():
            check_comparison(ratio, [run["ns"][side] for side in name.split("/")], 2)
    for choice in ((), ("--control",)):
        alone = run_bench("-p", "8", "-n", "0", "--against", other, *choice, memory=False)
        assert alone.returncode == 0, alone.stderr
        assert "plain ÷ against" in alone.stdout and "on ÷ off" not in alone.stdout
        assert "llama_model_loader" not in alone.stderr


def test_unpacked_weights(base, tmp_path):
    """Of the package's model, in Q8_0, also by another library; and what is not unpacked is told."""
    shutil.copytree(library.library_folder(), tmp_path / "lib")
    options = ["--control", "--unpack", "all", "--no-repack", "-p", "16", "-n", "0"]
    model = default_files()[0]
    result = deltamem("bench", "-m", model, *SMALL, *options, "-v")
    assert result.returncode == 0, result.stderr
    assert ("overridden to DELTAMEM_BF16" in result.stderr) == multiplies_bf16()
    result = deltamem("bench", "-m", model, *SMALL, *options, "--against", tmp_path / "lib")
    assert result.returncode == 0 and "plain ÷ against" in result.stdout
    assert ("--unpack all" in result.stderr) == (not multiplies_bf16())
    result = deltamem("bench", "-m", base(), *SMALL, *options)  # in F32
    assert result.returncode == 0 and "--unpack all" in result.stderr


def test_a_table_whose_reader_is_gone(base, adapter, tmp_path):
    """Ends as other commands do, and the report is written all the same."""
    path = tmp_path / "b.json"
    model = ["-m", base(), "--deltamem", adapter("qwen3", "tsw_qo")]
    args = ["bench", *model, *SMALL, "-p", "8", "-n", "0", "--rss", "0", "--json", path]
    assert shell('trap "" PIPE; { "$@"; echo $? >&2; } | true', *args).stderr == "141\n"
    assert json.loads(path.read_text(encoding="utf-8"))["prompt"]


@pytest.mark.parametrize("width", ["50", "80"])
def test_a_narrow_terminal_cuts_no_figure(base, adapter, capsys, monkeypatch, width):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in (("COLUMNS", width), ("LINES", "24"), ("TERM", "dumb")):  # rich wants both
        monkeypatch.setenv(name, value)
    model = ["-m", str(base()), "--deltamem", str(adapter("qwen3", "tsw_qo"))]
    assert main.main(["bench", *model, *SMALL, "-p", "8", "-n", "0", "--rss", "0"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r" \d+\.\d{4}  ", shown) and re.search(r" \d+\.\d{4}–\d+\.\d{4}", shown) and "…" not in shown


def test_threads_for_prompts_and_weights_as_they_are(run_bench, tmp_path):
    path = tmp_path / "result.json"
    options = ("-p", "8", "-n", "2", "--rss", "0", "--json", path)
    for more, found in (((), (None, True)), (("-tb", "2", "--no-repack"), (2, False))):
        assert run_bench(*options, *more).returncode == 0
        setup = json.loads(path.read_text(encoding="utf-8"))["setup"]
        assert (setup["n_threads"], setup["n_threads_batch"], setup["repack"]) == (1, *found)


def test_control_has_no_adapter(run_bench):
    result = run_bench("-p", "8", "-n", "0", "--control", "--renew", "0", memory=False)
    assert result.returncode == 0, result.stderr
    assert "which all share contexts" in result.stdout
    assert "no adapter either" in result.stdout and "on ÷ off" in result.stdout and "Adapter:" not in result.stdout


def test_nodes(run_bench, tmp_path):
    """Every node that computes is there, on both sides, and the memory's own on one."""
    path = tmp_path / "result.json"
    result = run_bench("--nodes", "-p", "16,40", "-ub", "16", "-n", "3", "-d", "5", "--renew", "1", "--json", path)
    assert result.returncode == 0, result.stderr
    assert "All nodes:" in result.stdout and "deltamem_read" in result.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [test["test"] for test in found["nodes"]] == ["prompt 16", "prompt 40", "decode 3 at 5"]
    # a prompt of 40 is three graphs of 16, 16 and 8; in decode the untimed token is one more, and two rounds make eight
    for test, n_graphs, n_times in zip(found["nodes"], (1, 3, 1), (2, 2, 8)):
        assert test["times"] == n_times and f"the least of {n_times} times" in result.stdout
        rows = {(row["name"], row["op"]): row for row in test["rows"]}
        assert len(rows) == len(test["rows"])
        assert {op for _, op in rows}.isdisjoint({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
        own = {name: row["n_on"] for (name, _), row in rows.items() if name.startswith("deltamem")}
        layers = 4 * n_graphs
        assert own == {"deltamem_in": layers, "deltamem_read": layers, "deltamem_corrected": 2 * layers}  # q and o
        for (name, _), row in rows.items():
            assert row["n_off"] == (0 if name in own else row["n_on"])
        for side in ("on", "off"):
            assert test[side] == pytest.approx(sum(row[side] for row in rows.values()))
        assert test["ratio"] == test["on"] / test["off"]
    assert "prompt" not in found and "decode" not in found


def test_sides_alternate():
    """Every round runs each side once, forth and back in turn; the warm-up is not counted."""
    order = []

    class Side:
        def __init__(self, name):
            self.name, self.n = name, 0

        def prompt(self, n_tokens):
            order.append(self.name)
            self.n += 1
            return 1000 * self.n, 1 if self.n == 1 else 0  # the first builds a graph

    result = pairs.measure({"on": Side("on"), "off": Side("off")}, "prompt", (5,), 4, lambda: None)
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert rounds == [("off", "on"), ("on", "off"), ("off", "on"), ("on", "off"), ("off", "on")]
    assert result["ns"] == {"on": [2000, 3000, 4000, 5000], "off": [2000, 3000, 4000, 5000]}
    assert result["graphs_built"] == 0
    assert result["on"] == pytest.approx(5e9 / 3500)


def test_pairs_that_share_contexts_count_once():
    """Contexts are new where the groups of compare end; two values of 0.9 and two of 1.1 are two, not four."""
    log = []

    class Side:
        def renew(self):
            log.append("new")

        def prompt(self, n_tokens):
            log.append("run")
            return 1000, 0

    for n_renew, n_groups in ((0, 5), (1, 5), (2, 3), (5, 1)):
        log.clear()
        result = pairs.measure({"on": Side(), "off": Side()}, "prompt", (5,), 5, lambda: None, n_renew)
        assert (result["pairs"], result["groups"]) == (5, n_groups)
        assert log.count("new") == (0 if n_renew == 0 else 2 * (n_groups - 1))
        # runs since the contexts were made: untimed ones, then n_renew pairs
        parts = [part.count("run") for part in " ".join(log).replace("new new", "|").split("|")]
        assert n_renew == 0 or all(n == 2 + 2 * n_renew for n in parts[:-1])

    shared = pairs.compare([9, 9, 11, 11], [10] * 4, 2)
    assert shared["ratio"] == pytest.approx(1.0) and (shared["low"], shared["high"]) == (0.9, 1.1)
    assert (shared["groups"], shared["confidence"]) == (2, 0.5)


def test_the_interval_covers_where_pairs_share_contexts():
    """Contexts that differ as much as their runs do: the stated confidence holds in 2,000 benches of 24 pairs."""
    choice = random.Random(1)
    hits = 0
    for _ in range(2000):
        ratios = []
        for _ in range(12):
            offset = choice.gauss(1.0, 0.02)
            ratios += [offset + choice.gauss(0.0, 0.02) for _ in range(2)]
        found = pairs.compare(ratios, [1.0] * 24, 2)
        hits += found["low"] <= 1.0 <= found["high"]
    confidence = found["confidence"]
    assert confidence >= 0.95
    assert abs(hits / 2000 - confidence) < 5 * (confidence * (1 - confidence) / 2000) ** 0.5


def test_a_run_is_what_it_says(runner):
    """Positions after each run, for both sides; decode leaves the depth as it found it and builds no graph."""
    for side in (runner(True), runner(False)):
        assert side.prompt(100)[0] > 0
        assert side.n_tokens == 100
        nanoseconds, built = side.decode(70, 5)
        assert nanoseconds > 0 and built == 0
        assert side.n_tokens == 75
        side.decode(70, 2)
        assert side.n_tokens == 72
        side.decode(0, 3)
        assert side.n_tokens == 3
        side.decode(50, 1)  # longer than the present text: the text is decoded again
        assert side.n_tokens == 51


@pytest.mark.parametrize(("case", "outtype"), [("tsw_qo", "f32"), ("msw4_qo", "f16"), ("msw4_qo", "q8_0")])
def test_what_is_computed_as_one_follows_each_other(options, adapter, case, outtype):
    """A layer's projection, read and correction of q, one node each whatever the heads and types: only neighbours are
    computed together."""
    watched = nodes.Nodes()
    model = runs.Model(library.llama_cpp, options)
    side = runs.Runner(model, str(adapter("qwen3", case, outtype)), watched.callback)
    with watched.watch(alike=True):
        side.decode(0, 1)
    names = [name for _, name, _, _ in watched.least]
    first = [i for i, name in enumerate(names) if name.startswith("deltamem_in")]
    assert len(first) == 4
    for layer, i in enumerate(first):
        found = [name.split(" ")[0] for name in names[i : i + 3]]
        assert found == [f"deltamem_{what}-{layer}" for what in ("in", "read", "corrected")]
    side.close()
    model.close()


def test_the_adapter_is_attached_and_writes(runner):
    on, off = runner(True), runner(False)
    for side in (on, off):
        side.prompt(10)
    assert library.llama_deltamem_is_attached(on.ctx) and not library.llama_deltamem_is_attached(off.ctx)
    assert on.n_graphs > 0 and off.n_graphs == 0
    size = library.llama_deltamem_state_size(on.ctx)
    state = (ctypes.c_float * size)()
    assert library.llama_deltamem_state_get(on.ctx, 0, state, size) == 0
    assert any(state)


def test_worker_does_what_a_runner_does(options, adapter):
    side = worker.Worker(library.library_folder(), options, str(adapter("qwen3", "tsw_qo")))
    try:
        assert side.prompt(20)[0] > 0
        nanoseconds, built = side.decode(20, 3)
        assert nanoseconds > 0 and built == 0
        assert side.resident()["peak"] > 1 << 20
        first = side.process
        side.renew()
        assert first.poll() == 0 and side.process.pid != first.pid
        assert side.prompt(20)[0] > 0
        assert side.description["model_info"]["n_params"] > 0 and "CPU" in side.description["system"]
        side.process.kill()
        with refuses(LibraryError, library.library_folder(), "-9"):
            side.prompt(20)
    finally:
        side.close()
    with refuses(AdapterError, options.model):
        worker.Worker(library.library_folder(), options, options.model)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_that_does_not_end_is_killed(options, monkeypatch):
    side = worker.Worker(library.library_folder(), options)
    side.process.send_signal(signal.SIGSTOP)
    wait = side.process.wait

    def impatient(timeout=None):
        if timeout is not None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return wait()

    monkeypatch.setattr(side.process, "wait", impatient)
    side.close()
    assert side.process.returncode == -signal.SIGKILL


@pytest.fixture
def of_no_architecture(base, tmp_path):
    """A file that our reader takes and llama.cpp does not load."""
    return rewrite(base(), tmp_path / "qwen99.gguf", "qwen99")


def test_ctrl_c_while_a_model_is_loaded_is_not_lost(options, monkeypatch):
    """It comes within the callback for llama.cpp's log, where Python drops exceptions."""

    class Press(logging.Handler):
        def emit(self, record):
            pressed.append(record)
            if len(pressed) == 1:
                signal.raise_signal(signal.SIGINT)

    pressed, press = [], Press()
    log = logging.getLogger("pydeltamem.llama_cpp")
    before, level = signal.signal(signal.SIGINT, signal.default_int_handler), log.level
    monkeypatch.setattr(library.logger, "level", logging.ERROR)  # as without --verbose
    log.addHandler(press)
    log.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.Model(library.llama_cpp, options)
    finally:
        log.removeHandler(press)
        log.setLevel(level)
        signal.signal(signal.SIGINT, before)
    assert len(pressed) > 1


def test_what_cannot_be_run(options, runner, bitnet, adapter, of_no_architecture, tmp_path):  # noqa: F811
    made = []

    def model(**changed):
        made.append(runs.Model(library.llama_cpp, dataclasses.replace(options, **changed)))
        return made[-1]

    with refuses(ModelError, of_no_architecture):
        model(model=str(of_no_architecture))
    with refuses(DecodeError, options.model):
        runner().prompt(300)  # the context holds 256 tokens
    with refuses(ModelError, options.model):
        runs.Runner(model(type_v="q8_0"))  # needs flash attention
    memory = str(rewrite(adapter("smollm3", "tsw_qo"), tmp_path / "adapter.gguf", "bitnet"))
    with refuses(AdapterError, memory, "bitnet"):
        runs.Runner(model(model=str(bitnet)), memory)  # the graph passes by its hooks
    for one in made:
        one.close()


def test_median_interval_covers_the_median():
    """The stated confidence is that of the binomial distribution, and it holds on samples."""
    for n in range(1, 40):
        low, high, confidence = median_interval(list(range(n)))
        rank = low + 1
        assert (low, high) == (rank - 1, n - rank)
        inside = sum(math.comb(n, k) for k in range(rank, n - rank + 1)) / 2**n
        assert confidence == pytest.approx(inside)
        assert confidence >= 0.95 or rank == 1
        if n >= 6:
            assert confidence >= 0.95
    assert median_interval(range(10))[2] == pytest.approx(1 - 22 / 1024)

    choice = random.Random(1)
    hits = 0
    for _ in range(2000):
        low, high, confidence = median_interval([choice.expovariate(1.0) for _ in range(10)])
        hits += low <= math.log(2) <= high
    assert abs(hits / 2000 - confidence) < 5 * (confidence * (1 - confidence) / 2000) ** 0.5


@pytest.mark.parametrize(
    "args, names",
    [
        ((), ("-m", "--synthetic", "--op")),
        (("-m", "nothing.gguf"), ("nothing.gguf",)),
        (("--op", "-m", "x"), ("--op", "-m")),
        (("--op", "--nodes"), ("--op", "--nodes")),
        (("--op", "--ftype", "f16", "--vocab", "x"), ("--op", "--ftype", "--vocab")),
        (
            ("-m", "x", "--vocab", "y", "--rank", "99", "--ftype", "f16"),
            ("--ftype", "--vocab", "--rank", "--synthetic", "x"),
        ),
        (("-m", "x", "--nodes", "--against", "y"), ("--nodes", "--against")),
        (("--op", "--rank", "65"), ("--rank 65", "64")),
        (("--op", "--op-tokens", "0"), ("--op-tokens",)),
        (("--synthetic", "qwen3-0.6b", "--deltamem", "x"), ("--synthetic", "--deltamem")),
        (("-m", "x", "--control", "--deltamem", "y"), ("--control", "--deltamem")),
        (("-m", "x", "-ctv", "q8_0"), ("-ctv q8_0", "-fa on")),
        (("-m", "x", "--plot", "y.png"), ("--plot", "--return")),
        (("-m", "x", "--return", "8", "--nodes"), ("--return", "--nodes")),
        (("-m", "x", "--return", "8,0"), ("--return",)),
        (("--op", "--return", "8"), ("--op", "--return")),
        (("-m", "x", "-p", "0", "-n", "0"), ("-p 0", "-n 0")),
        (("-m", "x", "-p", "0", "-n", "0", "--rss", "64", "--control"), ("-p 0", "-n 0")),
        (("-m", "x", "-p", "0", "-n", "0", "--rss", "64", "--nodes"), ("-p 0", "-n 0")),
        (("-m", "x", "--against", "no-such-folder/lib"), ("no-such-folder/lib",)),
        (("-m", "x", "--json", "no-such-folder/x.json"), ("no-such-folder/x.json",)),
    ],
)
def test_refused(in_process, args, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(in_process("bench", *args), *names)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("args", [("-p", "x"), ("-p", "-1"), ("--pairs", "0"), ("--synthetic", "nothing"), ("-t", "0")])
def test_usage(in_process, args):
    result = in_process("bench", *args)
    assert result.returncode == 2 and "usage:" in result.stderr


def test_refused_by_the_library(run_bench, base, of_no_architecture, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libllama.so").write_bytes(b"x")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base().read_bytes()[:100_000])
    odd = of_no_architecture
    short = ["-p", "8", "-n", "0"]
    refused(run_bench(*short, memory=False), base(), "--deltamem", "--against")
    refused(run_bench(*short, "--deltamem", base(), memory=False), base())
    refused(run_bench(*short, "--deltamem", base(), "--rss", "0", memory=False), base())
    refused(run_bench(*short, "--deltamem", tmp_path / "none", memory=False), tmp_path / "none")
    refused(run_bench(*short, "--rss", "0", "--against", broken), broken)
    refused(run_bench(*short, "--rss", "0", "--against", broken, "--unpack", "all"), broken, "--unpack")
    refused(run_bench(*short, "-m", cut), cut)
    refused(run_bench(*short, "-m", odd, "--rss", "0"), odd, "qwen99")
    refused(
        run_bench(*short, "-m", odd, "--control", "--against", library.library_folder(), memory=False), odd, "qwen99"
    )
    refused(run_bench("--return", "8", memory=False), base(), "--deltamem")
    refused(run_bench("--return", "8", "-m", cut), cut)
    nothing = run_bench("-p", "0", "-n", "0", "--rss", "8", "--against", library.library_folder(), memory=False)
    refused(nothing, "-p 0", "-n 0", "--rss")


def test_op(tmp_path):
    path = tmp_path / "op.json"
    result = deltamem("bench", "--op", "--op-tokens", "1,16", "--json", path)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["rank"], row["tokens"]) for row in found["op"]] == list(itertools.product((8, 16), (1, 16)))
    for row in found["op"]:
        assert 0 < row["ns_min"] <= row["ns"]
        assert row["instructions"] is None or row["instructions"] > found["floor"][str(row["rank"])]["issue_cycles"]
    assert found["floor"]["8"]["text"] in result.stdout
    assert result.stdout.count("not available") == sum(row["instructions"] is None for row in found["op"])


@pytest.mark.parametrize(
    ("function", "returns"),
    [("ggml_backend_dev_by_type", None), ("ggml_backend_alloc_ctx_tensors", None), ("ggml_backend_graph_compute", 1)],
)
def test_op_without_a_cpu_or_ram_or_a_result(monkeypatch, function, returns):
    real = ggml_graph.ggml_library()

    class Failing:
        def __getattr__(self, name):
            return (lambda *_: returns) if name == function else getattr(real, name)

    monkeypatch.setattr(ggml_graph, "ggml_library", Failing)
    with refuses(LibraryError, "--op"):
        operator.measure(8, 1, 1, 1)


@pytest.mark.parametrize(("what", "option"), [(ggml_graph.ggml_library, "--op"), (nodes.Nodes, "--nodes")])
def test_a_library_that_hides_ggml(monkeypatch, what, option):
    monkeypatch.setattr(library.llama_cpp.llama_cpp, "_lib", types.SimpleNamespace(_name="libother.so"))
    with refuses(LibraryError, "libother.so", option):
        what()


def test_a_cycle_is_measured_by_one_chain(monkeypatch):
    """One vector of outputs of one token: what the kernel computes side by side would pass for a faster core."""
    real, chains = ggml_graph.ggml_library(), []

    class Watched:
        def __getattr__(self, name):
            function = getattr(real, name)
            if name != "deltamem_correct_forward":
                return function

            def called(args):
                chains.append((args.n_out, args.n_tokens))
                function.argtypes, function.restype = [ctypes.c_void_p], None
                function(ctypes.byref(args))

            return called

    monkeypatch.setattr(floor, "ggml_library", Watched)
    cycle = floor.cycle_ns(2, 64)
    assert (cycle is None and not chains) or set(chains) == {(min(8, floor.lanes()), 1)}


def test_a_kernel_that_cannot_be_called(monkeypatch):
    """As in a build with a ggml-cpu per CPU: the floor has cycles only, for the widest vectors that any CPU has."""
    monkeypatch.setattr(floor, "ggml_library", object)
    assert floor.cycle_ns(1) is None and floor.per_cycle(1, 1.0) is None
    assert floor.simd_name() == "unknown" and floor.lanes() == 16


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's performance counters")
@pytest.mark.parametrize("works", [True, False])
def test_instructions_are_counted_while_it_works(monkeypatch, tmp_path, works):
    """Counters that are allowed, as they are in few containers; and that fail later."""
    import fcntl
    import os

    done = []
    file = tmp_path / "counter"
    file.write_bytes((1234).to_bytes(8, sys.byteorder))
    counter = os.open(file, os.O_RDONLY)

    def ioctl(fd, request, argument):
        assert fd == counter
        if not works:
            raise OSError("no counter")
        done.append({0x2400: "on", 0x2401: "off", 0x2403: "reset"}[request])

    def syscall(*_):
        return counter

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(instructions.ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace(syscall=syscall))
    assert instructions.count_instructions(lambda: done.append("work")) == (1234 if works else None)
    assert done == (["reset", "on", "work", "off"] if works else [])
    with pytest.raises(OSError):
        os.fstat(counter)  # it is closed


def test_instructions_of_another_machine(monkeypatch):
    monkeypatch.setattr(instructions.platform, "machine", lambda: "abacus")
    assert instructions.count_instructions(lambda: pytest.fail("nothing counts")) is None


def test_ram_where_the_system_tells_only_the_peak(monkeypatch):
    known = ram.resident()["peak"]

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert ram.resident() == {"peak": pytest.approx(known, rel=0.2)}


def test_op_computes_the_operator(monkeypatch):
    """The graph that is timed: states change by what the tokens write, each layer's alike."""
    graphs = []
    compute = ggml_graph.Graph.compute
    allocate = ggml_graph.Graph.allocate

    def keep(graph, values):
        graphs.append([tensor for tensor, data in values.items() if len(data) == 4 * 2 * 64 and not any(data)])
        allocate(graph, values)

    def check(graph):
        compute(graph)
        get = graph.ggml.ggml_backend_tensor_get
        get.argtypes, get.restype = graph.ggml.ggml_backend_tensor_set.argtypes, None
        states = []
        for tensor in graphs[-1]:
            buf = ctypes.create_string_buffer(4 * 2 * 64)
            get(tensor, buf, 0, len(buf))
            states.append(buf.raw)
        assert len(states) == graph.n_nodes
        assert any(states[0]) and len(set(states)) == 1

    monkeypatch.setattr(ggml_graph.Graph, "allocate", keep)
    monkeypatch.setattr(ggml_graph.Graph, "compute", check)
    row = operator.measure(8, 2, 64, 1)
    assert row["layers"] == 36 and row["heads"] == 2


def test_floor():
    """The floor by hand: rank 8, one head, at a nanosecond a cycle."""
    found = floor.floor(8, 1, 1.0, None)
    operations = 4 * 64 + 16 * 20 + 8 * 18 + 7 * 8
    assert found["vector_instructions"] == operations / floor.lanes()
    assert found["issue_cycles"] == operations / floor.lanes() / 2
    assert found["chain_cycles"] == 4 * (1 + 3 + 2)
    assert found["ns"] == max(found["issue_cycles"], found["chain_cycles"])
    assert floor.floor(8, 3, 1.0, None)["vector_instructions"] == 3 * found["vector_instructions"]
    assert floor.floor(8, 1, None, None)["ns"] is None
    # a rate is a bound from below, and whole: 0.9 and 1.04 are 1 vector a cycle, 1.4 are 2
    for rate, starts in ((0.9, 1), (1.04, 1), (1.4, 2), (2.02, 2)):
        assert floor.floor(8, 1, 1.0, rate)["issue_cycles"] == operations / floor.lanes() / starts


def test_synthetic_files_are_kept(tmp_path, monkeypatch, golden_dir):
    from pydeltamem.bench import models, synthetic

    shape = synthetic.Shape("qwen3", n_layer=2, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, n_ctx=512)
    monkeypatch.setitem(synthetic.SHAPES, "tiny", shape)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ("tiny", "q4_k_m", "f16", 4, 2, str(golden_dir / "qwen3" / "base-f32.gguf"))
    files = models.synthetic_files(*arguments)
    made = {path: path.stat().st_mtime_ns for path in models.cache_folder().iterdir()}
    assert {str(path) for path in made} == set(files)
    assert models.synthetic_files(*arguments[:-1]) == files  # now without a vocabulary
    assert {path: path.stat().st_mtime_ns for path in models.cache_folder().iterdir()} == made

    result = deltamem("bench", "-m", files[0], "--deltamem", files[1], *SMALL, "-p", "8", "-n", "2", "--rss", "0")
    assert result.returncode == 0, result.stderr
    assert f"{17 * 2 * 4 * 4 * 2 * 4:,} bytes of states and checkpoints" in result.stdout

    # a type that llama.cpp's quantiser makes; its source file is removed
    quantised, adapter = models.synthetic_files("tiny", "IQ4_NL", *arguments[2:])
    assert adapter == files[1] and Header(quantised).keys["general.file_type"] == file_type("iq4_nl")
    assert {str(path) for path in models.cache_folder().iterdir()} == {*files, quantised}
    with refuses(InputError, "q9"):
        models.synthetic_files("tiny", "q9", *arguments[2:])

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with refuses(OutputError, "--synthetic", models.cache_folder()):
        models.synthetic_files(*arguments)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """--synthetic tiny, and an empty cache."""
    from pydeltamem.bench import models, synthetic

    shape = synthetic.Shape("qwen3", n_layer=2, n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_ff=64, n_ctx=512)
    monkeypatch.setitem(synthetic.SHAPES, "tiny", shape)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return models


def test_the_vocabulary_of_the_build(tiny, golden_dir, monkeypatch, tmp_path, capsys):
    """From the sources that the build unpacked, else from the download, of which a copy is kept."""
    vocabulary, name = golden_dir / "qwen3" / "base-f32.gguf", tiny.VOCABULARIES["qwen3"]
    monkeypatch.setattr(tiny, "__file__", str(tmp_path / "pydeltamem" / "bench" / "models.py"))
    build, arguments = tmp_path / "build" / "native", ("tiny", "f16", "f16", 4, 1)
    with refuses(InputError, "--vocab", build):
        tiny.synthetic_files(*arguments)

    (build / "download").mkdir(parents=True)
    (build / "download" / "llama_cpp_python-0.cut.tar.gz").write_bytes(b"cut")
    for release, add in (("1", lambda tar, member: tar.add(tmp_path / "build", member, recursive=False)),
                         ("2", lambda tar, member: tar.add(vocabulary, member))):  # fmt: skip
        with tarfile.open(build / "download" / f"llama_cpp_python-{release}.tar.gz", "w:gz") as tar:
            add(tar, f"llama_cpp_python-{release}/vendor/llama.cpp/models/{name}")
    files = {Path(path) for path in tiny.synthetic_files(*arguments)}
    kept = tiny.cache_folder() / name
    assert kept.read_bytes() == vocabulary.read_bytes()
    assert set(tiny.cache_folder().iterdir()) == {*files, kept}

    shutil.rmtree(build)  # the copy is enough
    for file in files:
        file.unlink()
    assert (
        main.main(["bench", "--synthetic", "tiny", "--ftype", "f16", *SMALL, "-p", "8", "-n", "0", "--rss", "0"]) == 0
    )
    assert "prompt 8" in capsys.readouterr().out

    kept.unlink()
    models = build / "llama.cpp" / "models"
    models.mkdir(parents=True)
    shutil.copy(vocabulary, models / name)
    assert tiny.synthetic_files("tiny", "f32", *arguments[2:])[0].endswith("tiny-f32.gguf")
    assert not kept.exists()
