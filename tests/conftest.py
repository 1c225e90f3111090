"""Shared fixtures: the golden data, adapters converted from it, and models over them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

import pydeltamem  # noqa: F401 - before any test imports llama_cpp: it names the library folder

ROOT = Path(__file__).resolve().parent.parent

# the golden data
ARCHITECTURES = ["qwen3", "smollm3"]
CASES = [
    "layers_subset_scale_layer",
    "msw4_qo",
    "no_lambda_raw_qk",
    "o_rmsnorm_scale_head",
    "qkvo_lambda_outside",
    "ssw_message",
    "ssw_sentence",
    "standard_uncoupled_scalar_gate",
    "tsw_qo",
]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The golden vectors: $DELTAMEM_GOLDEN, else ../shared/golden beside the checkout, else the test is skipped."""
    path = Path(os.environ.get("DELTAMEM_GOLDEN") or ROOT.parent / "shared" / "golden")
    if not path.is_dir():
        pytest.skip(f"no golden data in {path}: set DELTAMEM_GOLDEN")
    return path


@pytest.fixture(scope="session")
def adapter(golden_dir, tmp_path_factory):
    """adapter(arch, case, outtype="f32"): that golden checkpoint as adapter GGUF, converted once per session."""
    from pydeltamem.convert import cli

    folder = tmp_path_factory.mktemp("adapters")

    def convert(arch: str, case: str, outtype: str = "f32") -> Path:
        out = folder / f"{arch}-{case}-{outtype}.gguf"
        if not out.exists():
            parser = argparse.ArgumentParser()
            cli.add_arguments(parser)
            base = golden_dir / arch / "base-f32.gguf"
            arguments = [golden_dir / arch / case, "--base", base, "-o", out, "--outtype", outtype]
            assert cli.run(parser.parse_args([str(argument) for argument in arguments])) == 0
        return out

    return convert


@pytest.fixture(scope="session")
def base(golden_dir):
    """base(arch): the golden backbone of that architecture as GGUF."""
    return lambda arch="qwen3": golden_dir / arch / "base-f32.gguf"


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
def llm(make_llm):
    """The golden Qwen3 with the TSW adapter."""
    return make_llm()
