"""deltamem eval: what is read from the files, what is asked, resumed runs, shards and the report."""

from __future__ import annotations

import gzip
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

from pydeltamem import DeltaMemLlama
from pydeltamem.cli.main import main
from pydeltamem.errors import InputError
from pydeltamem.evals import views
from pydeltamem.evals.asker import Ask, Asker, Shared
from pydeltamem.evals.benchmarks import BENCHMARKS
from pydeltamem.evals.items import Context, Item, Piece, chosen, items_of
from pydeltamem.evals.results import results_of
from pydeltamem.evals.run import Prompts, methods_of, units_of
from pydeltamem.formats.gguf_header import Header
from pydeltamem.models import default_files
from pydeltamem.runtime.stream import TextStream
from pydeltamem.version import __version__
from refusals import check_names, refuses

TALK = ("My name is Anna.", "I live in Oslo.", "My dog is called Rex.", "I work as a baker.", "I play the piano.")
ASKED = (
    "Where does she live?",
    "What is her name?",
    "What is the dog called?",
    "What is her job?",
    "What does she play?",
)


def locomo(folder, n=2):
    """A file of LoCoMo with n conversations of two sessions."""
    record = {
        "conversation": {
            "speaker_a": "Anna", "speaker_b": "Ben",
            "session_1_date_time": "1:56 pm on 8 May, 2023", "session_10_date_time": "9 June, 2023",
            "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "Goodbye."}],
            "session_1": [{"speaker": "Anna", "dia_id": f"D1:{i}", "text": text} for i, text in enumerate(TALK)],
        },
        "qa": [{"question": q, "answer": "Oslo", "category": 1 + i % 4} for i, q in enumerate(ASKED)]
        + [{"question": "Why?", "adversarial_answer": "x", "category": 5}],
    }  # fmt: skip
    records = []
    for i in range(n):
        other = json.loads(json.dumps(record).replace("Oslo", ("Oslo", "Lima", "Rome")[i % 3]))
        records.append({"sample_id": f"conv-{i}", **other})
    path = folder / "locomo10.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


#
# files
#


def test_locomo_has_four_categories_and_dates(tmp_path):
    items = items_of(BENCHMARKS["locomo"][0], str(locomo(tmp_path)))
    assert [item.kind for item in items[:5]] == ["multi-hop", "temporal", "open", "single-hop", "multi-hop"]
    assert len(items) == 10 and len({item.id for item in items}) == 10 and len({id(i.context) for i in items}) == 2
    shown = items[0].context.shown()
    assert shown.index("[1:56 pm on 8 May, 2023]") < shown.index("Oslo") < shown.index("[9 June, 2023]")
    assert shown.count("8 May") == 1
    assert "date" in items[1].question.lower() and "date" not in items[0].question.lower()


HOTPOT = {"_id": "a", "type": "bridge", "question": "Who?", "answer": "Ada", "context": [["T", ["One.", " Two."]]]}
SQUAD = {"data": [{"paragraphs": [{"context": "A. B.", "qas": [{"question": "Q?", "answers": [{"text": "A"}]}]}]}]}
GPQA = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\nWhy?,1,2,3,4\n"
FILES = {
    "hotpotqa": [
        json.dumps([HOTPOT]),
        json.dumps({**HOTPOT, "id": "a", "context": {"title": ["T"], "sentences": [["One.", " Two."]]}}),
    ],
    "qa": [json.dumps(SQUAD), json.dumps({"context": "A. B.", "qa": [["Q?", ["A"]]]})],
    "memory-agent-bench": [json.dumps({"context": "0. A.\n1. B.", "questions": ["Q?"], "answers": [["A"]]})],
    "ifeval": [json.dumps({"key": 1, "prompt": "P", "instruction_id_list": [], "kwargs": []})],
    "gpqa": [GPQA],
}


