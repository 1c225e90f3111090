"""deltamem tune: the rule by which it chooses, the record that it keeps, and who uses that. Never time."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pydeltamem import DeltaMemLlama, tuned
from pydeltamem.bench import tune
from pydeltamem.bench.tune import COUNTS, DECODE, PROMPTS, SAME, Candidate, Gain, choose, halve, relevant
from pydeltamem.cli import chat, generate, model_options, serve
from pydeltamem.cli.main import main
from pydeltamem.cli.parser import Parser
from pydeltamem.formats.packed import pack
from pydeltamem.runtime import library
from pydeltamem.runtime.unpacking import layouts
from pydeltamem.tuned import Record, Settings
from refusals import check_names, refused
from test_cli import deltamem

SMALL = Path(__file__).resolve().parent.parent / "pydeltamem" / "models" / "default.gguf"

FOUND = Settings(
    repack=False,
    unpack="none",
    flash_attn=True,
    type_k="f16",
    type_v="f16",
    n_threads=3,
    n_threads_batch=2,
    n_ubatch=64,
)
QUANTISED = replace(FOUND, type_k="q8_0", type_v="q8_0")
RECORD = Record(FOUND, {"counts": "both"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, for this process and those that it starts."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(tuned, "cache_folder", lambda: folder / "deltamem")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "deltamem"


@pytest.fixture
def model(tmp_path):
    """A copy of the small model, whose file may be changed."""
    return Path(shutil.copy(SMALL, tmp_path / "model.gguf"))


@pytest.fixture
def load(model):
    """load(**kwargs): that model with what was found for it, on one thread where nothing was."""
    made = []

    def make(**kwargs):
        made.append(DeltaMemLlama(model, **{"n_ctx": 256, "tuned": True, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


#
# the rule
#

ratios = st.floats(0.2, 5)


@st.composite
def gains(draw):
    low, ratio, high = sorted(draw(st.tuples(ratios, ratios, ratios)))
    return draw(st.sampled_from([SAME, Gain(ratio, low, high)]))


@st.composite
def measurements(draw):
    default = Settings.default()
    return [
        Candidate(replace(default, n_ubatch=i + 1), {PROMPTS: draw(gains()), DECODE: draw(gains())})
        for i in range(draw(st.integers(0, 6)))
    ]


@given(measurements(), st.sampled_from(list(COUNTS.values())))
def test_nothing_that_measured_worse_is_chosen(candidates, counts):
    chosen = choose(candidates, counts)
    good = [
        one
        for one in candidates
        if all(one.gains[kind].ratio >= 1 for kind in counts) and any(one.gains[kind].low > 1 for kind in counts)
    ]
    assert (chosen is None) == (not good)
    if chosen is not None:
        assert chosen in good

        def product(one):
            return math.prod(one.gains[kind].ratio for kind in counts)

        assert product(chosen) == pytest.approx(max(map(product, good)))


def test_what_cannot_be_compared_is_not_chosen():
    nan = Gain(math.nan, math.nan, math.nan)
    assert choose([Candidate(FOUND, {PROMPTS: nan, DECODE: Gain(2, 2, 2)})], COUNTS["both"]) is None


@given(st.lists(st.floats(1, 100), min_size=1, max_size=9, unique=True), st.integers(1, 3), st.data())
def test_halving_finds_the_fastest_on_a_machine_whose_speed_drifts(times, keep, data):
    """Whatever a round shares does not matter; everyone runs equally often beside those that are left."""
    arms = list(range(len(times)))
    n_runs = dict.fromkeys(arms, 0)
    drift = {}

    def times_of(arm):
        factor = drift.setdefault(n_runs[arm], data.draw(st.floats(0.5, 2)))
        n_runs[arm] += 1
        return [times[arm] * factor, times[arm] * factor * 3]

    left, speeds = halve(arms, times_of, 0, keep)
    ranked = sorted(arms, key=times.__getitem__)
    assert sorted(left) == sorted(ranked[:keep])
    assert all(0 < speeds[arm] <= 1.0000001 for arm in arms)
    assert len({n_runs[arm] for arm in left}) == 1
    if len(arms) > keep:
        assert left == ranked[:keep] and speeds[ranked[0]] == pytest.approx(1)


def test_choices_that_llama_cpp_does_not_take_are_not_tried():
    choices = tune.weights_and_attention(Settings.default(), ["q8_0"], [(True, "none"), (False, "none")])
    assert len(choices) == len(set(choices)) == 6
    assert all(choice.flash_attn for choice in choices if choice.type_v == "q8_0")
    assert tune.thread_counts(1) == (1,) and tune.thread_counts(2) == (1, 2) and tune.thread_counts(64)[-1] == 64


def test_what_differs_in_one_kind_only_is_the_default_in_the_other():
    """Found: a thread more for a reply is faster, a smaller micro-batch is not: the thread alone is taken."""
    default = replace(FOUND, repack=True, flash_attn=False, n_threads=1)
    best = replace(default, n_threads=2, n_ubatch=8)
    found = {
        (PROMPTS, relevant(default, PROMPTS)): SAME,
        (DECODE, relevant(default, DECODE)): SAME,
        (PROMPTS, relevant(best, PROMPTS)): Gain(0.9, 0.8, 1.1),
        (DECODE, relevant(best, DECODE)): Gain(1.5, 1.4, 1.6),
    }
    chosen = choose(tune.candidates_of([best], default, found), COUNTS["both"])
    assert chosen.settings == replace(default, n_threads=2)
    assert chosen.gains == {PROMPTS: SAME, DECODE: Gain(1.5, 1.4, 1.6)}


#
# the record
#


def test_record_round_trip(cache, model):
    assert tuned.kept(str(model), -1) is None
    path = tuned.keep(RECORD, str(model), -1)
    assert path.is_relative_to(cache) and [file for file in cache.rglob("*") if file.is_file()] == [path]
    assert tuned.kept(str(model), -1) == RECORD
    other = Record(QUANTISED, {})
    assert tuned.keep(other, str(model), -1) == path
    assert tuned.kept(str(model), -1) == other


def test_the_record_of_a_moved_file(cache, model, tmp_path):
    tuned.keep(RECORD, str(model), 0)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    os.replace(model, folder / model.name)
    assert tuned.kept(str(folder / model.name), 0) == RECORD


def longer(model, monkeypatch):
    status = model.stat()
    with open(model, "ab") as file:
        file.write(b"0")
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))


def newer(model, monkeypatch):
    status = model.stat()
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def gone(model, monkeypatch):
    model.unlink()


def another_library(model, monkeypatch):
    folder = model.parent / "lib"
    shutil.copytree(library.library_folder(), folder, ignore=shutil.ignore_patterns("converter", "include"))
    monkeypatch.setattr(library, "library_folder", lambda: str(folder))
    assert tuned.kept(str(model), 0) == RECORD  # a copy is the same build
    next(folder.glob("*ggml-cpu*")).touch()


def another_version(model, monkeypatch):
    monkeypatch.setattr(tuned, "__version__", "0.0.1")


def another_processor(model, monkeypatch):
    monkeypatch.setattr(tuned, "cpu_name", lambda: "Z80")


def fewer_cpus(model, monkeypatch):
    monkeypatch.setattr(tuned, "usable", lambda: 1000)


@pytest.mark.parametrize(
    "change", [longer, newer, gone, another_library, another_version, another_processor, fewer_cpus]
)
def test_a_stale_record_is_ignored(cache, model, monkeypatch, change):
    tuned.keep(RECORD, str(model), 0)
    assert tuned.kept(str(model), 0) == RECORD
    change(model, monkeypatch)
    assert tuned.kept(str(model), 0) is None


def changed(*path, to):
    """A function that changes a value of a record's JSON; None takes it out."""

    def change(text):
        data = json.loads(text)
        inner = data
        for name in path[:-1]:
            inner = inner[name]
        if to is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return json.dumps(data)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: "\0" + text,
        changed("version", to=1),
        changed("format", to="another"),
        changed("for", "processor", to="Z80"),
        changed("settings", to=None),
        changed("found", to=[1]),
        changed("settings", "repack", to=None),
        changed("settings", "repack", to=1),
        changed("settings", "unpack", to="some"),
        changed("settings", "n_threads", to=True),
        changed("settings", "n_threads", to=0),
        changed("settings", "n_threads_batch", to=100_000),
        changed("settings", "n_ubatch", to=-1),
        changed("settings", "n_ubatch", to=2**31),
        changed("settings", "type_v", to="q99"),
        changed("settings", "colour", to="blue"),
    ],
)
def test_a_damaged_record_is_ignored_and_replaced(cache, model, load, damage):
    path = tuned.keep(RECORD, str(model), 0)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert tuned.kept(str(model), 0) is None
    assert load().tuned == {}
    assert tuned.keep(RECORD, str(model), 0) == path and tuned.kept(str(model), 0) == RECORD


