"""The golden vectors as the tests read them: lays out `tests/golden` in full, and computes a digest of each file.

`tests/golden/README.md` says what is in the files. The repository stores each array once. So `lay_out` copies the files
of `examples/tiny`, and writes the Hugging Face weights, which are the GGUF's under other names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).resolve().parent / "golden"
TINY = ROOT / "examples" / "tiny"
CHECKSUMS = SHIPPED / "checksums.json"

ARCHITECTURES = ["qwen3", "smollm3"]
CASES = [
    "layers_subset_scale_layer",
    "msw4_qo",
    "no_lambda_raw_qk",
    "o_rmsnorm_scale_head",
    "qkvo_lambda_outside",
    "ssw_message",
    "ssw_sentence",
    "standard_uncoupled_scalar_gate",
    "tsw_qo",
]

# Hugging Face's names of tensors, of a layer and others, by their names in the GGUF
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


def hugging_face_weights(base: Path, config: dict) -> dict[str, np.ndarray]:
    """The backbone's tensors under Hugging Face's names, with the rows of q and k in its order.

    llama.cpp's converter interleaves the halves of each head of SmolLM3 (LlamaModel.permute); this undoes it.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in gguf.GGUFReader(base).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        rows = np.array(tensor.data)
        if name in heads and config["model_type"] == "smollm3":
            rows = rows.reshape(heads[name], -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        prefix = "" if layer is None else f"model.layers.{layer}."
        weights[f"{prefix}{NAMES[name]}.weight"] = rows
    return weights


def lay_out(folder: Path) -> Path:
    """Writes the golden vectors to `folder`, laid out as those that they were taken from."""
    for arch in ARCHITECTURES:
        shutil.copytree(SHIPPED / arch, folder / arch)
        shutil.copy(SHIPPED / "tokenizer.model", folder / arch / "hf")
    shutil.copy(TINY / "base.gguf", folder / "qwen3" / "base-f32.gguf")
    shutil.copytree(TINY / "adapter", folder / "qwen3" / "tsw_qo", dirs_exist_ok=True)
    for arch in ARCHITECTURES:
        config = json.loads((folder / arch / "hf" / "config.json").read_text())
        weights = hugging_face_weights(folder / arch / "base-f32.gguf", config)
        safetensors.numpy.save_file(weights, folder / arch / "hf" / "model.safetensors", {"format": "pt"})
    return folder


def yardstick() -> Path | None:
    """What `tests/golden` was taken from, if it is there: $DELTAMEM_GOLDEN, else ../shared/golden."""
    path = Path(os.environ.get("DELTAMEM_GOLDEN") or ROOT.parent / "shared" / "golden")
    return path if path.is_dir() else None


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, by name: its arrays, or of another file its bytes."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".pt":
        import torch

        return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        text = json.dumps(keys, sort_keys=True).encode()
        return {"": np.frombuffer(text, np.uint8), **{tensor.name: tensor.data for tensor in reader.tensors}}
    return {"": np.frombuffer(path.read_bytes(), np.uint8)}


def digest(path: Path) -> str:
    """SHA-256 of a file's arrays with their names, types and shapes: the same however the file packs them."""
    sha = hashlib.sha256()
    for name, array in sorted(arrays_of(path).items()):
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Digests of the files of both architectures in `folder`, by path in it."""
    files = sorted(path for arch in ARCHITECTURES for path in (folder / arch).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}
