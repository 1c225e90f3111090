"""From two PyTorch directories to a conversation: the three commands of docs/how-to/convert.md, with a tiny model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def commands():
    """As they stand in the page."""
    text = (REPOSITORY / "docs" / "how-to" / "convert.md").read_text(encoding="utf-8")
    block = re.search(r"^ {4}deltamem convert-base .*\n(?: {4}deltamem .*\n)+", text, re.MULTILINE)
    return [shlex.split(line) for line in block[0].splitlines()]


def test_from_two_directories_to_a_chat(directories, tmp_path):
    lines = commands()
    assert [line[:2] for line in lines] == [["deltamem", c] for c in ("convert-base", "convert", "chat")]
    for said in ("My name is Ada.\n", "What is my name?\n"):  # the second time the files exist
        for line in lines:
            options = ["-n", "8", "--temp", "0", "-t", "1"] if line[1] == "chat" else []
            done = subprocess.run(
                [sys.executable, "-m", "pydeltamem.cli", *line[1:], *options],
                cwd=tmp_path, input=said, capture_output=True, encoding="utf-8", errors="replace", timeout=300,
            )  # fmt: skip
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        memory = tmp_path / "ada.memory"
        assert memory.is_file()
    shown = subprocess.run(
        [sys.executable, "-m", "pydeltamem.cli", "memory", "show", memory],
        capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0 and "2 layers" in shown.stdout, shown.stdout + shown.stderr
