"""The native library: loads it, and declares the functions of llama-deltamem.h as llama_cpp.llama_cpp does."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from _pydeltamem_startup import LLAMA_CPP_VERSION

from ..errors import DecodeError, LibraryError

LIB_DIR = Path(__file__).resolve().parent.parent / "lib"


def _import_llama_cpp() -> Any:
    """Imports llama_cpp so that it loads the library with δ-mem. Raises LibraryError if it loaded another one."""
    loaded_before = "llama_cpp" in sys.modules
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    try:
        import llama_cpp
        import llama_cpp.llama_cpp
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # from _pydeltamem_startup
        raise LibraryError(str(error)) from error
    except (FileNotFoundError, RuntimeError) as error:  # from llama_cpp's load_shared_library
        raise LibraryError(
            f"the native library cannot be loaded from {folder or LIB_DIR} ({error}): "
            + (
                "unset LLAMA_CPP_LIB_PATH to use the library of pydeltamem"
                if folder
                else "reinstall pydeltamem, which builds it"
            )
        ) from error

    if llama_cpp.__version__ != LLAMA_CPP_VERSION:
        raise LibraryError(
            f"llama-cpp-python {llama_cpp.__version__} is installed but pydeltamem is built for {LLAMA_CPP_VERSION}: "
            f"pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
        )

    lib = llama_cpp.llama_cpp._lib
    if not hasattr(lib, "llama_deltamem_adapter_load"):
        if loaded_before or not folder:
            raise LibraryError(
                f"llama_cpp was imported first and loaded {lib._name}, which lacks δ-mem: "
                "import pydeltamem before llama_cpp"
            )
        raise LibraryError(
            f"LLAMA_CPP_LIB_PATH names {folder}, whose llama.cpp lacks δ-mem: "
            "unset LLAMA_CPP_LIB_PATH to use the library of pydeltamem"
        )
    return llama_cpp


llama_cpp = _import_llama_cpp()


def library_folder() -> str:
    """The folder of the loaded library."""
    return os.path.dirname(str(llama_cpp.llama_cpp._lib._name))


from llama_cpp import Llama, LlamaState  # noqa: E402, F401 - for .llama
from llama_cpp._ctypes_extensions import ctypes_function_for_shared_library  # noqa: E402
from llama_cpp._logger import llama_log_callback, logger  # noqa: E402
from llama_cpp.llama_cpp import (  # noqa: E402
    llama_context_p,
    llama_context_p_ctypes,
    llama_model_p,
    llama_model_p_ctypes,
)
from llama_cpp.llama_tokenizer import LlamaTokenizer  # noqa: E402, F401 - for .tokenizer

_F = TypeVar("_F", bound=Callable[..., Any])


class Declare(Protocol):
    """Decorator: turns a declaration into the library's function of that name."""

    def __call__(self, name: str, argtypes: list[Any], restype: Any) -> Callable[[_F], _F]: ...


ctypes_function: Declare = ctypes_function_for_shared_library(llama_cpp.llama_cpp._lib)

llama_deltamem_adapter_p = int
llama_deltamem_adapter_p_ctypes = ctypes.c_void_p

LLAMA_DELTAMEM_VERSION = 1

# enum llama_deltamem_granularity
LLAMA_DELTAMEM_TOKEN = 0
LLAMA_DELTAMEM_MESSAGE_MEAN = 1
LLAMA_DELTAMEM_SENTENCE_MEAN = 2
LLAMA_DELTAMEM_TOKEN_DEFERRED = 3
LLAMA_DELTAMEM_REPLY_DEFERRED = 4

float_p = ctypes.POINTER(ctypes.c_float)
int32_p = ctypes.POINTER(ctypes.c_int32)
int8_p = ctypes.POINTER(ctypes.c_int8)


# const char * llama_deltamem_last_error(void);
@ctypes_function("llama_deltamem_last_error", [], ctypes.c_char_p)
def llama_deltamem_last_error() -> bytes: ...


