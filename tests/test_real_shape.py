"""A real shape end to end: Qwen3-0.6B with random weights and a random adapter, by the commands that a user types."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import ROOT
from pydeltamem.bench.synthetic import write_adapter_checkpoint, write_model

VOCAB = ROOT / "build" / "native" / "llama.cpp" / "models" / "ggml-vocab-qwen2.gguf"


def deltamem(*args):
    command = [sys.executable, "-m", "pydeltamem.cli", *map(str, args)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_qwen3_0_6b(tmp_path):
    """One adapter file, converted for a Q8_0 base, also runs on a Q4_K_M base with flash attention and an F16 cache."""
    if not VOCAB.is_file():
        pytest.skip(f"no {VOCAB}: the vocabulary is in the source that the build unpacks")
    base, small = tmp_path / "q8_0.gguf", tmp_path / "q4_k_m.gguf"
    checkpoint, adapter = tmp_path / "checkpoint", tmp_path / "adapter.gguf"
    write_model(base, "qwen3-0.6b", VOCAB, "q8_0")
    write_adapter_checkpoint(checkpoint, base)
    assert "28 of 28 layers" in deltamem("convert", checkpoint, "--base", base, "-o", adapter)

    prompt = ["-p", "The memory of a model", "--deltamem", adapter, "--no-display-prompt"]
    options = ["-n", 8, "-c", 512, "-t", 2, "-tb", 2, "--temp", 0, "--ignore-eos"]
    memories = [tmp_path / "a.memory", tmp_path / "b.memory"]
    assert deltamem("generate", "-m", base, *prompt, *options, "--save-memory", memories[0]).strip()
    base.unlink()  # keep only one file of half a GB at a time

    write_model(small, "qwen3-0.6b", VOCAB, "q4_k_m")
    cache = ["-fa", "on", "-ctk", "f16", "-ctv", "f16"]
    assert deltamem("generate", "-m", small, *prompt, *options, *cache, "--save-memory", memories[1]).strip()
    small.unlink()
    for memory in memories:  # it learned as it read
        assert "28 × 1 × 8 × 8" in deltamem("inspect", memory)
