"""Layers in another process, by llama.cpp's RPC backend: the same numbers, states, files and rollback as here."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT
from golden_data import CASES
from pydeltamem import DeltaMemLlama
from pydeltamem.errors import InputError, LibraryError, RpcServerAway
from pydeltamem.runtime import devices, remote
from pydeltamem.runtime.remote import connect
from refusals import check_names, refuses
from test_golden import BOUND, F32, expected_of, nmse

LAYERS = {"all": -1, "half": 3}  # two of four: llama.cpp counts the output layer too


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An endpoint where the CPU of this machine is served; what it prints is in its log."""
    endpoint, log = f"127.0.0.1:{free_port()}", tmp_path_factory.mktemp("rpc") / "log"
    with open(log, "wb") as file:
        command = [
            sys.executable,
            "-m",
            "pydeltamem.cli.main",
            "rpc-server",
            "--port",
            endpoint.split(":")[1],
            "-t",
            "1",
        ]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(100):
            assert process.poll() is None, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", int(endpoint.split(":")[1])), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield endpoint, log
    finally:
        process.kill()
        process.wait()


def in_process(script: str, *args: object) -> str:
    """Runs Python that connects: a process that did has the devices for good, and this one must not."""
    command = [sys.executable, "-c", script, *map(str, args)]
    folder, env = ROOT / "tests", {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


REMOTE = """
import sys
import numpy as np
from pathlib import Path
from pydeltamem import DeltaMemLlama
from test_golden import F32, expected_of, nmse, read_one_by_one, read_prompt

endpoint, base, adapter, golden, arch, case, n_gpu_layers, out = sys.argv[1:]
expected = expected_of(Path(golden), arch, case)
options = {**F32, "verbose": True}
llm = DeltaMemLlama(base, deltamem_path=adapter, rpc_servers=endpoint, n_gpu_layers=int(n_gpu_layers), **options)
arrays = {"prompt_logits": read_prompt(llm, expected), "prompt_state": llm.memory.state}
position = llm.n_tokens
llm.memory.checkpoint()
llm.memory.save(out + ".memory")
arrays["decode_logits"] = read_one_by_one(llm, expected["decode_ids"])
arrays["decode_state"] = llm.memory.state
llm.memory.rollback(position)
arrays["back"] = llm.memory.state
llm.memory.reset()
assert not llm.memory.state.any()
llm.memory.load(out + ".memory")
arrays["loaded"] = llm.memory.state
np.savez(out, **arrays)
llm.close()
"""


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case in ("tsw_qo", "ssw_message", "msw4_qo", "o_rmsnorm_scale_head")]
)
def test_golden(server, golden_dir, adapter, base, case, layers, tmp_path):
    endpoint, log = server
    expected, out = expected_of(golden_dir, "qwen3", case), tmp_path / "out.npz"
    path = adapter("qwen3", case)
    said = in_process(REMOTE, endpoint, base("qwen3"), path, golden_dir, "qwen3", case, LAYERS[layers], out)

    # the states of as many layers as asked for are there
    assert re.search(r"RPC0\S* δ-mem buffer size", said), said
    assert ("CPU" in "".join(re.findall(r".* δ-mem buffer size", said))) == (layers == "half"), said
    assert "Accepted client connection" in log.read_text()
    with np.load(out) as found:
        errors = {name: nmse(found[name], expected[name]) for name in found if name in expected}
        assert len(errors) == 4 and max(errors.values()) <= BOUND, errors
        assert np.array_equal(found["back"], found["prompt_state"])
        assert np.array_equal(found["loaded"], found["prompt_state"])

    # its file loads here
    here = DeltaMemLlama(model_path=base("qwen3"), deltamem_path=path, **F32)
    here.memory.load(f"{out}.memory")
    assert nmse(here.memory.state, expected["prompt_state"]) <= BOUND
    here.close()