# struct llama_deltamem_adapter * llama_deltamem_adapter_load(const struct llama_model * model, const char * path);
@ctypes_function(
    "llama_deltamem_adapter_load", [llama_model_p_ctypes, ctypes.c_char_p], llama_deltamem_adapter_p_ctypes
)
def llama_deltamem_adapter_load(model: llama_model_p, path: bytes, /) -> llama_deltamem_adapter_p | None: ...


# struct llama_deltamem_adapter * llama_deltamem_adapter_load_deferring(
#     const struct llama_model * model, const char * path);
@ctypes_function(
    "llama_deltamem_adapter_load_deferring", [llama_model_p_ctypes, ctypes.c_char_p], llama_deltamem_adapter_p_ctypes
)
def llama_deltamem_adapter_load_deferring(model: llama_model_p, path: bytes, /) -> llama_deltamem_adapter_p | None: ...


# void llama_deltamem_adapter_free(struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_adapter_free", [llama_deltamem_adapter_p_ctypes], None)
def llama_deltamem_adapter_free(adapter: llama_deltamem_adapter_p, /) -> None: ...


# int32_t llama_deltamem_n_layer(const struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_n_layer", [llama_deltamem_adapter_p_ctypes], ctypes.c_int32)
def llama_deltamem_n_layer(adapter: llama_deltamem_adapter_p, /) -> int: ...