@pytest.mark.parametrize("name", FILES)
def test_published_formats(name, tmp_path):
    """Every form that a file is published in gives the same questions; packed files do, too."""
    found = []
    for i, text in enumerate(FILES[name]):
        path = tmp_path / f"{i}.{'csv' if name == 'gpqa' else 'jsonl.gz'}"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        found.append(items_of(BENCHMARKS[name][0], str(path)))
    assert all(len(items) == 1 for items in found)
    assert all(items[0].question == found[0][0].question for items in found)
    assert all(items[0].context == found[0][0].context and items[0].answers == found[0][0].answers for items in found)
    if name == "gpqa":
        (item,) = found[0]
        assert f"({item.answers[0]}) 1" in item.question


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_and_damaged_files_are_named(name, tmp_path, monkeypatch):
    benchmark = BENCHMARKS[name][0]
    monkeypatch.delenv("DELTAMEM_DATA", raising=False)
    with pytest.raises(InputError) as error:
        items_of(benchmark, None)
    check_names(str(error.value), ["--data", benchmark.source])
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    for path in (tmp_path / "none.jsonl", tmp_path / "x.jsonl"):
        with pytest.raises(InputError) as error:
            items_of(benchmark, str(path))
        check_names(str(error.value), [path, benchmark.source])


PACKED = gzip.compress(json.dumps([HOTPOT] * 20).encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.json", b"[]"),
        ("cut.json", gzip.compress(b"[]" * 500, mtime=0)[:-9]),
        ("damaged.json", PACKED[:40] + b"\0\xff\0\xff" + PACKED[44:]),
        ("binary.json", b"\xff\xfe"),
        ("deep.json", b"[" * 100_000),
        ("long.csv", b'id,question\n1,"' + b"x" * 200_000 + b'"\n'),
        ("binary.parquet", b"PAR1" + b"\xff" * 100 + b"\x10\0\0\0PAR1"),
        ("unanswered.json", json.dumps([{**HOTPOT, "answer": None}]).encode()),
        ("twice.json", json.dumps([HOTPOT, {**HOTPOT, "question": "Where?"}]).encode()),
    ],
)
def test_files_that_hold_no_question_or_cannot_be_read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        items_of(BENCHMARKS["hotpotqa"][0], str(path))
    check_names(str(error.value), [path])
    assert str(error.value).count(path.name) == 1


def test_a_mark_of_utf_8_is_no_text(tmp_path):
    """As spreadsheets write it."""
    (tmp_path / "gpqa.csv").write_text(GPQA, encoding="utf-8-sig")
    assert len(items_of(BENCHMARKS["gpqa"][0], str(tmp_path / "gpqa.csv"))) == 1


def test_the_folder_of_the_data(tmp_path, monkeypatch):
    """By --data or DELTAMEM_DATA: each benchmark knows its file in it."""
    path = locomo(tmp_path)
    benchmark = BENCHMARKS["locomo"][0]
    expected = [item.id for item in items_of(benchmark, str(path))]
    (tmp_path / benchmark.file).parent.mkdir(exist_ok=True)
    path.rename(tmp_path / benchmark.file)
    assert [item.id for item in items_of(benchmark, str(tmp_path))] == expected
    monkeypatch.setenv("DELTAMEM_DATA", str(tmp_path))
    assert [item.id for item in items_of(benchmark, None)] == expected


def test_parquet(tmp_path):
    import pyarrow  # of the harness' datasets
    from pyarrow import parquet

    record = json.loads(FILES["memory-agent-bench"][0])
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(record))
    one, other = (
        items_of(BENCHMARKS["memory-agent-bench"][0], str(tmp_path / f"x.{ext}")) for ext in ("parquet", "json")
    )
    assert one == other and one[0].context == other[0].context


