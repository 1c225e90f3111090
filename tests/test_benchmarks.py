"""deltamem eval: what is asked, resumed runs, and shards."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest

from asked import ASKED, FILES, GPQA, TALK, locomo
from pydeltamem import DeltaMemLlama
from pydeltamem.cli.main import main
from pydeltamem.errors import InputError
from pydeltamem.evals import views
from pydeltamem.evals.asker import Ask, Asker, Shared
from pydeltamem.evals.benchmarks import BENCHMARKS
from pydeltamem.evals.items import Context, Item, Piece, digest_of_file, digest_of_model, items_of
from pydeltamem.evals.results import results_of
from pydeltamem.evals.run import Prompts, methods_of, units_of
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.packed import pack
from pydeltamem.models import default_files
from pydeltamem.version import __version__
from refusals import check_names, refuses

#
# asking
#


@pytest.fixture(scope="module")
def asker():
    model, adapters = default_files()
    made = Asker(model, threads=1, parallel=4)
    made.attach(adapters["msw"])
    yield made
    made.close()


OPTIONS = {"n_predict": 12, "temp": 0.0}
TEXT = " ".join(TALK) + "\n\n"


@pytest.fixture(scope="module")
def memory(asker):
    """What the text leaves in the memory of msw."""
    read = asker._read(Shared(TEXT, True))
    copy = read.memory.copy()
    read.close()
    return copy


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_questions_that_share_a_text_are_answered_as_alone(asker, dropped, writes):
    """The shared text is decoded once, and no question meets another."""
    shared = Shared(TEXT, dropped, writes)
    asked = [Ask(shared, question, OPTIONS) for question in ASKED[:3]]
    together = asker.answer(asked)
    before = asker.llm._engine.slots.n_decodes
    assert asker.answer(asked[::-1]) == together[::-1]
    again = asker.llm._engine.slots.n_decodes - before
    asker.forget()
    assert [asker.answer([ask])[0] for ask in asked] == together
    assert again <= 12 + 2  # the questions and their answers; not the text


def test_protocols(asker):
    """In both the memory has read the text; in `memory` nothing of it is left in the text of a question."""
    llm = asker.llm
    kept, dropped = asker._read(Shared(TEXT, False)), asker._read(Shared(TEXT, True, False))
    try:
        assert kept.memory.state.any() and (kept.memory.state == dropped.memory.state).all()
        assert kept.n_tokens - dropped.n_tokens > 20
        assert "Oslo" not in llm.detokenize(dropped.tokens, special=True).decode()
        assert kept.memory.write and not dropped.memory.write
        state = dropped.memory.state
        dropped.say("Where do I live?", **OPTIONS)
        assert (dropped.memory.state == state).all()
        kept.say("Where do I live?", **OPTIONS)
        assert (kept.memory.state != state).any()
    finally:
        kept.close()
        dropped.close()


def test_a_context_is_decoded_for_each_question_if_wanted(asker):
    model, adapters = default_files()
    other = Asker(model, threads=1, parallel=4, shares=False)
    other.attach(adapters["msw"])
    try:
        asker.forget()
        asked = [Ask(Shared(TEXT, True), question, OPTIONS) for question in ASKED[:3]]
        said, n_decodes = [], []
        for each in (asker, other):
            slots = each.llm._engine.slots
            before = slots.n_decodes
            said.append(each.answer(asked))
            n_decodes.append(slots.n_decodes - before)
        assert said[0] == said[1] and n_decodes[0] + 2 == n_decodes[1]  # the text, twice more
    finally:
        other.close()


def test_the_temperature_of_locomo_comes_first():
    """As in transformers: top-p looks at the cooled distribution, and what is outside of it is never said."""
    sampling = BENCHMARKS["locomo"].sampling
    with DeltaMemLlama(default_files()[0], n_ctx=256, n_threads=1) as llm:
        tokens = llm.tokenize(b"My name is")
        llm.eval(tokens)
        likely = np.sort(llm.logits.astype(np.float64))[::-1][:10]
        said = set()
        for i in range(300):
            options = sampling(i, 42)
            answer = llm.create_completion(tokens, max_tokens=1, temperature=options.pop("temp"), **options)
            said.add(answer["choices"][0]["text"])

    def n_kept(temperature):
        shares = np.exp((likely - likely[0]) / temperature)
        return 1 + int(np.searchsorted(np.cumsum(shares) / shares.sum(), 0.9))

    assert n_kept(0.4) < n_kept(1.0) and len(said) == n_kept(0.4)


def test_more_questions_than_slots(asker):
    """Where an answer ends, the next question begins: not when the longest of as many as fit has ended."""
    lengths = [40, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    asked = [Ask(Shared(), f"{ASKED[0]} ({n})", {**OPTIONS, "n_predict": length}) for n, length in enumerate(lengths)]
    slots = asker.llm._engine.slots
    before = slots.n_decodes
    together = asker.answer(asked)
    n_decodes = slots.n_decodes - before
    assert together == [asker.answer([ask])[0] for ask in asked]
    first = asker.llm._engine.slots.n_decodes
    asker.answer(asked[:1])
    assert n_decodes <= slots.n_decodes - first + 3  # about as many as the longest alone


def test_what_is_asked_together():
    """As many as fit, about four times as many where a question has nothing before it; never two contexts."""
    talks = [Context((Piece("Ann: I keep bees.", "[1 May]"),), f"talk {i}") for i in range(2)]
    items = [Item(f"{i}", "k", "q", ("a",), i, talks[i % 2]) for i in range(10)]
    alone = [Item(f"{i}", "k", "q", ("a",), i, None) for i in range(40)]
    none, backbone = methods_of({}, (), {}, False, ["none", "backbone"], True)
    sizes = {method.name: [len(unit.items) for unit in units_of(items, [method], 4)] for method in (none, backbone)}
    assert sizes == {"none": [10], "backbone": [3, 2, 3, 2]}
    for n, units in (40, [20, 20]), (34, [17, 17]), (17, [17]), (3, [3]), (0, []):
        assert [len(unit.items) for unit in units_of(alone[:n], [backbone], 4)] == units


def test_a_text_that_is_read_twice(asker):
    once, twice = (asker._read(Shared(TEXT, True, is_rehearsed=again)) for again in (False, True))
    try:
        assert (once.memory.state != twice.memory.state).any() and once.n_tokens == twice.n_tokens
        assert twice.memory.n_written > 1.9 * once.memory.n_written
    finally:
        once.close()
        twice.close()


def test_a_memory_to_begin_with(asker, memory):
    """Each text begins with a copy of it, and what one question writes does not reach the next."""
    model, adapters = default_files()
    full = Asker(model, threads=1, parallel=4, memory=memory)
    try:
        full.attach(adapters["msw"])
        asked = Ask(Shared(), ASKED[0], OPTIONS)
        first = full.answer([asked])
        assert first == full.answer([asked]) == asker.answer([Ask(Shared(TEXT, True), ASKED[0], OPTIONS)])
        begun = full._read(Shared())
        assert (begun.memory.state == memory.state).all() and begun.n_tokens == 0
        begun.close()
        full.attach(None)  # the plain model has nothing to begin with
        assert full.answer([asked]) != first
    finally:
        full.close()


def test_one_prompt_is_one_message(asker):
    """Shared text and question are read as one user message, as if they had been asked at once."""
    conversation = asker._read(Shared(TEXT))
    try:
        conversation.say(TEXT + ASKED[0], n_predict=0)
        assert conversation.tokens == asker._prompt(TEXT + ASKED[0])
    finally:
        conversation.close()


#
# runs
#

RUN = ["-t", "1", "--parallel", "4", "--methods", "none,backbone,bm25,msw/context,msw/memory,ssw/memory+last"]


def command(path, folder, *options):
    return ["eval", "locomo", "--data", str(path), "-o", str(folder), *RUN, *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all questions: the file of questions, and the folder of answers."""
    folder = tmp_path_factory.mktemp("whole")
    path = locomo(folder)
    assert main(command(path, folder / "out")) == 0
    return path, folder / "out"


