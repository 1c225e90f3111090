"""Architectures that the golden data does not have: llama.cpp's graph with the hooks against the reference in PyTorch.

The models are tiny and random, and converted by llama.cpp's own converter. `make architectures` prints the table of
docs/reference/architectures.md and writes pydeltamem/runtime/architectures.json, from which `deltamem architectures`
knows what is verified.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import pydeltamem
from conftest import ROOT
from native_context import open_context
from pydeltamem.convert import hf
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import ModelError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import Checkpoint
from pydeltamem.formats.gguf_header import Header
from pydeltamem.runtime import library
from pydeltamem.runtime.architectures import RESULTS, tiny_models
from pydeltamem.train.reference import DeltaMem, DeltaMemConfig
from refusals import refuses
from test_reference import ARCHITECTURES, randomise, tiny, tokens

# float32 against float32, through two layers and a softmax
BOUND = 1e-8

# llama.cpp looks GELU up in a table of F16 numbers: 2^-11 of each value, in the backbone alone too
GELU = {"Gemma2", "Gemma3Text", "Phi"}

# values that llama.cpp assumes
SETTINGS = {
    "Mistral": dict(sliding_window=None),
    "Qwen3Moe": dict(norm_topk_prob=True),
    "Gemma2": dict(query_pre_attn_scalar=16),
    "Gemma3Text": dict(query_pre_attn_scalar=16),
    "Phi": dict(num_key_value_heads=4, intermediate_size=192),
    # gpt-oss says truncate=False, and llama.cpp rounds to whole dimensions: 3e-11 in the backbone, 2e-7 with a memory
    # that sharpens its attention (docs/reference/architectures.md)
    "GptOss": dict(
        intermediate_size=64,
        rope_parameters=dict(
            rope_type="yarn",
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=True,
            rope_theta=150000.0,
            original_max_position_embeddings=4096,
        ),
    ),
    "Lfm2": dict(block_auto_adjust_ff_dim=False, head_dim=12),
    "Qwen3Next": dict(norm_topk_prob=True),
}

NAMES = [name for name in ARCHITECTURES if name not in ("OPT", "GPTJ", "Qwen3Next")]


def row(model):
    """A line of the table of docs/reference/architectures.md."""
    layers = ", ".join(map(str, model["layers"]))
    errors = " | ".join(f"{model[what]:.0e}" for what in ("backbone", "logits", "state"))
    return f"| {model['model']} | `{model['architecture']}` | {layers} | {errors} |"


def bound_of(name):
    return 2.0**-22 if name in GELU else BOUND


def nmse(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


@torch.no_grad()
def reference(name, folder):
    """A tiny model and a memory on it, both saved: tokens, logits [T, n_vocab] and state [L, H, r, r]."""
    model = tiny(name, **{**ARCHITECTURES[name], **SETTINGS.get(name, {})})
    # no target_layers: all with attention, which of a hybrid are not all
    memory = randomise(DeltaMem(model, DeltaMemConfig(rank=4, num_state_heads=2, delta_heads=tuple("qkvo"))))
    prompt = tokens(1, 14)
    logits = model(prompt).logits[0].numpy()
    state = memory.state[:, 0].numpy()
    memory.save_checkpoint(folder / "adapter")
    memory.remove()
    plain = model(prompt).logits[0].numpy()
    model.save_pretrained(folder / "hf")
    return prompt[0].tolist(), logits, state, plain, memory.layers


def convert(*folders):
    """Converts the models, in one process. Returns what it said."""
    script = [sys.executable, str(ROOT / "tools" / "convert_tiny.py"), str(hf.converter().parent)]
    paths = [str(folder / name) for folder in folders for name in ("hf", "base.gguf")]
    return subprocess.run([*script, *paths], capture_output=True, text=True).stderr


def converted(folder, said):
    """The model and the adapter as GGUF."""
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    assert base.exists(), said[-2000:]
    write_adapter(Checkpoint(folder / "adapter"), Base(base), adapter)
    return base, adapter


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """models(name): the reference, the model and the adapter of each that a test will ask for."""
    tests = [item for item in request.session.items if item.path == request.path and "models" in item.fixturenames]
    folders = {test.callspec.params["name"]: tmp_path_factory.mktemp("model") for test in tests}
    references = {name: reference(name, folder) for name, folder in folders.items()}
    said = convert(*folders.values())
    return lambda name: (references[name], *converted(folders[name], said))


@pytest.fixture(scope="module")
def results(request):
    """What was measured: of every model, to the file of $DELTAMEM_ARCHITECTURES and as the table of the page."""
    models = []
    yield models
    path = os.environ.get("DELTAMEM_ARCHITECTURES")
    if path and [model["model"] for model in models] == NAMES:
        versions = {
            "llama_cpp_python": library.LLAMA_CPP_VERSION,
            "pydeltamem": pydeltamem.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(path).write_text(json.dumps({**versions, "models": models}, indent=1) + "\n", encoding="utf-8")
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", *map(row, models), sep="\n")


@pytest.mark.parametrize("name", NAMES)
def test_architecture(models, name, results):
    (prompt, logits, state, plain, layers), base, adapter = models(name)
    with open_context(base) as context:
        without = context.decode([(token, 0) for token in prompt])
    with open_context(base, adapter) as context:
        got = context.decode([(token, 0) for token in prompt])
        got_state = context.state(0)
        n_layer = library.llama_deltamem_n_layer(context.adapter)
        hooked = [library.llama_deltamem_layer(context.adapter, i) for i in range(n_layer)]
    architecture = Header(base).keys["general.architecture"]
    errors = nmse(without, plain), nmse(got, logits), nmse(got_state, state)
    measured = dict(zip(("backbone", "logits", "state"), (float(f"{error:.0e}") for error in errors)))
    result = {"model": name, "architecture": architecture, "layers": hooked, **measured}
    assert hooked == layers
    assert nmse(logits, plain) > 1e-4, "the memory has no effect on the reference"
    bound = bound_of(name)
    assert errors[0] <= bound, "the backbone itself differs"
    assert errors[1] <= bound and errors[2] <= bound
    results.append(result)


def test_going_back_where_the_cache_holds_a_window_only(tmp_path, monkeypatch):
    """swa_full=False: what was overwritten is read again, without writing."""
    monkeypatch.setitem(SETTINGS, "Gemma3Text", {**SETTINGS["Gemma3Text"], "sliding_window": 16})
    reference("Gemma3Text", tmp_path)
    base, adapter = converted(tmp_path, convert(tmp_path))
    text = tokens(1, 300)[0].tolist()
    found = []
    for goes_back in (False, True):
        llm = pydeltamem.DeltaMemLlama(
            base, deltamem_path=adapter, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1,
            swa_full=False, type_k=0, type_v=0, verbose=False,
        )  # fmt: skip
        if goes_back:
            llm.eval(text)
            llm.n_tokens = 100
            llm.eval([7, 8, 9])
        else:
            llm.eval([*text[:100], 7, 8, 9])
        found.append((llm.logits, llm.memory.state))
        assert llm.memory.n_written == 103
        llm.close()
    assert nmse(found[1][0], found[0][0]) <= BOUND and nmse(found[1][1], found[0][1]) <= BOUND


@pytest.mark.skipif("DELTAMEM_ARCHITECTURES" in os.environ, reason="they are being made")
def test_the_results_in_the_package_are_of_this_library():
    """After another llama-cpp-python, or with other models: `make architectures`."""
    shipped = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert shipped["llama_cpp_python"] == library.LLAMA_CPP_VERSION
    assert [model["model"] for model in shipped["models"]] == NAMES
    for model in shipped["models"]:
        assert max(model["backbone"], model["logits"], model["state"]) <= bound_of(model["model"])
    page = (ROOT / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.count("|") == 7][2:] == [row(model) for model in shipped["models"]]


@pytest.mark.parametrize("name", ["Qwen3Next"])
def test_a_hybrid_that_goes_around_a_hook_is_refused(models, name):
    """llama.cpp's Qwen3-Next applies a gate between attention and output projection, outside of the common function."""
    _, base, adapter = models(name)
    with pytest.raises(AssertionError, match=r"'qwen3next'.* layer 1\b"), open_context(base, adapter):
        pass


@pytest.mark.parametrize("name", ["Qwen3Next"])
def test_a_projection_that_is_not_of_attention_is_refused(models, name):
    """Qwen3-Next's layers without attention have a fused projection, too; here narrower than k and v would be."""
    _, base, adapter = models(name)
    with open_context(base) as context:
        assert tiny_models().deltamem_tiny_adapter(context.model, 0, b"k", str(adapter).encode()) == 0
    with pytest.raises(AssertionError, match=r"'qwen3next'.* layer 0\b"), open_context(base, adapter):
        pass


@pytest.mark.parametrize("name", ["Gemma2"])
def test_a_prompt_in_pieces_is_the_same(models, name):
    """Sliding windows and the memory over several batches."""
    (prompt, logits, state, *_), base, adapter = models(name)
    with open_context(base, adapter) as context:
        got = np.concatenate([context.decode([(token, 0) for token in prompt[i : i + 3]]) for i in range(0, 14, 3)])
        assert nmse(got, logits) <= bound_of(name) and nmse(context.state(0), state) <= bound_of(name)


def test_a_model_without_a_tokenizer(tmp_path):
    reference("Llama", tmp_path)
    with refuses(ModelError, tmp_path / "hf"):
        hf.convert_base(tmp_path / "hf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