@pytest.mark.parametrize("name", ["qa", "hotpotqa", "memory-agent-bench"])
def test_only_a_line_feed_ends_a_line_of_json(name, tmp_path):
    record = json.loads(FILES[name][1 if name == "qa" else 0])
    record = {**(record[0] if name == "hotpotqa" else record), "note": "\u2028 \u2029 \x85 \x1c"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(items_of(BENCHMARKS[name][0], str(tmp_path / "x.jsonl"))) == 1


def test_a_single_answer_is_one(tmp_path):
    """Given as a plain string, where a list of right answers is usual; beside an empty one, which all answers hold."""
    for name, record in (
        ("memory-agent-bench", {"context": "0. Built in 1889.", "questions": ["When?"], "answers": [["1889", " "]]}),
        ("qa", {"context": "Built in 1889.", "qa": [["When?", "1889"]]}),
        ("memory-agent-bench", {"context": "0. Built in 1889.", "questions": ["When?"], "answers": ["1889"]}),
    ):
        (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
        assert [item.answers for item in items_of(BENCHMARKS[name][0], str(tmp_path / "x.jsonl"))] == [("1889",)]


def test_limits_and_shards_are_parts_of_the_questions(tmp_path):
    items = items_of(BENCHMARKS["locomo"][0], str(locomo(tmp_path, 3)))
    some = chosen(items, 7, 1, (1, 1))
    assert len(some) == 7 and some == [item for item in items if item in some]
    assert some == chosen(items, 7, 1, (1, 1)) != chosen(items, 7, 2, (1, 1))
    parts = [chosen(items, 7, 1, (i, 2)) for i in (1, 2)]
    assert sorted(item.index for part in parts for item in part) == [item.index for item in some]
    assert not {id(i.context) for i in parts[0]} & {id(i.context) for i in parts[1]}


#
# what fits
#


def words(text):
    return len(text.split())


CONTEXT = Context(tuple(Piece(f"word{i} a b c", f"day {i // 3}") for i in range(9)))  # 4 words each, 2 of a head


def test_the_last_sessions_that_fit():
    for room in range(100):
        kept = views.clipped(CONTEXT, "last", room, words)
        assert words(kept.shown()) <= room
        assert kept.pieces == CONTEXT.pieces[len(CONTEXT.pieces) - len(kept.pieces) :]
        heads = [piece.head for piece in kept.pieces]
        if len(set(heads)) > 1:  # whole sessions
            assert len(heads) % 3 == 0
    assert kept == CONTEXT
    assert len(views.clipped(CONTEXT, "last", 8, words).pieces) == 1  # part of one where no whole one fits


def test_the_first_third_and_the_last_two():
    plain = Context(tuple(Piece(f"word{i}") for i in range(100)))
    kept = [piece.text for piece in views.clipped(plain, "thirds", 30, words).pieces]
    assert kept == [f"word{i}" for i in (*range(10), *range(80, 100))]
    assert views.clipped(plain, "thirds", 100, words) == plain
    assert len(views.clipped(plain, "thirds", 1000, words, max_characters=70).shown()) <= 70


def test_what_a_search_finds():
    context = Context((Piece("I live in Lima."), Piece("Hello."), Piece("My door is red."), Piece("Hi.")))
    assert views.found_pieces(context, "What colour has the door?", 4, words, "bm25") == [2]
    assert views.last_pieces(context, 5, words) == [2, 3]


def test_dense_retrieval_orders_by_the_encoder(monkeypatch):
    class Encoder:
        def encode(self, texts, **options):
            return [[float("door" in text), float("Lima" in text)] for text in texts]

    monkeypatch.setattr(views, "encoder", Encoder)
    context = Context((Piece("I live in Lima."), Piece("Hello."), Piece("My door is red.")))
    assert views.found_pieces(context, "the door?", 4, words, "dense") == [2]
    assert views.found_pieces(context, "Lima?", 5, words, "dense") == [0]


def test_a_running_summary_takes_all_in():
    seen = []

    def write(prompt, n):
        seen.append(prompt)
        return f"summary {len(seen)}"

    context = Context(tuple(Piece(f"word{i} " * 300) for i in range(8)))
    assert views.summary(context, 10, words, write) == f"summary {len(seen)}"
    assert len(seen) > 1 and all(f"word{i}" in "".join(seen) for i in range(8))
    assert all(f"summary {i}" in prompt for i, prompt in enumerate(seen[1:], 1))


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
    sampling = BENCHMARKS["locomo"][0].sampling
    with DeltaMemLlama(default_files()[0], n_ctx=256, n_threads=1) as llm:
        tokens = llm.tokenize(b"My name is")
        llm.eval(tokens)
        likely = np.sort(llm.logits.astype(np.float64))[::-1][:10]
        said = {next(iter(TextStream(llm, tokens, n_predict=1, **sampling(i, 42))), "") for i in range(300)}

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
    for text in ("no answers\n", "[]\n"):
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
    prompts = Prompts(BENCHMARKS["hotpotqa"][0], [item], Count(), 100, 1)
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


def report_of(folder, **scores):
    """The report of answers with these scores."""
    folder.mkdir()
    records = [{"setup": {"benchmark": "qa", "model": "m"}}]
    records += [
        {"benchmark": "qa", "id": str(i), "kind": "", "about": None, "method": name.replace("_", "/"), "answer": "",
         "scores": {"f1": value}}
        for name, values in scores.items() for i, value in enumerate(values)
    ]  # fmt: skip
    (folder / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["eval", "report", str(folder), "--json", str(folder / "report.json")]) == 0
    return json.loads((folder / "report.json").read_text())


def test_ratios_in_a_report(tmp_path):
    found = report_of(
        tmp_path / "a", none=[0, 1] * 20, backbone=[1, 1] * 20, a_context=[1, 0] * 20, a_memory=[0, 1] * 20
    )
    assert {(of["method"], of["over"]): of["ratio"]["value"] for of in found["ratios"]} == {
        ("a/context", "backbone"): 0.5, ("a/memory", "backbone"): 0.5, ("a/memory", "none"): 1,
    }  # fmt: skip
    # only what both answered is compared, however far other methods have come
    found = report_of(tmp_path / "b", none=[1, 0, 1, 1], backbone=[1, 0, 1, 1], a_context=[1, 0], a_memory=[1, 1, 0])
    assert {(of["method"], of["over"]): (of["n"], of["ratio"]["value"]) for of in found["ratios"]} == {
        ("a/context", "backbone"): (2, 1), ("a/memory", "backbone"): (3, 1), ("a/memory", "none"): (3, 1),
    }  # fmt: skip
    assert len(found["notes"]) == 2


def answers_of(path, benchmark="qa", model="m", method="a/memory", **scores):
    """A file of answers: by id, the answer's score and text."""
    record = {"benchmark": benchmark, "kind": "", "about": None, "method": method}
    records = [{**record, "id": id, "answer": text, "scores": {"f1": s}} for id, (s, text) in scores.items()]
    setup = {"setup": {"benchmark": benchmark, "model": model}}
    path.write_text("".join(json.dumps(line) + "\n" for line in (setup, *records)))
    return path


def test_a_report_of_several_benchmarks_has_their_mean(tmp_path):
    """Of the methods that all of them have, each benchmark counting once."""
    for benchmark, score in (("qa", 0.5), ("locomo", 0.1)):
        scores = {str(i): (score, "x") for i in range(4 if benchmark == "qa" else 40)}
        for method in ("a/memory", *(["b/memory"] if benchmark == "qa" else [])):
            answers_of(tmp_path / f"{benchmark}-{method[0]}.jsonl", benchmark, method=method, **scores)
        full = {id: (1.0, "x") for id in scores}
        answers_of(tmp_path / f"{benchmark}-full.jsonl", benchmark, method="backbone", **full)
    ratios = {(of.benchmark, of.method): of.ratio.value for of in results_of([tmp_path]).ratios}
    assert ratios["average", "a/memory"] == pytest.approx(0.3) and ("average", "b/memory") not in ratios


def test_files_that_do_not_fit_together(tmp_path):
    one = answers_of(tmp_path / "1.jsonl", x=(1, "Lima"))
    same, other = (answers_of(tmp_path / f"{name}.jsonl", x=(1, name)) for name in ("Lima", "Rome"))
    assert len(results_of([one, same]).rows) == 1
    with pytest.raises(InputError) as error:
        results_of([one, other])
    check_names(str(error.value), [other, "x"])
    with pytest.raises(InputError) as error:
        results_of([one, answers_of(tmp_path / "2.jsonl", model="another", y=(1, "Lima"))])
    check_names(str(error.value), ["m", "another"])
    with pytest.raises(InputError) as error:
        results_of([answers_of(tmp_path / "3.jsonl")])
    check_names(str(error.value), [tmp_path / "3.jsonl"])


def with_setup(path, **changes):
    """The file with another setup."""
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({"setup": {**json.loads(first)["setup"], **changes}}) + "\n" + rest)
    return path


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("none", {"n_ctx": 1}), ("none", {"seed": 1}), ("bm25", {"window": 1}), ("a/memory", {"rehearse": True}),
        ("a/context", {"answer_writes": "off"}), ("a/context", {"adapters": {"a": "y.gguf"}, "sha256": {"model": "1"}}),
        ("a/memory", {"sha256": {"model": "1", "adapters": {"a": "2"}}}), ("lora", {"lora": "y.gguf"}),
        ("backbone", {"unpack": "all"}), ("backbone", {"sha256": {"model": "1", "data": "2"}}),
        ("backbone", {"sha256": {"model": "2"}}), ("none", {"version": "2"}), ("none", {"version": None}),
    ],
)  # fmt: skip
def test_answers_under_other_conditions_are_not_joined(tmp_path, method, changes):
    """Shards of one method must have been asked alike, but for what does not concern the method."""
    setup = {"n_ctx": 9, "seed": 9, "window": 9, "answer_writes": "on", "adapters": {"a": "x.gguf"}, "lora": "x.gguf"}
    setup |= {"version": "1", "sha256": {"model": "1", "data": "1", "adapters": {"a": "1"}}}
    one, two = (answers_of(tmp_path / f"{id}.jsonl", method=method, **{id: (1, "x")}) for id in "ab")
    assert results_of([with_setup(one, **setup), with_setup(two, **setup)]).rows[0].n == 2
    with pytest.raises(InputError) as error:
        results_of([one, with_setup(two, **changes)])
    check_names(str(error.value), [two])
    other = {"window": 1, "rehearse": True, "answer_writes": "off", "adapters": {"b": "y.gguf"}, "lora": None}
    if method == "none":
        assert results_of([one, with_setup(two, **{**setup, **other})]).rows[0].n == 2


