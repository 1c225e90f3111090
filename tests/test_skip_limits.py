"""`pytest --strict-skips`, with which CI fails if a test skips that must not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from skip_limits import ALLOWED

REASON, (FILE, *_) = next(iter(ALLOWED.items()))

TESTS = """
import pytest

def test_that_runs():
    pass

@pytest.mark.parametrize("i", range(100))
def test_that_skips(i):
    pytest.skip({reason!r})

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""
WHOLE_FILE = "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"


def run(folder, *options):
    command = [sys.executable, "-m", "pytest", "-p", "skip_limits", "-p", "xdist", "-c", os.devnull, *options]
    # without the other plugins, which take long to load
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run([*command, "--rootdir", folder, folder], capture_output=True, text=True, env=env)
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("file", "reason", "ok"),
    [
        (FILE, f"{REASON}: more", True),
        ("test_it.py", f"{REASON}: more", False),
        (FILE, "no such tool", False),
    ],
)
def test_a_skip_that_is_not_allowed_fails_the_run(tmp_path, file, reason, ok):
    (tmp_path / file).write_text(TESTS.format(reason=reason))
    status, output = run(tmp_path, "--strict-skips")
    assert (status == pytest.ExitCode.OK) is ok, output
    assert ok or f"{file}: 100 skipped: {reason}" in output.rpartition("skip_limits.py")[2]
    assert run(tmp_path)[0] == pytest.ExitCode.OK  # without the option skips fail nothing


def test_a_file_that_skips_as_a_whole(tmp_path):
    (tmp_path / FILE).write_text(TESTS.format(reason=REASON))
    (tmp_path / "test_whole.py").write_text(WHOLE_FILE.format(reason="no such tool"))
    status, output = run(tmp_path, "--strict-skips")
    assert status == pytest.ExitCode.TESTS_FAILED and "no such tool" in output.rpartition("skip_limits.py")[2]


def test_in_several_processes(tmp_path):
    for file in (FILE, "test_it.py"):
        (tmp_path / file).write_text(TESTS.format(reason=REASON))
    (tmp_path / "test_whole.py").write_text(WHOLE_FILE.format(reason="no such tool"))
    status, output = run(tmp_path, "--strict-skips", "-n2", "--dist=loadfile")
    assert status == pytest.ExitCode.TESTS_FAILED
    told = output.rpartition("skip_limits.py")[2]
    assert f"test_it.py: 100 skipped: {REASON}" in told and "test_whole.py: 1 skipped: no such tool" in told
    assert FILE not in told


def test_the_files_that_may_skip_exist():
    """And have the reason themselves, or the plugin that their fixtures are from."""
    for reason, files in ALLOWED.items():
        for file in files:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            plugins = re.findall(r'^pytest_plugins = \["(\w+)"\]', text, re.MULTILINE)
            texts = [text, *((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8") for name in plugins)]
            assert any(reason in each for each in texts)
