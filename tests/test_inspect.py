"""deltamem inspect: what it says about an adapter, a model, a packed model and a memory file, and what it refuses."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from pydeltamem import DeltaMemLlama
from pydeltamem.cli.main import main
from pydeltamem.errors import AdapterError, CheckpointError, MemoryFileError, ModelError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint
from pydeltamem.formats.description import describe
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.memory_file import write_memory_file
from pydeltamem.hub import adapter_file, model_file
from refusals import refuses
from test_with_others import write_like

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123\n"


@pytest.fixture
def memory(tmp_path):
    """A memory file of two layers, two heads, rank 3, and its state."""
    state = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)
    path = tmp_path / "talk.memory"
    metadata = {"layers": "1,3", "adapter": "ab" * 32, "adapter_name": "talker", "architecture": "qwen3"}
    write_memory_file(path, state, metadata)
    return path, state


def rewritten(path, *sources, without=(), **keys):
    """Keys and tensors of the sources in one GGUF: the first one's keys win, `keys` (. as __) win over all."""
    readers = [gguf.GGUFReader(source) for source in sources]
    writer = gguf.GGUFWriter(path, readers[0].fields["general.architecture"].contents())
    fields = {}
    for reader in reversed(readers):
        fields.update(reader.fields)
    for key, field in fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and key not in without:
            value = keys.get(key.replace(".", "__"), field.contents())
            writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name not in without:
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def packed(base, adapter, tmp_path):
    return rewritten(tmp_path / "packed.gguf", base(), adapter("qwen3", "tsw_qo"))


# the header


def without_tensors(path, keys):
    """A GGUF of keys alone."""
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, value in keys.items():
        add = {str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_uint32)
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tokens_that_are_no_list(tmp_path):
    path = without_tensors(tmp_path / "odd.gguf", {"tokenizer.ggml.tokens": 5, "qwen3.vocab_size": 7})
    assert describe(path)["model"]["vocabulary"] == 7


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_header(base, adapter, arch):
    """As gguf.GGUFReader, which is slow on a vocabulary, reads it."""
    for path in (
        base(arch),
        adapter(arch, "msw4_qo"),
        adapter(arch, "tsw_qo", "q8_0"),
        adapter(arch, "tsw_qo", "bf16"),
    ):
        header, reader = Header(path), gguf.GGUFReader(path)
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert header.keys == {key: field.contents() for key, field in fields.items()}
        assert header.types == {key: field.types[-1] for key, field in fields.items()}
        assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            mine = header.tensors[tensor.name]
            assert mine.shape == tuple(tensor.shape[::-1].tolist())
            assert (mine.type, mine.offset, mine.n_bytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(header.read(tensor.name), expected.reshape(mine.shape))


# what it says


def test_adapter(adapter, golden_dir):
    path = adapter("qwen3", "standard_uncoupled_scalar_gate", "f16")
    found = describe(path)
    assert (found["file"], found["bytes"], found["kind"]) == (str(path), path.stat().st_size, "adapter")
    assert "model" not in found and "memory" not in found
    source = golden_dir / "qwen3" / "standard_uncoupled_scalar_gate"
    config = json.loads((source / "delta_mem_config.json").read_text())
    details = found["adapter"]
    assert details["architecture"] == "qwen3"
    assert details["name"] == "standard_uncoupled_scalar_gate"
    assert details["rank"] == config["rank"]
    assert details["heads"] == config["num_state_heads"]
    assert details["alpha"] == config["alpha"]
    assert details["update_mode"] == "standard"
    assert details["gates"] == "per head"
    assert details["lambda"] == "its own projection"
    assert details["normalize_qk"] is True
    assert details["write_granularity"] == "token"
    assert details["delta_heads"] == config["delta_heads"]
    assert details["layers"] == [0, 1, 2, 3]
    assert (details["base_layers"], details["base_width"]) == (4, 96)
    assert details["source"] == "delta_mem_adapter.pt"
    assert details["source_sha256"] == hashlib.sha256((source / "delta_mem_adapter.pt").read_bytes()).hexdigest()

    tensors = gguf.GGUFReader(path).tensors
    for kind, row in details["tensor_types"].items():
        sizes = [tensor.n_bytes for tensor in tensors if tensor.tensor_type.name == kind]
        assert row == {"tensors": len(sizes), "bytes": sum(sizes)}
    assert set(details["tensor_types"]) == {"F16", "F32"}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_norms_of_the_corrections(adapter, outtype):
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter("smollm3", "msw4_qo")).tensors}
    rows = describe(adapter("smollm3", "msw4_qo", outtype))["adapter"]["correction_norms"]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert set(row) == {"layer", "q", "o"}
        for head in "qo":
            norm = np.linalg.norm(exact[f"blk.{row['layer']}.deltamem_{head}.weight"])
            assert row[head] == pytest.approx(norm, rel=1e-6 if outtype == "f32" else 5e-3)


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("layers_subset_scale_layer", "layers", [1, 3]),
        ("no_lambda_raw_qk", "lambda", "none"),
        ("no_lambda_raw_qk", "normalize_qk", False),
        ("tsw_qo", "lambda", "1 - beta"),
        ("tsw_qo", "gates", "per row"),
        ("tsw_qo", "o_norm_epsilon", None),
        ("o_rmsnorm_scale_head", "o_norm_epsilon", pytest.approx(1e-6)),
        ("ssw_sentence", "write_granularity", "sentence_mean"),
        ("qkvo_lambda_outside", "delta_heads", ["q", "k", "v", "o"]),
    ],
)
def test_adapter_options(adapter, case, key, value):
    assert describe(adapter("qwen3", case))["adapter"][key] == value


