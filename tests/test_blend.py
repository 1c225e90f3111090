"""Averages of checkpoints (recipes/blend.py)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from blend import blend
from conftest import ROOT
from pydeltamem.bench.synthetic import write_adapter_checkpoint
from pydeltamem.errors import CheckpointError, InputError, OutputError
from pydeltamem.formats.checkpoint import Checkpoint
from refusals import refuses


@pytest.fixture
def two(golden_dir, tmp_path):
    """Checkpoints of one configuration."""
    base = golden_dir / "qwen3" / "base-f32.gguf"
    for seed, name in ((1, "a"), (2, "b")):
        write_adapter_checkpoint(tmp_path / name, base, seed=seed)
    return tmp_path / "a", tmp_path / "b"


def test_weights_are_added_by_their_shares(two, tmp_path):
    a, b = two
    blend([(a, 3), (b, 1)], tmp_path / "out")
    first, second, found = (Checkpoint(folder).tensors for folder in (a, b, tmp_path / "out"))
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        expected = 0.75 * first[name] + 0.25 * second[name]
        assert np.abs(tensor - expected).max() <= 2.0**-11 * np.abs(expected).max()  # float16 rounds


def test_the_command(two, tmp_path):
    command = [sys.executable, ROOT / "recipes" / "blend.py", tmp_path / "out", f"{two[0]}=1", f"{two[1]}=0"]
    assert subprocess.run(command).returncode == 0
    for name, tensor in Checkpoint(tmp_path / "out").tensors.items():
        assert np.array_equal(tensor, Checkpoint(two[0]).tensors[name].astype(np.float16))


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_everybody_may_read_a_checkpoint_as_the_umask_says(two, golden_dir, tmp_path):
    """Found: safetensors' own writer made the weights readable by their owner only."""
    old = os.umask(0o022)
    try:
        blend([(two[0], 1)], tmp_path / "out")
        write_adapter_checkpoint(tmp_path / "made", golden_dir / "qwen3" / "base-f32.gguf")
    finally:
        os.umask(old)
    for folder in ("out", "made"):
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / folder).iterdir()} == {0o644}


def test_outputs_and_writes_are_changed_without_training(two, tmp_path):
    a, _ = two
    blend([(a, 1)], tmp_path / "out", outputs=0.5, write_bias=1)
    first, found = (Checkpoint(folder).tensors for folder in (a, tmp_path / "out"))
    changed = set()
    for name, tensor in found.items():
        kind = name.rpartition(".")[2]
        factor = 0.5 if kind in ("delta_q_proj", "delta_k_proj", "delta_v_proj", "delta_o_proj") else 1
        expected = factor * first[name] + (kind == "beta_bias")
        assert np.abs(tensor - expected).max() <= 2.0**-11 * np.abs(expected).max()  # float16 rounds
        if not np.array_equal(expected, first[name]):
            changed.add(kind)
    assert {"delta_q_proj", "delta_o_proj", "beta_bias"} <= changed
    for outputs in (float("nan"), 1e9):  # the second makes infinities of float16
        with refuses(InputError, "--outputs"):
            blend([(a, 1)], tmp_path / "other", outputs=outputs)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_averaged(two, golden_dir, tmp_path):
    write_adapter_checkpoint(tmp_path / "c", golden_dir / "qwen3" / "base-f32.gguf", alpha=8.0)
    out = tmp_path / "out"
    with refuses(InputError, tmp_path / "c", two[0]):
        blend([(two[0], 1), (tmp_path / "c", 1)], out)
    with refuses(CheckpointError, tmp_path / "none"):
        blend([(two[0], 1), (tmp_path / "none", 1)], out)
    for shares in ((0, 0), (1, -0.5), (1, float("nan"))):
        with refuses(InputError):
            blend(list(zip(two, shares)), out)
    assert not out.exists()
    out.mkdir()
    (out / "delta_mem_adapter.safetensors").write_text("mine")
    with refuses(OutputError, out):
        blend([(two[0], 1)], out)
    assert (out / "delta_mem_adapter.safetensors").read_text() == "mine"


def test_a_checkpoint_that_is_there_stays(two, tmp_path):
    """Weights that would be read instead of the blend, and what is averaged, under whatever name."""
    a, b = two
    (tmp_path / "link").symlink_to(a)
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "delta_mem_adapter.pt").write_bytes(b"weights")
    (trained / "delta_mem_config.json").write_text("{}")
    for out, name in ((trained, trained / "delta_mem_adapter.pt"), (a, a), (tmp_path / "link", tmp_path / "link")):
        before = {path: path.read_bytes() for path in out.iterdir()}
        with refuses(InputError, name):
            blend([(a, 1), (b, 1)], out)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    for shares in ((1, 1), (1, 0)):
        blend(list(zip(two, shares)), tmp_path / "out")
    for name, tensor in Checkpoint(tmp_path / "out").tensors.items():
        assert np.array_equal(tensor, Checkpoint(a).tensors[name].astype(np.float16))
