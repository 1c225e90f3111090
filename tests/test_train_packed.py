"""The packed form of a training step against the padded one, and its kernels against plain PyTorch."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from pydeltamem import train
from pydeltamem.train import Ask, Batch, Example, Objective, Options, PackedBatch, PackedModel, answer_logits, kernels
from pydeltamem.train.recurrence import recurrence as token_by_token
from pydeltamem.train.reference import DeltaMem, DeltaMemConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "tie_word_embeddings": True}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
}


def make(family, dtype=torch.float32, **config):
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases begin as zeros, norms as ones
        parameter.add_(torch.randn_like(parameter) * 0.05)
    memory = DeltaMem(model, DeltaMemConfig(rank=4, output_init="random", **config))
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if "delta" in name:
                parameter.mul_(20)  # large enough to show in the logits
            if name.endswith(("beta_proj", "lambda_proj")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, memory


def examples(visible=(False, False, False)):
    draw = torch.Generator().manual_seed(3)

    def some(n):
        return torch.randint(1, 64, (n,), generator=draw).tolist()

    made = []
    for earlier, asks, seen in zip((17, 30, 1), ((4, 9), (6,), (5, 5, 3)), visible):
        system, read = some(3), some(earlier)
        questions = [system + some(n) for n in asks]
        asked = [Ask(question, [0] * len(question), some(1 + len(question) % 4)) for question in questions]
        made.append(Example(read, [0] * len(read), asked, questions, seen))
    return made


def gradients(memory):
    found = {name: p.grad.clone() for name, p in memory.named_parameters() if p.grad is not None}
    memory.zero_grad()
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_state_heads": 3, "state_update_mode": "no_lambda"},
        {"delta_heads": ("q", "k", "v", "o"), "couple_lambda": False, "delta_o_rmsnorm": True},
        {"state_update_mode": "lambda_outside", "rankwise_gates": False, "target_layers": (0, 2)},
    ],
    ids=["published", "msw", "qkvo", "some_layers"],
)
@pytest.mark.parametrize("rehearsed", [(False, False, False), (True, False, True)], ids=["once", "rehearsed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_padded(family, rehearsed, config, plain, monkeypatch):
    """Logits of the answers and gradients of every weight: the same, to float32's rounding."""
    monkeypatch.setattr(kernels, "FORCE_PLAIN", plain)
    model, memory = make(family, **config)
    given = [replace(example, rehearsed=twice) for example, twice in zip(examples(), rehearsed)]
    batch = Batch.of(given, "cpu")
    expected = answer_logits(model, memory, batch)[batch.answer_mask]
    torch.nn.functional.cross_entropy(expected, batch.answer[batch.answer_mask]).backward()
    of_padded = gradients(memory)

    packed = PackedBatch.of(given)
    logits = PackedModel(model, memory).logits(packed)
    assert packed.targets.tolist() == batch.answer[batch.answer_mask].tolist()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    torch.nn.functional.cross_entropy(logits, packed.targets).backward()
    of_packed = gradients(memory)
    assert of_packed.keys() == of_padded.keys()
    relative = 2e-4 if any(rehearsed) else 1e-4  # sums over twice as many tokens
    for name, gradient in of_padded.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(of_packed[name], gradient, rtol=0, atol=relative * largest + 1e-9, msg=name)


def test_answers_of_one_token():
    """The padded form then decodes nothing after the question."""
    model, memory = make("llama")
    given = [replace(e, asks=[ask._replace(answer=ask.answer[:1]) for ask in e.asks]) for e in examples()]
    batch, packed = Batch.of(given, "cpu"), PackedBatch.of(given)
    logits = answer_logits(model, memory, batch)
    assert logits.shape[1] == 1 and batch.answer[batch.answer_mask].tolist() == packed.targets.tolist()
    expected = PackedModel(model, memory).logits(packed)
    torch.testing.assert_close(logits[batch.answer_mask], expected, rtol=0, atol=2e-5)


def test_text_that_stays():
    """With the text visible the packed form is the model's own pass over all of it, the memory written as it reads."""
    model, memory = make("llama")
    given = examples((True, False, True))
    packed = PackedBatch.of(given)
    rows = iter(PackedModel(model, memory).logits(packed).split(packed.asks))
    for example in given:
        for question, _, answer in example.asks:
            memory.reset()
            if example.visible:
                whole = example.earlier + question + answer[:-1]
                expected = model(torch.tensor([whole])).logits[0, -len(answer) :]
            else:
                model(torch.tensor([example.earlier]))
                expected = model(torch.tensor([question + answer[:-1]])).logits[0, -len(answer) :]
            torch.testing.assert_close(next(rows), expected, rtol=0, atol=2e-5)


