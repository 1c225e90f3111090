"""The frozen model to train on: a Hugging Face directory, or a dequantised GGUF, so that training sees what runs."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import DeltaMemError, InputError, ModelError, no_file, shown
from ..formats.gguf_header import Header
from ..hub import PACKAGES
from ..runtime.names import nearest
from .tokenizer import GgufTokenizer


def load_frozen(path: str | os.PathLike[str], dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face directory or of a GGUF that transformers can dequantise.

    dtype "auto": bfloat16 for a GGUF, or a directory of bfloat16, if the processor multiplies it; else float32.
    Raises ModelError; InputError if the device is not available.
    """
    path = Path(path)
    is_file = os.path.isfile(path)
    if not os.path.exists(path):
        raise ModelError(no_file(path, "model file or directory") + nearest(str(path), PACKAGES))
    if not is_file and not os.path.isfile(path / "config.json"):
        raise ModelError(f"{path}: this is neither a GGUF nor a Hugging Face model directory: it has no config.json")
    try:
        torch.zeros(1, device=device).item()  # the device "meta" holds no value
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {device}: {shown(str(error).splitlines()[0])}") from error
    if is_file:
        _check_file(path)
        folder, options = os.path.abspath(path.parent), {"gguf_file": path.name}
    else:
        folder, options = str(path), {}
    wanted = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if dtype == "auto" and (is_file or not multiplies_bfloat16(device)):
        wanted = torch.bfloat16 if is_file and multiplies_bfloat16(device) else torch.float32
    transformers_logging.disable_progress_bar()
    quiet = contextlib.redirect_stderr(io.StringIO()) if is_file else contextlib.nullcontext()
    try:
        with quiet:  # it shows a progress bar for each tensor
            if is_file:
                tokenizer: Any = GgufTokenizer(path)
                options["config"] = _config(path, folder)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            # transformers dequantises to float32; with another dtype it warns and rounds the same way
            loaded = torch.float32 if is_file else wanted
            found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=loaded, output_loading_info=True, **options)
    except DeltaMemError:
        raise
    except ImportError as error:  # accelerate, gguf
        raise ModelError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # transformers passes on whatever its readers raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"{path}: cannot be loaded: {reason}") from error
    model, missing = found[0], found[1]["missing_keys"]
    if missing:  # transformers makes them up
        raise ModelError(f"{path}: is incomplete, no weights for {min(missing)}: are files missing?")
    if is_file:
        model = model.to(wanted)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _check_file(path: Path) -> None:
    """Raises ModelError if the file is no whole model."""
    header = Header.of_model(path)
    if header.keys.get("general.type") == "adapter":
        raise ModelError(f"{path}: is an adapter: name the model that it is for")
    if len(header.files) > 1:
        raise ModelError(
            f"{path}: is a model in {len(header.files)} parts, training reads one file: llama-gguf-split --merge"
        )


def _config(path: Path, folder: str) -> Any:
    """transformers' configuration of a GGUF, with the file's width of a head instead of the family's default."""
    config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    keys = Header(os.fspath(path)).keys
    size = keys.get(f"{keys.get('general.architecture')}.attention.key_length")
    if size and hasattr(config, "head_dim"):
        config.head_dim = int(size)
    return config


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device != "cpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    cpu: Any = torch.cpu
    return any(getattr(cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
