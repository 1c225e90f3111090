"""deltamem pack, unpack and quantize: one file that loads as one model, and back again."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest

from pydeltamem import AdapterError, DeltaMemLlama, InputError, ModelError, OutputError
from pydeltamem.cli import main
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.packed import pack, unpack
from pydeltamem.models import default_files
from pydeltamem.runtime.quantize import file_type, quantize
from refusals import refuses
from test_with_others import write_like

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88]


@pytest.fixture
def packed(base, adapter, tmp_path):
    """packed(arch, case, outtype): a packed model."""

    def make(arch="qwen3", case="tsw_qo", outtype="f32"):
        path = tmp_path / f"packed-{arch}-{case}-{outtype}.gguf"
        pack(base(arch), adapter(arch, case, outtype), path)
        return path

    return make


def logits_and_state(path, deltamem_path=None):
    llm = DeltaMemLlama(path, deltamem_path=deltamem_path, n_ctx=256, logits_all=True, n_threads=1, verbose=False)
    llm.eval(TOKENS)
    result = llm.scores[: llm.n_tokens].copy(), llm.memory.state
    llm.close()
    return result


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
@pytest.mark.parametrize("case", ["tsw_qo", "msw4_qo", "ssw_message", "o_rmsnorm_scale_head"])
def test_a_packed_model_is_base_and_adapter(base, adapter, packed, arch, case):
    one = logits_and_state(packed(arch, case))
    two = logits_and_state(base(arch), adapter(arch, case))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert one[1].any()


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_unpacking_gives_back_both_files(base, adapter, packed, tmp_path, outtype):
    unpack(packed("qwen3", "tsw_qo", outtype), tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == base().read_bytes()
    assert (tmp_path / "adapter.gguf").read_bytes() == adapter("qwen3", "tsw_qo", outtype).read_bytes()


@pytest.fixture
def aligned(base, tmp_path):
    """The golden backbone with its tensors aligned otherwise than the adapter's."""
    path = tmp_path / "aligned.gguf"
    header, writer = Header(base()), gguf.GGUFWriter(path, "qwen3")
    for key, value in header.keys.items():
        if key.startswith("qwen3."):
            writer.add_key_value(key, value, header.types[key])
    writer.add_custom_alignment(256)
    for name in header.tensors:
        writer.add_tensor(name, header.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert any(tensor.n_bytes % 256 for tensor in Header(path).tensors.values())
    return path


def test_other_alignment(adapter, aligned, tmp_path):
    pack(aligned, adapter("qwen3", "tsw_qo"), tmp_path / "packed.gguf")
    assert all(tensor.offset % 256 == 0 for tensor in Header(tmp_path / "packed.gguf").tensors.values())
    unpack(tmp_path / "packed.gguf", tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == aligned.read_bytes()
    assert (tmp_path / "adapter.gguf").read_bytes() == adapter("qwen3", "tsw_qo").read_bytes()


@pytest.fixture
def merged(base, tmp_path):
    """The golden backbone as llama-gguf-split --merge leaves it: with keys of shards that it no longer has."""
    header = Header(base())
    for key, value, kind in (
        ("split.no", 0, gguf.GGUFValueType.UINT16),
        ("split.tensors.count", len(header.tensors), gguf.GGUFValueType.INT32),
        ("split.count", 0, gguf.GGUFValueType.UINT16),
    ):
        header.keys[key], header.types[key] = value, kind
    write_like(tmp_path / "merged.gguf", header)
    return tmp_path / "merged.gguf"


def test_a_merged_model_is_one_file(base, adapter, merged, tmp_path):
    memory, before = adapter("qwen3", "tsw_qo"), merged.read_bytes()
    pack(merged, memory, tmp_path / "packed.gguf")
    same(logits_and_state(tmp_path / "packed.gguf"), logits_and_state(base(), memory))
    pack(merged, memory, tmp_path / "packed.gguf")  # again: such a file may be replaced
    unpack(tmp_path / "packed.gguf", merged, tmp_path / "adapter.gguf")
    assert merged.read_bytes() == before
    assert (tmp_path / "adapter.gguf").read_bytes() == memory.read_bytes()
    for limit in (10, 1000):
        files = pack(merged, memory, tmp_path / "shards.gguf", max_tensors=limit)
        pack(merged, memory, tmp_path / "shards.gguf", max_tensors=limit)
        unpack(files[0], tmp_path / "base.gguf", tmp_path / "adapter.gguf")  # without keys of shards
        assert (tmp_path / "base.gguf").read_bytes() == base().read_bytes()
    quantize(merged, tmp_path / "small.gguf", "q8_0")
    quantize(merged, tmp_path / "small.gguf", "q8_0")


@pytest.mark.parametrize("alignment", [0, 48, 1 << 62, "32", True])
def test_an_alignment_that_cannot_be(packed, tmp_path, alignment):
    header, types = Header(packed()), gguf.GGUFValueType
    key = "deltamem.packed.general.alignment"
    header.keys[key] = alignment
    header.types[key] = {str: types.STRING, bool: types.BOOL}.get(type(alignment), types.UINT64)
    write_like(tmp_path / "odd.gguf", header)
    if alignment is True:  # a number, for what it is worth
        return unpack(tmp_path / "odd.gguf", tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    with refuses(ModelError, tmp_path / "odd.gguf", key, alignment):
        unpack(tmp_path / "odd.gguf", tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*base*")) and not (tmp_path / "adapter.gguf").exists()


def test_command_line(base, adapter, tmp_path, capsys):
    model = str(tmp_path / "model.gguf")
    assert main.main(["pack", str(base()), str(adapter("qwen3", "tsw_qo")), "-o", model]) == 0
    assert "loads as one model" in capsys.readouterr().out
    assert main.main(["inspect", model]) == 0
    assert "model with a δ-mem adapter" in capsys.readouterr().out
    files = [str(tmp_path / "base.gguf"), str(tmp_path / "adapter.gguf")]
    assert main.main(["unpack", model, "--base", files[0], "--adapter", files[1]]) == 0
    options = ["-p", "hello", "-n", "4", "-c", "256", "--save-memory", str(tmp_path / "a.memory")]
    result = subprocess.run(
        [sys.executable, "-m", "pydeltamem.cli", "generate", "-m", model, *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.memory").exists()


def test_what_cannot_be_packed(base, adapter, packed, tmp_path):
    memory, out = adapter("qwen3", "tsw_qo"), tmp_path / "out.gguf"
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    for error, names, arguments in (
        (ModelError, [packed(), "unpack"], (packed(), memory, out)),
        (ModelError, [memory, "adapter"], (memory, base(), out)),
        (AdapterError, [base("smollm3")], (base(), base("smollm3"), out)),
        (AdapterError, [memory, base("smollm3"), "qwen3", "smollm3"], (base("smollm3"), memory, out)),
        (ModelError, [text, "GGUF"], (text, memory, out)),
        (ModelError, [tmp_path / "none"], (base(), tmp_path / "none", out)),
        (InputError, [memory], (base(), memory, memory)),
        (OutputError, [tmp_path / "no" / "out.gguf", "No such file"], (base(), memory, tmp_path / "no" / "out.gguf")),
        (OutputError, [tmp_path, "folder"], (base(), memory, tmp_path)),
        (ModelError, [tmp_path, "folder"], (tmp_path, memory, out)),
    ):
        with refuses(error, *names):
            pack(*arguments)
    assert not out.exists()
    with refuses(ModelError, base()):
        unpack(base(), tmp_path / "a", tmp_path / "b")
    with refuses(InputError, tmp_path / "a"):
        unpack(packed(), tmp_path / "a", tmp_path / "a")


def test_an_adapter_of_other_shapes_is_not_packed(base, adapter, tmp_path):
    """Sizes of the base that it names are right; loading refuses it."""
    header = Header(adapter("qwen3", "tsw_qo"))
    tensors = {name: header.read(name) for name in header.tensors}
    tensors["blk.2.deltamem_q.weight"] = np.concatenate([tensors["blk.2.deltamem_q.weight"]] * 2)
    write_like(tmp_path / "adapter.gguf", header, tensors)
    with pytest.raises(AdapterError):
        DeltaMemLlama(base(), deltamem_path=tmp_path / "adapter.gguf", n_ctx=64, verbose=False)
    with refuses(AdapterError, tmp_path / "adapter.gguf", base(), "blk.2.deltamem_q.weight", 384, 192):
        pack(base(), tmp_path / "adapter.gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("of", "keys", "tensor"),
    [
        ("adapter", {}, "token_embd.weight"),  # the base's, too
        ("adapter", {}, "other.weight"),  # unpacking would give it to the base
        ("adapter", {"deltamem.packed.general.name": 1}, None),
        ("base", {}, "blk.0.deltamem_o.weight"),
        ("base", {"deltamem.rank": 8}, None),
    ],
)
def test_names_that_would_be_there_twice(base, adapter, tmp_path, of, keys, tensor):
    """The file could not be read, nor unpacked."""
    files = {"base": base(), "adapter": adapter("qwen3", "tsw_qo")}
    header = Header(files[of])
    header.keys.update(keys)
    header.types.update(dict.fromkeys(keys, gguf.GGUFValueType.UINT32))
    tensors = {name: header.read(name) for name in header.tensors}
    if tensor:
        tensors[tensor] = np.zeros((4, 4), np.float32)
    files[of] = tmp_path / "odd.gguf"
    write_like(files[of], header, tensors)
    with refuses({"base": ModelError, "adapter": AdapterError}[of], files[of], tensor or next(iter(keys))):
        pack(files["base"], files["adapter"], tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_layers_that_predict_further_tokens_are_not_counted(base, adapter, tmp_path):
    """As llama.cpp counts: what loads, packs."""
    header = Header(base())
    header.keys["qwen3.block_count"] += 1
    header.keys["qwen3.nextn_predict_layers"] = 1
    header.types["qwen3.nextn_predict_layers"] = gguf.GGUFValueType.UINT32
    write_like(tmp_path / "base.gguf", header)
    try:
        DeltaMemLlama(tmp_path / "base.gguf", verbose=False).close()
    except ModelError:
        pytest.skip("this release of llama.cpp knows no such layers in a Qwen3; the pinned one does")
    pack(tmp_path / "base.gguf", adapter("qwen3", "tsw_qo"), tmp_path / "packed.gguf")
    same(logits_and_state(tmp_path / "packed.gguf"), logits_and_state(base(), adapter("qwen3", "tsw_qo")))


def test_unpacking_writes_both_files_or_none(base, packed, tmp_path):
    model, old = packed(), tmp_path / "base.gguf"
    quantize(base(), old, "f16")
    before = old.read_bytes()
    with refuses(OutputError, tmp_path / "no" / "memory", "No such file"):
        unpack(model, old, tmp_path / "no" / "memory")

    def advance(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(model, old, tmp_path / "adapter.gguf", advance)
    assert old.read_bytes() == before
    assert set(tmp_path.iterdir()) == {model, old}


def test_progress_is_not_on_the_output(base, adapter, tmp_path):
    command = [sys.executable, "-m", "pydeltamem.cli", "pack", str(base()), str(adapter("qwen3", "tsw_qo"))]
    done = subprocess.run([*command, "-o", str(tmp_path / "model.gguf")], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stdout.startswith(f"{tmp_path / 'model.gguf'}: ")
    assert done.stderr == ""


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from pydeltamem.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def on_a_full_disk(*arguments):
    """The error of a command that can write no more than 200 kB into a file."""
    command = [sys.executable, "-c", FULL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_full_disk_is_named(base, adapter, packed, tmp_path):
    memory, model, folder = adapter("qwen3", "tsw_qo"), packed(), tmp_path / "out"
    folder.mkdir()
    out = folder / "out.gguf"
    for arguments in (
        ("pack", base(), memory, "-o", out),
        ("unpack", model, "--base", out, "--adapter", folder / "adapter.gguf"),
        ("quantize", base(), out, "q8_0"),
    ):
        assert on_a_full_disk(*arguments) == f"deltamem: error: {out}: cannot be written: File too large\n"
        assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux reports it")
def test_packing_holds_neither_file_in_memory(base, adapter, tmp_path):
    """A base of 300 MB, packed by a process whose memory does not grow by a tenth of that."""
    large = tmp_path / "large.gguf"
    header, writer = Header(base()), gguf.GGUFWriter(large, "qwen3")
    for key, value in header.keys.items():
        if key.startswith("qwen3."):
            writer.add_key_value(key, value, header.types[key])
    for name in header.tensors:
        more = "ffn_up" in name
        writer.add_tensor(name, np.zeros((20_000, 1000), np.float32) if more else header.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code = (
        "import resource, sys\n"
        "from pydeltamem.formats.packed import pack\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack(*sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    arguments = [sys.executable, "-c", code, str(large), str(adapter("qwen3", "tsw_qo")), str(tmp_path / "out.gguf")]
    grown = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout) * 1024
    assert grown < 30e6
    assert os.path.getsize(tmp_path / "out.gguf") > 300e6


# shards


@pytest.fixture
def sharded(base, tmp_path):
    """sharded(arch, n): the golden backbone in shards of n tensors by llama.cpp's gguf package; the first one."""

    def make(arch="qwen3", n=7):
        header = Header(base(arch))
        (tmp_path / arch).mkdir()
        write_like(tmp_path / arch / "base.gguf", header, split_max_tensors=n)
        return min((tmp_path / arch).iterdir())

    return make


def same(one, two):
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("arch", "case"), [("qwen3", "tsw_qo"), ("smollm3", "o_rmsnorm_scale_head")])
def test_a_packed_model_in_shards_is_the_same_model(base, adapter, packed, tmp_path, arch, case):
    files = pack(base(arch), adapter(arch, case), tmp_path / "model.gguf", max_tensors=10)
    n = len(files)
    assert [file.name for file in files] == [f"model-{i:05}-of-{n:05}.gguf" for i in range(1, n + 1)]
    assert sorted(tmp_path.glob("model-*")) == files
    holds = [[".deltamem_" in name for name in Header(file).tensors] for file in files]
    assert all(len(names) == 10 for names in holds[:-1]) and 0 < len(holds[-1]) <= 10
    assert not any(holds[0]) and sum(map(any, holds)) > 1, "the memory is not spread over shards"
    one = logits_and_state(packed(arch, case))
    same(logits_and_state(files[0]), one)
    assert one[1].any()

    unpack(files[0], tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == base(arch).read_bytes()
    assert (tmp_path / "adapter.gguf").read_bytes() == adapter(arch, case).read_bytes()


def test_a_memory_is_of_the_same_adapter_and_base_in_one_file(base, adapter, packed, tmp_path):
    """So its file says: a memory goes from one to the other without a warning."""
    memory, whole = adapter("qwen3", "tsw_qo", "f16"), packed("qwen3", "tsw_qo", "f16")
    quantize(whole, tmp_path / "q8_0.gguf", "q8_0")
    shards = pack(base(), memory, tmp_path / "shards.gguf", max_tensors=10)

    def says(path, deltamem_path=None):
        with DeltaMemLlama(path, deltamem_path=deltamem_path, n_ctx=64, verbose=False) as llm:
            metadata = dict(llm.memory.copy().metadata)
        del metadata["created"]
        return metadata

    expected = says(base(), memory)
    assert expected["adapter_name"] == Header(memory).keys["general.name"] != expected["base_name"]
    for path in (whole, shards[0], tmp_path / "q8_0.gguf"):
        assert says(path) == says(path, memory) == expected


def test_shards_of_a_size(base, adapter, tmp_path):
    limit = max(tensor.n_bytes for tensor in Header(base()).tensors.values()) - 1
    files = pack(base(), adapter("qwen3", "tsw_qo"), tmp_path / "model.gguf", max_size=limit)
    headers = [Header(file) for file in files]
    sizes = [[tensor.n_bytes for tensor in header.tensors.values()] for header in headers]
    assert all(sum(row) <= limit or len(row) == 1 for row in sizes) and any(sum(row) > limit for row in sizes)
    for this, following in itertools.pairwise(sizes):
        assert sum(this) + following[0] > limit, "a shard was ended early"
    for i, header in enumerate(headers):
        split = [header.keys[key] for key in ("split.no", "split.count", "split.tensors.count")]
        assert split == [i, len(files), len(Header.of_model(files[0]).tensors)]
    same(logits_and_state(files[0]), logits_and_state(base(), adapter("qwen3", "tsw_qo")))


def test_a_base_in_shards(base, adapter, packed, sharded, tmp_path):
    """Is what the whole base is: to convert, inspect, pack and load."""
    from pydeltamem.convert.adapter import write_adapter
    from pydeltamem.formats.base_model import Base
    from pydeltamem.formats.checkpoint import Checkpoint
    from pydeltamem.formats.description import describe

    first = sharded()
    whole = describe(str(base()))
    shown = describe(str(first))
    assert shown["model"] == whole["model"] and (shown["shards"], whole["shards"]) == (7, 1)
    assert shown["bytes"] == sum(path.stat().st_size for path in first.parent.iterdir())

    checkpoint = adapter("qwen3", "tsw_qo")
    source = base().parent / "tsw_qo"
    write_adapter(Checkpoint(source), Base(first), tmp_path / "adapter.gguf", name="tsw_qo")
    assert (tmp_path / "adapter.gguf").read_bytes() == checkpoint.read_bytes()

    expected = logits_and_state(packed())
    same(logits_and_state(first, checkpoint), expected)
    pack(first, checkpoint, tmp_path / "one.gguf")
    assert not any(key.startswith("split.") for key in Header(tmp_path / "one.gguf").keys)
    same(logits_and_state(tmp_path / "one.gguf"), expected)
    files = pack(first, checkpoint, tmp_path / "again.gguf", max_tensors=13)
    same(logits_and_state(files[0]), expected)
    assert describe(str(files[0]))["adapter"] == describe(str(checkpoint))["adapter"]


def test_shards_of_another_alignment(aligned, adapter, tmp_path):
    files = pack(aligned, adapter("qwen3", "tsw_qo"), tmp_path / "model.gguf", max_tensors=20)
    assert all(tensor.offset % 256 == 0 for file in files for tensor in Header(file).tensors.values())
    unpack(files[0], tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == aligned.read_bytes()
    assert (tmp_path / "adapter.gguf").read_bytes() == adapter("qwen3", "tsw_qo").read_bytes()


def test_shards_quantise(base, adapter, packed, tmp_path):
    files = pack(base(), adapter("qwen3", "tsw_qo"), tmp_path / "model.gguf", max_tensors=20)
    quantize(files[0], tmp_path / "from-shards.gguf", "q8_0")
    quantize(packed(), tmp_path / "from-one.gguf", "q8_0")
    same(logits_and_state(tmp_path / "from-shards.gguf"), logits_and_state(tmp_path / "from-one.gguf"))
    with refuses(InputError, files[1]):
        quantize(files[0], files[1], "q8_0")


def test_shards_on_the_command_line(base, adapter, tmp_path, capsys):
    arguments = ["pack", str(base()), str(adapter("qwen3", "tsw_qo")), "-o", str(tmp_path / "model.gguf")]
    assert main.main([*arguments, "--split-max-size", "1M"]) == 0
    said = capsys.readouterr().out.strip()
    first = tmp_path / "model-00001-of-00002.gguf"
    assert said.startswith(f"{first}: ") and "in 2 shards, loads as one model" in said
    assert main.main(["inspect", str(first)]) == 0
    assert "in 2 shards" in capsys.readouterr().out
    command = [sys.executable, "-m", "pydeltamem.cli", "generate", "-m", str(first), "-p", "hello", "-n", "4"]
    memory = tmp_path / "a.memory"
    done = subprocess.run([*command, "-c", "256", "--save-memory", str(memory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert memory.exists()
    both = ["--split-max-tensors", "2", "--split-max-size", "1M"]
    for wrong in (["--split-max-size", "1k"], ["--split-max-tensors", "0"], both):
        with pytest.raises(SystemExit) as info:
            main.main([*arguments, *wrong])
        assert info.value.code == 2


def test_shards_that_are_not_whole(base, adapter, tmp_path):
    memory = adapter("qwen3", "tsw_qo")
    files = pack(base(), memory, tmp_path / "model.gguf", max_tensors=20)
    with refuses(ModelError, files[1], "...-00001-of-00004.gguf"):
        unpack(files[1], tmp_path / "a", tmp_path / "b")
    with refuses(ModelError, files[1]):
        DeltaMemLlama(files[1], n_ctx=64, verbose=False)
    with refuses(InputError, files[2]):
        unpack(files[0], files[2], tmp_path / "b")
    last = files[-1].read_bytes()
    files[-1].unlink()
    for read in (
        lambda: unpack(files[0], tmp_path / "a", tmp_path / "b"),
        lambda: pack(files[0], memory, tmp_path / "c"),
    ):
        with refuses(ModelError, files[-1]):
            read()
    with refuses(ModelError, files[0], files[-1].name):
        DeltaMemLlama(files[0], n_ctx=64, verbose=False)
    files[-1].write_bytes(last[:-5000])
    with refuses(ModelError, files[0]):
        DeltaMemLlama(files[0], n_ctx=64, verbose=False)
    moved = files[0].rename(tmp_path / "model.gguf")
    with refuses(ModelError, moved, "...-00001-of-00004.gguf"):
        unpack(moved, tmp_path / "a", tmp_path / "b")


def test_too_many_shards(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("pydeltamem.formats.packed.MAX_SHARDS", 3)
    with refuses(InputError, tmp_path / "model.gguf", 3):
        pack(base(), adapter("qwen3", "tsw_qo"), tmp_path / "model.gguf", max_tensors=10)
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_a_type_that_is_too_new(base, adapter, tmp_path):
    data, name = base().read_bytes(), b"output_norm.weight"
    place = data.index(name) + len(name) + 4 + 8  # after the name: the number of dimensions, the one, the type
    path = tmp_path / "new.gguf"
    path.write_bytes(data[:place] + (99).to_bytes(4, "little") + data[place + 4 :])
    with refuses(ModelError, path, name.decode()):
        pack(path, adapter("qwen3", "tsw_qo"), tmp_path / "packed.gguf")


def test_a_base_that_is_cut_while_it_is_packed(base, adapter, tmp_path):
    path = tmp_path / "base.gguf"
    shutil.copy(base(), path)
    with refuses(ModelError, path):
        pack(path, adapter("qwen3", "tsw_qo"), tmp_path / "packed.gguf", lambda n, total: os.truncate(path, 1000))
    assert list(tmp_path.iterdir()) == [path]


def test_packing_in_shards_that_fails_leaves_nothing(base, adapter, tmp_path):
    def advance(done, total):
        if done > total * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(base(), adapter("qwen3", "tsw_qo"), tmp_path / "model.gguf", advance, max_tensors=5)
    assert not list(tmp_path.iterdir())


# quantize


def test_a_packed_model_quantises_and_keeps_its_memory(packed, adapter, tmp_path):
    path = packed()
    quantize(path, tmp_path / "small.gguf", "q8_0")
    before, after = Header(path), Header(tmp_path / "small.gguf")
    for name, tensor in before.tensors.items():
        if ".deltamem_" in name:
            assert after.tensors[name].type == tensor.type
            np.testing.assert_array_equal(after.read(name), before.read(name))
    assert after.tensors["blk.0.ffn_up.weight"].type == gguf.GGMLQuantizationType.Q8_0
    logits, state = logits_and_state(tmp_path / "small.gguf")
    exact_logits, exact_state = logits_and_state(path)
    assert 0 < ((logits - exact_logits) ** 2).sum() / (exact_logits**2).sum() < 1e-2  # of Q8_0
    assert 0 < ((state - exact_state) ** 2).sum() / (exact_state**2).sum() < 1e-2

    # as the quantised base with the adapter beside it
    unpack(tmp_path / "small.gguf", tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    memory, original = Header(tmp_path / "adapter.gguf"), Header(adapter("qwen3", "tsw_qo"))
    assert memory.keys == original.keys and memory.tensors.keys() == original.tensors.keys()
    np.testing.assert_array_equal(logits_and_state(tmp_path / "base.gguf", tmp_path / "adapter.gguf")[0], logits)


def test_quantising_a_plain_model(base, tmp_path, capsys):
    assert main.main(["quantize", str(base()), str(tmp_path / "small.gguf"), "Q8_0"]) == 0
    assert "q8_0" in capsys.readouterr().out.lower()
    assert os.path.getsize(tmp_path / "small.gguf") < 0.4 * os.path.getsize(base())
    assert len({file_type(name) for name in ("q4_k_m", "Q8_0", "f16", "bf16", "f32")}) == 5


def test_what_cannot_be_quantised(base, adapter, tmp_path, capfd):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base().read_bytes()[:-1000])
    out = tmp_path / "out.gguf"
    memory = adapter("qwen3", "tsw_qo")
    for error, names, arguments in (
        (InputError, ["q9"], (base(), out, "q9")),
        (InputError, [513], (base(), out, "q8_0", 513)),
        (InputError, [-1], (base(), out, "q8_0", -1)),
        (ModelError, [default_files()[0], "matrix"], (default_files()[0], out, "iq1_s", 1, True)),
        (ModelError, [memory, "adapter"], (memory, out, "q8_0")),
        (ModelError, [cut], (cut, out, "q8_0")),
        (InputError, [base()], (base(), base(), "q8_0")),
        (OutputError, [tmp_path / "no" / "out.gguf", "No such file"], (base(), tmp_path / "no" / "out.gguf", "q8_0")),
        (OutputError, [tmp_path, "folder"], (base(), tmp_path, "q8_0")),
        (ModelError, [tmp_path, "folder"], (tmp_path, out, "q8_0")),
    ):
        with refuses(error, *names):
            quantize(*arguments)
    quantize(base(), tmp_path / "small.gguf", "q8_0")
    with refuses(ModelError, tmp_path / "small.gguf", "q8_0", "--allow-requantize"):
        quantize(tmp_path / "small.gguf", out, "q4_0")
    assert not out.exists()
    quantize(tmp_path / "small.gguf", out, "q4_0", allow_requantize=True)
    assert capfd.readouterr().err == ""
