"""The PyTorch reference: parity with the published implementation, recurrences, checkpoints and architectures."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from golden_data import CASES
from pydeltamem.errors import CheckpointError, InputError, ModelError
from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint
from pydeltamem.train.attention import find_attention
from pydeltamem.train.recurrence import chunked_recurrence, fused_recurrence, recurrence
from pydeltamem.train.reference import DeltaMem, DeltaMemConfig
from refusals import refuses

BOUND = 1e-10  # both sides are float32 PyTorch

each_case = pytest.mark.parametrize("case", CASES)
each_arch = pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
FORMS = {"naive": recurrence, "fused": fused_recurrence, "chunked": chunked_recurrence}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def backbone(golden_dir):
    """backbone(arch): the golden backbone in float32, loaded once."""
    models = {}

    def load(arch):
        if arch not in models:
            model = transformers.AutoModelForCausalLM.from_pretrained(golden_dir / arch / "hf", dtype=torch.float32)
            models[arch] = model.eval().requires_grad_(False)
        return models[arch]

    return load


@pytest.fixture
def attach():
    """attach(model, config or checkpoint directory, ...): a memory on the model, taken off at the end."""
    memories = []

    def make(model, what, **arguments):
        make_it = DeltaMem if isinstance(what, DeltaMemConfig) else DeltaMem.from_checkpoint
        memories.append(make_it(model, what, **arguments))
        return memories[-1]

    yield make
    for memory in memories:
        memory.remove()


LLAMA = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA.update(num_key_value_heads=2, pad_token_id=0)


def tiny(name, **config):
    """A random model of few weights: the causal model of transformers' `name`Config."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**{**LLAMA, **config})
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:  # these begin as zeros and ones, where a missing one would not show
            parameter += 0.3 * torch.randn(parameter.shape)
    return model


def randomise(memory, seed=0):
    """Random values for all that has an effect: large enough that every part of the memory shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return memory


def tokens(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def nmse(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


#
# the published implementation
#


@each_form
@each_case
@each_arch
@torch.no_grad()
def test_golden(golden_dir, backbone, attach, arch, case, form):
    expected = dict(np.load(golden_dir / arch / case / "expected.npz"))
    model = backbone(arch)
    memory = attach(model, golden_dir / arch / case, recurrence=form)
    assert not memory.state.any()

    def check(name, logits):
        assert nmse(logits[0], expected[f"{name}_logits"]) <= BOUND
        if f"{name}_state" in expected:
            assert nmse(memory.state[:, 0], expected[f"{name}_state"]) <= BOUND

    ids = next((expected[f"prompt_{x}_ids"] for x in ("sentence", "message") if f"prompt_{x}_ids" in expected), None)
    assert (ids is not None) == case.startswith("ssw")
    with contextlib.nullcontext() if ids is None else memory.segments(ids):
        out = model(torch.tensor(expected["prompt_ids"])[None], use_cache=True)
    check("prompt", out.logits)

    logits, cache = [], out.past_key_values
    for token in expected["decode_ids"]:
        logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits)
    check("decode", torch.cat(logits, 1))

    memory.write = False
    out = model(torch.tensor(expected["recall_ids"])[None], use_cache=True)
    check("recall", out.logits)
    token = out.logits[:, -1:].argmax(-1)
    following = model(token, past_key_values=out.past_key_values).logits[0, 0]
    assert nmse(following, expected["recall_next_logits"]) <= BOUND
    assert nmse(memory.state[:, 0], expected["recall_state"]) <= BOUND

    memory.reset()
    check("empty", model(torch.tensor(expected["recall_ids"])[None]).logits)


@each_case
@each_arch
def test_checkpoint_round_trip(golden_dir, backbone, attach, tmp_path, arch, case):
    source = golden_dir / arch / case
    attach(backbone(arch), source).save_checkpoint(tmp_path / "new" / "saved")
    saved = tmp_path / "new" / "saved"
    assert sorted(path.name for path in saved.iterdir()) == sorted([WEIGHTS[0], CONFIG])
    assert json.loads((saved / CONFIG).read_text()) == json.loads((source / CONFIG).read_text())
    before, after = (torch.load(path / WEIGHTS[0], weights_only=True) for path in (source, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


#
# the recurrences
#


def inputs(n_batch=2, n_token=37, n_head=2, rank=5, seed=0, mode="standard"):
    """State, q, k, v, keep, erase, write in float64; some tokens do not write and some gates are shut or wide open."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n_batch, n_token, n_head, rank, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(), dim=-1) for _ in "qk")
    v, beta, lam = normal(), torch.sigmoid(3 * normal()), torch.sigmoid(3 * normal())
    keep = {"standard": 1 - beta, "lambda_outside": lam, "no_lambda": torch.ones_like(beta)}[mode].clone()
    erase = keep * beta if mode == "lambda_outside" else beta
    beta, erase = beta.clone(), erase.clone()
    keep[:, ::5], erase[:, ::5], beta[:, ::5] = 1, 0, 0
    if mode != "no_lambda":
        keep[:, 3:4] = 0
    state = torch.randn(n_batch, n_head, rank, rank, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (state, q, k, v, keep, erase, beta)]


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("n_token", [1, 2, 16, 37])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunked_equals_naive(mode, n_token, chunk):
    arguments = inputs(n_token=n_token, mode=mode)
    naive, chunked = recurrence(*arguments), chunked_recurrence(*arguments, chunk=chunk)
    weights = [torch.randn_like(x) for x in naive]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), arguments, retain_graph=True)
        for out in (naive, chunked)
    ]
    for one, other in zip((*naive, *gradients[0]), (*chunked, *gradients[1])):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize(("n_batch", "n_token", "n_head", "rank"), [(1, 1, 1, 8), (3, 2, 1, 1), (2, 37, 4, 16)])
