"""The memory together with LoRA and control vectors, and several δ-mem adapters on one model."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest

from pydeltamem import AdapterError, Conversation
from pydeltamem.formats.gguf_header import Header
from pydeltamem.models import default_files

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88]

# prompts of a quantised model, and between them products of PyTorch in the same thread
BESIDE = """
import sys, numpy, torch
from pydeltamem import DeltaMemLlama

torch.set_num_threads(1)
llm = DeltaMemLlama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
logits = []
for _ in range(3):
    llm.reset()
    llm.eval(list(range(5, 45)))
    logits.append(llm.logits.copy())
    for kind in (torch.bfloat16, torch.float32):
        x = torch.ones(64, 512, dtype=kind)
        torch.nn.functional.linear(x, torch.ones(256, 512, dtype=kind)).sum().item()
assert all((each == logits[0]).all() for each in logits)
"""


# a model at the end of a program, which PyTorch makes longer
AT_EXIT = """
import sys
from pydeltamem import Conversation, DeltaMemLlama

llm = DeltaMemLlama(sys.argv[1], deltamem_path=sys.argv[2], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
stream = Conversation(llm).stream("hello")
next(stream)
import torch
if sys.argv[3] == "closed":
    llm.close()
"""


def write_like(path, header, tensors=None, alignment=None, **options):
    """A model with the keys of another one and these tensors, or its own. options: of gguf's writer."""
    if tensors is None:
        tensors = {name: header.read(name) for name in header.tensors}
    writer = gguf.GGUFWriter(path, header.keys["general.architecture"], **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in header.keys.items():
        kind = header.types[key]
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", ["tsw_qo", "qkvo_lambda_outside"])
def test_with_lora(base, adapter, make_llm, tmp_path, case):
    """A LoRA on the projections that the memory corrects is the same as its product added to their weights."""
    rng, header = np.random.default_rng(0), Header(base())
    tensors = {name: header.read(name) for name in header.tensors}
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for layer in range(4):
        for what in ("attn_q", "attn_v", "attn_output"):
            name = f"blk.{layer}.{what}.weight"
            a, b = (
                0.2 * rng.standard_normal(shape) for shape in ((4, tensors[name].shape[1]), (tensors[name].shape[0], 4))
            )
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float32))
            tensors[name] = (tensors[name] + b @ a).astype(np.float32)  # alpha / rank is 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_like(tmp_path / "merged.gguf", header, tensors)

    from pydeltamem import DeltaMemLlama

    options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "type_k": 0, "type_v": 0, "verbose": False}
    memory = adapter("qwen3", case)
    models = [
        DeltaMemLlama(base(), deltamem_path=memory, lora_path=str(tmp_path / "lora.gguf"), **options),
        DeltaMemLlama(tmp_path / "merged.gguf", deltamem_path=memory, **options),
        DeltaMemLlama(base(), deltamem_path=memory, **options),
    ]
    for llm in models:
        llm.eval(TOKENS)
    (logits, state), (merged_logits, merged_state), (plain_logits, _) = (
        (llm.scores[: llm.n_tokens].copy(), llm.memory.state) for llm in models
    )
    for llm in models:
        llm.close()

    assert nmse(logits, plain_logits) > 1e-4, "the LoRA has no effect"
    # float32: products of some hundred terms, once in another order
    assert nmse(logits, merged_logits) < 1e-9 and nmse(state, merged_state) < 1e-9


