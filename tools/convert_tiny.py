"""Converts models without a tokenizer by llama.cpp's converter: python convert_tiny.py CONVERTER_DIR HF_DIR OUT [...]

One that cannot be converted leaves no OUT; the others are. All in one process, as the converter takes seconds to load.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

converter, *paths = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]

import gguf  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402


def set_vocab(self):
    """A vocabulary without tokens, only their number."""
    self.gguf_writer.add_tokenizer_model("none")
    if not any("vocab_size" in key for data in self.gguf_writer.kv_data for key in data):
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


def convert(directory, out):
    hparams = ModelBase.load_hparams(directory, False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    model_class.set_vocab = set_vocab
    if hasattr(model_class, "no_mtp"):
        model_class.no_mtp = True  # the model has no layers that predict further tokens
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.exists():  # Gemma 3's class asks it for the number of tokens
        vocab = {str(i): i for i in range(hparams["vocab_size"])}
        tokenizer.write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    model_class(directory, gguf.LlamaFileType.ALL_F32, out).write()


add = gguf.GGUFWriter.add_vocab_size


def add_once(self, size):
    if not getattr(self, "has_vocab_size", False):
        self.has_vocab_size = True
        add(self, size)


gguf.GGUFWriter.add_vocab_size = add_once
failed = False
for directory, out in zip(paths[::2], paths[1::2], strict=True):
    try:
        convert(Path(directory), Path(out))
    except Exception:
        failed = True
        traceback.print_exc()
sys.exit(failed)
