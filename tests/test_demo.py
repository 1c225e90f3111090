"""deltamem demo: what a newcomer sees first."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest

from pydeltamem import Conversation, models
from pydeltamem.cli import demo
from pydeltamem.cli.main import main
from pydeltamem.cli.picture import picture
from pydeltamem.errors import FetchError, OutputError
from pydeltamem.evals.scoring import holds
from pydeltamem.evals.stories import STORIES
from pydeltamem.models import default_files
from test_cli import deltamem


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_the_memory_answers_and_the_frozen_model_does_not(strategy):
    # test_evaluate.py checks how much is recalled
    result = deltamem("demo", "--seed", "4", "--delay", "0", "--strategy", strategy)
    assert result.returncode == 0, result.stderr
    assert "The text is thrown away" in result.stdout
    right, alone = map(int, re.search(r"right\s+(\d) of 4\s+(\d) of 4", result.stdout).groups())
    assert right >= 3 and alone == 0, result.stdout
    assert result.stdout.count("The memory after that") == 1


def test_facts_of_ones_own():
    said = "My name is Anna.\nI live in Oslo.\n/forget\nWhere do I live?\n/reset\nWhere do I live?\n/nonsense\n/quit\n"
    result = deltamem("demo", "--interactive", "--strategy", "msw", input=said)
    assert result.returncode == 0, result.stderr
    before, _, after = result.stdout.partition("of text are gone, the memory stays.")
    recalled, _, emptied = after.partition("Text and memory are empty.")
    assert "Oslo" in recalled and "Oslo" not in emptied, result.stdout
    assert before.count("the memory changed by") == 2 and "changed" not in after  # questions only read
    assert result.stdout.count("/forget") >= 2  # the help, again after an unknown command


def test_the_picture_comes_at_the_end():
    result = deltamem("demo", "--interactive", "--strategy", "msw", input="I live in Oslo.\nMy name is Anna.\n")
    assert result.stdout.count("The memory after that") == 1
    assert result.stdout.rpartition("the memory changed by")[2].count("The memory after that") == 1


def test_wrong_options_are_named():
    result = deltamem("demo", "--facts", "99")
    assert result.returncode == 2 and "--facts" in result.stderr
    plain = ["-m", default_files()[0]]
    for options, name in (
        (["-m", "x.gguf"], "x.gguf"),
        (plain, "--deltamem"),
        ([*plain, "--deltamem", "y.gguf", "--strategy", "msw"], "--strategy"),
    ):
        result = deltamem("demo", *options)
        assert result.returncode == 1 and name in result.stderr and "Traceback" not in result.stderr


def test_a_packed_model_needs_no_adapter(tmp_path):
    """Here and in evaluations, as in other commands."""
    model, adapters = default_files()
    packed = tmp_path / "packed.gguf"
    assert main(["pack", str(model), str(adapters["msw"]), "-o", str(packed)]) == 0
    result = deltamem("demo", "-m", packed, "--seed", "1", "--delay", "0")
    assert result.returncode == 0 and "The memory after that" in result.stdout, result.stderr
    recall = ["eval", "recall", "-m", packed, "-n", "1", "--tasks", "recall", "--facts", "1", "-t", "1", "--json", "-"]
    result = deltamem(*recall)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["answers"][0]["right"]) >= {"memory", "full"}
    paragraph = {"context": "Anna lives in Oslo.", "qa": [["Where does Anna live?", ["Oslo"]]]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(paragraph))
    result = deltamem("eval", "qa", "-m", packed, "--data", tmp_path / "qa.jsonl", "-o", tmp_path / "o", "-c", "512")
    assert result.returncode == 0 and "| deltamem/memory | 1 |" in result.stdout, result.stderr


#
# which model the demo shows
#


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of the package's models, as it is without a memory for the real one."""
    model, memories = default_files()
    for path in (model, *memories.values()):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    return tmp_path


SHOWN = ["demo", "--seed", "1", "--delay", "0"]