def test_methods_under_other_conditions_are_noted(tmp_path):
    one, two = (answers_of(tmp_path / f"{method}.jsonl", method=method, a=(1, "x")) for method in ("none", "backbone"))
    assert not results_of([one, two]).notes
    (note,) = results_of([with_setup(one, n_ctx=11), with_setup(two, n_ctx=12)]).notes
    check_names(note, ["n_ctx", 11, 12])
    (note,) = results_of([with_setup(one, n_ctx=12, version="0.0.8"), with_setup(two, version="0.0.9")]).notes
    check_names(note, ["version", "0.0.8", "0.0.9"])
    with pytest.raises(InputError):  # other questions under the same ids
        results_of([with_setup(one, sha256={"data": "1"}), with_setup(two, sha256={"data": "2"})])


def test_shards_of_several_machines_are_joined_and_noted(tmp_path):
    """Each rounds in its own way. What was written before that was recorded says nothing of it."""
    old, one, two, gpu = (answers_of(tmp_path / f"{id}.jsonl", **{id: (1, "x")}) for id in "abcd")
    with_setup(one, processor=["Xeon"], gpu_layers=0)
    assert not results_of([old, one]).notes
    (note,) = results_of([old, one, with_setup(two, processor=["EPYC"], gpu_layers=0)]).notes
    check_names(note, ["Xeon", "EPYC"])
    notes = results_of([one, with_setup(gpu, processor=["Xeon", "H200"], gpu_layers=9)]).notes
    assert len(notes) == 2
    check_names(" ".join(notes), ["H200", 0, 9])


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


