"""`llm.memory`: the state that a conversation has written, and what can be done with it."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import _lib
from .errors import AdapterError, InputError, MemoryFileError
from .memory_file import read_memory_file, write_memory_file

if TYPE_CHECKING:
    from .llama import DeltaMemLlama

SEQUENCE = 0  # the sequence of the context that llama_cpp.Llama evaluates its text in


class Memory:
    """The memory of a `DeltaMemLlama`: one state per layer that carries memory, separate from the text.

    Obtained as `llm.memory`; a view, it keeps nothing of its own. L layers, H state heads of rank r. Every access to
    the state raises AdapterError if the model has no memory adapter attached.
    """

    def __init__(self, llm: DeltaMemLlama) -> None:
        self._llm = llm

    @property
    def attached(self) -> bool:
        """Whether an adapter is attached, so that tokens read and write memory."""
        ctx = self._llm.ctx
        return ctx is not None and _lib.llama_deltamem_is_attached(ctx)

    @property
    def layers(self) -> list[int]:
        """The model layers that carry memory, ascending; empty without an adapter."""
        adapter = self._llm._adapter
        if adapter is None:
            return []
        return [_lib.llama_deltamem_layer(adapter, i) for i in range(_lib.llama_deltamem_n_layer(adapter))]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(L, H, r, r)"""
        adapter = self._adapter
        rank = _lib.llama_deltamem_rank(adapter)
        return _lib.llama_deltamem_n_layer(adapter), _lib.llama_deltamem_n_head(adapter), rank, rank

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """The state, float32 [L, H, r, r] with S[i, j] = [row (value), column (key)]. Reading copies it out.

        Assigning replaces it; the value must have that shape and be finite (InputError). No token of the present text
        counts as written into the new state: see `DeltaMemLlama.eval`.
        """
        state = np.empty(self.shape, dtype=np.float32)
        _check(_lib.llama_deltamem_state_get(self._ctx, SEQUENCE, _pointer(state), state.size))
        return state

    @state.setter
    def state(self, value: npt.ArrayLike) -> None:
        shape = self.shape
        try:
            with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is refused below
                state = np.array(value, dtype=np.float32, order="C")
        except (TypeError, ValueError) as error:
            raise InputError(f"a state must be numbers of shape {shape}: {error}") from error
        if state.shape != shape:
            raise InputError(f"a state of shape {state.shape} does not fit: this memory has shape {shape}")
        if not np.isfinite(state).all():
            raise InputError("a state must be finite: the array holds NaN or infinite values")
        _check(_lib.llama_deltamem_state_set(self._ctx, SEQUENCE, _pointer(state), state.size))
        self._llm._forget_writes()

    @property
    def write(self) -> bool:
        """True (default): tokens read and write. False: they only read."""
        return _lib.llama_deltamem_get_write(self._ctx, SEQUENCE)

    @write.setter
    def write(self, value: bool) -> None:
        _check(_lib.llama_deltamem_set_write(self._ctx, SEQUENCE, bool(value)))

    def reset(self) -> None:
        """Empties the memory. The text stays: `DeltaMemLlama.reset` forgets that."""
        _check(_lib.llama_deltamem_state_reset(self._ctx, SEQUENCE))
        self._llm._forget_writes()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a memory file (`pydeltamem.memory_file`), in one step. Raises MemoryFileError."""
        write_memory_file(path, self.state, {"layers": self._layers_text, **self._identity})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces the state by that of a memory file.

        Raises MemoryFileError if the file cannot be read or belongs to another adapter; the memory is then as it was.
        """
        mine = self._identity
        state, metadata = read_memory_file(path)
        theirs = {key: metadata.get(key, "") for key in mine}
        if theirs["adapter"] != mine["adapter"] or theirs["architecture"] != mine["architecture"]:
            raise MemoryFileError(
                f"{os.fspath(path)}: the memory of another adapter, {_describe(theirs)}; attached is {_describe(mine)}"
            )
        if metadata.get("layers", "") != self._layers_text or state.shape != self.shape:
            raise MemoryFileError(
                f"{os.fspath(path)}: holds layers {metadata.get('layers', '')} of shape {state.shape}; "
                f"the adapter has layers {self._layers_text} of shape {self.shape}"
            )
        self.state = state

    def attach(self) -> None:
        """Attaches the adapter again, with an empty memory."""
        ctx = self._llm._open_ctx
        if self._llm._adapter is None:
            raise AdapterError(_NO_ADAPTER)
        with _lib.errors_held():
            _check(_lib.llama_deltamem_attach(ctx, self._llm._adapter))
        self._llm._forget_writes()

    def detach(self) -> None:
        """Back to the plain model; the state is lost. `attach` brings memory back."""
        _lib.llama_deltamem_detach(self._ctx)

    def __repr__(self) -> str:
        if not self.attached:
            return "Memory(not attached)"
        layers, heads, rank, _ = self.shape
        return (
            f"Memory(layers={layers}, heads={heads}, rank={rank}, write={self.write}, "
            f"norm={float(np.linalg.norm(self.state)):.4g})"
        )

    @property
    def _ctx(self) -> _lib.llama_context_p:
        """The native context; raises if there is no memory in it."""
        ctx = self._llm._open_ctx
        if not _lib.llama_deltamem_is_attached(ctx):
            raise AdapterError(_NO_ADAPTER)
        return ctx

    @property
    def _adapter(self) -> _lib.llama_deltamem_adapter_p:
        _ = self._ctx
        return self._llm._adapter

    @property
    def _layers_text(self) -> str:
        return ",".join(map(str, self.layers))

    @property
    def _identity(self) -> dict[str, str]:
        adapter = self._adapter
        name = _lib.meta(adapter, "general.name") or _lib.meta(adapter, "deltamem.source.name")
        return {
            "adapter": _lib.meta(adapter, "deltamem.source.sha256") or "",
            "adapter_name": name or "",
            "architecture": _lib.meta(adapter, "general.architecture") or "",
        }


_NO_ADAPTER = "no memory adapter is attached: load the model with deltamem_path=..."


def _check(status: int) -> None:
    if status != 0:
        raise AdapterError(_lib.last_error())


def _pointer(array: npt.NDArray[np.float32]) -> ctypes._Pointer[ctypes.c_float]:
    return array.ctypes.data_as(_lib.float_p)


def _describe(identity: dict[str, str]) -> str:
    name, checksum = identity["adapter_name"] or "unnamed", identity["adapter"][:12] or "no checksum"
    return f"{name} for {identity['architecture'] or 'an unknown architecture'} ({checksum})"
