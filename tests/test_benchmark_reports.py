"""The report of answers to benchmarks: which are joined, under which conditions, and what is noted."""

from __future__ import annotations

import json

import pytest

from pydeltamem.cli.main import main
from pydeltamem.errors import InputError
from pydeltamem.evals.results import markdown, results_of
from refusals import check_names


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


@pytest.mark.parametrize("order", [1, -1])
def test_files_with_other_scores(tmp_path, order):
    """As those of two versions, of which the later one has another metric."""
    paths = [answers_of(tmp_path / f"{name}.jsonl", method=name, x=(1, "Lima")) for name in ("none", "backbone")]
    paths[1].write_text(paths[1].read_text().replace('"f1": 1', '"f1": 1, "exact": 0'))
    with pytest.raises(InputError) as error:
        results_of(paths[::order])
    check_names(str(error.value), [paths[::order][1], "f1", "exact"])


def test_questions_of_no_kind_among_others(tmp_path):
    """They have no row of their own: the one of all has no kind either."""
    path = answers_of(tmp_path / "x.jsonl", x=(1, "Lima"), y=(0, "Rome"), z=(1, "Oslo"))
    path.write_text(path.read_text().replace('"id": "x"', '"id": "x", "kind": "Physics"', 1))
    found = results_of([path])
    assert [(row.kind, row.n) for row in found.rows] == [("", 3), ("Physics", 1)]
    widths = {line.count("|") for line in markdown(found).split("\n\n")[1].splitlines()}
    assert len(widths) == 1  # a table


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
        ("a/memory", {"sha256": {"model": "1", "adapters": {"a": "2"}}}), ("a/context", {"load_memory": "y.memory"}),
        ("lora", {"lora": "y.gguf"}),
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
    other["load_memory"] = "y.memory"
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
        ('"f1": 1', '"f1": NaN'), ('"f1": 1', '"f1": 100'), ('"f1": 1', '"f1": []'),
        ('"kind": ""', '"kind": "\\ud800"'), ('"model": "m"', '"model": "\\ud800"'),
        ('"model": "m"', '"model": "m", "seed": 1e999'),
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


@pytest.mark.parametrize("setup", [{"cache": {}}, {"cache": [None]}, {"gpu_layers": [[1]]}])
def test_a_setup_of_other_values_is_joined(tmp_path, setup):
    """What a report does not compute with may be anything."""
    one, two = (answers_of(tmp_path / f"{id}.jsonl", **{id: (1, "x")}) for id in "ab")
    assert results_of([with_setup(one, **setup), two]).rows[0].n == 2


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


def test_few_contexts_of_a_kind_are_noted(tmp_path):
    """Where all questions have enough, and one kind of them has not."""
    path = answers_of(tmp_path / "x.jsonl", **{str(i): (i % 2, "x") for i in range(48)})
    setup, *records = map(json.loads, path.read_text().splitlines())
    for i, record in enumerate(records):
        record.update(about=str(i // 4), kind="rare" if i < 8 else "often")
    path.write_text("".join(json.dumps(line) + "\n" for line in (setup, *records)))
    (note,) = results_of([path]).notes
    check_names(note, ["rare", 2])


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


def test_a_report_of_nothing(tmp_path, capsys):
    assert main(["eval", "report", str(tmp_path)]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path])
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert main(["eval", "report", str(tmp_path)]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "x.jsonl"])
    answers_of(tmp_path / "x.jsonl", q=(1, "yes"))
    assert main(["eval", "report", str(tmp_path), str(tmp_path / "other")]) == 1
    check_names(capsys.readouterr().err.strip(), [tmp_path / "other"])