@pytest.mark.parametrize("gone", ["kind", "about", "scores", "method", "benchmark", "model", "id"])
def test_a_damaged_line_is_named(tmp_path, gone):
    path = answers_of(tmp_path / "x.jsonl", x=(1, "Lima"), y=(0, "Rome"))
    path.write_text(path.read_text().replace(f'"{gone}"', '"other"'))
    with pytest.raises(InputError) as error:
        results_of([path])
    check_names(str(error.value), [path])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"id": "x"', '"id": ["x"]'), ('"method": "a/memory"', '"method": {}'), ('"method": "a/memory"', '"method": 1'),
        ('"kind": ""', '"kind": 1'), ('"about": null', '"about": []'),
        ('"benchmark": "qa", "kind"', '"benchmark": 1, "kind"'),
        ('"f1": 1', '"f1": "x"'), ('"f1": 1', '"f1": null'), ('"f1": 1', '"f1": [{}]'), ('"model": "m"', '"model": []'),
        ('"model": "m"', '"model": "m", "methods": [1]'), ('"model": "m"', '"model": "m", "questions": "9"'),
        ('"model": "m"', '"model": "m", "sha256": "x"'), ('"model": "m"', '"model": "m", "sha256": {"data": []}'),
        ('"model": "m"', '"model": "m", "n_ctx": [1]'), ('"model": "m"', '"model": "m", "cache": [[]]'),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(tmp_path, before, after):
    path = answers_of(tmp_path / "x.jsonl", x=(1, "Lima"), y=(0, "Rome"))
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError) as error:
        results_of([path])
    check_names(str(error.value), [path])


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