#
# its use
#


def of(llm):
    """The settings that a loaded model has."""
    names = {getattr(library.llama_cpp, f"GGML_TYPE_{name.upper()}"): name for name in ("f16", "q8_0", "q4_0")}
    params = llm.context_params
    return Settings(
        llm.model_params.use_extra_bufts,
        llm.unpack,
        params.flash_attn_type == library.llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        names[params.type_k],
        names[params.type_v],
        library.llama_cpp.llama_n_threads(llm.ctx),
        library.llama_cpp.llama_n_threads_batch(llm.ctx),
        params.n_ubatch,
    )


def n_ctx_batch(settings, n_batch=256):
    """As they are in a context of n_batch tokens, where no micro-batch is longer."""
    return replace(settings, n_ubatch=min(settings.n_ubatch, n_batch))


def test_defaults_without_a_record(cache, load):
    llm = load()
    assert of(llm) == n_ctx_batch(Settings.default()) and llm.tuned == {}


@pytest.mark.parametrize("settings", [FOUND, QUANTISED])
def test_what_was_found_is_used(cache, model, load, settings):
    tuned.keep(Record(settings, {}), str(model), 0)
    llm = load()
    assert of(llm) == settings
    assert llm.tuned.keys() == asdict(settings).keys()
    assert of(load(tuned=False)) == n_ctx_batch(Settings.default())
    reply = llm.create_completion("hello", max_tokens=4, temperature=0)["choices"][0]["text"]
    again = pickle.loads(pickle.dumps(llm))
    try:
        assert of(again) == settings
        assert again.create_completion("hello", max_tokens=4, temperature=0)["choices"][0]["text"] == reply
    finally:
        again.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repack", True),
        ("unpack", "all"),
        ("flash_attn", False),
        ("type_k", library.llama_cpp.GGML_TYPE_F16),
        ("n_threads", 1),
        ("n_threads_batch", 1),
        ("n_ubatch", 32),
    ],
)
def test_keywords_win(cache, model, load, name, value):
    tuned.keep(RECORD, str(model), 0)
    llm = load(**{name: value})
    expected = "f16" if name == "type_k" else value
    assert of(llm) == replace(FOUND, **{name: expected})
    assert name not in llm.tuned