def test_fused_equals_naive(mode, n_batch, n_token, n_head, rank):
    arguments = inputs(n_batch, n_token, n_head, rank, mode=mode)
    naive, fused = recurrence(*arguments), fused_recurrence(*arguments)
    weights = [torch.randn_like(x) for x in naive]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), arguments) for out in (naive, fused)
    ]
    for one, other in zip((*naive, *gradients[0]), (*fused, *gradients[1])):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("least", [0.0, 1e-30, 1e-6, 0.5])
def test_gradients_in_float32(form, least):
    """Of all arguments, as exact as float32 is, also where next to nothing is kept."""
    arguments = inputs(mode="lambda_outside")
    with torch.no_grad():
        arguments[4][:, 5:9] = least
    weights = [torch.randn_like(x) for x in recurrence(*arguments)]

    def gradients(form, given):
        return torch.autograd.grad(sum((x * w.to(x.dtype)).sum() for x, w in zip(form(*given), weights)), given)

    exact = gradients(recurrence, arguments)
    given = [x.detach().float().requires_grad_() for x in arguments]
    for one, other in zip(exact, gradients(FORMS[form], given)):
        error = (other.double() - one).abs().max() / one.abs().max()
        assert error < 20 * 2.0**-24  # rounding, of sums over up to 37 tokens


@each_form
def test_gradcheck(form):
    arguments = inputs(n_batch=1, n_token=7, n_head=1, rank=3)
    arguments[4] = (0.2 + 0.6 * arguments[4].detach()).requires_grad_()
    assert torch.autograd.gradcheck(form, arguments)


def test_naive_is_the_equation():
    """One token by hand: read before write, S[i, j] with i the value and j the key."""
    state = torch.arange(4.0).reshape(1, 1, 2, 2)
    row = lambda *x: torch.tensor(x).reshape(1, 1, 1, 2)  # noqa: E731
    reads, after = recurrence(
        state, row(1.0, 2.0), row(0.0, 1.0), row(5.0, 7.0), row(0.5, 1.0), row(0.1, 0.2), row(1.0, 2.0)
    )
    assert reads.flatten().tolist() == [2.0, 8.0]
    expected = torch.tensor([[0.0, 0.5 - 0.1 + 5.0], [2.0, 3.0 - 0.6 + 14.0]])
    torch.testing.assert_close(after[0, 0], expected)


#
# the memory of a model
#


CONFIGS = {
    "tsw": DeltaMemConfig(rank=4),
    "msw_qkvo": DeltaMemConfig(rank=4, num_state_heads=2, delta_heads=("q", "k", "v", "o"), couple_lambda=False),
    "ssw": DeltaMemConfig(
        rank=4,
        memory_write_granularity="message_mean",
        delta_o_rmsnorm=True,
        trainable_delta_scale=True,
        delta_scale_granularity="head",
    ),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


@each_config
def test_gradients_through_the_model(attach, name):
    """Back-propagation through two ingests agrees with finite differences, for all that is trained."""
    model = tiny("OPT", **ARCHITECTURES["OPT"]).double()  # computes nothing in float32, as RMS norms of others do
    memory = randomise(attach(model, CONFIGS[name])).double()
    trained = [parameter for parameter in memory.parameters() if parameter.requires_grad]
    ids = tokens(2, 9)

    def loss():
        memory.reset()
        with memory.segments([0, 0, 0, -1, 1, 1, 2, 2, 2]):
            model(ids)
        logits = model(ids.flip(1)).logits  # transformers' own loss is float32 too
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    gradients = torch.autograd.grad(loss(), trained)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(trained, gradients):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(loss())
                parameter.sub_(step * direction)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8)