def lines(folder):
    return [json.loads(line) for line in (folder / "locomo.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_prompt_answer_and_score_is_on_disk(whole):
    setup, *records = lines(whole[1])
    assert setup["setup"]["model"] == "default.gguf" and setup["setup"]["seed"] == 42
    texts = {record["context"]: record["text"] for record in records if "text" in record}
    answers = [record for record in records if "answer" in record]
    methods = RUN[-1].split(",")
    assert len(answers) == 10 * len(methods)
    assert {record["method"] for record in answers} == set(methods)
    for record in answers:
        shown = texts.get(record["context"], "")
        assert ("Anna: I live in" in shown) == (record["method"] not in ("none",)) or record["method"] == "bm25"
        assert record["is_dropped"] == ("/memory" in record["method"])
        assert record["scores"].keys() == {"f1"}
        if record["method"] == "ssw/memory+last":
            assert "Goodbye." in record["question"]


def test_only_a_memory_without_the_text_reads_twice(whole, tmp_path):
    path, folder = whole
    assert main([*command(path, tmp_path), "--rehearse"]) == 0
    setup, *twice = lines(tmp_path)
    assert setup["setup"]["rehearse"] is True
    pairs = [(a, b) for a, b in zip(lines(folder)[1:], twice, strict=True) if "answer" in a]
    assert {a["method"] for a, b in pairs if a["answer"] != b["answer"]} <= {"msw/memory", "ssw/memory+last"}
    assert any(a["answer"] != b["answer"] for a, b in pairs)
    assert main(command(path, tmp_path)) == 1  # another run is there


def test_only_methods_with_a_memory_begin_with_one(whole, tmp_path, memory):
    path, _ = whole
    file = tmp_path / "full.memory"
    memory.save(file)
    _, adapters = default_files()
    only = ["--methods", "none,msw/context", "--limit", "4", "--adapters", f"msw={adapters['msw']}"]
    for name, more in ("empty", []), ("full", ["--load-memory", str(file)]):
        run = [*command(path, tmp_path / name), *only, *more]
        assert main(run) == 0
        assert main(run) == 0  # it is the same run
    empty, full = ([record for record in lines(tmp_path / name) if "answer" in record] for name in ("empty", "full"))
    assert {a["method"] for a, b in zip(empty, full, strict=True) if a["answer"] != b["answer"]} == {"msw/context"}
    setup = lines(tmp_path / "full")[0]["setup"]
    assert setup["load_memory"] == "full.memory" and len(setup["sha256"]["load_memory"]) == 64
    assert lines(tmp_path / "empty")[0]["setup"]["load_memory"] is None
    with pytest.raises(InputError):  # one table does not hold both
        results_of([tmp_path / "empty", tmp_path / "full"])


def test_a_memory_of_another_adapter_is_refused_at_once(whole, tmp_path, memory, capsys):
    path, _ = whole
    file = tmp_path / "full.memory"
    memory.save(file)
    model, adapters = default_files()
    for wrong in ["--adapters", f"ssw={adapters['ssw']}"], []:
        run = ["eval", "locomo", "--data", str(path), "-o", str(tmp_path / "out"), "-m", str(model), *wrong]
        assert main([*run, "--load-memory", str(file)]) == 1
        check_names(capsys.readouterr().err.rstrip(), [file, "ssw"] if wrong else ["--load-memory"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77, 0.999])
def test_a_run_goes_on_where_it_stopped(whole, tmp_path, share):
    """Cut anywhere, also within a line: it ends with the same bytes."""
    path, folder = whole
    data = (folder / "locomo.jsonl").read_bytes()
    (tmp_path / "locomo.jsonl").write_bytes(data[: int(share * len(data))])
    assert main(command(path, tmp_path)) == 0
    assert (tmp_path / "locomo.jsonl").read_bytes() == data


def started(path, folder):
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pydeltamem.cli.main", *command(path, folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_killed_run_ends_with_the_same_file(whole, tmp_path):
    """SIGKILL after a random number of bytes, four times."""
    path, folder = whole
    data, file, draw = (folder / "locomo.jsonl").read_bytes(), tmp_path / "locomo.jsonl", random.Random(3)
    for _ in range(4):
        size = file.stat().st_size if file.exists() else 0
        until = size + draw.randrange(1, len(data) // 5)
        run = started(path, tmp_path)
        while run.poll() is None and (not file.exists() or file.stat().st_size < until):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert main(command(path, tmp_path)) == 0
    assert file.read_bytes() == data


def test_one_run_at_a_time_writes_a_file(whole, tmp_path, capsys):
    """The second one is refused until the first has ended, by SIGKILL too; another part of the questions is not."""
    path, folder = whole
    file = tmp_path / "locomo.jsonl"
    run = started(path, tmp_path)
    try:
        while run.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 3):
            time.sleep(0.002)
        run.send_signal(signal.SIGSTOP)
        held = file.read_bytes()
        assert main(command(path, tmp_path)) == 1
        check_names(capsys.readouterr().err.strip(), [file, "--output"])
        assert file.read_bytes() == held
        assert main([*command(path, tmp_path, "--shard", "1/2"), "--methods", "none"]) == 0
    finally:
        run.kill()
        assert run.wait() == -signal.SIGKILL
    assert main(command(path, tmp_path)) == 0
    assert file.read_bytes() == (folder / "locomo.jsonl").read_bytes()


def test_a_file_that_is_removed_while_it_is_written(whole, tmp_path, capsys, monkeypatch):
    path, _ = whole
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (tmp_path / "locomo.jsonl").unlink(missing_ok=True) or sync(file))
    assert main(command(path, tmp_path)) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "locomo.jsonl"])


