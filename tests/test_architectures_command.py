"""deltamem architectures: the list is complete, and agrees with what attaching an adapter to a model does."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys

import gguf
import pytest

from pydeltamem import AdapterError, DeltaMemLlama, InputError, LibraryError
from pydeltamem.cli import main
from pydeltamem.convert import hf
from pydeltamem.runtime import architectures, library
from refusals import check_names, refuses
from test_unsupported import bitnet, rewrite  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def description():
    return architectures.describe()


@pytest.fixture(scope="module")
def rows(description):
    return {row["architecture"]: row for row in description["architectures"]}


def test_every_architecture_is_there(rows):
    """Those that llama.cpp's converter can write, by the gguf package of the same source."""
    code = "from gguf.constants import MODEL_ARCH_NAMES; print(*MODEL_ARCH_NAMES.values(), sep='\\n')"
    folder = hf.converter().parent / "gguf-py"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert set(rows) == set(done.stdout.split()) == set(architectures.names())
    assert all(row["status"] in architectures.STATUSES for row in rows.values())
    assert all(row["layers"] or row["problem"] for row in rows.values())


def test_what_is_verified_is_supported(rows):
    """The results are of this library, and the library agrees with them."""
    shipped = json.loads(architectures.RESULTS.read_text(encoding="utf-8"))
    assert shipped["llama_cpp_python"] == library.LLAMA_CPP_VERSION
    names = {model["architecture"] for model in shipped["models"]}
    assert len(names) > 5
    assert names == {name for name, row in rows.items() if row["verified"]}
    # a hybrid's attention layers were compared, its others have none
    partly = {name for name in names if rows[name]["status"] == "in part"}
    assert partly == {"lfm2"}
    assert names - partly == {name for name, row in rows.items() if row["status"] == "verified"}
    assert sorted(model["model"] for row in rows.values() for model in row["verified"]) == sorted(
        model["model"] for model in shipped["models"]
    )


def test_refused(rows):
    """What has the same fault is refused for the same reason, and for another one than the rest."""
    kinds = (
        ("bert", "modern-bert", "dream"),  # no decoder
        ("t5",),  # an encoder
        ("mamba", "rwkv7", "rwkv6qwen2"),  # no attention
        ("deepseek2",),  # other projections
        ("openelm",),  # one projection, outside of the common function
        ("clip",),  # no language model
    )
    reasons = []
    for names in kinds:
        said = set()
        for name in names:
            row = rows[name]
            assert row["status"] == "refused" and not row["verified"], name
            given = {row["problem"]} if row["problem"] else {layer["reason"] for layer in row["layers"]}
            assert all(f"'{name}'" in reason for reason in given) or name == "clip", given
            said |= {re.sub(r"'[^']+'|\d+", "", reason) for reason in given}
        assert len(said) == 1, said
        reasons += said
    assert len(set(reasons)) == len(kinds), reasons


def test_hybrids_take_a_memory_where_they_have_attention(rows):
    for name, attention in (("jamba", [True, False]), ("lfm2", [True, False]), ("falcon-h1", [True, True])):
        assert [bool(layer["corrects"]) for layer in rows[name]["layers"]] == attention, name


@pytest.mark.parametrize("arch", ["qwen3", "smollm3", "llama"])
def test_attaching_agrees_where_it_is_supported(rows, base, adapter, tmp_path, arch):
    """Real files, with a memory in every layer that corrects q, k, v and o."""
    if arch == "llama":  # SmolLM3 has its tensors
        model = rewrite(base("smollm3"), tmp_path / "base.gguf", arch)
        memory = rewrite(adapter("smollm3", "qkvo_lambda_outside"), tmp_path / "adapter.gguf", arch)
    else:
        model, memory = base(arch), adapter(arch, "qkvo_lambda_outside")
    llm = DeltaMemLlama(model, deltamem_path=memory, n_ctx=64, verbose=False)
    assert llm.memory.attached
    llm.close()
    assert rows[arch]["status"] == "verified"
    assert all(layer["corrects"] == "qkvo" for layer in rows[arch]["layers"])


def refusal(base, memory):
    """The sentence of attaching, without the name of the file."""
    with pytest.raises(AdapterError) as info:
        DeltaMemLlama(base, deltamem_path=memory, n_ctx=64, verbose=False)
    assert str(info.value).startswith(f"{memory}: ")
    return str(info.value).removeprefix(f"{memory}: ")


def test_attaching_is_refused_with_the_same_reason(rows, bitnet, base, adapter, tmp_path):  # noqa: F811
    memory = rewrite(adapter("smollm3", "tsw_qo"), tmp_path / "adapter.gguf", "bitnet")
    assert refusal(bitnet, memory) == rows["bitnet"]["layers"][0]["reason"]
    assert rows["bitnet"]["status"] == "in part"
    assert {layer["corrects"] for layer in rows["bitnet"]["layers"]} == {"qkv"}

    model = rewrite(base("smollm3"), tmp_path / "llada.gguf", "llada")  # the same tensors, and no decoder
    memory = rewrite(adapter("smollm3", "tsw_qo"), tmp_path / "llada-adapter.gguf", "llada")
    assert refusal(model, memory) == rows["llada"]["layers"][0]["reason"]
    assert rows["llada"]["status"] == "refused"


