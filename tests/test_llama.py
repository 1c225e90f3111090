"""DeltaMemLlama: everything of llama_cpp.Llama works on it, and the memory follows the text."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama, LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from pydeltamem import AdapterError, DecodeError, DeltaMemError, DeltaMemLlama, InputError, ModelError
from pydeltamem.formats.gguf_header import Header
from refusals import refuses

TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31]
MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello there"}]


def text(completion):
    return completion["choices"][0]["text"]


def joined(stream):
    return "".join(chunk["choices"][0]["text"] for chunk in stream)


# llama_cpp.Llama


def test_is_a_llama(llm):
    assert isinstance(llm, Llama)
    assert llm.detokenize(llm.tokenize(b"hello")) == b" hello" or llm.detokenize(llm.tokenize(b"hello")) == b"hello"


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_without_adapter_it_is_the_plain_model(base, make_llm, arch):
    plain = Llama(str(base(arch)), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llm = make_llm(None, arch, logits_all=True)
    for model in (plain, llm):
        model.eval(TOKENS)
    np.testing.assert_array_equal(plain.scores[: plain.n_tokens], llm.scores[: llm.n_tokens])
    # for every limit, except where llama_cpp exceeds it because the bytes so far end within a character
    n_equal = 0
    for n in range(1, 17):
        both = [model("hello", max_tokens=n, temperature=0) for model in (plain, llm)]
        if both[0]["usage"] == both[1]["usage"]:
            assert text(both[0]) == text(both[1])
            n_equal += 1
    assert n_equal > 3
    plain.close()


def test_completion(llm):
    completion = llm.create_completion("hello", max_tokens=12, temperature=0)
    assert completion["usage"]["completion_tokens"] >= 1
    assert text(completion)
    assert np.abs(llm.memory.state).max() > 0


def test_completion_reads_the_memory(llm):
    greedy = {"max_tokens": 24, "temperature": 0}
    first = text(llm.create_completion("hello", **greedy))
    llm.reset()
    llm.memory.reset()
    assert text(llm.create_completion("hello", **greedy)) == first
    llm.reset()
    llm.memory.state = np.random.default_rng(0).standard_normal(llm.memory.shape)
    assert text(llm.create_completion("hello", **greedy)) != first


def test_streaming(llm):
    options = {"max_tokens": 24, "temperature": 1.0, "seed": 7}
    whole = text(llm.create_completion("hello", **options))
    llm.reset()
    llm.memory.reset()
    assert joined(llm.create_completion("hello", stream=True, **options)) == whole


def test_chat_completion(llm):
    options = {"max_tokens": 16, "temperature": 0}
    reply = llm.create_chat_completion(MESSAGES, **options)["choices"][0]["message"]
    assert reply["role"] == "assistant" and reply["content"]
    llm.reset()
    llm.memory.reset()
    pieces = [chunk["choices"][0]["delta"] for chunk in llm.create_chat_completion(MESSAGES, stream=True, **options)]
    assert "".join(piece.get("content") or "" for piece in pieces) == reply["content"]


def test_grammar(llm):
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert text(llm.create_completion("hello", max_tokens=8, grammar=grammar)) in ("yes", "no")


def test_logprobs(make_llm):
    llm = make_llm(logits_all=True)
    choice = llm.create_completion("hello", max_tokens=4, temperature=0, logprobs=3)["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) >= 4
    assert all(np.isfinite(value) and value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_embedding_reads_and_does_not_write(make_llm):
    llm = make_llm(embedding=True, n_ctx=512, n_batch=64, pooling_type=LLAMA_POOLING_TYPE_MEAN)
    state = np.random.default_rng(0).standard_normal(llm.memory.shape).astype(np.float32)
    empty = llm.embed(["hello there", "hello there", "other"])
    llm.memory.state = state
    texts = llm.embed(["hello there", "hello there", "other"])
    np.testing.assert_array_equal(llm.memory.state, state)
    assert llm.memory.write is True
    np.testing.assert_allclose(texts[0], texts[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(texts[0], empty[0], rtol=1e-3, atol=1e-3), "the memory was not read"
    embedding = llm.create_embedding("hello there")["data"][0]["embedding"]
    np.testing.assert_allclose(embedding, texts[0], rtol=1e-4, atol=1e-5)


def test_draft_model(make_llm):
    """Speculative decoding gives the greedy text while nothing writes, also when it is asked again."""
    greedy = {"max_tokens": 40, "temperature": 0}
    llm = make_llm(draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=5))
    expected = make_llm()
    state = np.random.default_rng(0).standard_normal(llm.memory.shape)
    for model in (llm, expected):
        model.memory.state = state
        model.memory.write = False
    prompt = "one two one two one two one"
    reference = text(expected.create_completion(prompt, **greedy))
    assert text(llm.create_completion(prompt, **greedy)) == reference
    assert text(llm.create_completion(prompt, **greedy)) == reference
    llm.memory.write = True
    for _ in range(3):  # old and new tokens in one batch
        assert text(llm.create_completion(prompt, **greedy))


def test_close(make_llm):
    llm = make_llm()
    llm.eval(TOKENS)
    llm.close()
    llm.close()
    del llm


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.n_ctx(),
        lambda llm: llm.n_vocab(),
        lambda llm: llm.n_embd(),
        lambda llm: llm.tokenize(b"hello"),
        lambda llm: llm.detokenize([5]),
        lambda llm: llm("hello"),
        lambda llm: llm.create_chat_completion(MESSAGES),
        lambda llm: next(llm.generate(TOKENS)),
        lambda llm: llm.eval(TOKENS),
        lambda llm: llm.embed("hello"),
        lambda llm: llm.save_state(),
        lambda llm: llm.load_state(llm.saved),
    ],
    ids=lambda use: "",
)
def test_a_closed_model_says_so(make_llm, base, use):
    llm = make_llm(embedding=True)
    llm.eval(TOKENS)
    llm.saved = llm.save_state()
    llm.close()
    with pytest.raises(ModelError) as info:
        use(llm)
    assert str(info.value) == f"{base()}: the model is closed"


def test_is_freed_without_the_garbage_collector(base, adapter):
    """No reference cycle keeps a model alive: gigabytes would wait for the collector."""
    import gc
    import weakref

    gc.disable()
    try:
        llm = DeltaMemLlama(base(), deltamem_path=adapter("qwen3", "tsw_qo"), n_ctx=256, verbose=False)
        _ = llm.memory.state
        reference = weakref.ref(llm)
        del llm
        assert reference() is None
    finally:
        gc.enable()


# eval


def test_eval_in_pieces_is_eval_at_once(make_llm):
    at_once, in_pieces = make_llm(), make_llm(n_batch=5)
    at_once.eval(TOKENS)
    in_pieces.eval(TOKENS)
    assert at_once.n_tokens == in_pieces.n_tokens == len(TOKENS)
    np.testing.assert_allclose(in_pieces.memory.state, at_once.memory.state, rtol=0, atol=1e-5)


def test_failed_eval_leaves_everything_as_it_was(make_llm, monkeypatch):
    llm = make_llm(n_batch=4)
    llm.eval(TOKENS)
    state = llm.memory.state
    decode, calls = type(llm._ctx).decode, []

    def fail_second(ctx, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("llama_decode returned 1")
        decode(ctx, batch)

    monkeypatch.setattr(type(llm._ctx), "decode", fail_second)
    with refuses(DecodeError, "llama_decode returned 1"):
        llm.eval([9, 8, 7, 6, 5, 4])
    monkeypatch.undo()
    assert len(calls) == 2
    assert llm.n_tokens == len(TOKENS)
    np.testing.assert_array_equal(llm.memory.state, state)

    other = make_llm(n_batch=4)
    for model in (llm, other):
        if model is other:
            model.eval(TOKENS)
        model.eval([9, 8, 7, 6, 5, 4])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, rtol=0, atol=1e-6)


def test_eval_beyond_the_context(make_llm):
    llm = make_llm(n_ctx=256)
    with refuses(InputError, "257 tokens", "256", "n_ctx"):
        llm.eval([5] * 257)
    assert llm.n_tokens == 0 and not llm.memory.state.any()


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        ([14, -1], [-1, 319]),
        ([14, 10**6], [10**6, 319]),
        ([2**40], [2**40, 319]),
        ([2**70], ["tokens"]),
        ([14, 1.5], ["tokens"]),
        (["a"], ["tokens"]),
        ("abc", ["tokens"]),
        (None, ["tokens"]),
        ([[14, 15]], ["tokens"]),
        ([[14], [15, 16]], ["tokens"]),
    ],
)
def test_what_is_no_token(llm, tokens, names):
    llm.eval(TOKENS)
    state = llm.memory.state
    with refuses(InputError, *names):
        llm.eval(tokens)
    assert llm.n_tokens == len(TOKENS)
    np.testing.assert_array_equal(llm.memory.state, state)


def test_eval_of_nothing(llm):
    llm.eval([])
    assert llm.n_tokens == 0


# options of the model


def test_the_context_of_several_texts_is_that_of_the_model_each(make_llm, base):
    trained = Header(base()).keys["qwen3.context_length"]
    for n_seq_max in (1, 3):
        assert make_llm(None, n_ctx=0, n_seq_max=n_seq_max).n_ctx() == trained


@pytest.mark.parametrize("name", ["n_threads", "n_threads_batch"])
def test_too_many_threads(make_llm, name):
    for n in (513, -1):
        with refuses(InputError, name, "1 to 512", n):
            make_llm(**{name: n})


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")
def test_as_many_threads_as_cpus_that_the_process_may_use(base):
    """llama_cpp counts those of the machine; two threads on one CPU wait for each other most of the time."""
    program = f"""
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from pydeltamem import DeltaMemLlama

