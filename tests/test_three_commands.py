"""From two PyTorch directories to a conversation: the README's three commands, with a tiny model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the model is PyTorch's")
transformers = pytest.importorskip("transformers", reason="llama.cpp's converter needs transformers (extra: convert)")
pytest.importorskip("sentencepiece", reason="the model's tokenizer is SentencePiece's (extra: convert)")

REPOSITORY = Path(__file__).parents[1]


def commands():
    """As they stand in the README."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(r"From two PyTorch directories.*?\n\n((?: {4}deltamem [^\n]*\n)+)", text, re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()]


@pytest.fixture
def directories(tmp_path, monkeypatch):
    """MODEL_DIR and CHECKPOINT_DIR, as transformers and the published code write them."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    import backbone

    from pydeltamem.reference import DeltaMem, DeltaMemConfig

    model_dir, checkpoint_dir = tmp_path / "MODEL_DIR", tmp_path / "CHECKPOINT_DIR"
    model_dir.mkdir()
    tokenizer = backbone.train_tokenizer(model_dir, seed=0, vocab_size=512, n=200)
    backbone.write_hf_tokenizer(model_dir, tokenizer)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=tokenizer.vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            bos_token_id=tokenizer.piece_to_id("<s>"),
            eos_token_id=tokenizer.piece_to_id(backbone.END),
        )
    )
    model.save_pretrained(model_dir)
    config = DeltaMemConfig(rank=8, output_init="random", delta_heads=("q", "o"))
    DeltaMem(model, config).save_checkpoint(checkpoint_dir)
    return model_dir, checkpoint_dir


def test_from_two_directories_to_a_chat(directories, tmp_path):
    lines = commands()
    assert [line[:2] for line in lines] == [["deltamem", c] for c in ("convert-base", "convert", "chat")]
    for said in ("My name is Ada.\n", "What is my name?\n"):  # the second time the files are there
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
