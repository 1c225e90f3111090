"""Converts a model without a tokenizer by llama.cpp's converter: python convert_tiny.py CONVERTER_DIR HF_DIR OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path

converter, directory, out = sys.argv[1:]
sys.path[:0] = [converter, f"{converter}/gguf-py"]

import gguf  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402


def set_vocab(self):
    """A vocabulary without tokens, only their number."""
    self.gguf_writer.add_tokenizer_model("none")
    if not any("vocab_size" in key for data in self.gguf_writer.kv_data for key in data):
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


hparams = ModelBase.load_hparams(Path(directory), False)
model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
model_class.set_vocab = set_vocab
if hasattr(model_class, "no_mtp"):
    model_class.no_mtp = True  # the model has no layers that predict further tokens
tokenizer = Path(directory, "tokenizer.json")
if not tokenizer.exists():  # Gemma 3's class asks it for the number of tokens
    vocab = {str(i): i for i in range(hparams["vocab_size"])}
    tokenizer.write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
add = gguf.GGUFWriter.add_vocab_size
written = set()


def add_once(self, size):
    if id(self) not in written:
        written.add(id(self))
        add(self, size)


gguf.GGUFWriter.add_vocab_size = add_once
model_class(Path(directory), gguf.LlamaFileType.ALL_F32, Path(out)).write()