def threads(**options):
    with contextlib.closing(DeltaMemLlama({str(base())!r}, n_ctx=256, **options)) as llm:
        params = llm.context_params
        assert (llm.n_threads, llm.n_threads_batch) == (params.n_threads, params.n_threads_batch)
        return llm.n_threads, llm.n_threads_batch

import contextlib
print(threads(), threads(n_threads=0, n_threads_batch=0), threads(n_threads=3), threads(n_threads_batch=2))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "(1, 1) (1, 1) (3, 1) (1, 2)", result.stderr


@pytest.mark.parametrize("name", ["n_ctx", "n_seq_max", "n_batch", "n_threads", "n_threads_batch", "seed"])
def test_numbers_are_whole(base, name):
    for value in ("256", 2.5):
        with refuses(InputError, name, repr(value)):
            DeltaMemLlama(base(), **{name: value})
    with DeltaMemLlama(base(), **{"n_ctx": 256, name: np.int64(64)}) as llm:
        llm.eval([5])


def test_its_path_is_a_plain_string(base):
    """Answers hold it, and go to programs that do not know this package."""
    with DeltaMemLlama(base(), n_ctx=256) as llm:
        answer = llm.create_completion("hello", max_tokens=1)
        assert type(llm.model_path) is str and type(answer["model"]) is str