def lora(path):
    """A LoRA adapter for the package's model with random weights."""
    header, rng = Header(default_files()[0]), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, header.keys["general.architecture"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    n_out, n_in = header.read("blk.0.attn_output.weight").shape
    for what, shape in (("a", (4, n_in)), ("b", (n_out, 4))):
        tensor = 0.3 * rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"blk.0.attn_output.weight.lora_{what}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_summaries_and_lora(tmp_path):
    """Summaries are the plain model's, with a memory and without; the LoRA adapter changes the backbone's answers; all
    of it goes on after a stop.
    """
    methods = "backbone,summary,msw/memory+summary,lora"
    path = locomo(tmp_path)
    arguments = [*command(path, tmp_path / "a"), "--methods", methods, "--lora", str(lora(tmp_path / "lora.gguf"))]
    arguments += ["--window", "24"]
    assert main(arguments) == 0
    file = tmp_path / "a" / "locomo.jsonl"
    data, (_, *records) = file.read_bytes(), lines(tmp_path / "a")
    texts = {record["context"]: record["text"] for record in records if "text" in record}
    answers = {(record["method"], record["id"]): record for record in records if "answer" in record}
    for (method, id), record in answers.items():
        if method == "msw/memory+summary":
            summary = texts[answers["summary", id]["context"]].partition(chr(10) * 2)[2].strip()
            assert summary and summary in record["question"]
        if method == "lora":
            assert record["context"] == answers["backbone", id]["context"]
    assert any(r["answer"] != answers["backbone", id]["answer"] for (m, id), r in answers.items() if m == "lora")
    for share in (0.4, 0.8):
        file.write_bytes(data[: int(share * len(data))])
        assert main(arguments) == 0
        assert file.read_bytes() == data


def test_a_summary_in_a_small_context(tmp_path, capsys):
    """Parts of the text are as long as fit; what cannot fit is named."""
    record = json.loads(locomo(tmp_path, 1).read_text())
    said = [{"speaker": "Anna", "text": f"{text} My number is {i}."} for i in range(12) for text in TALK]
    record[0]["conversation"]["session_1"] = said
    path = tmp_path / "long.json"
    path.write_text(json.dumps(record))
    arguments = [*command(path, tmp_path / "a"), "--methods", "summary", "--limit", "1", "-c", "768"]
    assert main([*arguments, "--window", "32"]) == 0
    assert main([*arguments, "-o", str(tmp_path / "b"), "--window", "400"]) == 1
    check_names(capsys.readouterr().err.strip().splitlines()[-1], ["-c", 768, "--window", 400])


def test_a_file_of_another_run_stays(whole, capsys):
    path, folder = whole
    before = (folder / "locomo.jsonl").read_bytes()
    assert main(command(path, folder, "--window", "77")) == 1
    check_names(capsys.readouterr().err.strip(), [folder / "locomo.jsonl", 77, 512])
    assert (folder / "locomo.jsonl").read_bytes() == before


def test_what_stands_after_a_complete_run_goes(whole, tmp_path):
    path, folder = whole
    data = (folder / "locomo.jsonl").read_bytes()
    (tmp_path / "locomo.jsonl").write_bytes(data + data.splitlines(keepends=True)[-1])
    assert main(command(path, tmp_path)) == 0
    assert (tmp_path / "locomo.jsonl").read_bytes() == data


def test_a_file_that_is_none_or_cannot_be_written(whole, tmp_path, capsys, monkeypatch):
    path, _ = whole
    file = tmp_path / "locomo.jsonl"
    for text in ("no answers\n", "[]\n", "[" * 100_000 + "\n"):
        file.write_text(text)
        assert main(command(path, tmp_path)) == 1
        check_names(capsys.readouterr().err.strip(), [file, "--output"])
        assert file.read_text() == text
    assert main(command(path, file)) == 1
    check_names(capsys.readouterr().err.strip(), [file / "locomo.jsonl"])

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(command(path, tmp_path / "new")) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "new" / "locomo.jsonl"])