def test_an_assertion_of_llama_cpp_is_not_the_end(rows):
    """Where the hyperparameters of its tests do not do, the process that asks ends; those after it are asked too."""
    assert "do not make a model" in rows["plm"]["problem"] and rows["plm"]["status"] == "unknown"
    few = architectures.describe(["plm", "qwen3"])["architectures"]
    assert [(row["architecture"], row["status"]) for row in few] == [("qwen3", "verified"), ("plm", "unknown")]


def test_a_model_without_a_context_is_told(monkeypatch, capsys):
    """By the process that asks: a later llama.cpp may have such a model."""
    defaults = library.llama_cpp.llama_context_default_params

    def refused():
        params = defaults()
        params.type_v, params.flash_attn_type = gguf.GGMLQuantizationType.Q8_0, 0
        return params

    monkeypatch.setattr(library.llama_cpp, "llama_context_default_params", refused)
    monkeypatch.setattr(sys, "argv", ["architectures", "qwen3", "llama"])
    monkeypatch.delitem(sys.modules, architectures.__name__)
    runpy.run_module(architectures.__name__, run_name="__main__")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert "V cache" in answer["problem"] and not answer["refused"] and not answer["layers"]


def test_command_line(rows, tmp_path, capsys):
    path = tmp_path / "architectures.json"
    assert main.main(["architectures", "qwen3", "bitnet", "mamba", "baichuan", "--json", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert said["qwen3"].startswith("verified q, k, v, o q, k, v, o Qwen3 in PyTorch: NMSE below 1e-1")
    for name in ("bitnet", "mamba"):
        row = rows[name]
        reason = row["problem"] or next(layer["reason"] for layer in row["layers"] if layer["reason"])
        assert reason.rpartition(": ")[2].rpartition(", but ")[2] in said[name]
    assert [row["architecture"] for row in json.loads(path.read_text())["architectures"]] == [
        "qwen3",
        "baichuan",
        "bitnet",
        "mamba",
    ]
    assert main.main(["architectures", "qwen3", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["architectures"][0]["status"] == "verified"


def test_a_name_that_is_given_twice():
    rows = architectures.describe(["bert", "qwen3", "bert"])["architectures"]
    assert sorted(row["architecture"] for row in rows) == ["bert", "qwen3"]


def test_user_errors(tmp_path, capsys):
    with refuses(InputError, "qwen9"):
        architectures.describe(["qwen9"])
    assert main.main(["architectures", "qwen3", "--json", str(tmp_path / "no" / "file")]) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [tmp_path / "no" / "file"])


def test_results_of_another_library_do_not_count(monkeypatch, tmp_path):
    results = json.loads(architectures.RESULTS.read_text(encoding="utf-8"))
    path = tmp_path / "architectures.json"
    path.write_text(json.dumps({**results, "llama_cpp_python": "0.0.1"}))
    monkeypatch.setattr(architectures, "RESULTS", path)
    assert [row["status"] for row in architectures.describe(["qwen3"])["architectures"]] == ["supported"]


def test_tiny_adapters_that_cannot_be(tmp_path):
    tiny = architectures.tiny_models()
    with library.errors_held() as log:
        model = tiny.deltamem_tiny_model(b"qwen3")
        assert tiny.deltamem_tiny_adapter(model, 99, b"q", str(tmp_path / "a").encode()) == -1
        assert "99" in library.last_error()
        assert tiny.deltamem_tiny_adapter(model, 0, b"q", str(tmp_path / "no" / "a").encode()) == -1
        assert str(tmp_path / "no" / "a") in library.last_error()
        for given in [(None, 0, b"q", b"a"), (model, 0, None, b"a"), (model, 0, b"q", None)]:
            assert tiny.deltamem_tiny_adapter(*given) == -1
        library.llama_cpp.llama_model_free(model)
        assert not tiny.deltamem_tiny_model(None)
        assert not tiny.deltamem_tiny_model(b"qwen9")
        assert "qwen9" in library.last_error()
        log.clear()
    assert tiny.deltamem_architecture_name(-1) is None and tiny.deltamem_architecture_name(10_000) is None


def test_only_this_command_loads_the_tiny_models():
    """They are a test file of llama.cpp, which the library that everybody loads does without."""
    assert hasattr(architectures.tiny_models(), "deltamem_tiny_model")
    llama = library.llama_cpp.llama_cpp._lib
    assert not [name for name in ("llama_deltamem_tiny_model", "deltamem_tiny_model") if hasattr(llama, name)]


def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library, "library_folder", lambda: str(tmp_path))
    architectures.tiny_models.cache_clear()
    with refuses(LibraryError, tmp_path):
        architectures.describe(["qwen3"])
    assert main.main(["architectures", "qwen3"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