def test_a_chat_that_begins():
    """No earlier turn: the memory is empty, and the question and its answer write it."""
    model, memory = make("llama")
    given = [replace(example, earlier=[], segments=[], visible=i != 1) for i, example in enumerate(examples())]
    packed = PackedBatch.of(given)
    logits = PackedModel(model, memory).logits(packed)
    rows = iter(logits.split(packed.asks))
    for example in given:
        for question, _, answer in example.asks:
            memory.reset()
            expected = model(torch.tensor([question + answer[:-1]])).logits[0, -len(answer) :]
            torch.testing.assert_close(next(rows), expected, rtol=0, atol=2e-5)
    torch.nn.functional.cross_entropy(logits, packed.targets).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(memory).values())


def test_questions_that_only_read():
    model, memory = make("llama")
    given = [replace(example, ask_writes=i == 1) for i, example in enumerate(examples((False, True, True)))]
    packed = PackedBatch.of(given)
    rows = iter(PackedModel(model, memory).logits(packed).split(packed.asks))
    for example in given:
        for question, _, answer in example.asks:
            memory.reset()
            memory.write = True
            cache = model(torch.tensor([example.earlier]), use_cache=True).past_key_values if example.visible else None
            if not example.visible:
                model(torch.tensor([example.earlier]))
            memory.write = example.ask_writes
            asked = model(torch.tensor([question + answer[:-1]]), past_key_values=cache)
            torch.testing.assert_close(next(rows), asked.logits[0, -len(answer) :], rtol=0, atol=2e-5)