def test_types_that_need_flash_attention_leave_with_it(cache, model, load):
    tuned.keep(Record(QUANTISED, {}), str(model), 0)
    assert of(load(flash_attn=False)) == replace(FOUND, flash_attn=False)


def test_how_long_a_text_to_embed_may_be_does_not_change(cache, model, load):
    tuned.keep(RECORD, str(model), 0)
    assert of(load(embedding=True)) == replace(FOUND, n_ubatch=256)


def test_layers_on_other_machines_were_not_measured(cache, model, monkeypatch):
    tuned.keep(RECORD, str(model), 0)
    asked = []
    monkeypatch.setattr("pydeltamem.llama.connect", asked.append)
    with DeltaMemLlama(model, n_ctx=256, rpc_servers="localhost:1", tuned=True) as llm:
        assert asked == ["localhost:1"] and llm.tuned == {}


def arguments(module, *args):
    parser = Parser()
    module.add_arguments(parser)
    return parser.parse_args(list(map(str, args)))


EXPLICIT = {
    ("-t", "1"): {"n_threads": 1, "n_threads_batch": 1},
    ("-tb", "1"): {"n_threads_batch": 1},
    ("-fa", "off"): {"flash_attn": False},
    ("-ub", "32"): {"n_ubatch": 32},
    ("--repack",): {"repack": True},
    ("--unpack", "rest"): {"unpack": "rest"},
    ("-fa", "on", "-ctk", "q8_0", "-ctv", "q4_0"): {"type_k": "q8_0", "type_v": "q4_0"},
    (): {},
}


@pytest.mark.parametrize("module", [generate, chat])
@pytest.mark.parametrize("options", EXPLICIT)
def test_options_win(cache, model, module, options):
    tuned.keep(RECORD, str(model), -1)
    with model_options.load(arguments(module, "-m", model, "-c", 256, *options)) as llm:
        assert of(llm) == replace(FOUND, **EXPLICIT[options])