SEQUENCES = """
import sys
import numpy as np
from pydeltamem.runtime.remote import connect
from native_context import open_context

endpoint, base, adapter, out = sys.argv[1:]
if endpoint:
    connect(endpoint)
texts = {0: list(range(5, 17)), 1: list(range(20, 32))}
with open_context(base, adapter, n_seq=2, n_gpu_layers=-1) as context:
    logits = context.decode([(text[i], seq) for i in range(12) for seq, text in texts.items()])
    np.savez(out, logits=logits, a=context.state(0), b=context.state(1))
"""


def test_several_sequences(server, base, adapter, tmp_path):
    for name, endpoint in (("there", server[0]), ("here", "")):
        in_process(SEQUENCES, endpoint, base("qwen3"), adapter("qwen3", "tsw_qo"), tmp_path / f"{name}.npz")
    with np.load(tmp_path / "there.npz") as there, np.load(tmp_path / "here.npz") as here:
        assert there["a"].any() and not np.array_equal(there["a"], there["b"])
        for name in here:
            assert nmse(there[name], here[name]) <= BOUND


OVERRIDE = """
import ctypes
import sys
from pathlib import Path
import llama_cpp.llama as high
from pydeltamem import DeltaMemLlama
from pydeltamem.runtime.remote import connect
from test_golden import F32, errors_of, expected_of

endpoint, base, adapter, golden = sys.argv[1:]
connect(endpoint)

class Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_void_p)]

llama = high.llama_cpp
here = llama._lib.ggml_backend_cpu_buffer_type
here.restype = ctypes.c_void_p
overrides = (Override * 2)(Override(rb"attn_q\\.weight", here()))
defaults = llama.llama_model_default_params

def with_overrides():
    params = defaults()
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p).value
    return params

llama.llama_model_default_params = with_overrides
llm = DeltaMemLlama(base, deltamem_path=adapter, n_gpu_layers=-1, n_ubatch=1, **F32)
print("worst", max(errors_of(llm, expected_of(Path(golden), "qwen3", "ssw_message")).values()))
llm.close()
"""


def test_weights_on_another_device_than_their_layer(server, golden_dir, base, adapter):
    """Attention weights kept here (llama.cpp's -ot), layers there: what the operator needs comes to it unharmed."""
    said = in_process(OVERRIDE, server[0], base("qwen3"), adapter("qwen3", "ssw_message"), golden_dir)
    assert float(re.search(r"worst (\S+)", said)[1]) <= BOUND


SPLIT = """
import sys
import llama_cpp
from pydeltamem import DeltaMemLlama
from pydeltamem.errors import AdapterError

endpoint, base, adapter = sys.argv[1:]
options = dict(rpc_servers=endpoint, n_gpu_layers=-1, n_ctx=64, verbose=False)
try:
    DeltaMemLlama(base, deltamem_path=adapter, split_mode=llama_cpp.LLAMA_SPLIT_MODE_TENSOR, flash_attn=True, **options)
except AdapterError as error:
    print(error)
"""


def test_split_by_tensors_is_refused(server, base, adapter):
    """llama.cpp has no rule for cutting the operator in pieces: it would abort the process."""
    path = adapter("qwen3", "tsw_qo")
    said = in_process(SPLIT, server[0], base("qwen3"), path)
    check_names(said.strip(), [path, "'tensor'", "'layer'"])


@pytest.mark.parametrize("endpoints", ["nowhere", "host:0", ":50052", "127.0.0.1:1"])
def test_wrong_endpoints_are_named(endpoints):
    with refuses(RpcServerAway if endpoints == "127.0.0.1:1" else InputError, endpoints):
        connect(endpoints)


def test_command_line(server, base):
    command = [sys.executable, "-m", "pydeltamem.cli"]
    taken = subprocess.run([*command, "rpc-server", "--port", server[0].split(":")[1]], capture_output=True, text=True)
    assert taken.returncode == 1 and server[0] in taken.stderr and "Traceback" not in taken.stderr
    there = [*command, "generate", "-m", base("qwen3"), "-p", "a b c", "-n", "4", "--temp", "0"]
    plain = subprocess.run(there, capture_output=True, text=True)
    remote = subprocess.run([*there, "--rpc", server[0]], capture_output=True, text=True)
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout == plain.stdout
    gone = subprocess.run([*there, "--rpc", "127.0.0.1:1"], capture_output=True, text=True)
    assert gone.returncode == 1 and "127.0.0.1:1" in gone.stderr and "Traceback" not in gone.stderr