def test_model(base):
    found = describe(base("smollm3"))
    assert found["kind"] == "base" and "adapter" not in found
    tensors = gguf.GGUFReader(base("smollm3")).tensors
    assert found["model"] == {
        "architecture": "smollm3",
        "name": "Hf",
        "parameters": sum(int(tensor.n_elements) for tensor in tensors),
        "file_type": "F32",
        "layers": 5,
        "width": 96,
        "heads": 6,
        "kv_heads": 2,
        "context": 512,
        "vocabulary": 320,
        "tensor_types": {"F32": {"tensors": 47, "bytes": sum(tensor.n_bytes for tensor in tensors)}},
    }


def test_packed(base, adapter, packed):
    found = describe(packed)
    assert found["kind"] == "packed"
    assert found["model"] == describe(base())["model"]
    assert found["adapter"] == {**describe(adapter("qwen3", "tsw_qo"))["adapter"], "name": found["model"]["name"]}


def test_memory(memory):
    path, state = memory
    found = describe(path)
    assert found["kind"] == "memory" and found["bytes"] == path.stat().st_size
    details = found["memory"]
    assert details["shape"] == [2, 2, 3, 3]
    assert (details["heads"], details["rank"], details["layers"]) == (2, 3, [1, 3])
    assert (details["adapter"], details["adapter_sha256"], details["architecture"]) == ("talker", "ab" * 32, "qwen3")
    assert [row["layer"] for row in details["norms"]] == [1, 3]
    for row, layer in zip(details["norms"], state):
        assert row["norm"] == pytest.approx(np.linalg.norm(layer.astype(np.float64)))
    assert datetime.datetime.fromisoformat(details["created"]).tzinfo
    assert details["age_seconds"] >= 0


# how it is printed


def test_a_long_name_of_an_adapter_is_kept_whole(base, adapter, tmp_path):
    name = "a long name, é " * 40
    long = rewritten(tmp_path / "long.gguf", adapter("qwen3", "tsw_qo"), general__name=name)
    with DeltaMemLlama(base(), deltamem_path=long, n_ctx=64, verbose=False) as llm:
        llm.memory.save(tmp_path / "talk.memory")
    assert describe(tmp_path / "talk.memory")["memory"]["adapter"] == name


