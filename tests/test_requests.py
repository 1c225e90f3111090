"""Ordinary requests to train on (recipes/ordinary): each once, none of them IFEval's; their answers stay."""

import gzip
import json
import re

import pytest

import documents
import mixture
import ordinary
from conftest import ROOT
from pydeltamem.errors import InputError
from pydeltamem.evals.asker import Asker
from refusals import refuses

WRITTEN = mixture.HERE / "ordinary" / "requests.jsonl.gz"


def written():
    return [item["prompt"] for item in mixture.lines(WRITTEN)]


def test_each_request_is_there_once():
    assert len(written()) > 1000 and len(set(written())) == len(written())
    assert all(3 <= len(text.split()) <= 140 for text in written())


def test_a_request_that_quotes_a_benchmark_is_found():
    """`recipes/ordinary.py` compares all requests with IFEval's, which is not in this repository."""
    asked = ["Write a long letter to the mayor of Springfield, now.", "Sing."]
    mine = [
        "Please: write a LONG letter, to the mayor of Springfield!",
        "Write a long letter to the lord mayor of Bath.",
        "Sing.",
    ]
    assert ordinary.quoting(mine, asked) == mine[:1]
    assert ordinary.quoting(written(), asked) == []


def test_answers_that_are_shipped():
    """SmolLM2's to requests of ours, as recipes/ordinary.py --ours writes them."""
    shipped = mixture.lines(mixture.HERE / "ordinary" / "answers.jsonl.gz")
    asked = [item["prompt"] for item in shipped]
    assert len(set(asked)) == len(asked) and set(asked) >= set(written())
    assert len(set(asked) & set(ordinary.requests(None, 3))) > 1400
    assert sum(len(item["answer"].split()) >= 320 for item in shipped) > 100  # they were not cut at 192 tokens


def test_answers_to_requests_stay(tmp_path, monkeypatch):
    """A request is a chat's first message, or follows one; and its line says that the answer stays."""
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("sgd", "nq_oracle", "covidqa", "hotpot_train_100"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8"):
            pass
    requests = tmp_path / "ordinary.jsonl"
    requests.write_text(json.dumps({"prompt": "Write a rhyme.", "answer": "Time, lime."}) + "\n", encoding="utf-8")
    made = mixture.Mixture(tmp_path, requests, seed=1)
    made.weights = {"ordinary": 1.0, "natural": 1.0}
    monkeypatch.setattr(made, "_dialogues", made._natural)
    drawn = [made.draw() for _ in range(60)]
    kept = [line for line in drawn if line.get("keep")]
    assert 10 < len(kept) < 50
    assert all(line["asks"] == [mixture.messages([("Write a rhyme.", "Time, lime.")])] for line in kept)
    assert all(line["visible"] for line in kept if not line["messages"])
    assert any(line["messages"] and not line["visible"] for line in kept)
    assert not any("Time, lime." in json.dumps(line) for line in drawn if not line.get("keep"))


ASKED = [f"Say {word} again, please." for word in ("red", "green", "blue", "white", "one", "two", "three")]
SETUP = {"model": "default", "seed": 3, "longest": 9}


@pytest.fixture
def answer(monkeypatch):
    """Answers requests by threes, and is stopped while it answers batch number `last`."""
    monkeypatch.setattr(ordinary, "BATCH", 3)

    def answer(out, last=None, setup=SETUP):
        calls = []

        def open_model():
            asker = Asker(ROOT / "pydeltamem" / "models" / "default.gguf", n_ctx=256, threads=1, parallel=2)
            real = asker.answer

            def counted(asks):
                if len(calls) == last:
                    raise KeyboardInterrupt
                calls.append(len(asks))
                return real(asks)

            asker.answer = counted
            return asker

        ordinary.answer_all(ASKED, setup, open_model, out)
        return calls

    return answer


@pytest.fixture
def whole(answer, tmp_path):
    assert answer(tmp_path / "whole.jsonl") == [3, 3, 1]
    return (tmp_path / "whole.jsonl").read_bytes()


def stopped(answer, tmp_path, last):
    """The file of answers, and what a run that was stopped has left of it."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(out, last)
    (left,) = set(tmp_path.glob("out.jsonl*"))
    assert left != out
    return out, left


def test_an_interrupted_run_goes_on_to_the_same_answers(answer, whole, tmp_path):
    out, left = stopped(answer, tmp_path, 2)
    with open(left, "ab") as file:
        file.write(b'{"prompt": "Say o')  # as where it was killed while it wrote
    assert answer(out) == [1]  # the rest
    assert out.read_bytes() == whole and not left.exists()
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == ASKED


@pytest.mark.parametrize("lost", [5, 400])
def test_a_batch_that_was_cut_off_is_asked_again(answer, whole, tmp_path, lost):
    out, left = stopped(answer, tmp_path, 2)
    data = left.read_bytes()
    left.write_bytes(data[: max(len(data) - lost, 20)])  # into an answer, or into the first line
    assert answer(out) == ([3, 1] if lost < 100 else [3, 3, 1])
    assert out.read_bytes() == whole


def test_answers_to_other_options_stay(answer, tmp_path):
    out, left = stopped(answer, tmp_path, 1)
    before = left.read_bytes()
    with refuses(InputError, left):
        answer(out, setup={**SETUP, "seed": 4})
    left.write_bytes(b"somebody's notes")
    with refuses(InputError, left):
        answer(out)
    assert left.read_bytes() == b"somebody's notes" and before


def test_two_runs_do_not_write_one_file(answer, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out, left = stopped(answer, tmp_path, 1)
    before = left.read_bytes()
    with open(left, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with refuses(InputError, left):
            answer(out)
    assert left.read_bytes() == before
    assert answer(out) == [3, 1]


def test_no_paragraph_that_is_held_out(tmp_path, monkeypatch):
    """Nor another question about its text: not as paragraphs, passages or requests."""
    folder, n = tmp_path / "train", documents.HELD_OUT + 240
    folder.mkdir()
    first = n - documents.HELD_OUT  # that is held out
    texts = {0: f"It is Name {n - 1}."}  # the text of the last one
    for name in ("sgd", "nq_oracle", "covidqa", "hotpot_train_100"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for i in range(n if name == "nq_oracle" else 0):
                passage = {"title": f"T{i}", "text": texts.get(i, f"It is Name {i}.")}
                line = {"question": f"who is number {i}", "answers": [passage["text"][6:-1]], "ctxs": [passage]}
                file.write(json.dumps(line) + "\n")
    made = mixture.Mixture(tmp_path, None, seed=1)
    monkeypatch.setattr(documents, "WEIGHTS", {"passages": 1.0})
    made.weights = {"paragraphs": 1.0, "documents": 1.0}
    text = json.dumps([made.draw() for _ in range(1500)]) + json.dumps(ordinary.requests(tmp_path, 1))
    drawn = {int(i) for i in re.findall(r"(?:Name|number) (\d+)", text)}
    assert drawn == set(range(1, first))
