"""Without an adapter the patched library gives the same output as unpatched llama.cpp, to the last bit.

Needs a build of the unpatched source: `make test-stock` makes it and runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pydeltamem.formats.packed import pack

STOCK_LIB = os.environ.get("DELTAMEM_STOCK_LIB")
OUR_LIB = Path(__file__).resolve().parents[1] / "pydeltamem" / "lib"

pytestmark = pytest.mark.skipif(
    not STOCK_LIB, reason="DELTAMEM_STOCK_LIB names no unpatched build: run `make test-stock`"
)

# Runs in its own process, with the library that LLAMA_CPP_LIB_PATH names.
PROGRAM = """
import sys
import llama_cpp
import numpy as np
model, tokens, out, options = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
llm = llama_cpp.Llama(model_path=model, n_ctx=512, logits_all=True, verbose=False, **options)
tokens = [int(token) for token in tokens.split(",")]
llm.eval(tokens)
for _ in range(16):
    llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
np.save(out, llm.scores[: llm.n_tokens])
print(llama_cpp.llama_cpp._lib._name)
"""

OPTIONS = {
    "f32": dict(type_k=0, type_v=0, n_threads=2),
    "f16-kv": dict(n_threads=1),
    "flash": dict(flash_attn=True, n_threads=2, n_ubatch=7),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_no_adapter_no_difference(golden_dir, tmp_path, arch, options):
    with np.load(golden_dir / arch / "base_logits.npz") as arrays:
        tokens = ",".join(map(str, arrays["ids"]))
    logits = {}
    for lib in (STOCK_LIB, str(OUR_LIB)):
        out = tmp_path / "logits.npy"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, golden_dir / arch / "base-f32.gguf", tokens, out, repr(options)],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": lib},
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(done.stdout.strip()).parent == Path(lib)
        logits[lib] = np.load(out)
    ours, stock = logits[str(OUR_LIB)], logits[STOCK_LIB]
    assert stock.any() and np.array_equal(ours, stock)


def test_a_packed_model_is_refused(base, adapter, tmp_path):
    """Better than leaving the memory out in silence, which a plain Llama over our library does."""
    model, out = tmp_path / "packed.gguf", tmp_path / "logits.npy"
    pack(base(), adapter("qwen3", "tsw_qo"), model)
    program = PROGRAM.replace("verbose=False", "verbose=True")  # llama.cpp gives its reason in the log
    for lib, loads in ((STOCK_LIB, False), (str(OUR_LIB), True)):
        done = subprocess.run(
            [sys.executable, "-c", program, model, "1,2,3", out, "{}"],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": lib},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        assert out.exists() == loads
        assert loads or "wrong number of tensors" in done.stderr
