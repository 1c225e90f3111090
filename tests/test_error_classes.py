"""The error classes: each kind of error has its own class, and carries llama.cpp's reason."""

from __future__ import annotations

import ctypes

import llama_cpp
import pytest

import pydeltamem
from pydeltamem import (
    DecodeError,
    DeltaMemError,
    InputError,
    MemoryFileError,
    MemoryFileInUse,
    OutputError,
    TrainingError,
)
from pydeltamem.errors import shown_value
from refusals import refuses


def test_every_error_is_of_the_package():
    found = [value for value in map(pydeltamem.__dict__.get, pydeltamem.__all__) if isinstance(value, type)]
    errors = {value for value in found if issubclass(value, Exception)}
    assert errors >= {DecodeError, MemoryFileInUse, OutputError, TrainingError}
    assert all(issubclass(error, DeltaMemError) for error in errors)
    assert issubclass(MemoryFileInUse, MemoryFileError)  # as before
    assert issubclass(DecodeError, RuntimeError)  # as llama_cpp's own
    for error in (DecodeError, OutputError, TrainingError):  # none of them comes from the input
        assert not issubclass(error, InputError)


def test_of_a_large_value_only_the_beginning_is_written():
    class Counted:
        n = 0

        def __repr__(self):
            Counted.n += 1
            return "counted"

    for value in ([Counted()] * 10_000, {i: Counted() for i in range(10_000)}, [[[Counted()] * 100] * 100] * 100):
        Counted.n = 0
        assert "counted" in shown_value(value) and Counted.n < 1000
    assert shown_value({"b": [1], "a": "é"}) == repr({"a": "é", "b": [1]}) and shown_value("x\n") == repr("x\n")
    assert len(shown_value("x" * 10_000)) < 200


def test_a_failed_decode_says_why(llm, monkeypatch, capfd):
    """llama.cpp gives its reason in the log alone."""
    decode = llama_cpp._internals.LlamaContext.decode

    def decode_elsewhere(ctx, batch):
        batch.batch.pos[0] += 7
        decode(ctx, batch)

    llm.eval([5, 17, 40])
    capfd.readouterr()
    monkeypatch.setattr("llama_cpp._internals.LlamaContext.decode", decode_elsewhere)
    with refuses(DecodeError, -1, "inconsistent sequence positions"):  # llama.cpp's words
        llm.eval([99])
    assert "inconsistent" not in capfd.readouterr().err  # the reason stands there once


def test_a_decode_that_was_stopped(llm):
    callback = llama_cpp.ggml_abort_callback(lambda data: True)
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    with refuses(DecodeError, 2):
        llm.eval([5, 17, 40])
    llama_cpp.llama_set_abort_callback(llm.ctx, ctypes.cast(None, llama_cpp.ggml_abort_callback), None)
    llm.eval([5, 17, 40])
    assert llm.n_tokens == 3


@pytest.mark.parametrize("pooled", [False, True])
def test_a_failed_embedding_says_so(make_llm, pooled):
    kwargs = {"pooling_type": llama_cpp.LLAMA_POOLING_TYPE_MEAN} if pooled else {}
    llm = make_llm(embedding=True, **kwargs)
    callback = llama_cpp.ggml_abort_callback(lambda data: True)
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    with pytest.raises(DecodeError):
        llm.embed("hello")


def test_a_failed_decode_on_the_command_line(base, adapter, monkeypatch, capsys):
    from pydeltamem.cli.main import main

    def fail(ctx, batch):
        raise RuntimeError("llama_decode returned 1")

    monkeypatch.setattr("llama_cpp._internals.LlamaContext.decode", fail)
    arguments = ["-m", str(base()), "--deltamem", str(adapter("qwen3", "tsw_qo")), "-p", "hello", "-c", "256"]
    assert main(["generate", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("deltamem: error: ") and error.count("\n") == 1 and "returned 1" in error