def nmse(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


@pytest.mark.parametrize(("arch", "case"), [("qwen3", "tsw_qo"), ("smollm3", "qkvo_lambda_outside")])
def test_with_a_control_vector(adapter, golden_dir, make_llm, arch, case):
    """The same as the reference in PyTorch with the vectors added to the outputs of its layers, all but the first."""
    import torch
    import transformers

    from pydeltamem.runtime import library
    from pydeltamem.train.reference import DeltaMem

    hf = transformers.AutoModelForCausalLM.from_pretrained(golden_dir / arch / "hf", dtype=torch.float32).eval()
    layers = hf.model.layers
    vectors = np.random.default_rng(0).standard_normal((len(layers), hf.config.hidden_size)).astype(np.float32)
    vectors[0] = 0  # llama.cpp has none for layer 0
    memory = DeltaMem.from_checkpoint(hf, golden_dir / arch / case)

    @torch.no_grad()
    def expected(first, last):
        """With the vectors of the layers from first to last."""
        hooks = [
            layers[i].register_forward_hook(lambda module, args, out, i=i: out + torch.from_numpy(vectors[i]))
            for i in range(first, last + 1)
        ]
        memory.reset()
        logits = hf(torch.tensor([TOKENS])).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        return logits, memory.state[:, 0].numpy()

    llm = make_llm(case, arch, type_k=0, type_v=0, logits_all=True)

    def got(data, first, last):
        flat = None if data is None else data[1:].ctypes.data_as(library.float_p)
        n = 0 if data is None else data[1:].size
        assert library.llama_cpp.llama_set_adapter_cvec(llm.ctx, flat, n, vectors.shape[1], first, last) == 0
        llm.reset()
        llm.memory.reset()
        llm.eval(TOKENS)
        return llm.scores[: llm.n_tokens].copy(), llm.memory.state

    plain = got(None, -1, -1)
    n = len(layers)
    for first, last in ((1, n - 1), (2, n - 2)):
        logits, state = got(vectors, first, last)
        expected_logits, expected_state = expected(first, last)
        # float32 against float32, as in test_golden.py
        assert nmse(logits, expected_logits) < 1e-9 and nmse(state, expected_state) < 1e-9
        # each has an effect: the vectors on logits and memory, the memory on the logits
        assert nmse(logits, plain[0]) > 1e-3 and nmse(state, plain[1]) > 1e-3
        llm.memory.detach()
        llm.reset()
        llm.eval(TOKENS)
        assert nmse(llm.scores[: llm.n_tokens], logits) > 1e-4
        llm.memory.attach(adapter(arch, case))
    for a, b in zip(got(None, -1, -1), plain):
        np.testing.assert_array_equal(a, b)


def test_two_adapters_in_turn(adapter, make_llm):
    """Attaching another adapter begins with an empty memory, and is as a model that was loaded with it."""
    llm = make_llm("tsw_qo", type_k=0, type_v=0, logits_all=True)
    for case in ("msw4_qo", "tsw_qo", "qkvo_lambda_outside"):
        llm.memory.attach(adapter("qwen3", case))
        assert not llm.memory.state.any() and llm.memory.n_written == 0
        llm.reset()
        llm.eval(TOKENS)
        other = make_llm(case, type_k=0, type_v=0, logits_all=True)
        other.eval(TOKENS)
        np.testing.assert_array_equal(llm.memory.state, other.memory.state)
        np.testing.assert_array_equal(llm.scores[: llm.n_tokens], other.scores[: other.n_tokens])
        assert llm.memory.copy().metadata["adapter"] == other.memory.copy().metadata["adapter"]


def test_two_adapters_on_one_model_at_once(adapter, base):
    """Two contexts of one model, each with an adapter of its own."""
    from native_context import llama
    from pydeltamem.bench import runs
    from pydeltamem.runtime import library

    model = runs.Model(llama, runs.Options(str(base()), 256, 64, 64, 1, 0, False, "f32", "f32"))
    states = {}
    runners = {case: runs.Runner(model, str(adapter("qwen3", case))) for case in ("tsw_qo", "no_lambda_raw_qk")}
    for _ in range(2):  # in turns
        for session in runners.values():
            session.decode(0, 5)
    for case, session in runners.items():
        state = np.empty(library.llama_deltamem_state_size(session.ctx), dtype=np.float32)
        assert not library.llama_deltamem_state_get(session.ctx, 0, state.ctypes.data_as(library.float_p), state.size)
        states[case] = state
        session.close()
    for case, state in states.items():
        alone = runs.Runner(model, str(adapter("qwen3", case)))
        for _ in range(2):
            alone.decode(0, 5)
        expected = np.empty_like(state)
        assert not library.llama_deltamem_state_get(alone.ctx, 0, expected.ctypes.data_as(library.float_p), state.size)
        np.testing.assert_array_equal(state, expected)
        alone.close()
    model.close()
    assert all(np.isfinite(state).all() and state.any() for state in states.values())


def test_conversations_that_stand_aside_begin_anew(adapter, make_llm):
    llm = make_llm("tsw_qo")
    holding, aside = Conversation(llm, n_predict=4), Conversation(llm, n_predict=4)
    for conversation in (aside, holding):
        conversation.say("hello there")
    assert aside._text.slot is None and aside.memory.state.any()
    llm.memory.attach(adapter("qwen3", "msw4_qo"))
    for conversation in (holding, aside):
        assert conversation.memory.state.shape == llm.memory.shape and not conversation.memory.state.any()
        conversation.say("how are you")
        assert conversation.memory.state.any()


@pytest.mark.parametrize("what", ["missing", "another model's", "text"])
def test_an_adapter_that_does_not_fit_changes_nothing(adapter, make_llm, tmp_path, what, capfd):
    llm = make_llm()
    llm.eval(TOKENS)
    state = llm.memory.state
    path = {"missing": tmp_path / "none", "another model's": adapter("smollm3", "tsw_qo"), "text": tmp_path / "text"}[
        what
    ]
    if what == "text":
        path.write_text("no adapter")
    capfd.readouterr()
    with pytest.raises(AdapterError) as info:
        llm.memory.attach(path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.eval([3])
    assert capfd.readouterr().err == ""


def test_beside_pytorch():
    """Both may use the matrix unit of the processor, each with its own configuration of it: it ends no process."""
    result = subprocess.run([sys.executable, "-c", BESIDE, str(default_files()[0])], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr or result.returncode


@pytest.mark.parametrize("how", ["open", "closed"])
def test_at_the_end_of_a_program(base, adapter, how):
    """A model that nobody closed is freed before Python takes down what llama.cpp calls meanwhile."""
    command = [sys.executable, "-c", AT_EXIT, str(base()), str(adapter("qwen3", "tsw_qo")), how]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