def test_an_unfinished_first_line(whole, tmp_path, capsys):
    """The beginning of the run's own setup is gone on with; anything else stays, the questions themselves, too."""
    path, folder = whole
    data, file = (folder / "locomo.jsonl").read_bytes(), tmp_path / "locomo.jsonl"
    for text in (b'{"my": "notes"}', b"one line\rand another", data.partition(b"\n")[0] + b"x"):
        file.write_bytes(text)
        assert main(command(path, tmp_path)) == 1
        check_names(capsys.readouterr().err.strip(), [file, "--output"])
        assert file.read_bytes() == text
    questions = tmp_path / "qa.jsonl"
    questions.write_text(FILES["qa"][1])  # which ends without a line feed
    assert main(["eval", "qa", "--data", str(questions), "-o", str(tmp_path), "-t", "1"]) == 1
    check_names(capsys.readouterr().err.strip(), [questions, "--output"])
    assert questions.read_text() == FILES["qa"][1]
    for n in (0, 20):
        file.write_bytes(data[:n])
        assert main(command(path, tmp_path)) == 0
        assert file.read_bytes() == data


def test_some_kinds_and_a_model_without_adapters(tmp_path):
    model = default_files()[0]
    options = ["--kinds", "temporal,open", "-m", str(model), "-t", "1"]
    assert main(["eval", "locomo", "--data", str(locomo(tmp_path)), "-o", str(tmp_path), *options]) == 0
    answers = [record for record in lines(tmp_path) if "answer" in record]
    assert {record["kind"] for record in answers} == {"temporal", "open"}
    assert {record["method"] for record in answers} == {"none", "backbone", "last", "bm25"}


