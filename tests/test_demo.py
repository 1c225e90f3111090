"""deltamem demo: what a newcomer sees first."""

from __future__ import annotations

import re

import pytest

from test_cli import deltamem


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_the_memory_answers_and_the_frozen_model_does_not(strategy):
    # how much is recalled, on the whole, test_evaluate.py asks
    result = deltamem("demo", "--seed", "4", "--delay", "0", "--strategy", strategy)
    assert result.returncode == 0, result.stderr
    assert "The text is thrown away" in result.stdout
    right, alone = map(int, re.search(r"right\s+(\d) of 4\s+(\d) of 4", result.stdout).groups())
    assert right >= 3 and alone == 0, result.stdout


def test_facts_of_ones_own():
    said = "My name is Anna.\nI live in Oslo.\n/forget\nWhere do I live?\n/reset\nWhere do I live?\n/nonsense\n/quit\n"
    result = deltamem("demo", "--interactive", input=said)
    assert result.returncode == 0, result.stderr
    before, _, after = result.stdout.partition("of text are gone, the memory stays.")
    recalled, _, emptied = after.partition("Text and memory are empty.")
    assert "Oslo" in recalled and "Oslo" not in emptied, result.stdout
    assert "the memory changed by" in before
    assert result.stdout.count("/forget") >= 2  # the help, again after an unknown command


def test_wrong_options_are_named():
    result = deltamem("demo", "--facts", "99")
    assert result.returncode == 2 and "--facts" in result.stderr