@each_config
@each_form
@torch.no_grad()
def test_batch_equals_single_runs(attach, name, form):
    model = tiny("Llama")
    memory = randomise(attach(model, CONFIGS[name], recurrence=form))
    prompts, lengths = tokens(2, 21), [21, 13]  # the second is padded at its right
    ids = torch.arange(21).div(4, rounding_mode="floor").repeat(2, 1)
    ids[1, 13:] = -1
    with memory.segments(ids):
        together = model(prompts).logits
    states = memory.state
    for i, n in enumerate(lengths):
        memory.reset()
        with memory.segments(ids[i, :n]):
            alone = model(prompts[i : i + 1, :n]).logits
        assert nmse(together[i, :n], alone[0]) <= BOUND
        assert nmse(states[:, i], memory.state[:, 0]) <= BOUND


@torch.no_grad()
def test_segments_write_their_mean_once(attach):
    """In so many words: the mean hidden state of each segment is written once, in the order of the ids."""
    model = tiny("Llama", num_hidden_layers=1)
    memory = randomise(attach(model, CONFIGS["ssw"]))
    ids = torch.tensor([7, 7, -1, 3, 3, 3, 7])
    hidden = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with memory.segments(ids):
        model(tokens(1, 7))
    handle.remove()
    means = torch.stack([hidden[0][0, ids == i].mean(0) for i in (3, 7)])[None]
    layer = memory.memories[0]
    values = layer.activate(layer.project(means), torch.ones(1, 2, dtype=torch.bool))
    assert nmse(memory.state[0], recurrence(torch.zeros(1, 1, 4, 4), *values)[1]) <= BOUND


@torch.no_grad()
def test_an_ingest_may_span_calls(attach):
    model = tiny("Llama")
    memory = randomise(attach(model, CONFIGS["ssw"]))
    prompt, ids = tokens(1, 12), [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]
    with memory.segments(ids):
        whole = model(prompt).logits
    state = memory.state
    memory.reset()
    with memory.segments(ids):
        first = model(prompt[:, :6], use_cache=True)
        assert not memory.state.any()
        second = model(prompt[:, 6:], past_key_values=first.past_key_values)
    assert nmse(torch.cat([first.logits, second.logits], 1), whole) <= BOUND
    assert nmse(memory.state, state) <= BOUND


@torch.no_grad()
def test_an_ingest_that_fails_writes_nothing(attach):
    model = tiny("Llama")
    memory = randomise(attach(model, CONFIGS["ssw"]))
    model(tokens(1, 5))
    state = memory.state
    for ids, length, names in (([0] * 6, 5, ["6 ids", "5 tokens"]), ([0] * 4, 5, ["ids [1, 4]", "[1, 5]"])):
        with refuses(InputError, *names), memory.segments(ids):
            model(tokens(1, length))
        assert torch.equal(memory.state, state)
    with memory.segments([0] * 5):
        with refuses(InputError, "segments(...)"), memory.segments([0]):
            pass
        model(tokens(1, 5))
    assert not torch.equal(memory.state, state)
    with refuses(InputError, "[1]", "[T] or [B, T]"), memory.segments([0.5]):
        pass


@torch.no_grad()
def test_write_off_reset_and_state(attach):
    model = tiny("Llama")
    plain = model(tokens(1, 9, seed=1)).logits
    memory = randomise(attach(model, CONFIGS["msw_qkvo"]))
    memory.write = False
    assert torch.equal(model(tokens(1, 9, seed=1)).logits, plain)  # an empty memory changes nothing
    assert not memory.state.any()

    memory.write = True
    model(tokens(1, 20))
    state, memory.write = memory.state, False
    with_memory = model(tokens(1, 9, seed=1)).logits
    assert nmse(with_memory, plain) > 1e-4
    with memory.segments([0] * 9):
        model(tokens(1, 9, seed=1))
    assert torch.equal(memory.state, state)

    questions = model(torch.cat([tokens(1, 9, seed=1)] * 3)).logits  # one memory, many questions
    assert memory.state.shape[1] == 1
    assert nmse(questions[2:], with_memory) <= BOUND

    memory.reset()
    assert not memory.state.any()
    memory.state = state
    assert torch.equal(model(tokens(1, 9, seed=1)).logits, with_memory)
    memory.remove()
    assert torch.equal(model(tokens(1, 9, seed=1)).logits, plain)


