"""The draws that adapters of real language are trained on (recipes/mixture.py): sources, and what is declined."""

import gzip
import json
import re
import subprocess
import sys

import pytest

import mixture
from conftest import ROOT
from mixture import Mixture, messages

KEPT = {"prompt": "Write a rhyme.", "answer": "Time, lime."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Published data, as far as a mixture cannot do without; and an ordinary request."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    for name in ("sgd", "nq_oracle", "covidqa", "hotpot_train_100"):
        with gzip.open(folder / "train" / f"{name}.jsonl.gz", "wt", encoding="utf-8"):
            pass
    (folder / "ordinary.jsonl").write_text(json.dumps(KEPT) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(folder):
    return Mixture(folder, folder / "ordinary.jsonl", seed=1)


def told(said):
    return [m["content"] for m in said if m["role"] == "user"]


@pytest.fixture
def only(made, monkeypatch):
    def draws(kind, n):
        monkeypatch.setattr(made, "weights", {kind: 1.0})
        return [made.draw() for _ in range(n)]

    return draws


def test_alone_is_one_short_message(only):
    for line in only("alone", 200):
        (message,) = told(line["messages"])
        assert len(message) < 2 * mixture.SHORT  # other values may be longer
        assert line["asks"]


def test_numbers_are_in_an_answer(made):
    assert len(made.numbers) > 1000
    assert all(any(re.search(r"\d", ask[-1]["content"]) for ask in one["asks"]) for one in made.numbers)


def test_words_are_invented_of_the_models_tokens(folder):
    made = Mixture(folder, None, seed=1, vocabulary=["\u0120zzyx", "qqv"])
    made.weights = {"invented": 1.0}
    lines = [made.draw() for _ in range(50)]
    assert all(re.search("zzyx", " ".join(told(line["messages"])), re.IGNORECASE) for line in lines)
    assert sum("zzyx" in ask[-1]["content"].lower() for line in lines for ask in line["asks"]) > 50
    assert "invented" not in Mixture(folder, None, seed=1).weights


def test_a_question_of_another_conversation_is_declined(made, monkeypatch):
    """It comes after the conversation's own, and is about nothing that was told or is asked there."""
    monkeypatch.setattr(mixture, "ELSEWHERE", 1.0)
    monkeypatch.setattr(mixture, "SWAPPED", 0.0)
    own = {json.dumps(one["messages"]): one["asks"] for one in made.natural}
    n_more = 0
    for source in (made._natural, made._alone, made._numbers):
        for _ in range(200):
            said, asks = source()
            mine = own[json.dumps(said)]
            assert asks[: len(mine)] == mine
            here = " ".join(told(said)).lower()
            for question, answer in asks[len(mine) :]:
                n_more += 1
                assert answer["content"] in mixture.UNTOLD or mixture.DECLINES.match(answer["content"])
                about = mixture._words(question["content"])
                assert about and not any(re.search(rf"\b{word}\b", here) for word in about)
    assert n_more > 300


def test_what_may_have_been_told_here_is_not_declined(made, monkeypatch):
    monkeypatch.setattr(mixture, "ELSEWHERE", 1.0)
    lighthouse = messages([("How tall is the lighthouse?", "You didn't say how tall.")])
    monkeypatch.setattr(made, "declined", [lighthouse])
    monkeypatch.setattr(made, "answered", [lighthouse, messages([("and where?", "In Lima.")])])
    mine = [messages([("What do I do?", "You bake.")])]
    for _ in range(40):
        assert made._asked_more(messages([("The lighthouse has 40 metres.", "Tall.")]), mine)[1] == mine
    asked = [ask for _ in range(40) for ask in made._asked_more(messages([("I bake.", "Nice.")]), mine)[1][1:]]
    assert {ask[0]["content"] for ask in asked} == {"How tall is the lighthouse?"}
    assert all(ask[1]["content"] in [lighthouse[1]["content"], *mixture.UNTOLD] for ask in asked)


@pytest.mark.parametrize(
    "answer", ["You haven't told me his name.", "You never gave her age.", "You did not mention it."]
)
def test_what_declines(answer):
    assert mixture.DECLINES.match(answer)


@pytest.mark.parametrize(
    "answer", ["You never learned to say no.", "You don't know who left it.", "No, she never told."]
)
def test_what_does_not_decline(answer):
    assert not mixture.DECLINES.match(answer)


def test_two_together_are_asked_their_own_questions_only(made, monkeypatch):
    monkeypatch.setattr(mixture, "ELSEWHERE", 1.0)
    monkeypatch.setattr(mixture, "SWAPPED", 0.0)
    own = {json.dumps(ask) for one in made.natural for ask in one["asks"]}
    assert all(json.dumps(ask) in own for _ in range(100) for ask in made._together()[1])


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_the_share_of_kept_answers(folder, kept, monkeypatch):
    made = Mixture(folder, folder / "ordinary.jsonl", seed=1, kept=kept)
    assert made.weights["ordinary"] / sum(made.weights.values()) == pytest.approx(kept)
    made.weights = {name: made.weights[name] for name in ("ordinary", "natural")}
    monkeypatch.setattr(made, "_dialogues", made._natural)
    n_kept = sum(bool(made.draw().get("keep")) for _ in range(100))
    assert n_kept > 50 if kept else n_kept == 0


def test_every_source_has_a_weight(made, folder):
    assert all(callable(getattr(made, f"_{name}")) for name in (*mixture.WEIGHTS, "ordinary"))
    assert "ordinary" not in Mixture(folder, None, seed=1).weights


def test_the_same_seed_draws_the_same(folder):
    def drawn(seed):
        made = Mixture(folder, folder / "ordinary.jsonl", seed)
        made.weights = {name: made.weights[name] for name in ("natural", "alone", "numbers", "together", "replies")}
        return list(mixture.draw_all(made, 40))

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("options", [["--kept", "1"], ["--kept", "0.3"]])
def test_bad_options_of_the_command(folder, tmp_path, options):
    """The whole is no share; and without requests there is nothing to keep."""
    command = [sys.executable, ROOT / "recipes" / "mixture.py", tmp_path / "out.jsonl", "--data", folder, *options]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "--kept" in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()