def test_answers_with_separators_of_lines(tmp_path):
    path = answers_of(tmp_path / "x.jsonl", x=(1, "Lima"), y=(0, "here"))
    path.write_text(path.read_text().replace("here", "one\u2028two\x85three"), encoding="utf-8")
    assert [(row.n, row.mean.value) for row in results_of([path]).rows] == [(2, 0.5)]


def test_few_contexts_are_noted(tmp_path):
    """Also where there is no method to compare with."""
    path = answers_of(tmp_path / "x.jsonl", **{str(i): (i % 2, "x") for i in range(20)})
    assert not results_of([path]).notes
    path.write_text(path.read_text().replace('"about": null', '"about": "one"'))
    (note,) = results_of([path]).notes
    check_names(note, ["qa", 1])


def test_benchmarks_are_drawn_apart(tmp_path):
    """Where one is right and the other wrong in the same row, their mean is no surer than where both are right."""
    rights = {"qa": [1, 0] * 20, "locomo": [0, 1] * 20}
    for benchmark, right in rights.items():
        for method, scores in (("a/memory", right), ("backbone", [1] * 40)):
            of = {f"{i:02}": (score, "x") for i, score in enumerate(scores)}
            answers_of(tmp_path / f"{benchmark}-{method[0]}.jsonl", benchmark, method=method, **of)
    (mean,) = [of.ratio for of in results_of([tmp_path]).ratios if of.benchmark == "average"]
    error = 1.96 * 0.5 / 80**0.5  # of the mean of 80 rights and wrongs
    assert mean.value == 0.5
    assert mean.low == pytest.approx(0.5 - error, abs=0.03) and mean.high == pytest.approx(0.5 + error, abs=0.03)


def test_a_large_file_that_is_no_text_is_not_quoted(tmp_path):
    (tmp_path / "locomo10.json").write_bytes(b"\xff" * 100_000)
    for read in (lambda: results_of([tmp_path / "locomo10.json"]), lambda: items_of(BENCHMARKS["locomo"][0], tmp_path)):
        with refuses(InputError, tmp_path / "locomo10.json") as info:
            read()
        assert len(str(info.value)) < 1000


def test_a_report_of_nothing(tmp_path, capsys):
    assert main(["eval", "report", str(tmp_path)]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path])
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert main(["eval", "report", str(tmp_path)]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "x.jsonl"])
    answers_of(tmp_path / "x.jsonl", q=(1, "yes"))
    assert main(["eval", "report", str(tmp_path), str(tmp_path / "other")]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "other"])


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