@pytest.mark.parametrize("module", [generate, chat])
def test_no_tune(cache, model, module):
    tuned.keep(RECORD, str(model), -1)
    with model_options.load(arguments(module, "-m", model, "-c", 256, "--no-tune")) as llm:
        assert of(llm) == n_ctx_batch(Settings.default()) and llm.tuned == {}
    with model_options.load(arguments(module, "-m", model, "-c", 256, "--no-tune", "--no-repack")) as llm:
        assert of(llm) == n_ctx_batch(replace(Settings.default(), repack=False))


def test_the_server_takes_the_same_options(model):
    options = model_options.running_options(arguments(serve, "-m", model, "-ub", 32, "--no-repack"))
    assert options == {
        "n_batch": 512, "n_ubatch": 32, "n_gpu_layers": -1, "repack": False, "tuned": True, "use_mmap": True,
        "n_threads": None, "n_threads_batch": None, "rpc_servers": None,
    }  # fmt: skip
    assert model_options.running_options(arguments(serve, "-m", model, "--no-tune"))["tuned"] is False


#
# the command
#


@pytest.mark.parametrize(
    ("counts", "more"),
    [("both", ()), ("decode", ("--kv-types", "q8_0")), ("prompts", ("--deltamem", "ADAPTER")), ("decode", ("packed",))],
)
def test_a_small_run(cache, model, counts, more):
    adapter = SMALL.with_name("default-tsw.gguf")
    if more == ("packed",):
        pack(SMALL, adapter, model)
        adapter, more = model, ()
    elif more[:1] != ("--deltamem",):
        adapter = None
    more = [str(adapter) if word == "ADAPTER" else word for word in more]
    result = deltamem("tune", "-m", model, "--seconds", 1, "--for", counts, *more)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    record = tuned.kept(str(model), -1)
    found = record.found
    assert found["counts"] == counts and Settings.of(found["default"]) == Settings.default()
    assert found["deltamem"] == (None if adapter is None else str(adapter))
    measured = {kind: found["tokens_per_second"][kind] for kind in (PROMPTS, DECODE)}
    assert all(one["low"] <= one["ratio"] <= one["high"] and one["tuned"] > 0 for one in measured.values())
    assert all(measured[kind]["ratio"] >= 1 for kind in COUNTS[counts])
    assert record.settings == Settings.default() or any(measured[kind]["low"] > 1 for kind in COUNTS[counts])
    weights = [Settings.of(row["settings"]) for row in found["tried"]["weights"]]
    assert {(choice.repack, choice.unpack) for choice in weights} == set(layouts(model))
    assert {choice.flash_attn for choice in weights} == {False, True}
    assert {choice.type_k for choice in weights} == ({"f16", "q8_0"} if "q8_0" in more else {"f16"})

    path = str(tuned.record_path(tuned.circumstances(str(model), -1)))
    assert "flash attention" in result.stdout and path in result.stdout
    shown = deltamem("tune", "-m", model, "--show")
    assert shown.returncode == 0 and shown.stdout == result.stdout
    with DeltaMemLlama(model, n_ctx=512, tuned=True) as llm:
        assert of(llm) == record.settings


def test_refusals(cache, model, tmp_path):
    refused(deltamem("tune", "-m", tmp_path / "no.gguf"), tmp_path / "no.gguf")
    refused(deltamem("tune", "-m", model, "--deltamem", tmp_path / "no.gguf"), tmp_path / "no.gguf")
    refused(deltamem("tune", "-m", model, "--kv-types", "q8_0,q99"), "--kv-types", "q99")
    refused(deltamem("tune", "-m", model, "--show"), model)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:5000])
    refused(deltamem("tune", "-m", damaged, "--seconds", 1), damaged)
    wrong = deltamem("tune", "-m", model, "--deltamem", model, "--seconds", 1)
    refused(wrong, model)
    for usage in (["--for", "speed"], ["--seconds", "0"], ["--seconds", "soon"], []):
        assert deltamem("tune", *(["-m", model] if usage else []), *usage).returncode == 2
    assert not cache.exists()


def test_what_cannot_be_kept_is_not_measured(cache, model, monkeypatch, capsys):
    def measure(*args, **kwargs):
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(tune, "run", measure)
    cache.mkdir(parents=True)
    (cache / "tuned").write_bytes(b"")
    assert main(["tune", "-m", str(model)]) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [cache / "tuned"])


def test_a_record_that_cannot_be_shown_or_written(cache, model):
    path = tuned.keep(RECORD, str(model), -1)  # its `found` says nothing
    refused(deltamem("tune", "-m", model, "--show"), path)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_bytes(b"")
    refused(deltamem("tune", "-m", model, "--seconds", 1), path.parent)