def test_a_text_that_is_rehearsed():
    """The second time is a text of its own, and finds the memory of the first. A text that stays is decoded once."""
    model, memory = make("llama")
    given = [replace(example, rehearsed=i < 2) for i, example in enumerate(examples((True, False, False)))]
    packed = PackedBatch.of(given)
    rows = iter(PackedModel(model, memory).logits(packed).split(packed.asks))
    for times, example in zip((1, 2, 1), given):
        for question, _, answer in example.asks:
            memory.reset()
            for _ in range(times):
                cache = model(torch.tensor([example.earlier]), use_cache=True).past_key_values
            asked = torch.tensor([question + answer[:-1]])
            expected = model(asked, past_key_values=cache if example.visible else None).logits[0, -len(answer) :]
            torch.testing.assert_close(next(rows), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("by_turn", [False, True])
def test_deferred_writes(by_turn):
    """Each turn reads what the turns before it wrote. A text that reads nothing is computed without a gradient."""
    model, memory = make("llama", memory_write_granularity="token_deferred")
    given = []
    for i, example in enumerate(examples((True, False, False))):
        n = len(example.earlier)
        cuts = [cut for cut in (1, n // 2) if 0 < cut < n] if by_turn else []
        given.append(replace(example, turns=tuple(cuts), rehearsed=i == 2))
    packed = PackedBatch.of(given, granularity="token_deferred")
    assert packed.n_frozen == sum(len(e.earlier) for e in given if not (e.visible or e.turns)) > 0
    logits = PackedModel(model, memory).logits(packed)
    expected = []
    for example in given:
        for question, _, answer in example.asks:
            memory.reset()
            for _ in range(2 if example.rehearsed else 1):
                cache = None
                for begin, end in itertools.pairwise([0, *example.turns, len(example.earlier)]):
                    turn = torch.tensor([example.earlier[begin:end]])
                    cache = model(turn, past_key_values=cache, use_cache=True).past_key_values
            asked = torch.tensor([question + answer[:-1]])
            out = model(asked, past_key_values=cache if example.visible else None)
            expected.append(out.logits[0, -len(answer) :])
    expected = torch.cat(expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    above = random(*logits.shape, grad=False)
    for values in (logits, expected):
        memory.zero_grad()
        (values * above).sum().backward()
        found = gradients(memory)
        if values is logits:
            first = {name: gradient.clone() for name, gradient in found.items()}
    assert first.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(first[name], gradient, rtol=0, atol=2e-4 * gradient.abs().max().item())


def test_deferred_replies():
    """An answer reads what was written before its question, which reads the present."""
    model, memory = make("llama")
    given = examples((True, False, False))
    packed = PackedBatch.of(given, granularity="reply_deferred")
    rows = iter(PackedModel(model, memory).logits(packed).split(packed.asks))
    with torch.no_grad():
        for example in given:
            for question, _, answer in example.asks:
                memory.reset()
                memory.write = True
                cache = model(torch.tensor([example.earlier]), use_cache=True).past_key_values
                told = memory.state
                asked = model(torch.tensor([question]), past_key_values=cache if example.visible else None)
                expected = [asked.logits[0, -1:]]
                memory.state, memory.write = told, False
                if answer[:-1]:
                    replied = model(torch.tensor([answer[:-1]]), past_key_values=asked.past_key_values)
                    expected.append(replied.logits[0])
                torch.testing.assert_close(next(rows), torch.cat(expected), rtol=0, atol=2e-5)


def test_a_teacher_reads_the_text_and_has_no_memory():
    model, memory = make("qwen3")
    given = examples()
    packed = PackedBatch.of(given, memory=False)
    rows = iter(PackedModel(model, memory).logits(packed, memory=False).split(packed.asks))
    memory.remove()
    for example in given:
        for question, _, answer in example.asks:
            whole = example.earlier + question + answer[:-1]
            torch.testing.assert_close(
                next(rows), model(torch.tensor([whole])).logits[0, -len(answer) :], rtol=0, atol=2e-5
            )


def test_answers_that_stay_are_those_of_the_frozen_model():
    """The loss is the divergence from the frozen model, which sees what stays visible and has no memory."""
    model, memory = make("llama")
    given = [replace(e, keep=i != 1) for i, e in enumerate(examples((True, False, False)))]
    objective = Objective(model, None, memory, Options("m", "d", "o", wording=0.25, gate_weight=0.5))
    logits, _ = objective.student(given)
    weights = train.told_weights(given, 0.25)
    gates = torch.stack(objective.packed.gate_means)
    loss = objective.loss(given)
    memory.remove()
    total, i = 0.0, 0
    for example in given:
        for question, _, answer in example.asks:
            student = logits[i : i + len(answer)].log_softmax(-1)
            seen = (example.earlier if example.visible else []) + question + answer[:-1]
            frozen = model(torch.tensor([seen])).logits[0, -len(answer) :].log_softmax(-1)
            for token, one, other in zip(answer, student, frozen):
                each = (other.exp() * (other - one)).sum() if example.keep else -one[token]
                total += each.item() * weights[i]
                assert weights[i] == 0.25 or not example.keep
                i += 1
    expected = total / sum(weights) + 0.5 * (gates - objective.options.gate_mean).pow(2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(memory).values())


def test_what_cannot_be_packed_is_named():
    model, memory = make("llama")
    assert PackedModel.refusal(model, memory) is None
    memory.config = replace(memory.config, memory_write_granularity="message_mean")
    assert "per token" in PackedModel.refusal(model, memory)
    model, memory = make("llama")
    model.config.model_type = "gpt2"
    assert "gpt2" in PackedModel.refusal(model, memory)
    for family, name, value, named in (
        ("llama", "hidden_act", "gelu", "gelu"), ("mistral", "sliding_window", 8, "sliding"),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"], "full attention"),
    ):  # fmt: skip
        model, memory = make(family)
        assert PackedModel.refusal(model, memory) is None
        setattr(model.config, name, value)
        assert named in PackedModel.refusal(model, memory)


ROPE = {"rope_theta": 1e4, "factor": 4.0}
ROPES = {
    "linear": {}, "yarn": {"original_max_position_embeddings": 32},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {}, "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_are_scaled(kind, monkeypatch):
    """As the model scales them, or refused: by the length of a text, of which a batch has several."""
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=32, rope_parameters={"rope_type": kind, **ROPE, **ROPES[kind]}
    )
    monkeypatch.setitem(CONFIGS, "llama", lambda: config)
    model, memory = make("llama")
    if kind in ("dynamic", "longrope"):
        assert kind in PackedModel.refusal(model, memory)
        return
    assert PackedModel.refusal(model, memory) is None
    batch = Batch.of(examples(), "cpu")
    padded = answer_logits(model, memory, batch)[batch.answer_mask]
    packed = PackedModel(model, memory).logits(PackedBatch.of(examples()))
    assert torch.allclose(packed, padded, atol=1e-5)


#
# kernels
#


def both(monkeypatch, function, *tensors):
    """Results and gradients of a function, by the C kernel and by plain PyTorch."""
    found = []
    for plain in (False, True):
        monkeypatch.setattr(kernels, "FORCE_PLAIN", plain)
        given = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        out = function(*given)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        (out.float() * weight.float()).sum().backward()
        found.append([out, *(x.grad for x in given if x.requires_grad)])
    return zip(*found)


def random(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def test_with_a_damaged_library_the_kernels_are_plain_pytorch(monkeypatch):

    def missing(path):
        raise OSError(f"{path}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(kernels.ctypes, "CDLL", missing)
        patch.setattr(kernels, "library", kernels.library.__wrapped__)
        assert kernels.library() is None
        x, weight = torch.randn(3, 8), torch.rand(8)
        found = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(found, kernels.rms_norm(x, weight, 1e-6), rtol=0, atol=1e-6)


def test_a_package_without_the_library(monkeypatch, tmp_path):
    x, weight = torch.randn(3, 8), torch.rand(8)
    expected = kernels.rms_norm(x, weight, 1e-6)
    monkeypatch.setattr(kernels, "LIB_DIR", tmp_path)
    kernels.library.cache_clear()
    try:
        assert kernels.library() is None
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), expected, rtol=0, atol=1e-6)
    finally:
        kernels.library.cache_clear()


def test_the_library_is_there():
    assert kernels.library() is not None


@pytest.mark.parametrize(
    ("capability", "held", "taken"),
    [
        ("AVX512", ("-x86-64-v3", "-x86-64-v4"), "-x86-64-v4"),
        ("AVX512", ("-x86-64-v3",), "-x86-64-v3"),
        ("AVX2", ("-x86-64-v3", "-x86-64-v4"), "-x86-64-v3"),
        ("DEFAULT", ("-x86-64-v3", "-x86-64-v4"), ""),
        ("AVX512", (), ""),
    ],
)
def test_the_library_for_this_processor(monkeypatch, tmp_path, capability, held, taken):
    """A wheel holds several."""
    built = Path(kernels.library()._name)
    for level in ("", *held):
        shutil.copy(built, tmp_path / f"{built.stem.partition('-x86')[0]}{level}{built.suffix}")
    monkeypatch.setattr(kernels, "LIB_DIR", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    kernels.library.cache_clear()
    try:
        assert Path(kernels.library()._name).stem.endswith(f"deltamem-train{taken}")
    finally:
        kernels.library.cache_clear()


# bfloat16 has 8 bits: results are rounded to them once, plain PyTorch's on the way too
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_elementwise(monkeypatch, dtype, tolerance, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        angles = torch.randn(7, 5)
        cosine, sine = angles.cos(), angles.sin()
        weight = random(33, dtype=dtype, grad=False)
        cases = [
            (lambda x, w: kernels.rms_norm(x, w, 1e-5), random(5, 3, 33, dtype=dtype), weight),
            (kernels.swiglu, random(9, 37, dtype=dtype), random(9, 37, dtype=dtype)),
            (lambda x: kernels.swiglu(x * 40, x), random(9, 37, dtype=dtype)),
            (lambda x: kernels.rotate(x, cosine, sine), random(7, 3, 10, dtype=dtype)),
        ]
        for function, *tensors in cases:
            for native, plain in both(monkeypatch, function, *tensors):
                assert native.dtype == plain.dtype == dtype
                largest = plain.float().abs().max().item()
                torch.testing.assert_close(native.float(), plain.float(), rtol=0, atol=tolerance * max(largest, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("x", "y"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["float32", "bfloat16"]
)
def test_values_of_two_types(monkeypatch, x, y):
    """A kernel is told one type, and would read the other values as what they are not, or past their end."""
    cases = [
        (lambda a, w: kernels.rms_norm(a, w, 1e-5), random(5, 16, dtype=x), random(16, dtype=y, grad=False)),
        (kernels.swiglu, random(5, 16, dtype=x), random(5, 16, dtype=y)),
    ]
    for function, *tensors in cases:
        for native, plain in both(monkeypatch, function, *tensors):
            assert native.dtype == plain.dtype
            torch.testing.assert_close(native, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_attention(monkeypatch, dtype, tolerance):
    """Several texts, one of a single token, one whose tokens do not see all before them, four heads on two keys."""
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[6:, 3:6] = False
    spans = [(0, 5, None), (5, 14, seen), (14, 15, None), (15, 40, None)]
    tensors = [random(40, heads, 16, dtype=dtype) for heads in (4, 2, 2)]
    for native, plain in both(monkeypatch, lambda q, k, v: kernels.attention(q, k, v, spans, 0.25), *tensors):
        largest = plain.float().abs().max().item()
        torch.testing.assert_close(native.float(), plain.float(), rtol=0, atol=tolerance * largest)


def test_attention_of_large_scores_in_bfloat16(monkeypatch):
    """Scores that were rounded to bfloat16 before the exponential made its gradient wrong by 3 %."""
    q, k, v = ((scale * random(64, heads, 64, grad=False)).bfloat16() for scale, heads in ((3, 9), (3, 3), (1, 3)))
    above = random(64, 9, 64, grad=False).bfloat16()

    def gradients(dtype, is_plain):
        monkeypatch.setattr(kernels, "FORCE_PLAIN", is_plain)
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        kernels.attention(*given, [(0, 64, None)], 0.125).backward(above.to(dtype))
        return [x.grad.float() for x in given]

    for expected, found in zip(gradients(torch.float32, True), gradients(torch.bfloat16, False)):
        assert (found - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize("source", [None, [-1, 0, 0, -2, 2]], ids=["at once", "deferred"])
@pytest.mark.parametrize("rank", [1, 8, 16, 5])
def test_recurrence(monkeypatch, rank, source):
    """Runs that start from each other, one of them empty: kernel, plain form and the token-by-token reference."""
    runs = kernels.Runs([0, 6, 6, 9, 14], [6, 6, 9, 14, 20], [-1, 0, 1, 1, -1], source)
    values = [random(20, 3, rank) for _ in range(3)]
    values[0], values[1] = (torch.nn.functional.normalize(x.detach(), dim=-1).requires_grad_() for x in values[:2])
    values += [torch.rand(20, 3, rank).requires_grad_() for _ in range(3)]
    for native, plain in both(monkeypatch, lambda *x: kernels.recurrence(runs, x), *values):
        largest = plain.abs().max().item()
        torch.testing.assert_close(native, plain, rtol=0, atol=2e-5 * largest)

    monkeypatch.setattr(kernels, "FORCE_PLAIN", False)
    reads, last = kernels.recurrence(runs, [x.detach() for x in values]), []
    for j, (begin, end, parent) in enumerate(zip(runs.begin, runs.end, runs.parent)):
        state = torch.zeros(1, 3, rank, rank) if parent < 0 else last[parent]
        if end > begin:
            expected, state = token_by_token(state, *(x.detach()[None, begin:end] for x in values))
            if source and source[j] != kernels.PRESENT:
                read = torch.zeros_like(state) if source[j] < 0 else last[source[j]]
                expected = torch.einsum("bhij,bthj->bthi", read, values[0].detach()[None, begin:end])
            torch.testing.assert_close(reads[begin:end], expected[0], rtol=0, atol=2e-5)
        last.append(state)


@pytest.mark.parametrize("config", [{}, {"delta_o_rmsnorm": True, "trainable_delta_scale": True}])
def test_bfloat16_is_near_float32(config):
    model, memory = make("llama", **config)
    packed = PackedBatch.of(examples())
    expected = PackedModel(model, memory).logits(packed)
    half = PackedModel(model.to(torch.bfloat16), memory).logits(packed)
    assert half.dtype == torch.bfloat16
    error = (half.float() - expected).pow(2).mean() / expected.pow(2).mean()
    assert error < 1e-3  # an 8-bit mantissa: 2^-8 squared is 1.5e-5 an operation


def test_shared_beginnings_are_read_once():
    packed = PackedBatch.of(examples())
    n_read = sum(len(x.earlier) + len(x.asks[0][0][:3]) for x in examples())
    n_asked = sum(len(q) - 3 + len(a) - 1 for x in examples() for q, _, a in x.asks)
    assert len(packed.ids) == n_read + n_asked
    assert packed.asks == [len(answer) for x in examples() for _, _, answer in x.asks]