@pytest.mark.parametrize("more", [lambda n: 0, lambda n: n * n // 400], ids=["by pieces", "by length"])
def test_a_text_that_is_longer_than_its_pieces(more):
    """What is shown fits even where pieces have more tokens together than one by one."""

    class Count:
        n_ctx = 600

        def n_prompt(self, text):
            return self.count(text)

        def count(self, text):
            n = len(text.split())
            return n + 4 * text.count("\n") + more(n)

    pieces = tuple(Piece(f"{i} is here.\n") for i in range(300))
    item = Item("a", "", "Which?", ("1",), 0, Context(pieces))
    prompts = Prompts(BENCHMARKS["hotpotqa"], [item], Count(), 100, 1)
    shown = prompts.shown(item, views.FULL)
    assert shown and Count().count(shown) <= prompts.room


def test_a_report_joins_shards(whole, tmp_path, capsys):
    path, _ = whole
    for i in (1, 2):
        assert main(command(path, tmp_path / str(i), "--shard", f"{i}/2")) == 0
    capsys.readouterr()
    out = tmp_path / "report.json"
    folders = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["eval", "report", *folders, "--json", str(out), "--plot", str(tmp_path / "p.png")]) == 0
    table = capsys.readouterr().out
    assert all(f"| {method} | 10 |" in table for method in RUN[-1].split(","))
    found = json.loads(out.read_text())
    rows = [row for row in found["rows"] if not row["kind"]]
    assert {row["n"] for row in rows} == {10} and {row["method"] for row in rows} == set(RUN[-1].split(","))
    assert all(row["mean"]["low"] <= row["mean"]["value"] <= row["mean"]["high"] for row in rows)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert not [note for note in found["notes"] if "--shard" in note]
    assert main(["eval", "report", folders[1], "--json", str(out)]) == 0  # which tells of the other part
    (note,) = [note for note in json.loads(out.read_text())["notes"] if "--shard" in note]
    check_names(note, ["locomo", 2])


@pytest.mark.parametrize("part", [["--shard", "1/2"], ["--kinds", "single-hop"], ["--limit", "3"]])
def test_a_part_of_the_questions_is_asked_as_in_the_whole(tmp_path, part):
    """A long question elsewhere leaves less room for every context."""
    path = locomo(tmp_path)
    records = json.loads(path.read_text())
    records[1]["qa"][4] = {"question": " ".join(ASKED * 3), "answer": "no", "category": 1}
    path.write_text(json.dumps(records))
    run = ["eval", "locomo", "--data", str(path), "-t", "1", "-c", "256", "--methods", "backbone"]
    shown = []
    for folder, options in ((tmp_path / "whole", []), (tmp_path / "part", part)):
        assert main([*run, "-o", str(folder), *options]) == 0
        file = next(folder.glob("*.jsonl"))
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        shown.append({record["id"]: record["context"] for record in records if "answer" in record})
    whole, some = shown
    assert some.items() <= whole.items() and len(some) < len(whole)


def test_all_parts_of_a_model_tell_it_from_another(tmp_path):
    model, adapters = default_files()
    files = pack(model, adapters["msw"], tmp_path / "model.gguf", max_tensors=30)
    before = digest_of_model(files[0])
    assert len(files) > 1 and before == digest_of_model(files[0])
    with open(files[-1], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert digest_of_model(files[0]) != before
    assert digest_of_model(model) == digest_of_file(model)


@pytest.mark.parametrize("name", ["processor", "gpu_layers"])
def test_a_run_does_not_go_on_on_another_processor(whole, tmp_path, capsys, name):
    path, folder = whole
    first, rest = (folder / "locomo.jsonl").read_text(encoding="utf-8").split("\n", 1)
    setup = json.loads(first)["setup"]
    for value, status in (("another", 1), (None, 0)):  # None: begun before it was recorded
        changed = {**setup, name: value} if value else {key: setup[key] for key in setup if key != name}
        (tmp_path / "locomo.jsonl").write_text(f"{json.dumps({'setup': changed})}\n{rest}", encoding="utf-8")
        assert main(command(path, tmp_path)) == status
        if status:
            check_names(capsys.readouterr().err.strip(), [tmp_path / "locomo.jsonl", name, "another"])


def test_a_report_of_a_run_that_was_killed(whole, tmp_path):
    """Of what is whole; and it says how much that is."""
    data, path = (whole[1] / "locomo.jsonl").read_bytes(), tmp_path / "locomo.jsonl"
    path.write_bytes(data[: int(0.77 * len(data))])
    records = [json.loads(line) for line in path.read_bytes().splitlines()[:-1]]
    found = results_of([path])
    n = sum("answer" in record for record in records)
    assert sum(row.n for row in found.rows if not row.kind) == n < 60
    check_names(found.notes[0], [path, n, 60])


def test_answers_that_lack_their_method_are_asked_again(whole, tmp_path):
    path, folder = whole
    data, file = (folder / "locomo.jsonl").read_bytes(), tmp_path / "locomo.jsonl"
    file.write_bytes(data.replace(b'"method": "bm25"', b'"other": "bm25"'))
    assert main(command(path, tmp_path)) == 0
    assert file.read_bytes() == data


def test_a_run_does_not_go_on_with_other_files(whole, tmp_path, capsys):
    """Of the same name: another adapter, or other questions, though as many."""
    path, adapter = whole[0], tmp_path / "a.gguf"
    options = ["--adapters", f"a={adapter}", "--methods", "none,a/memory"]
    shutil.copy(default_files()[1]["msw"], adapter)
    assert main(command(path, tmp_path, *options)) == 0
    data = (tmp_path / "locomo.jsonl").read_bytes()
    capsys.readouterr()
    shutil.copy(default_files()[1]["tsw"], adapter)
    assert main(command(path, tmp_path, *options)) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "locomo.jsonl", "sha256"])
    shutil.copy(default_files()[1]["msw"], adapter)
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    other.write_text(path.read_text().replace("Rex", "Max"))
    assert main(command(other, tmp_path, *options)) == 1
    assert (tmp_path / "locomo.jsonl").read_bytes() == data


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_a_run_of_another_version_stays(whole, tmp_path, capsys, version):
    """Its prompts or sampling may have been others."""
    path, folder = whole
    first, rest = (folder / "locomo.jsonl").read_text(encoding="utf-8").split("\n", 1)
    setup = json.loads(first)["setup"]
    assert setup.pop("version") == __version__
    begun = json.dumps({"setup": setup if version is None else {"version": version, **setup}}) + "\n" + rest[:5000]
    (tmp_path / "locomo.jsonl").write_text(begun, encoding="utf-8")
    assert main(command(path, tmp_path)) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "locomo.jsonl", "version", "--output"])
    assert (tmp_path / "locomo.jsonl").read_text(encoding="utf-8") == begun