# int32_t llama_deltamem_layer(const struct llama_deltamem_adapter * adapter, int32_t i);
@ctypes_function("llama_deltamem_layer", [llama_deltamem_adapter_p_ctypes, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_layer(adapter: llama_deltamem_adapter_p, i: int, /) -> int: ...


# int32_t llama_deltamem_n_head(const struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_n_head", [llama_deltamem_adapter_p_ctypes], ctypes.c_int32)
def llama_deltamem_n_head(adapter: llama_deltamem_adapter_p, /) -> int: ...


# int32_t llama_deltamem_rank(const struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_rank", [llama_deltamem_adapter_p_ctypes], ctypes.c_int32)
def llama_deltamem_rank(adapter: llama_deltamem_adapter_p, /) -> int: ...


# enum llama_deltamem_granularity llama_deltamem_write_granularity(const struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_write_granularity", [llama_deltamem_adapter_p_ctypes], ctypes.c_int)
def llama_deltamem_write_granularity(adapter: llama_deltamem_adapter_p, /) -> int: ...


# int32_t llama_deltamem_meta_val_str(
#     const struct llama_deltamem_adapter * adapter, const char * key, char * buf, size_t buf_size);
@ctypes_function(
    "llama_deltamem_meta_val_str",
    [llama_deltamem_adapter_p_ctypes, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
    ctypes.c_int32,
)
def llama_deltamem_meta_val_str(
    adapter: llama_deltamem_adapter_p, key: bytes, buf: ctypes.Array[ctypes.c_char], buf_size: int, /
) -> int: ...


# size_t llama_deltamem_n_bytes(const struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_n_bytes", [llama_deltamem_adapter_p_ctypes], ctypes.c_size_t)
def llama_deltamem_n_bytes(adapter: llama_deltamem_adapter_p, /) -> int: ...


# int32_t llama_deltamem_attach(struct llama_context * ctx, struct llama_deltamem_adapter * adapter);
@ctypes_function("llama_deltamem_attach", [llama_context_p_ctypes, llama_deltamem_adapter_p_ctypes], ctypes.c_int32)
def llama_deltamem_attach(ctx: llama_context_p, adapter: llama_deltamem_adapter_p, /) -> int: ...


# int32_t llama_deltamem_detach(struct llama_context * ctx);
@ctypes_function("llama_deltamem_detach", [llama_context_p_ctypes], ctypes.c_int32)
def llama_deltamem_detach(ctx: llama_context_p, /) -> int: ...


# bool llama_deltamem_is_attached(const struct llama_context * ctx);
@ctypes_function("llama_deltamem_is_attached", [llama_context_p_ctypes], ctypes.c_bool)
def llama_deltamem_is_attached(ctx: llama_context_p, /) -> bool: ...


# bool llama_deltamem_can_shift(const struct llama_context * ctx);
@ctypes_function("llama_deltamem_can_shift", [llama_context_p_ctypes], ctypes.c_bool)
def llama_deltamem_can_shift(ctx: llama_context_p, /) -> bool: ...


# size_t llama_deltamem_state_n_bytes(const struct llama_context * ctx);
@ctypes_function("llama_deltamem_state_n_bytes", [llama_context_p_ctypes], ctypes.c_size_t)
def llama_deltamem_state_n_bytes(ctx: llama_context_p, /) -> int: ...


# int64_t llama_deltamem_n_graphs(const struct llama_context * ctx);
@ctypes_function("llama_deltamem_n_graphs", [llama_context_p_ctypes], ctypes.c_int64)
def llama_deltamem_n_graphs(ctx: llama_context_p, /) -> int: ...


# size_t llama_deltamem_state_size(const struct llama_context * ctx);
@ctypes_function("llama_deltamem_state_size", [llama_context_p_ctypes], ctypes.c_size_t)
def llama_deltamem_state_size(ctx: llama_context_p, /) -> int: ...


# int32_t llama_deltamem_state_get(struct llama_context * ctx, llama_seq_id seq_id, float * dst, size_t n);
@ctypes_function(
    "llama_deltamem_state_get", [llama_context_p_ctypes, ctypes.c_int32, float_p, ctypes.c_size_t], ctypes.c_int32
)
def llama_deltamem_state_get(
    ctx: llama_context_p, seq_id: int, dst: ctypes._Pointer[ctypes.c_float], n: int, /
) -> int: ...


# int32_t llama_deltamem_state_set(struct llama_context * ctx, llama_seq_id seq_id, const float * src, size_t n);
@ctypes_function(
    "llama_deltamem_state_set", [llama_context_p_ctypes, ctypes.c_int32, float_p, ctypes.c_size_t], ctypes.c_int32
)
def llama_deltamem_state_set(
    ctx: llama_context_p, seq_id: int, src: ctypes._Pointer[ctypes.c_float], n: int, /
) -> int: ...


# int32_t llama_deltamem_state_reset(struct llama_context * ctx, llama_seq_id seq_id);
@ctypes_function("llama_deltamem_state_reset", [llama_context_p_ctypes, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_state_reset(ctx: llama_context_p, seq_id: int, /) -> int: ...


LLAMA_DELTAMEM_STATE_NOT_FINITE = 1
LLAMA_DELTAMEM_LOGITS_NOT_FINITE = 2


# int32_t llama_deltamem_take_result(
#     struct llama_context * ctx, llama_seq_id seq_id, int32_t i, float * dst, size_t n);
@ctypes_function(
    "llama_deltamem_take_result",
    [llama_context_p_ctypes, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t],
    ctypes.c_int32,
)
def llama_deltamem_take_result(ctx: llama_context_p, seq_id: int, i: int, dst: int | None, n: int, /) -> int: ...


# int32_t llama_deltamem_state_copy(struct llama_context * ctx, llama_seq_id seq_id_src, llama_seq_id seq_id_dst);
@ctypes_function("llama_deltamem_state_copy", [llama_context_p_ctypes, ctypes.c_int32, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_state_copy(ctx: llama_context_p, seq_id_src: int, seq_id_dst: int, /) -> int: ...


LLAMA_DELTAMEM_MAX_CHECKPOINTS = 16


# int32_t llama_deltamem_set_checkpoints(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens);
@ctypes_function("llama_deltamem_set_checkpoints", [llama_context_p_ctypes, int32_p, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_set_checkpoints(
    ctx: llama_context_p, tokens: ctypes._Pointer[ctypes.c_int32], n_tokens: int, /
) -> int: ...


# int32_t llama_deltamem_checkpoint_get(struct llama_context * ctx, int32_t i, float * dst, size_t n);
@ctypes_function(
    "llama_deltamem_checkpoint_get",
    [llama_context_p_ctypes, ctypes.c_int32, float_p, ctypes.c_size_t],
    ctypes.c_int32,
)
def llama_deltamem_checkpoint_get(
    ctx: llama_context_p, i: int, dst: ctypes._Pointer[ctypes.c_float], n: int, /
) -> int: ...


# int32_t llama_deltamem_set_write(struct llama_context * ctx, llama_seq_id seq_id, bool write);
@ctypes_function("llama_deltamem_set_write", [llama_context_p_ctypes, ctypes.c_int32, ctypes.c_bool], ctypes.c_int32)
def llama_deltamem_set_write(ctx: llama_context_p, seq_id: int, write: bool, /) -> int: ...


# bool llama_deltamem_get_write(const struct llama_context * ctx, llama_seq_id seq_id);
@ctypes_function("llama_deltamem_get_write", [llama_context_p_ctypes, ctypes.c_int32], ctypes.c_bool)
def llama_deltamem_get_write(ctx: llama_context_p, seq_id: int, /) -> bool: ...


# int32_t llama_deltamem_set_segments(
#     struct llama_context * ctx, const int32_t * segments, const int8_t * ends, int32_t n_tokens);
@ctypes_function(
    "llama_deltamem_set_segments", [llama_context_p_ctypes, int32_p, int8_p, ctypes.c_int32], ctypes.c_int32
)
def llama_deltamem_set_segments(
    ctx: llama_context_p,
    segments: ctypes._Pointer[ctypes.c_int32],
    ends: ctypes._Pointer[ctypes.c_int8],
    n_tokens: int,
    /,
) -> int: ...


# int32_t llama_deltamem_begin_turn(struct llama_context * ctx, llama_seq_id seq_id);
@ctypes_function("llama_deltamem_begin_turn", [llama_context_p_ctypes, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_begin_turn(ctx: llama_context_p, seq_id: int, /) -> int: ...


# int32_t llama_deltamem_set_replies(struct llama_context * ctx, llama_seq_id seq_id, bool replies);
@ctypes_function("llama_deltamem_set_replies", [llama_context_p_ctypes, ctypes.c_int32, ctypes.c_bool], ctypes.c_int32)
def llama_deltamem_set_replies(ctx: llama_context_p, seq_id: int, replies: bool, /) -> int: ...


# int32_t llama_deltamem_turn_set(struct llama_context * ctx, llama_seq_id seq_id, const float * src, size_t n);
@ctypes_function(
    "llama_deltamem_turn_set",
    [llama_context_p_ctypes, ctypes.c_int32, float_p, ctypes.c_size_t],
    ctypes.c_int32,
)
def llama_deltamem_turn_set(
    ctx: llama_context_p, seq_id: int, src: ctypes._Pointer[ctypes.c_float], n: int, /
) -> int: ...


# int32_t llama_deltamem_abandon_ingest(struct llama_context * ctx, llama_seq_id seq_id);
@ctypes_function("llama_deltamem_abandon_ingest", [llama_context_p_ctypes, ctypes.c_int32], ctypes.c_int32)
def llama_deltamem_abandon_ingest(ctx: llama_context_p, seq_id: int, /) -> int: ...


# int32_t llama_deltamem_candidates(const float * logits, int32_t n, int32_t k, llama_token_data * dst);
@ctypes_function(
    "llama_deltamem_candidates",
    [ctypes.POINTER(ctypes.c_float), ctypes.c_int32, ctypes.c_int32, llama_cpp.llama_token_data_p],
    ctypes.c_int32,
)
def llama_deltamem_candidates(logits: Any, n: int, k: int, dst: Any, /) -> int: ...


def last_error() -> str:
    """The reason of the last native failure, without the name of the function that reported it."""
    return _reason(llama_deltamem_last_error().decode("utf-8", errors="replace"))


def meta(adapter: llama_deltamem_adapter_p, key: str) -> str | None:
    """A metadata value of the adapter's file; None if the key is missing."""
    size = 256
    while True:
        buf = ctypes.create_string_buffer(size)
        length = llama_deltamem_meta_val_str(adapter, key.encode(), buf, size)
        if length < size:
            return None if length < 0 else buf.value.decode("utf-8", errors="replace")
        size = length + 1


# Sends llama.cpp's log to Python's logging, line by line. With llama_cpp's verbose=True it is printed at once instead.
log = logging.getLogger("pydeltamem.llama_cpp")

# enum ggml_log_level; llama_cpp._logger mixes the numbers up and takes a warning for an error
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_LOG_LEVEL_CONT = 5  # continues the line before


class _Thread(threading.local):
    """The log lines of one thread."""

    level, line = logging.DEBUG, ""  # the line that has not ended yet
    held: list[str] | None = None  # errors, within errors_held()
    waiting: tuple[logging.LogRecord, ...] = ()


_thread = _Thread()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if logger.level <= logging.DEBUG:  # set by llama_cpp's set_verbose
        llama_log_callback(level, text, user_data)
        return
    if level != _LOG_LEVEL_CONT:
        before, _thread.level = _thread.level, _LOG_LEVELS.get(level, logging.INFO)
        if before != _thread.level and (line := _thread.line.strip()):  # an error in the middle of a line
            _add(before, line)
            _thread.line = ""
    *lines, _thread.line = (_thread.line + text.decode("utf-8", errors="replace")).split("\n")
    for line in lines:
        if line := line.strip():
            _add(_thread.level, line)


llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


def _add(level: int, line: str) -> None:
    if level >= logging.ERROR and _thread.held is not None:
        _thread.held.append(line)
    # without a logging setup Python prints warnings; most loads cause one that nobody needs
    elif log.isEnabledFor(level) and (level >= logging.ERROR or log.hasHandlers()):
        record = log.makeRecord(log.name, level, "llama.cpp", 0, line, (), None)
        if _thread.held is None:
            log.handle(record)
        else:
            _thread.waiting += (record,)


# llama_cpp discards the output of the process while it loads a model. Two loads at once would never restore it.
silencing: Any = threading.RLock()


def _renew() -> None:
    """After a fork no other thread is there that might have it."""
    global silencing
    if not silencing._is_owned():
        silencing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def errors_held() -> Iterator[list[str]]:
    """Yields a list that collects llama.cpp's error lines for the sentence of an exception. If nothing is raised, logs
    what the list holds. Logs other lines at the end, because llama_cpp discards stderr while it loads a model.
    """
    before = _thread.held
    lines: list[str] = []
    _thread.held = lines
    try:
        yield lines
    finally:
        _thread.held = before
        if before is None:
            waiting, _thread.waiting = _thread.waiting, ()
            for record in waiting:
                log.handle(record)
    for line in lines:
        _add(logging.ERROR, line)


_STATUS = {"1": ", the KV cache has no room for the batch", "2": ", it was stopped"}  # as in llama.h


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turns what llama_cpp raises when a decode or encode fails into a DecodeError with llama.cpp's reason."""
    try:
        with errors_held() as lines:
            yield
    except DecodeError:
        raise
    except RuntimeError as error:
        said = [line for line in lines if "failed to decode, ret" not in line and "failed to encode, ret" not in line]
        status = _STATUS.get(str(error).rpartition(" ")[2], "")
        raise DecodeError(f"llama.cpp failed to compute the tokens: {error}{status}{reason(said)}") from error


def _reason(line: str) -> str:
    return " ".join(re.sub(r"^(\w+: )+", "", line).split()).rstrip(" .:")


def reason(lines: list[str]) -> str:
    """The first error line in words, which names the cause, as text to end a sentence with; empty if there is none."""
    words = (_reason(line) for line in lines)
    return next((f": {text}" for text in words if re.search(r"[^\W\d_]", text)), "")
