"""`llm.memory`: the memory of a conversation; to look at, save, load, go back and replace."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import AdapterError, InputError, MemoryFileError, named, shown_value
from .formats.memory_file import MemorySnapshot, owner
from .hub import adapter_file
from .runtime import library
from .runtime.engine import Engine
from .runtime.interrupt import uninterrupted
from .runtime.lock import holding
from .runtime.slots import no_adapter
from .runtime.text import Text, log


class Owner(Protocol):
    """The model that the memory belongs to: `DeltaMemLlama`."""

    _engine: Engine
    _adapter: Any
    deltamem_path: str | None
    metadata: dict[str, str]
    model_path: str

    @property
    def fingerprint(self) -> str: ...
    def _attach(self, path: str) -> None: ...


class Memory:
    """The memory of a `DeltaMemLlama`, or of a `Conversation` on one: one state per layer that carries memory.

    `llm.memory` returns it. It is a view and holds no data of its own. L layers, H state heads of rank r. Every access
    to the state raises AdapterError if no adapter is attached.

    Threads may share it: a method waits until another thread's call on the same text has ended.
    """

    def __init__(self, llm: Owner, text: Text, end_reply: Callable[[], None] = lambda: None) -> None:
        self._llm = llm
        self._text = text
        self._end_reply = end_reply  # before the text goes back

    @property
    def attached(self) -> bool:
        """Whether an adapter is attached, so that tokens read and write the memory."""
        return self._llm._engine.slots.has_memory

    @property
    @holding("_text.lock")
    def by_segment(self) -> bool:
        """Whether the adapter writes once per segment, so that `DeltaMemLlama.eval` takes segment ids."""
        return self._llm._engine.slots.writes_by_segment

    @property
    @holding("_text.lock")
    def layers(self) -> list[int]:
        """The model layers that carry memory, ascending; empty without an adapter."""
        adapter = self._llm._adapter if self.attached else None  # which stays when it is detached
        if adapter is None:
            return []
        return [library.llama_deltamem_layer(adapter, i) for i in range(library.llama_deltamem_n_layer(adapter))]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the state, (L, H, r, r)."""
        return self._llm._engine.slots.shape

    @property
    @holding("_text.turn")
    def state(self) -> npt.NDArray[np.float32]:
        """A copy of the state, float32 [L, H, r, r] with S[i, j] = [row (value), column (key)].

        Assigning replaces it; the value must have that shape and be finite (InputError). No token of the present text
        counts as written into the new state. Going back in the text does not bring the old state back.
        """
        self._require_memory()
        self._text.finish()
        return self._text.state

    @state.setter
    @holding("_text.turn")
    @holding("_text.lock")  # the shape stays that of the adapter
    def state(self, value: npt.ArrayLike) -> None:
        shape = self.shape
        try:
            with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is refused below
                given = np.asarray(value)
                if given.dtype.kind == "c":
                    raise TypeError("they are complex")
                state = np.array(given, dtype=np.float32, order="C")
        except (TypeError, ValueError) as error:
            raise InputError(f"a state must be numbers of shape {shape}: {error}") from error
        if state.shape != shape:
            raise InputError(f"a state of shape {state.shape} does not fit: this memory has shape {shape}")
        if not np.isfinite(state).all():
            raise InputError("a state must be finite: the array holds NaN or infinite values")
        self._text.become(state)

    @property
    @holding("_text.turn")
    def n_written(self) -> int:
        """Tokens that were ever written into this memory."""
        self._require_memory()
        self._text.renew()
        self._text.finish()
        return self._text.position.n_written

    @property
    def write(self) -> bool:
        """True (default): tokens read and write. False: they only read."""
        self._require_memory()
        return self._text.write

    @write.setter
    @holding("_text.turn")
    def write(self, value: bool) -> None:
        self._require_memory()
        self._text.write = bool(value)

    @holding("_text.turn")
    @holding("_text.lock")
    def reset(self) -> None:
        """Empties the memory and keeps the text. `DeltaMemLlama.reset` does the reverse."""
        self._text.become(np.zeros(self.shape, dtype=np.float32))

    def _require_memory(self) -> None:
        """Raises AdapterError if no adapter is attached, ModelError if the model is closed."""
        self._llm._engine.slots.require_memory()

    #
    # going back
    #

    @holding("_text.turn")
    def checkpoint(self) -> int:
        """Makes a checkpoint at the end of the text, in addition to the automatic ones.

        Returns its position, for `rollback`.
        """
        self._require_memory()
        return self._text.checkpoint()

    @property
    @holding("_text.turn")
    def checkpoints(self) -> list[int]:
        """The positions of the checkpoints, in tokens: the memory can go back to them without decoding again."""
        self._text.renew()  # an adapter that was attached since has none of them
        return self._text.position.checkpoints.positions

    @holding("_text.turn")
    def rollback(self, position: int) -> int:
        """Takes memory and text back to `position`, counted in tokens from the beginning of the text.

        Returns how many tokens were decoded again, from the nearest checkpoint before `position`; 0 if one is at it.
        Raises InputError if the text, or this memory, began after `position`.
        """
        self._require_memory()
        self._end_reply()
        return self._text.back(position)

    @holding("_text.turn")
    def rehearse(self) -> None:
        """Decodes the text once more from its beginning: each token that wrote writes a second time.

        Call it before the text goes (`DeltaMemLlama.reset`, `Conversation.clear`): more of the text is recalled then.
        It takes as long as decoding the text took. The text stays. The memory cannot go back to before the second
        writes. A token that did not write, because `write` was off, does not write now.
        """
        self._require_memory()
        self._end_reply()
        self._text.rehearse()

    @property
    def n_decoded_again(self) -> int:
        """Tokens that were decoded again with writing so far, because the text went back to where there was no
        checkpoint, or because the model cannot cut its KV cache there.
        """
        return self._text.n_decoded_again

    #
    # copies and files
    #

    @holding("_text.turn")
    def copy(self) -> MemorySnapshot:
        """A copy of the memory: to save, export, compare or restore later."""
        self._text.finish()
        with self._text.lock:  # state and metadata are of one adapter
            return MemorySnapshot(self.state, self._metadata)

    def restore(self, snapshot: MemorySnapshot) -> None:
        """Replaces this memory by the copy. Raises MemoryFileError if another adapter wrote the copy."""
        if not isinstance(snapshot, MemorySnapshot):
            raise InputError(f"restore takes what copy returned, not {shown_value(snapshot)}")
        self._restore(snapshot, "the copy")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the memory to a memory file (docs/reference/formats.md), in one step. Raises MemoryFileError."""
        self.copy().save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces the memory by that of a memory file.

        Raises MemoryFileError if the file cannot be read or belongs to another adapter; the memory is then unchanged.
        """
        self._require_memory()
        self._restore(MemorySnapshot.load(path), named(path))

    def _misfit(self, snapshot: MemorySnapshot) -> str | None:
        """Why the snapshot does not fit the attached adapter; None if it does."""
        mine, theirs = self._metadata, snapshot.metadata
        if any(theirs.get(key, "") != mine[key] for key in ("adapter", "architecture")):
            return (
                f"the memory of another adapter, {owner(theirs)}; attached is {owner(mine)}: attach that adapter, or "
                "take another memory"
            )
        if theirs.get("layers", "") != mine["layers"] or snapshot.state.shape != self.shape:
            return (
                f"holds layers {theirs.get('layers', '')} of shape {snapshot.state.shape}; "
                f"the adapter has layers {mine['layers']} of shape {self.shape}"
            )
        return None

    @holding("_text.turn")
    @holding("_text.lock")
    def _restore(self, snapshot: MemorySnapshot, name: str) -> None:
        mine, theirs = self._metadata, snapshot.metadata
        reason = self._misfit(snapshot)
        if reason:
            raise MemoryFileError(f"{name}: {reason}")
        if theirs.get("base", mine["base"]) != mine["base"]:
            log.warning("%s: written by another base model than %s", name, mine["base_name"] or self._llm.model_path)
        self._text.become(snapshot.state, snapshot.tokens_written, theirs.get("created", self._text.position.since))

    def attach(self, path: str | os.PathLike[str] | None = None) -> None:
        """Attaches the adapter again, or another one for this model. The memory of every text is then empty.

        The path may be a name or a directory, as `deltamem_path` of `DeltaMemLlama`. Raises AdapterError if there is
        no adapter or it does not fit; the attached one then stays.
        """
        slots = self._llm._engine.slots
        slots.require_open()
        if path is not None:
            path = adapter_file(path, self._llm.model_path)  # others go on while it is fetched or converted
        with self._text.lock, uninterrupted(), library.errors_held():
            slots.require_open()
            if path is not None:
                self._llm._attach(path)
                self._llm.deltamem_path = path
            elif self._llm._adapter is not None:
                slots.attach(self._llm._adapter)
            else:
                raise AdapterError(no_adapter())

    @holding("_text.lock")
    def detach(self) -> None:
        """Detaches the adapter, which leaves the plain model. The state is lost; `attach` begins with an empty one."""
        self._require_memory()
        with uninterrupted():
            self._llm._engine.slots.detach()

    def __repr__(self) -> str:
        if not self.attached:
            return "Memory(not attached)"
        layers, heads, rank, _ = self.shape
        return (
            f"Memory(layers={layers}, heads={heads}, rank={rank}, write={self.write}, "
            f"norm={float(np.linalg.norm(self.state.astype(np.float64))):.4g})"
        )

    @property
    @holding("_text.turn")
    def _metadata(self) -> dict[str, str]:
        """The metadata of a memory file: what all memories share, and what is this one's."""
        tokens_written = str(self.n_written)
        return {**self._source, "tokens_written": tokens_written, "created": self._text.position.since}

    @property
    @holding("_text.lock")
    def _source(self) -> dict[str, str]:
        """Of the metadata, what all memories of this model and its adapter share."""
        self._require_memory()
        adapter = self._llm._adapter
        name = library.meta(adapter, "general.name") or library.meta(adapter, "deltamem.source.name")
        return {
            "layers": ",".join(map(str, self.layers)),
            "adapter": library.meta(adapter, "deltamem.source.sha256") or "",
            "adapter_name": name or "",
            "architecture": library.meta(adapter, "general.architecture") or "",
            "base": self._llm.fingerprint,
            "base_name": self._llm.metadata.get("general.name", ""),
        }
