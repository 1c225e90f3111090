"""Runs that train the backbone of the default model (recipes/backbone.py): one at a time in a folder, one log each."""

import json
import subprocess
import sys
from pathlib import Path

import backbone
from pydeltamem.formats.lock import held

ROOT = Path(__file__).parents[1]


def run(folder, *options):
    command = [sys.executable, ROOT / "recipes" / "backbone.py", folder, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with held(tmp_path):
        refused = run(tmp_path)
    assert refused.returncode == 1 and str(tmp_path) in refused.stderr and "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())


def test_the_log_is_of_one_run(tmp_path):
    backbone.train_tokenizer(tmp_path, seed=0, vocab_size=512, n=200)
    for steps in (2, 1):
        done = run(tmp_path, "--vocab", 512, "--steps", steps)
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in log] == [steps]
        (tmp_path / "checkpoint.pt").unlink()