def test_servers_get_the_layers(make_llm, monkeypatch):
    """llama_cpp's default is none of them."""
    connected = []
    monkeypatch.setattr("pydeltamem.llama.connect", connected.append)
    n_all = make_llm(n_gpu_layers=-1).model_params.n_gpu_layers
    assert make_llm(rpc_servers="host:1").model_params.n_gpu_layers == n_all
    assert make_llm(rpc_servers="host:1", n_gpu_layers=2).model_params.n_gpu_layers == 2
    assert make_llm().model_params.n_gpu_layers == 0 and connected == ["host:1"] * 2


# segments


@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_segments(make_llm, case):
    segments = [0, 0, 0, 0, -1, 1, 1, 1, 2, 2, 2, 2]
    llm, in_pieces = make_llm(case), make_llm(case, n_batch=5)
    llm.eval(TOKENS, segments=segments)
    in_pieces.eval(np.array(TOKENS), segments=np.array(segments))
    assert np.abs(llm.memory.state).max() > 0
    np.testing.assert_allclose(in_pieces.memory.state, llm.memory.state, rtol=0, atol=1e-5)

    silent = make_llm(case)
    silent.eval(TOKENS, segments=[-1] * len(TOKENS))
    assert not silent.memory.state.any()

    by_token, alone = make_llm(case), make_llm(case)
    by_token.eval(TOKENS[:1])
    alone.eval(TOKENS[:1], segments=[0])
    np.testing.assert_allclose(by_token.memory.state, alone.memory.state, rtol=0, atol=1e-6)
    assert np.abs(alone.memory.state).max() > 0