@torch.no_grad()
def test_states_that_do_not_fit(attach):
    model = tiny("Llama")
    memory = attach(model, CONFIGS["tsw"])
    with refuses(InputError, "[3, 1, 1, 4, 4]", "[2, B, 1, 4, 4]"):
        memory.state = torch.zeros(3, 1, 1, 4, 4)
    memory.state = torch.zeros(2, 2, 1, 4, 4)
    with refuses(InputError, "2 sequences", "batch 3", "reset()"):
        model(tokens(3, 4))


@torch.no_grad()
def test_half_precision_model(attach):
    """The memory stays float32 on a model that is not, and follows it closely."""
    prompt, states = tokens(1, 30), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("Llama").to(dtype)
        memory = randomise(attach(model, CONFIGS["msw_qkvo"]))
        assert model(prompt).logits.dtype == dtype
        assert memory.state.dtype == torch.float32
        states.append(memory.state)
    assert 0 < nmse(states[1], states[0]) < 1e-3


#
# architectures
#

HYBRID = dict(num_hidden_layers=4, head_dim=16)
ARCHITECTURES = {
    "Llama": {},
    "Mistral": dict(sliding_window=6),
    "Qwen2": {},
    "Qwen3": dict(head_dim=16),
    "Qwen3Moe": dict(head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    "Gemma2": dict(head_dim=16, sliding_window=6),
    "Gemma3Text": dict(head_dim=16, sliding_window=6),
    "Phi": {},
    "Phi3": {},
    "SmolLM3": {},
    "Granite": dict(logits_scaling=3.0, attention_multiplier=0.2, embedding_multiplier=4.0, residual_multiplier=0.5),
    "Olmo2": {},
    "GptOss": dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=48),
    "GPTJ": dict(n_embd=48, n_layer=2, n_head=4, rotary_dim=8),
    "Lfm2": dict(HYBRID, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "Qwen3Next": dict(
        HYBRID,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_architectures(attach, tmp_path, name):
    """Every correction reaches the logits, the prompt in two calls equals one, and a checkpoint brings it all back."""
    model = tiny(name, **ARCHITECTURES[name])
    prompt, plain = tokens(1, 14), None
    seen = set()
    for head in "qkvo":
        memory = randomise(attach(model, DeltaMemConfig(rank=4, delta_heads=(head,))))
        whole = model(prompt).logits
        state = memory.state
        memory.reset()
        first = model(prompt[:, :9], use_cache=True)
        second = model(prompt[:, 9:], past_key_values=first.past_key_values)
        assert nmse(torch.cat([first.logits, second.logits], 1), whole) <= 1e-9
        assert nmse(memory.state, state) <= 1e-9
        memory.save_checkpoint(tmp_path / head)
        memory.remove()
        again = attach(model, tmp_path / head)
        assert torch.equal(model(prompt).logits, whole)
        again.remove()
        plain = model(prompt).logits
        assert nmse(whole, plain) > 1e-7  # float32 alone: 1e-13
        seen.add(whole.sum().item())
    assert len(seen) == 4
    hybrid = "layer_types" in ARCHITECTURES[name]
    assert again.layers == ([1, 3] if hybrid else list(range(len(find_attention(model)))))


@torch.no_grad()
def test_fused_projection_equals_separate_ones(attach):
    """A Phi-3 and a Llama with the same weights are the same model, with memory too."""
    fused = tiny("Phi3")
    separate = tiny("Llama", tie_word_embeddings=False, rms_norm_eps=fused.config.rms_norm_eps)
    weights = {}
    for key, value in fused.state_dict().items():
        if "qkv_proj" in key:
            for name, part in zip("qkv", value.split([48, 24, 24])):
                weights[key.replace("qkv_proj", f"{name}_proj")] = part
        elif "gate_up_proj" in key:
            weights[key.replace("gate_up", "gate")], weights[key.replace("gate_up", "up")] = value.chunk(2)
        else:
            weights[key] = value
    separate.load_state_dict(weights)
    logits, states = [], []
    for model in (fused, separate):
        config = DeltaMemConfig(rank=4, delta_heads=("q", "k", "v"), output_init="base_slice")
        torch.manual_seed(0)
        memory = randomise(attach(model, config))
        logits.append(model(tokens(2, 11)).logits)
        states.append(memory.state)
    assert nmse(logits[0], logits[1]) <= BOUND
    assert nmse(states[0], states[1]) <= BOUND


def test_unknown_attention_is_refused():
    with refuses(ModelError, "GPTNeoXForCausalLM", "layer 0"):
        DeltaMem(tiny("GPTNeoX"))
    with refuses(ModelError, "Lfm2ForCausalLM", "layer 0"):
        DeltaMem(tiny("Lfm2", **ARCHITECTURES["Lfm2"]), DeltaMemConfig(target_layers=(0,)))
    model = tiny("Llama")
    model.config.num_hidden_layers += 1  # no list of modules is that long
    with refuses(ModelError, "LlamaForCausalLM", model.config.num_hidden_layers):
        DeltaMem(model)


#
# checkpoints and configurations
#


@pytest.mark.parametrize("output_init", ["zero", "random", "base_slice", "base_slice_fixed"])
@torch.no_grad()
def test_initial_weights(attach, output_init):
    model = tiny("Llama")
    config = DeltaMemConfig(output_init=output_init, base_slice_ref_width=2, trainable_delta_scale=True)
    layer = attach(model, config).memories[0]
    assert not layer.delta_k_proj.any()
    assert not layer.beta_proj.any()
    assert (layer.beta_bias == -1.5).all()
    assert (torch.sigmoid(layer.delta_scale_raw) * 2 == 1).all()
    columns = {"zero": 0, "random": 8, "base_slice": 8, "base_slice_fixed": 2}[output_init]
    assert int(layer.delta_o_proj.any(0).sum()) == columns
    if output_init.startswith("base_slice"):
        torch.testing.assert_close(layer.delta_o_proj[:, :columns].norm(dim=0), torch.full((columns,), 0.05))


def test_only_what_has_an_effect_is_trained(attach):
    memory = attach(tiny("Llama"), DeltaMemConfig(couple_lambda=False, state_update_mode="no_lambda"))
    frozen = {name for name, parameter in memory.memories[0].named_parameters() if not parameter.requires_grad}
    assert frozen == {"delta_k_proj", "delta_v_proj", "lambda_proj", "lambda_bias"}


def test_configurations_that_do_not_exist():
    for field, value in (("state_update_mode", "sometimes"), ("output_init", "ones"), ("delta_heads", ("x",))):
        with refuses(InputError, field):
            DeltaMemConfig(**{field: value})


def test_a_damaged_checkpoint_is_refused(golden_dir, backbone, attach, tmp_path):
    memory = attach(backbone("qwen3"), golden_dir / "qwen3" / "tsw_qo")
    memory.save_checkpoint(tmp_path)
    tensors = torch.load(tmp_path / WEIGHTS[0], weights_only=True)
    key = "model.layers.1.self_attn.delta_q_proj"
    for change, names in (
        ({key: tensors[key][1:]}, [key, "shape"]),
        ({key: tensors[key] * float("nan")}, [key, "finite"]),
        ({"model.layers.9.self_attn.beta_bias": torch.ones(1)}, ["model.layers.9.self_attn.beta_bias"]),
    ):
        torch.save({**tensors, **change}, tmp_path / WEIGHTS[0])
        with refuses(CheckpointError, tmp_path / WEIGHTS[0], *names):
            DeltaMem.from_checkpoint(backbone("qwen3"), tmp_path)
    with refuses(ModelError, "layer 7"):
        DeltaMem(backbone("qwen3"), DeltaMemConfig(target_layers=(1, 7)))


def test_a_checkpoint_with_any_initial_values(golden_dir, backbone, attach, tmp_path):
    """They do not matter to trained weights, and stay as they were. The file may begin with a byte order mark."""
    source = golden_dir / "qwen3" / "o_rmsnorm_scale_head"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    initial = {"beta_bias_init": None, "output_init": "ones", "base_slice_ref_width": "all", "delta_scale_init": [1]}
    fields = {**json.loads((source / CONFIG).read_text()), **initial, "online_gain": 0.1}
    (tmp_path / CONFIG).write_text(json.dumps(fields), encoding="utf-8-sig")
    memory, expected = attach(backbone("qwen3"), tmp_path), attach(backbone("qwen3"), source)
    for name, parameter in expected.named_parameters():
        assert torch.equal(memory.get_parameter(name), parameter), name
    assert memory.config.online_gain == 0.1
    memory.save_checkpoint(tmp_path)  # over it
    assert Checkpoint(tmp_path).config == Checkpoint(source).config


def test_a_failed_save_keeps_the_old_checkpoint(attach, tmp_path):
    model = tiny("Llama")
    attach(model, CONFIGS["tsw"]).save_checkpoint(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with refuses(CheckpointError, "alpha"):
        attach(model, DeltaMemConfig(alpha=float("inf"))).save_checkpoint(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Checkpoint(tmp_path).config.rank == 4


def test_importing_the_package_leaves_torch_alone(tmp_path):
    code = "import sys, pydeltamem, pydeltamem.formats.checkpoint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
