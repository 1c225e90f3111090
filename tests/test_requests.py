"""Ordinary requests to train on (recipes/ordinary): each once, none of them IFEval's; their answers stay."""

import gzip
import json
import re

import documents
import mixture
import ordinary

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