@pytest.mark.parametrize(
    ("segments", "names"),
    [
        ([0, 0, 1], ["3 segment ids", "12 tokens"]),
        ([0] * 11 + [-2], ["segment ids", -1, 2**31 - 1]),
        ([0] * 11 + [2**31], ["segment ids", -1, 2**31 - 1]),
        ([1] * 6 + [0] * 6, ["segment ids"]),
        ([1, -1, 0] * 4, ["segment ids"]),
        ([0.5] * 12, ["segment ids", "float64"]),
    ],
)
def test_bad_segments(make_llm, segments, names):
    llm = make_llm("ssw_message")
    with refuses(InputError, *names):
        llm.eval(TOKENS, segments=segments)
    assert llm.n_tokens == 0 and not llm.memory.state.any()


def test_segments_on_another_adapter(make_llm):
    with refuses(InputError, "segments", "per token"):
        make_llm("tsw_qo").eval(TOKENS, segments=[0] * len(TOKENS))
    with refuses(AdapterError, "segments", "adapter"):
        make_llm(None).eval(TOKENS, segments=[0] * len(TOKENS))


# bad input


def truncated(source, target, keep):
    target.write_bytes(source.read_bytes()[:keep])
    return target


def test_bad_model(base, tmp_path, capfd):
    for path, *names in (
        (tmp_path / "none.gguf",),
        (tmp_path, "folder"),
        (truncated(base(), tmp_path / "cut.gguf", 900_000), "corrupted or incomplete"),  # llama.cpp's words
        (truncated(base(), tmp_path / "short.gguf", 300),),
        (truncated(base(), tmp_path / "empty.gguf", 0),),
    ):
        with refuses(ModelError, path, *names):
            DeltaMemLlama(path, verbose=False)
    assert capfd.readouterr().err == ""


def test_a_chat_template_that_cannot_be_read(base, tmp_path):
    path = tmp_path / "bad.gguf"
    template = "{% for m in messages %}{{ m['content'] }}"
    script = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template]
    subprocess.run([*script, str(base()), str(path)], check=True, capture_output=True)
    with refuses(ModelError, path, "Unexpected end of template"):
        DeltaMemLlama(path, n_ctx=64, verbose=False)


def test_an_adapter_is_no_model(adapter):
    with refuses(ModelError, adapter("qwen3", "tsw_qo"), "deltamem_path", "model_path"):
        DeltaMemLlama(adapter("qwen3", "tsw_qo"), verbose=False)


def test_bad_adapter(base, adapter, tmp_path, capfd):
    good = adapter("qwen3", "tsw_qo")
    text_file = tmp_path / "text.gguf"
    text_file.write_text("no adapter\n" * 100)
    for path in (
        tmp_path / "none.gguf",
        truncated(good, tmp_path / "cut.gguf", good.stat().st_size - 500),
        truncated(good, tmp_path / "short.gguf", 200),
        truncated(good, tmp_path / "empty.gguf", 0),
        text_file,
        base("qwen3"),  # a model
        adapter("smollm3", "tsw_qo"),
    ):
        with pytest.raises(AdapterError) as info:
            DeltaMemLlama(base("qwen3"), deltamem_path=path, verbose=False)
        assert str(path) in str(info.value) and "\n" not in str(info.value)
        assert isinstance(info.value, DeltaMemError)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("start", "names"),
    [
        (b"GGUF" + (4).to_bytes(4, "little"), ["version 4", 3]),
        (b"GGUF" + (1).to_bytes(4, "little"), ["version 1", 2]),
        (b"GGUF" + (3).to_bytes(4, "big"), ["byte order"]),
        (b"vers" + b"ion ", ["no GGUF file"]),
        (b"GGUF", ["truncated"]),
    ],
)
def test_an_adapter_that_is_no_gguf_of_this_machine(base, adapter, tmp_path, start, names):
    path = tmp_path / "other.gguf"
    path.write_bytes(start + (adapter("qwen3", "tsw_qo").read_bytes()[8:] if len(start) == 8 else b""))
    with refuses(AdapterError, path, *names):
        DeltaMemLlama(base("qwen3"), deltamem_path=path, verbose=False)