@pytest.fixture
def printed(capsys):
    def run(*args):
        assert main(["inspect", *map(str, args)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def test_json(printed, base, adapter, packed, memory):
    for path in (base(), adapter("qwen3", "tsw_qo"), packed, memory[0]):
        found, expected = json.loads(printed(path, "--json")), describe(path)
        for description in (found, expected):
            description.get("memory", {}).pop("age_seconds", None)
        assert found == expected


def words(line):
    return " ".join(line.split())


def test_tables(printed, base, adapter, packed, memory):
    lines = [words(line) for line in printed(adapter("qwen3", "o_rmsnorm_scale_head", "q8_0")).splitlines()]
    for line in (
        "kind δ-mem adapter",
        "for qwen3, 4 layers, width 96",
        "heads × rank 1 × 8",
        "update mode standard",
        "gates per row",
        "writes per token",
        "corrects q, o (o by RMS norm, ε 1e-06)",
        "converted from delta_mem_adapter.pt",
        "layer |Δq| |Δo|",
    ):
        assert line in lines
    digest = describe(adapter("qwen3", "o_rmsnorm_scale_head", "q8_0"))["adapter"]["source_sha256"]
    assert f"sha256 {digest}" in lines  # on one line
    assert any(line.startswith("Q8_0 4 ") for line in lines)

    lines = [words(line) for line in printed(base()).splitlines()]
    assert "architecture qwen3" in lines and "vocabulary 320" in lines and "F32 46 1.80 MB" in lines

    lines = [words(line) for line in printed(packed).splitlines()]
    assert "kind model with a δ-mem adapter" in lines and "vocabulary 320" in lines and "layer |Δq| |Δo|" in lines

    lines = [words(line) for line in printed(memory[0]).splitlines()]
    assert "state [L, H, r, r] 2 × 2 × 3 × 3" in lines and "adapter talker" in lines and "layer |S|" in lines


def test_values_per_layer_are_a_span(printed, tmp_path):
    """And a file type that this gguf package does not know is its number, and no tensors are no table."""
    keys = {
        "qwen3.attention.head_count": [4, 8, 4], "qwen3.attention.head_count_kv": [2, 2, 2], "general.file_type": 999,
    }  # fmt: skip
    path = without_tensors(tmp_path / "layers.gguf", keys)
    out = printed(path)
    assert "4 to 8" in out and "2 to 2" not in out and "999" in out and "Tensors" not in out
    assert describe(path)["model"]["file_type"] == "999"


def saved_at(path, date):
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata()
    safetensors.numpy.save_file(arrays, path, {**metadata, "saved": date})


@pytest.mark.parametrize(
    ("ago", "words"),
    [({"days": 3}, "3 days"), ({"days": 1}, "1 day"), ({"hours": 5}, "5 hours"), ({"minutes": 2}, "2 minutes")],
)
def test_the_age_of_a_memory(printed, memory, ago, words):
    saved = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(**ago)
    saved_at(memory[0], saved.isoformat())
    assert f", {words} ago" in printed(memory[0])


@pytest.mark.parametrize("saved", ["yesterday", "2026-01-01T00:00:00"])
def test_an_age_that_is_not_known(printed, memory, saved):
    """No date, or one of an unknown time zone."""
    saved_at(memory[0], saved)
    assert describe(memory[0])["memory"]["age_seconds"] is None
    assert " ago" not in printed(memory[0])


def test_names_are_no_markup(printed, base, adapter, tmp_path):
    path = rewritten(tmp_path / "odd.gguf", adapter("qwen3", "tsw_qo"), general__name="[red]:smile: [/nothing]")
    assert "name [red]:smile: [/nothing]" in [words(line) for line in printed(path).splitlines()]


def test_names_do_not_command_a_terminal(printed, adapter, tmp_path):
    name = "a\x1b]0;b\x07\nc\u202ed"
    path = rewritten(tmp_path / "odd.gguf", adapter("qwen3", "tsw_qo"), general__name=name)
    out = printed(path)
    assert r"a\x1b]0;b\x07\nc\u202ed" in out and all(letter.isprintable() for letter in out.replace("\n", ""))
    assert json.loads(printed(path, "--json"))["adapter"]["name"] == name


def test_loads_no_llama_cpp(adapter):
    code = (
        "import sys, pydeltamem.cli.main as c; c.main(['inspect', sys.argv[1]]); sys.exit('llama_cpp' in sys.modules)"
    )
    command = [sys.executable, "-c", code, adapter("qwen3", "tsw_qo")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0


# what it refuses


def refused(path, error, says, capsys):
    with pytest.raises(error) as info:
        describe(path)
    sentence = str(info.value)
    assert "\n" not in sentence and str(path) in sentence and says in sentence
    for options in ([], ["--json"]):
        capsys.readouterr()
        assert main(["inspect", str(path), *options]) == 1
        captured = capsys.readouterr()
        assert captured.err == f"deltamem: error: {sentence}\n" and captured.out == ""


def test_not_a_file_of_ours(tmp_path, capsys):
    refused(tmp_path / "none", ModelError, "no such", capsys)
    refused(Path(os.devnull), ModelError, "device", capsys)
    refused(tmp_path, ModelError, "is a folder", capsys)
    path = tmp_path / "file"
    for content in (b"", b"GG", b"just text, nothing else", bytes(100)):
        path.write_bytes(content)
        refused(path, ModelError, "is neither a GGUF file nor a memory file", capsys)


def test_a_pointer_of_git_lfs_is_no_damaged_file(golden_dir, tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(POINTER)
    refused(path, ModelError, "git lfs pull", capsys)
    for error, read in (
        (ModelError, Header),
        (ModelError, model_file),
        (AdapterError, lambda path: adapter_file(path, "model.gguf")),
    ):
        with refuses(error, path, "git lfs pull"):
            read(path)
    for name in WEIGHTS:
        folder = tmp_path / Path(name).suffix
        folder.mkdir()
        shutil.copy(golden_dir / "qwen3" / "tsw_qo" / CONFIG, folder)
        (folder / name).write_bytes(POINTER)
        with refuses(CheckpointError, folder / name, "git lfs pull"):
            Checkpoint(folder)


@pytest.mark.parametrize("keep", [4, 20, 200, 4000, -1])
def test_truncated(base, adapter, packed, tmp_path, capsys, keep):
    for source in (base(), adapter("qwen3", "tsw_qo"), packed):
        path = tmp_path / "cut.gguf"
        path.write_bytes(source.read_bytes()[:keep])
        refused(path, ModelError, "is not a readable GGUF file: it is truncated", capsys)


def test_damaged_memory(memory, tmp_path, capsys):
    data = memory[0].read_bytes()
    memory[0].write_bytes(data[:-1])
    refused(memory[0], MemoryFileError, "cut off", capsys)
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, other)
    refused(other, MemoryFileError, "not a memory file", capsys)


def test_other_adapters(adapter, tmp_path, capsys):
    good = adapter("qwen3", "tsw_qo")
    lora = rewritten(tmp_path / "lora.gguf", good, adapter__type="lora")
    refused(lora, AdapterError, "adapter of type 'lora'", capsys)
    later = rewritten(tmp_path / "later.gguf", good, deltamem__version=2)
    refused(later, AdapterError, "has adapter version 2, this release reads 1", capsys)


@pytest.mark.parametrize("what", ["deltamem.rank", "deltamem.layers", "blk.2.deltamem_o.weight"])
def test_adapter_that_lacks_something(adapter, tmp_path, capsys, what):
    path = rewritten(tmp_path / "less.gguf", adapter("qwen3", "tsw_qo"), without=[what])
    refused(path, AdapterError, f"{what}, the adapter is damaged", capsys)


def test_adapter_with_a_key_of_another_type(adapter, tmp_path, capsys):
    keys = {"general.type": "adapter", "adapter.type": "deltamem", "deltamem.version": 1, "deltamem.layers": 4}
    path = without_tensors(tmp_path / "odd.gguf", keys)
    refused(path, AdapterError, "deltamem.layers of an unexpected type", capsys)


def test_an_epsilon_that_is_no_number(adapter, tmp_path, capsys):
    header = Header(adapter("qwen3", "o_rmsnorm_scale_head"))
    header.keys["deltamem.o_norm_epsilon"] = "small"
    header.types["deltamem.o_norm_epsilon"] = gguf.GGUFValueType.STRING
    write_like(tmp_path / "odd.gguf", header)
    refused(tmp_path / "odd.gguf", AdapterError, "deltamem.o_norm_epsilon of an unexpected type", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have(adapter, tmp_path, capsys, value):
    path = rewritten(tmp_path / "odd.gguf", adapter("qwen3", "tsw_qo"), deltamem__alpha=value)
    refused(path, AdapterError, "deltamem.alpha", capsys)


def test_layers_that_do_not_ascend(adapter, tmp_path, capsys):
    path = rewritten(tmp_path / "odd.gguf", adapter("qwen3", "tsw_qo"), deltamem__layers=[0, 1, 1, 2])
    refused(path, AdapterError, "deltamem.layers", capsys)


def test_adapter_of_an_unknown_tensor_type(adapter, tmp_path, capsys):
    """A type that is newer than the gguf package can be listed, its values cannot be read."""
    data, name = adapter("qwen3", "tsw_qo").read_bytes(), b"blk.1.deltamem_o.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # after the name: the number of dimensions, the two, the type
    path = tmp_path / "new.gguf"
    path.write_bytes(data[:place] + (99).to_bytes(4, "little") + data[place + 4 :])
    assert Header(path).tensors[name.decode()].type_name == "type 99"
    refused(path, ModelError, "tensor blk.1.deltamem_o.weight is type 99, which cannot be read here", capsys)


def test_no_language_model(adapter, tmp_path, capsys):
    good = adapter("qwen3", "tsw_qo").read_bytes()
    path = tmp_path / "odd.gguf"
    path.write_bytes(
        good.replace(b"general.architecture", b"general.architecturf").replace(b"adapter.type", b"adapter.typf")
    )
    refused(path, AdapterError, "not a δ-mem adapter", capsys)
    path.write_bytes(good.replace(b"general.type", b"general.typf").replace(b"deltamem.version", b"deltamem.versiof"))
    assert describe(path)["kind"] == "base"
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architecturf"))
    refused(path, ModelError, "has no key general.architecture", capsys)


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def entry(name, n=32, kind=0, offset=0):
    return string(name) + struct.pack("<IQIQ", 1, n, kind, offset)


@pytest.mark.parametrize(
    ("keys", "entries", "names"),
    [
        ([string("general.alignment") + struct.pack("<II", 4, 48)], [], ["general.alignment", "48"]),
        ([string("odd") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0)], [], []),  # a list of lists
        ([], [entry("twice"), entry("twice", offset=128)], ["twice"]),
        ([], [entry("rows", n=33, kind=8)], ["rows", "33", "Q8_0"]),  # blocks of 32
    ],
)
def test_damaged_header(tmp_path, keys, entries, names):
    path = tmp_path / "damaged.gguf"
    start = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys))
    path.write_bytes(start + b"".join([*keys, *entries]) + bytes(4096))
    with refuses(ModelError, path, *names):
        describe(path)


def test_a_header_without_end(tmp_path):
    """A file of no size on the disk must not take all memory."""
    path = tmp_path / "sparse.gguf"
    for layout, *value in (("<IIQ", 9, 0, 3 << 30), ("<IIQ", 9, 8, 1 << 28), ("<IQ", 8, 3 << 30)):
        with open(path, "wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("many") + struct.pack(layout, *value))
            file.truncate(4 << 30)
        with refuses(ModelError, path, "header"):
            Header(path)


def test_a_file_of_the_other_byte_order(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with refuses(ModelError, path, "byte order"):
        Header(path)


@pytest.mark.parametrize("keys", [{"general.architecture": "a\x1b[31m\nb"}, {"general.type": "a\nb"}])
def test_errors_of_a_base_stay_on_one_line(base, tmp_path, keys):
    header = Header(base())
    header.keys.update(keys)
    header.types.update(dict.fromkeys(keys, gguf.GGUFValueType.STRING))
    write_like(tmp_path / "odd.gguf", header)
    with refuses(ModelError, tmp_path / "odd.gguf", "a") as info:
        Base(tmp_path / "odd.gguf")
    assert str(info.value).isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="a file of /proc that cannot be read")
@pytest.mark.parametrize("read", [describe, Header])
def test_a_file_that_cannot_be_read(read):
    with refuses(ModelError, "/proc/self/mem"):
        read("/proc/self/mem")
