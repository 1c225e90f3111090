"""`pytest --strict-skips`, with which CI fails if a test skips that must not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from skip_limits import ALLOWED

REASON, LIMIT = next(iter(ALLOWED.items()))

TESTS = """
import pytest

def test_that_runs():
    pass

@pytest.mark.parametrize("i", range({count}))
def test_that_skips(i):
    pytest.skip({reason!r})

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""
WHOLE_FILE = "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"


def run(folder, *options):
    command = [sys.executable, "-m", "pytest", "-p", "skip_limits", "--rootdir", folder, "-c", os.devnull, *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": ""}
    result = subprocess.run([*command, folder], capture_output=True, text=True, env=env)
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("count", "reason", "ok"),
    [
        (LIMIT, f"{REASON}: more", True),
        (LIMIT + 1, f"{REASON}: more", False),
        (1, "no such tool", False),
    ],
)
def test_a_skip_beyond_those_allowed_fails_the_run(tmp_path, count, reason, ok):
    (tmp_path / "test_it.py").write_text(TESTS.format(count=count, reason=reason))
    status, output = run(tmp_path, "--strict-skips")
    assert (status == pytest.ExitCode.OK) is ok, output
    assert ok or f"{count} skipped" in output.rpartition("skip_limits.py")[2]
    assert run(tmp_path)[0] == pytest.ExitCode.OK  # without the option skips fail nothing


def test_a_file_that_skips_as_a_whole(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS.format(count=1, reason=REASON))
    (tmp_path / "test_whole.py").write_text(WHOLE_FILE.format(reason="no such tool"))
    status, output = run(tmp_path, "--strict-skips")
    assert status == pytest.ExitCode.TESTS_FAILED and "no such tool" in output.rpartition("skip_limits.py")[2]