def test_a_large_file_that_is_no_text_is_not_quoted(tmp_path):
    (tmp_path / "locomo10.json").write_bytes(b"\xff" * 100_000)
    for read in (lambda: results_of([tmp_path / "locomo10.json"]), lambda: items_of(BENCHMARKS["locomo"], tmp_path)):
        with refuses(InputError, tmp_path / "locomo10.json") as info:
            read()
        assert len(str(info.value)) < 1000


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (("--methods", "magic"), 1, ["magic"]),
        (("--protocol", "magic"), 1, ["magic"]),
        (("--shard", "3/2"), 2, ["--shard", "3/2"]),
        (("--shard", "3/3"), 1, ["--shard"]),
        (("--kinds", "magic"), 1, ["magic", "temporal"]),
        (("--adapters", "a/b=x"), 1, ["--adapters"]),
        (("--lora", "nothing.gguf"), 1, ["nothing.gguf"]),
    ],
)
def test_bad_options_are_named(in_process, tmp_path, options, code, names):
    result = in_process("eval", "locomo", "--data", locomo(tmp_path), "-o", tmp_path / "out", "-t", "1", *options)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    check_names(result.stderr.splitlines()[-1], names)


def test_what_does_not_fit_is_named(tmp_path, capsys):
    """An answer of IFEval is longer than the context of the package's model."""
    (tmp_path / "x.jsonl").write_text(FILES["ifeval"][0] + "\n")
    assert main(["eval", "ifeval", "--data", str(tmp_path / "x.jsonl"), "-o", str(tmp_path), "-t", "1"]) == 1
    check_names(capsys.readouterr().err.strip(), ["-c", 1024, 1500])


