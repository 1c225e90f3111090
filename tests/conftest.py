"""Shared fixtures: the golden data, adapters converted from it, models that use them, and servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import pydeltamem  # noqa: F401 - before any test imports llama_cpp: it names the library folder
from golden_data import lay_out
from skip_limits import pytest_addoption, pytest_configure  # noqa: F401 - hooks of pytest
from warm_converter import warm

DEFERRED = {"msw4_deferred": "token_deferred", "msw4_replies": "reply_deferred"}
ROOT = Path(__file__).resolve().parent.parent
pytest.register_assert_rewrite("page_browser")  # a plugin that tests also import


def pytest_collection_modifyitems(items):
    """A test has the same name in each of the processes that share the tests out."""
    for item in items:
        if re.search(r" at 0x[0-9a-f]", item.nodeid):
            raise pytest.UsageError(f"{item.nodeid}: an address differs from process to process: give the test an id")


@pytest.fixture(scope="session")
def golden_dir(tmp_path_factory) -> Path:
    """A folder with the golden vectors (tests/golden/README.md)."""
    return lay_out(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def checkpoint(golden_dir, tmp_path_factory):
    """checkpoint(arch, case): the folder of that golden checkpoint, or of msw4_qo with deferred writes (DEFERRED)."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def find(arch: str, case: str) -> Path:
        if case not in DEFERRED:
            return golden_dir / arch / case
        if not (made := folder / f"{arch}-{case}").exists():
            shutil.copytree(golden_dir / arch / "msw4_qo", made, ignore=shutil.ignore_patterns("*.npz"))
            config = made / "delta_mem_config.json"
            config.write_text(
                json.dumps({**json.loads(config.read_text()), "memory_write_granularity": DEFERRED[case]})
            )
        return made

    return find


@pytest.fixture(scope="session")
def adapter(golden_dir, checkpoint, tmp_path_factory):
    """adapter(arch, case, outtype="f32"): that checkpoint as adapter GGUF, converted once per session."""
    from pydeltamem.convert.adapter import write_adapter
    from pydeltamem.formats.base_model import Base
    from pydeltamem.formats.checkpoint import Checkpoint

    folder = tmp_path_factory.mktemp("adapters")

    def convert(arch: str, case: str, outtype: str = "f32") -> Path:
        out = folder / f"{arch}-{case}-{outtype}.gguf"
        if not out.exists():
            base = Base(golden_dir / arch / "base-f32.gguf")
            write_adapter(Checkpoint(checkpoint(arch, case)), base, out, outtype)
        return out

    return convert


@pytest.fixture(scope="session")
def base(golden_dir):
    """base(arch): the golden backbone of that architecture as GGUF."""
    return lambda arch="qwen3": golden_dir / arch / "base-f32.gguf"


@pytest.fixture(scope="module")
def warm_converter():
    """Has `convert_base` use a converter that is loaded once, where processes can fork."""
    from pydeltamem.convert import hf

    if not hasattr(os, "fork"):
        yield
        return
    with warm(hf.converter()) as script, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "converter", lambda: script)
        yield


@pytest.fixture
def make_llm(base, adapter):
    """make_llm(case="tsw_qo", arch="qwen3", **kwargs): a DeltaMemLlama, closed at the end; None: no adapter."""
    from pydeltamem import DeltaMemLlama

    made = []

    def make(case: str | None = "tsw_qo", arch: str = "qwen3", **kwargs):
        path = None if case is None else adapter(arch, case)
        options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **kwargs}
        llm = DeltaMemLlama(model_path=base(arch), deltamem_path=path, **options)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def make(make_llm):
    """make(...): as make_llm, but the KV cache is F32 too, so that nothing but the order of sums differs."""
    return lambda *args, **kwargs: make_llm(*args, type_k=0, type_v=0, **kwargs)


@pytest.fixture
def llm(make_llm):
    """The golden Qwen3 with the TSW adapter."""
    return make_llm()


@pytest.fixture
def read_once(make_llm):
    """read_once(tokens, state=None): the state of a memory that read these tokens once, from that state."""
    fresh = make_llm(type_k=0, type_v=0)

    def read(tokens, state=None):
        fresh.reset()
        fresh.memory.state = np.zeros(fresh.memory.shape) if state is None else state
        fresh.eval(list(tokens))
        return fresh.memory.state

    return read


@pytest.fixture
def in_process(capfd):
    """in_process(*args): `deltamem` in this process: for what it refuses, which takes less than its start."""
    from pydeltamem.cli.main import main

    def run(*args):
        capfd.readouterr()
        arguments = [str(arg) for arg in args]
        try:
            status = main(arguments)
        except SystemExit as end:  # argparse's
            status = end.code
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


@pytest.fixture
def directories(tmp_path):
    """MODEL_DIR and CHECKPOINT_DIR of a tiny Qwen3, as transformers and the published code write them."""
    import torch
    import transformers

    import backbone
    from pydeltamem.train.reference import DeltaMem, DeltaMemConfig

    model_dir, checkpoint_dir = tmp_path / "MODEL_DIR", tmp_path / "CHECKPOINT_DIR"
    model_dir.mkdir()
    tokenizer = backbone.train_tokenizer(model_dir, seed=0, vocab_size=512, n=200)
    backbone.write_hf_tokenizer(model_dir, tokenizer)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=tokenizer.vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            bos_token_id=tokenizer.piece_to_id("<s>"),
            eos_token_id=tokenizer.piece_to_id(backbone.END),
        )
    )
    model.save_pretrained(model_dir)
    config = DeltaMemConfig(rank=8, output_init="random", delta_heads=("q", "o"))
    DeltaMem(model, config).save_checkpoint(checkpoint_dir)
    return model_dir, checkpoint_dir


@pytest.fixture(scope="module")
def api():
    """A server in a thread (servers.py)."""
    from servers import in_thread

    with in_thread(model="small", base="default.gguf", adapter="default-msw.gguf") as api:
        yield api


@pytest.fixture(scope="module")
def two_keys(tmp_path_factory):
    """A server with two keys."""
    from pydeltamem.server.keys import Keys
    from servers import in_thread

    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("# who may use it\nkey-of-ada\n\nkey-of-bo\n")
    with in_thread(keys=Keys(path)) as api:
        yield api


@pytest.fixture(scope="module")
def narrow():
    """A server with one slot, a queue of one, and small limits."""
    from servers import in_thread, service

    with in_thread(
        lambda: service(slots=1, n_queue=1, n_sessions=2, turn_timeout=0.1), max_body=8000, heartbeat=0.1
    ) as api:
        yield api


@pytest.fixture(scope="module")
def anyio_backend():
    """What runs the tests that are coroutines."""
    return "asyncio"


@pytest.fixture
def serving(make_llm, tmp_path):
    """serving(n_seq_max=2, **options): a service on a store in this test's folder."""
    from pydeltamem.server import AsyncDeltaMem
    from pydeltamem.server.store import Store

    def serve(n_seq_max=2, store=None, n_ctx=512, **options):
        store = Store(f"sqlite:///{tmp_path / 'sessions.db'}") if store is None else store
        return AsyncDeltaMem(make_llm(n_seq_max=n_seq_max, n_ctx=n_ctx, type_k=0, type_v=0), store, **options)

    return serve