def test_the_real_model_is_shown_where_there_is_one(package, monkeypatch, capsys):
    """A person's messages in English, to the model that the name stands for."""
    shutil.copy(package / "default-msw.gguf", package / "smollm2-msw.gguf")
    named = []
    monkeypatch.setattr(demo, "model_file", lambda name: named.append(name) or str(package / "default.gguf"))
    assert main(SHOWN) == 0
    shown = capsys.readouterr()
    assert named == ["smollm2"] and not shown.err
    assert any(all(user in shown.out for user, _ in story.turns) for story in STORIES)


@pytest.mark.parametrize("kind", [FetchError, OutputError])
def test_else_the_small_one_and_a_line_says_why(package, monkeypatch, capsys, kind):
    assert main(SHOWN) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "smollm2" in line

    def cannot(name):
        raise kind(f"{name}: no network")

    shutil.copy(package / "default-msw.gguf", package / "smollm2-msw.gguf")
    monkeypatch.setattr(demo, "model_file", cannot)
    assert main(SHOWN) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no network" in line
    assert main([*SHOWN, "--strategy", "tsw"]) == 0
    assert not capsys.readouterr().err  # it was asked for


def test_a_model_that_is_named(package, capsys):
    assert main([*SHOWN, "-m", str(package / "default.gguf"), "--deltamem", str(package / "default-tsw.gguf")]) == 0
    shown = capsys.readouterr().out
    assert any(story.turns[0][0] in shown for story in STORIES)


def test_what_is_asked_was_told():
    for story in STORIES:
        for question, values in story.asks:
            assert any(holds(user, value) for user, _ in story.turns for value in values), question
            assert not any(holds(question, value) for value in values), question


def test_examples_of_what_to_tell(package):
    said = "/facts\n/quit\n"
    small = deltamem("demo", "--interactive", "--strategy", "msw", input=said).stdout
    model = ["-m", package / "default.gguf", "--deltamem", package / "default-msw.gguf"]
    real = deltamem("demo", "--interactive", *model, input=said).stdout
    small, real = (" ".join(text.split()) for text in (small, real))
    without = " ".join(deltamem("demo", "--interactive", "--strategy", "msw", input="/quit\n").stdout.split())
    assert small.count("?") >= without.count("?") + 5
    assert any(all(question in real for question, _ in story.asks) for story in STORIES)


def test_a_line_that_does_not_fit_changes_nothing():
    result = deltamem("demo", "--interactive", "--strategy", "msw", input="word " * 2000 + "\nI live in Oslo.\n")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.count("the memory changed by") == 1


@pytest.mark.parametrize("at_terminal", [True, False])
def test_ctrl_c_ends_the_reply_at_a_terminal_and_the_demo_over_a_pipe(monkeypatch, capsys, at_terminal):
    say = Conversation.say

    def interrupted(conversation, content):
        said = say(conversation, content)
        if content.endswith("?"):
            raise KeyboardInterrupt
        return said

    monkeypatch.setattr(Conversation, "say", interrupted)
    monkeypatch.setattr(demo.prompt, "said", lambda commands: iter(["I live in Oslo.", "Where?", "I live in Lima."]))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: at_terminal, raising=False)
    assert main(["demo", "--interactive", "--strategy", "msw"]) == (0 if at_terminal else 130)
    out = capsys.readouterr().out
    assert out.count("the memory changed by") == 1 + at_terminal and out.count("the memory was read") == at_terminal


def test_messages_come_one_by_one_at_a_terminal_only(package, monkeypatch):
    for forced, n in (("1", 7), ("", 0)):  # four facts and three other messages
        pauses = []
        monkeypatch.setattr(demo.time, "sleep", pauses.append)
        monkeypatch.setenv("FORCE_COLOR", forced)
        assert main(["demo", "--seed", "1", "--delay", "0.5", "--strategy", "msw"]) == 0
        assert pauses == [0.5] * n


@pytest.mark.parametrize("delay", ["-1", "nan", "1e9", "x"])
def test_a_delay_that_is_none(delay, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--delay", delay])
    assert delay in capsys.readouterr().err


def test_a_picture_of_an_odd_number_of_rows():
    """In colour a line shows two rows; the last one stands alone."""
    shown = picture(np.ones((3, 2), np.float32), 1.0, True, "title").plain
    assert shown == "title\n▀▀\n▀▀\n"
