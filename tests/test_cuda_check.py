"""`make cuda-check` (tools/cuda_check.py) without a GPU: how it reads the output of other programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cuda_check

NSYS = """\
Generating SQLite file report.sqlite

Time (%),Total Time (ns),Instances,Avg (ns),Name
60.0,6000,3,2000.0,"void mul_mat_vec<__half, (int)1>(const T1 *)"
40.0,4000,2,2000.0,"void deltamem::read_kernel<(int)8, (bool)0>(const deltamem::cuda_read_args)"
"""
NCU = """\
==PROF== Connected to process 1
loaded
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","void deltamem::correct_kernel<__half, 4, 1>(const T1 *)","gpu__time_duration.sum","ns","1,500"
"1","1","void deltamem::correct_kernel<__half, 4, 1>(const T1 *)","gpu__time_duration.sum","ns","2,500"
"2","1","k(int)","gpu__time_duration.sum","ns","100"
"""


def test_profilers_tables():
    assert list(cuda_check.nsys_kernels(NSYS).values()) == [(3, 6000.0), (2, 4000.0)]
    assert list(cuda_check.ncu_kernels(NCU).values()) == [(2, 4000.0), (1, 100.0)]
    for text in ("", "SKIPPED: no CUDA kernel data\n", "==ERROR== ERR_NVGPUCTRPERM\n"):
        assert cuda_check.nsys_kernels(text) == {} and cuda_check.ncu_kernels(text) == {}


@pytest.mark.parametrize(
    "summary, ok",
    [
        ("12 passed in 3.21s", True),
        ("12 passed, 1 warning in 3.21s", True),
        ("40 skipped in 0.80s", False),
        ("12 passed, 1 skipped in 3.21s", False),
        ("1 failed, 12 passed in 3.21s", False),
        ("no tests ran in 0.01s", False),
        ("", False),
    ],
)
def test_a_skip_is_no_pass(summary, ok):
    assert cuda_check.all_passed(f"...\n{summary}\n") is ok


def test_a_step(tmp_path):
    """Status, time out and what the output must say; a failed profiler fails nothing else."""
    check = cuda_check.Check(tmp_path)
    assert check.run("good", "echo", "1 passed", timeout=60, accept=cuda_check.all_passed) == "1 passed\n"
    assert check.run("skips", "echo", "1 skipped", timeout=60, accept=cuda_check.all_passed) is None
    assert check.run("profiler", "false", timeout=60, counts=False) is None
    assert check.run("slow", "sleep", "60", timeout=0.1) is None
    assert check.run("missing", tmp_path / "no-program", timeout=60) is None
    assert check.failed == ["skips", "slow", "missing"]
    table = (tmp_path / "report" / "summary.txt").read_text()
    assert "FAILED (not all was run)" in table and "no-program: No such file" in table


def ends(pid):
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)  # until the process that inherits it has taken its status


def test_what_a_step_started_ends_with_it(tmp_path):
    """A build's compilers must not go on beside those of the next run."""
    check = cuda_check.Check(tmp_path)
    pid = tmp_path / "pid"
    assert check.run("slow", "sh", "-c", f"sleep 60 & echo $! > {pid}; wait", timeout=1) is None
    ends(int(pid.read_text()))


def test_ctrl_c_ends_what_a_step_started(tmp_path):
    pid = tmp_path / "pid"
    program = """
import pathlib, sys
from cuda_check import Check
Check(pathlib.Path(sys.argv[1])).run("slow", "sh", "-c", f"echo $$ > {sys.argv[1]}/pid; sleep 60", timeout=60)
"""
    folder = Path(cuda_check.__file__).parent
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=folder, stderr=subprocess.DEVNULL) as check:
        while not pid.exists() or not pid.read_text():
            time.sleep(0.05)
        check.send_signal(signal.SIGINT)
    ends(int(pid.read_text()))


def test_no_step_after_the_time_is_up(tmp_path):
    check = cuda_check.Check(tmp_path, seconds=0)
    assert check.run("late", "touch", tmp_path / "touched", timeout=60) is None
    assert check.failed == ["late"] and not (tmp_path / "touched").exists()
    assert "late" in (tmp_path / "report" / "summary.txt").read_text()