@pytest.fixture
def listening():
    """An endpoint where somebody listens, who is no RPC server."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield f"127.0.0.1:{one.getsockname()[1]}"


def ggml_with(monkeypatch, add_server):
    """Puts a ggml in the library's place whose RPC backend is this function; None: it has no such backend. Returns the
    list of what is registered there.
    """
    kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
    callback = None if add_server is None else kind(add_server)
    registered = []
    ggml = SimpleNamespace(
        ggml_backend_register=lambda server: registered.append(server),
        ggml_backend_reg_by_name=lambda name: 1 if callback else None,
        ggml_backend_reg_get_proc_address=lambda backend, name: ctypes.cast(callback, ctypes.c_void_p).value,
    )
    monkeypatch.setattr(remote, "ggml", lambda: ggml)
    return registered


LOST = """
import threading
from pydeltamem.runtime import library, remote

told = threading.Event()
remote.when_lost(lambda reason: (print(reason), told.set()))
abort = library.llama_cpp.llama_cpp._lib.ggml_abort
thread = threading.Thread(target=abort, args=(b"file.c", 7, b"%s is gone", b"the server"), daemon=True)
thread.start()
assert told.wait(60)
thread.join(1)
print("alive", thread.is_alive())
"""


def test_where_llama_cpp_would_end_the_process_one_thread_stays():
    said = in_process(LOST)
    assert "the server is gone" in said and "alive True" in said


@pytest.mark.parametrize("types", [(0, 3), (3, 0, 1), (2, 0, 1)])
def test_what_a_machine_serves(monkeypatch, types):
    """Its GPUs, or its CPU if it has none (enum ggml_backend_dev_type), at an address: llama.cpp knows no names."""
    started, before, port = [], signal.getsignal(signal.SIGINT), free_port()
    arguments = ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
    start = ctypes.CFUNCTYPE(None, *arguments)(lambda *given: started.append((*given[:4], given[4][: given[3]])))
    of_ggml = {
        "reg_by_name": lambda name: 1,
        "reg_get_proc_address": lambda backend, name: ctypes.cast(start, ctypes.c_void_p).value,
        "dev_count": lambda: len(types),
        "dev_get": lambda i: 100 + i,
        "dev_type": lambda device: types[device - 100],
    }
    ggml = SimpleNamespace(**{f"ggml_backend_{name}": of_ggml[name] for name in of_ggml})
    for module in (remote, devices):
        monkeypatch.setattr(module, "ggml", lambda: ggml)
    try:
        remote.serve("localhost", port, 3)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # Ctrl-C ends it
    finally:
        signal.signal(signal.SIGINT, before)
    served = [100 + i for i, kind in enumerate(types) if kind in (1, 2)] or [100 + types.index(0)]
    assert started == [(f"127.0.0.1:{port}".encode(), None, 3, len(served), served)]


def test_a_library_without_rpc(monkeypatch, listening):
    ggml_with(monkeypatch, None)
    with refuses(LibraryError, "-DGGML_RPC=ON"):
        connect(listening)


def test_a_server_without_devices_is_named(monkeypatch, listening):
    asked = []
    ggml_with(monkeypatch, lambda endpoint: asked.append(endpoint.decode()))
    for n in (1, 2):  # it is no connected one
        with refuses(InputError, listening):
            connect(listening)
        assert asked == [listening] * n


def test_a_connected_server_is_not_connected_again(monkeypatch, listening):
    asked = []
    monkeypatch.setattr(remote, "_connected", set())
    registered = ggml_with(monkeypatch, lambda endpoint: asked.append(endpoint.decode()) or 7)
    connect(f"{listening},{listening}")
    connect(listening)
    assert asked == [listening] and registered == [7]