def test_an_adapter_for_another_architecture_is_named(base, adapter):
    with refuses(AdapterError, adapter("smollm3", "tsw_qo"), "smollm3", "qwen3"):
        DeltaMemLlama(base("qwen3"), deltamem_path=adapter("smollm3", "tsw_qo"), verbose=False)


# the library


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_package_alone_does_not_load_llama_cpp():
    result = python(
        "import sys, pydeltamem.cli.main, pydeltamem.formats.memory_file; sys.exit('llama_cpp' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_llama_cpp_after_pydeltamem_uses_our_library():
    result = python(
        "import pydeltamem, llama_cpp; from pydeltamem import DeltaMemLlama; "
        "assert issubclass(DeltaMemLlama, llama_cpp.Llama); llama_cpp.llama_cpp._lib.llama_deltamem_adapter_load"
    )
    assert result.returncode == 0, result.stderr


def test_llama_cpp_imported_before_with_another_library():
    result = python(
        "import ctypes, sys, types\n"
        "package, module = types.ModuleType('llama_cpp'), types.ModuleType('llama_cpp.llama_cpp')\n"
        "from _pydeltamem_startup import LLAMA_CPP_VERSION as release\n"
        "package.__version__, package.llama_cpp, package.__path__ = release, module, []\n"
        "module._lib = ctypes.CDLL(None)\n"
        "sys.modules.update({'llama_cpp': package, 'llama_cpp.llama_cpp': module})\n"
        "try:\n    import pydeltamem\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "import pydeltamem before llama_cpp" in result.stdout, result.stderr


def test_a_library_folder_without_a_library(tmp_path):
    result = python(
        f"import os; os.environ['LLAMA_CPP_LIB_PATH'] = {str(tmp_path)!r}\n"
        "try:\n    from pydeltamem import DeltaMemLlama\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "unset LLAMA_CPP_LIB_PATH" in result.stdout, result.stderr


def test_lazy_names():
    import pydeltamem

    assert set(pydeltamem.__all__) <= set(dir(pydeltamem))
    with pytest.raises(AttributeError):
        _ = pydeltamem.nothing


def test_going_back_has_no_logits(llm):
    llm.eval([14, 17, 40, 99])
    llm.n_tokens = 2
    with refuses(InputError, "logits", "eval"):
        _ = llm.logits
    following = next(llm.generate([14, 17], temp=0))
    llm.reset()
    llm.memory.reset()
    assert next(llm.generate([14, 17], temp=0)) == following


def test_logits_follow_the_latest_token(base, adapter):
    with_all = DeltaMemLlama(
        model_path=str(base()), deltamem_path=str(adapter("qwen3", "tsw_qo")), n_ctx=64, logits_all=True, verbose=False
    )
    last = DeltaMemLlama(model_path=str(base()), deltamem_path=str(adapter("qwen3", "tsw_qo")), n_ctx=64, verbose=False)
    with refuses(InputError, "logits", "eval"):
        _ = last.logits
    for tokens in ([3, 4, 5], [6]):
        with_all.eval(tokens)
        last.eval(tokens)
        np.testing.assert_array_equal(with_all.logits, with_all.scores[with_all.n_tokens - 1])
        np.testing.assert_allclose(last.logits, with_all.logits, rtol=0, atol=1e-5)  # a product of another shape
    last.reset()
    with refuses(InputError, "logits", "eval"):
        _ = last.logits


def test_it_is_closed_at_the_end_of_a_with(base):
    with DeltaMemLlama(base(), n_ctx=64) as llm:
        llm.eval([5, 6])
    with pytest.raises(ModelError):
        llm.eval([7])
    with pytest.raises(KeyError), DeltaMemLlama(base(), n_ctx=64) as llm:
        raise KeyError
    with pytest.raises(ModelError):
        llm.eval([7])