def test_a_run_that_failed_before_its_first_answer(tmp_path, capsys):
    """The same folder takes the run with other options. A context holds a multiple of 256 tokens."""
    path = locomo(tmp_path)
    path.write_text(path.read_text().replace(ASKED[0], ASKED[0] * 100))
    arguments = command(path, tmp_path, "--methods", "none", "--limit", "1")
    assert main([*arguments, "-c", "100"]) == 1
    check_names(capsys.readouterr().err.strip(), ["-c", 256])
    assert main([*arguments, "-c", "1000"]) == 0
    setup, *records = lines(tmp_path)
    assert setup["setup"]["n_ctx"] == 1024 and len(records) == 1


def test_a_model_without_a_chat_template(tmp_path, capsys):
    """It is refused: llama_cpp would ask in Llama 2's form, whatever the model was trained on."""
    data, key = default_files()[0].read_bytes(), b"tokenizer.chat_template"
    assert data.count(key) == 1
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(data.replace(key, key[:-1] + b"x"))
    options = ["-m", str(bare), "--methods", "none", "-t", "1", "-c", "256"]
    assert main(["eval", "locomo", "--data", str(locomo(tmp_path)), "-o", str(tmp_path), *options]) == 1
    check_names(capsys.readouterr().err.strip(), [bare])
    assert main(["eval", "recall", "-n", "1", "--tasks", "natural", *options]) == 1
    check_names(capsys.readouterr().err.strip(), [bare])


def test_a_benchmark_without_contexts_asks_once(tmp_path, capsys):
    path = tmp_path / "gpqa.csv"
    path.write_text(GPQA)
    assert main(["eval", "gpqa", "--data", str(path), "-o", str(tmp_path), "-t", "1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "gpqa.jsonl").read_text().splitlines()]
    asked = [record["method"] for record in records if "answer" in record]
    assert asked == ["backbone", "tsw/context", "ssw/context", "msw/context"]
    assert os.path.basename(records[0]["setup"]["data"]) == "gpqa.csv"
    options = ["eval", "gpqa", "--data", str(path), "-o", str(tmp_path / "none"), "-t", "1", "--methods", "none,last"]
    assert main(options) == 1
    check_names(capsys.readouterr().err.strip().splitlines()[-1], ["--methods"])
