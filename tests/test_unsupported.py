"""Attaching an adapter refuses, by name, an architecture whose graph does not pass through the hooks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pydeltamem import AdapterError, DeltaMemLlama
from refusals import refuses


def rewrite(source, target, architecture, more_tensors=()):
    """Copies a GGUF under another architecture's name, with more tensors (name, values)."""
    reader = gguf.GGUFReader(source)
    before = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *sub = field.types
            key = key.replace(f"{before}.", f"{architecture}.")
            writer.add_key_value(key, field.contents(), kind, sub[-1] if sub else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in more_tensors:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def bitnet(base, tmp_path):
    """BitNet: SmolLM3's sizes, q, k and v as usual, but a norm between attention and the output projection."""
    n_embd, n_ff, n_layer = 96, 192, 5
    norms = [("attn_sub_norm", n_embd), ("ffn_sub_norm", n_ff)]
    ones = [(f"blk.{i}.{name}.weight", np.ones(n, np.float32)) for i in range(n_layer) for name, n in norms]
    return rewrite(base("smollm3"), tmp_path / "bitnet.gguf", "bitnet", ones)


def test_output_projection_out_of_reach(bitnet, adapter, tmp_path):
    memory = rewrite(adapter("smollm3", "tsw_qo"), tmp_path / "adapter.gguf", "bitnet")
    with refuses(AdapterError, memory, "bitnet", "layer 0"):
        DeltaMemLlama(model_path=bitnet, deltamem_path=memory, n_ctx=256, verbose=False)
    # the model itself still works
    llm = DeltaMemLlama(model_path=bitnet, n_ctx=256, verbose=False, logits_all=True)
    llm.eval([1, 5, 9])
    assert np.isfinite(llm.scores[:3]).all()
    llm.close()


def test_what_is_in_reach_works(bitnet, adapter, tmp_path):
    """The same model takes an adapter that corrects q and v alone."""
    memory = rewrite(adapter("smollm3", "standard_uncoupled_scalar_gate"), tmp_path / "adapter.gguf", "bitnet")
    llm = DeltaMemLlama(model_path=bitnet, deltamem_path=memory, n_ctx=256, verbose=False, logits_all=True)
    llm.eval([1, 5, 9, 11])
    assert llm.memory.state.any() and np.isfinite(llm.scores[:4]).all()
    llm.close()


def test_attaching_fails_and_the_context_is_as_it_was(bitnet, adapter, tmp_path):
    """A refused adapter leaves the one that was attached, and its state."""
    from pydeltamem.runtime import library

    good = rewrite(adapter("smollm3", "standard_uncoupled_scalar_gate"), tmp_path / "good.gguf", "bitnet")
    bad = rewrite(adapter("smollm3", "tsw_qo"), tmp_path / "bad.gguf", "bitnet")
    llm = DeltaMemLlama(model_path=bitnet, deltamem_path=good, n_ctx=256, verbose=False)
    llm.eval([1, 5, 9, 11])
    state = llm.memory.state
    handle = library.llama_deltamem_adapter_load(llm.model, str(bad).encode())
    with library.errors_held() as log:
        assert library.llama_deltamem_attach(llm.ctx, handle) == -1
        log.clear()
    library.llama_deltamem_adapter_free(handle)
    assert np.array_equal(llm.memory.state, state)
    llm.eval([12])
    assert not np.array_equal(llm.memory.state, state)
    llm.close()
