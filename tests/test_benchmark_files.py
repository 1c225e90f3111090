"""What benchmarks read from the published files, and what of a text fits into a prompt."""

from __future__ import annotations

import gzip
import json

import pytest

from asked import FILES, GPQA, HOTPOT, locomo
from pydeltamem.errors import InputError
from pydeltamem.evals import views
from pydeltamem.evals.benchmarks import BENCHMARKS
from pydeltamem.evals.items import Context, Piece, chosen, items_of
from refusals import check_names

#
# files
#


def test_locomo_has_four_categories_and_dates(tmp_path):
    items = items_of(BENCHMARKS["locomo"], str(locomo(tmp_path)))
    assert [item.kind for item in items[:5]] == ["multi-hop", "temporal", "open", "single-hop", "multi-hop"]
    assert len(items) == 10 and len({item.id for item in items}) == 10 and len({id(i.context) for i in items}) == 2
    shown = items[0].context.shown()
    assert shown.index("[1:56 pm on 8 May, 2023]") < shown.index("Oslo") < shown.index("[9 June, 2023]")
    assert shown.count("8 May") == 1
    assert "date" in items[1].question.lower() and "date" not in items[0].question.lower()


def test_each_benchmark_is_read_as_published():
    """LoCoMo's file is longer, and has a test of its own."""
    assert {*FILES, "locomo"} == set(BENCHMARKS)


@pytest.mark.parametrize("name", FILES)
def test_published_formats(name, tmp_path):
    """Every form that a file is published in gives the same questions; packed files do, too."""
    found = []
    for i, text in enumerate(FILES[name]):
        path = tmp_path / f"{i}.{'csv' if name == 'gpqa' else 'jsonl.gz'}"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        found.append(items_of(BENCHMARKS[name], str(path)))
    assert all(len(items) == 1 for items in found)
    assert all(items[0].question == found[0][0].question for items in found)
    assert all(items[0].context == found[0][0].context and items[0].answers == found[0][0].answers for items in found)
    if name == "gpqa":
        (item,) = found[0]
        assert f"({item.answers[0]}) 1" in item.question


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_and_damaged_files_are_named(name, tmp_path, monkeypatch):
    benchmark = BENCHMARKS[name]
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
        items_of(BENCHMARKS["hotpotqa"], str(path))
    check_names(str(error.value), [path])
    assert str(error.value).count(path.name) == 1


@pytest.mark.parametrize(
    ("instructions", "kwargs"),
    [
        ([], []),  # whatever is answered would be right
        (["punctuation:no_such"], [{}]), (["punctuation:no_comma"], []), (["punctuation:no_comma"], [None]),
        (["length_constraints:number_words"], [{"relation": "about", "num_words": 3}]),
    ],
)  # fmt: skip
def test_instructions_that_cannot_be_checked(tmp_path, instructions, kwargs):
    """They are refused before the first answer."""
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({**json.loads(FILES["ifeval"][0]), "instruction_id_list": instructions, "kwargs": kwargs})
    )
    with pytest.raises(InputError) as error:
        items_of(BENCHMARKS["ifeval"], str(path))
    check_names(str(error.value), [path])


HALF = "half \ud800"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("qa", {"context": "A. B.", "qa": [[5, ["A"]]]}), ("qa", {"context": "A. B.", "qa": [[["Q?"], ["A"]]]}),
        ("qa", {"context": "A. B.", "qa": [[HALF, ["A"]]]}), ("qa", {"context": "A. B.", "qa": [["Q?", [HALF]]]}),
        ("qa", {"context": HALF, "qa": [["Q?", ["A"]]]}), ("hotpotqa", {**HOTPOT, "question": None}),
        ("ifeval", {**json.loads(FILES["ifeval"][0]), "prompt": 5}),
        ("ifeval", {**json.loads(FILES["ifeval"][0]), "prompt": None}),
    ],
)  # fmt: skip
def test_what_is_no_text_is_found_before_it_is_asked(tmp_path, name, record):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        items_of(BENCHMARKS[name], str(path))
    check_names(str(error.value), [path])
    str(error.value).encode()


def test_a_category_that_is_no_number(tmp_path):
    path = locomo(tmp_path)
    path.write_text(path.read_text().replace('"category": 2', '"category": 1e999'))
    with pytest.raises(InputError) as error:
        items_of(BENCHMARKS["locomo"], str(path))
    check_names(str(error.value), [path])


def test_a_question_without_a_type_has_no_kind(tmp_path):
    """As a column of Parquet gives it."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**HOTPOT, "type": None}))
    (item,) = items_of(BENCHMARKS["hotpotqa"], str(path))
    assert item.kind == ""


def test_a_mark_of_utf_8_is_no_text(tmp_path):
    """As spreadsheets write it."""
    (tmp_path / "gpqa.csv").write_text(GPQA, encoding="utf-8-sig")
    assert len(items_of(BENCHMARKS["gpqa"], str(tmp_path / "gpqa.csv"))) == 1


def test_the_folder_of_the_data(tmp_path, monkeypatch):
    """By --data or DELTAMEM_DATA: each benchmark knows its file in it."""
    path = locomo(tmp_path)
    benchmark = BENCHMARKS["locomo"]
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
    one, other = (items_of(BENCHMARKS["memory-agent-bench"], str(tmp_path / f"x.{ext}")) for ext in ("parquet", "json"))
    assert one == other and one[0].context == other[0].context


@pytest.mark.parametrize("name", ["qa", "hotpotqa", "memory-agent-bench"])
def test_only_a_line_feed_ends_a_line_of_json(name, tmp_path):
    record = json.loads(FILES[name][1 if name == "qa" else 0])
    record = {**(record[0] if name == "hotpotqa" else record), "note": "\u2028 \u2029 \x85 \x1c"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(items_of(BENCHMARKS[name], str(tmp_path / "x.jsonl"))) == 1


def test_a_single_answer_is_one(tmp_path):
    """Given as a plain string, where a list of right answers is usual; beside an empty one, which all answers hold."""
    for name, record in (
        ("memory-agent-bench", {"context": "0. Built in 1889.", "questions": ["When?"], "answers": [["1889", " "]]}),
        ("qa", {"context": "Built in 1889.", "qa": [["When?", "1889"]]}),
        ("memory-agent-bench", {"context": "0. Built in 1889.", "questions": ["When?"], "answers": ["1889"]}),
    ):
        (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
        assert [item.answers for item in items_of(BENCHMARKS[name], str(tmp_path / "x.jsonl"))] == [("1889",)]


def test_limits_and_shards_are_parts_of_the_questions(tmp_path):
    items = items_of(BENCHMARKS["locomo"], str(locomo(tmp_path, 3)))
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
