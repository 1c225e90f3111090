"""`DeltaMemLlama`: `llama_cpp.Llama` with a memory that learns from every token."""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from .errors import AdapterError, DeltaMemError, InputError, ModelError, naming, no_file, shown, shown_value
from .formats.kinds import ADAPTER
from .formats.packed import n_packed
from .hub import HUB, adapter_file, model_file
from .memory import Memory
from .runtime import library, loading
from .runtime.completion import Completion
from .runtime.continuation import Continuation
from .runtime.cpus import default_threads
from .runtime.embedding import vectors
from .runtime.engine import Engine
from .runtime.ggml import can_be_mapped
from .runtime.grammar import check_forced_call, grammar_of_format
from .runtime.history import Position, Tokens
from .runtime.interrupt import uninterrupted
from .runtime.library import Llama, LlamaState
from .runtime.loading import FileName
from .runtime.lock import holding
from .runtime.names import option
from .runtime.remote import connect
from .runtime.sampling import Sampler, derived, made_sampler
from .runtime.saved import DeltaMemState, kv_of, load_kv
from .runtime.slots import Slots
from .runtime.text import Text
from .runtime.tokenizer import Tokenizer
from .runtime.unpacking import NONE, UNPACK, overrides
from .runtime.values import segment_ids, token_ids, whole
from .tuned import kept

_llama = library.llama_cpp

LlamaChatCompletionHandlerNotFoundException: Any = (
    _llama.llama_chat_format.LlamaChatCompletionHandlerNotFoundException  # mypy does not know it
)
_GENERATE = inspect.signature(Llama.generate)
_COMPLETE = inspect.signature(Llama.create_completion)
_CHAT = inspect.signature(Llama.create_chat_completion)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _called_as(theirs: Callable[_P, Any]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Decorator: says that a method has the parameters of llama_cpp's, which it passes on. Editors show them, and
    programs ask for them to see which of their options they can give.
    """

    def decorated(ours: Callable[..., _R]) -> Callable[_P, _R]:
        ours.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
        return ours

    return decorated


class DeltaMemLlama(Llama):
    """A llama.cpp model whose attention is corrected by a memory that learns from every token.

    It does what `llama_cpp.Llama` does: completion, chat, grammars, streaming, LoRA, embeddings. It takes no images.

        with DeltaMemLlama(model_path="base.gguf", deltamem_path="adapter.gguf") as llm:
            llm.create_completion("...")
            llm.memory.save("ada.memory")

    Args:
        model_path: the model as GGUF, plain or packed with an adapter; or a name of one, or a Hugging Face directory
            (docs/how-to/names.md).
        deltamem_path: an adapter GGUF for that model, a name of one, or a directory as published. None: the adapter of
            a packed model. Without an adapter there is no memory, and `llm.memory` raises AdapterError.
        defer_replies: replies read what was written before their message, and not what the message and they themselves
            write (docs/explanation/method.md). For adapters that write per token.
        n_ctx: tokens of a text, which llama.cpp rounds up to a multiple of 256; 0: as many as the model was trained on.
            A batch (n_batch) is no larger than the context.
        n_seq_max: texts that the context holds at once: this object's own, and those of `Conversation`. The context is
            n_seq_max times as large.
        rpc_servers: `host:port` of machines that run `deltamem rpc-server`, separated by commas. They get layers first:
            all of them, unless n_gpu_layers says how many.
        n_threads, n_threads_batch: threads for a reply, and for prompts. None or 0: half of the CPUs that the process
            may use, and all of them.
        repack: whether llama.cpp puts weights into the layout of this CPU's fastest products when it loads them. That
            is not always the faster layout. None: yes.
        unpack: which quantised weights a prompt multiplies in BF16: "none", "all", or "rest", those that llama.cpp does
            not repack. None: "none". It applies to weights in Q4_0 to Q8_0, Q6_K and (with "all") BF16, on a processor
            with AVX512-BF16 and no AMX, without a GPU; other weights stay as `repack` says. Tokens that are decoded
            beside seven others, of whatever text, are then rounded differently than alone. The weights are a copy in
            memory.
        tuned: take what `deltamem tune` found fastest for this model on this machine, unless a keyword says otherwise.
            If nothing was found, or layers are on other machines, the defaults stay without an error.
        verbose: print llama.cpp's log. Otherwise it goes to the logger `pydeltamem.llama_cpp`.
        **kwargs: as `llama_cpp.Llama`.

    Raises:
        InputError: a keyword is unknown, n_ctx, n_seq_max, unpack or a number of threads is out of range, there is no
            memory for such batches, or an RPC server does not answer.
        ModelError: the model file is missing or cannot be loaded.
        AdapterError: the adapter is missing, corrupt or made for another model.
        FetchError: a model or adapter given by name cannot be fetched.

    Attributes:
        finish_reason: why the latest `generate` ended, "length" or "stop"; None before its end, or if it was closed
            early.
        tuned: the keywords and values that `tuned=True` took; empty if there were none.
        unpack: which weights prompts multiply in BF16, if the processor can: as given, or as `tuned=True` chose.

    Memory and text are independent: `reset()` forgets the text and keeps the memory, `memory.reset()` the reverse.

    As a context manager it closes itself at the end.

    Threads may share it (docs/reference/threads.md). Calls that use this object's own text run one after the other.
    They may run between two pieces of a stream, which ends with InputError if they change its text. A `Conversation`
    has its own text. Requests of several threads are decoded in common batches. Logits processors and stopping criteria
    are called in the thread that asks.

    Each token of a text is written once (docs/reference/one-write.md). If a text goes back, because a prompt is asked
    again or edited or drafted tokens were wrong, the memory goes back with it. A text that shares nothing with the
    present one, or in a chat only the system prompt, is another text: the memory goes on.
    """

    _sampler: Any  # of the current reply
    _is_closed = False
    _n_packed = 0  # parameters of the adapter in the model's own file

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        deltamem_path: str | os.PathLike[str] | None = None,
        defer_replies: bool = False,
        n_ctx: int = 512,
        n_seq_max: int = 1,
        rpc_servers: str | None = None,
        repack: bool | None = None,
        unpack: str | None = None,
        tuned: bool = False,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in loading.FORMER}
        loading.check_keywords(kwargs, n_ctx, n_seq_max, inspect.signature(DeltaMemLlama).parameters)
        if kwargs.get("vocab_only") and deltamem_path is not None:
            raise InputError(f"{option('deltamem_path')} needs the model's weights: leave out either it or vocab_only")
        if kwargs.get("seed") is not None:
            kwargs["seed"] = whole(kwargs["seed"], "seed")
        if kwargs.get("lora_path") is not None:
            kwargs["lora_path"] = path = FileName(os.fsdecode(kwargs["lora_path"]))
            if not os.path.isfile(path):
                raise ModelError(no_file(path, "LoRA file"))
        self._adapter: library.llama_deltamem_adapter_p | None = None
        self._adapters: list[library.llama_deltamem_adapter_p] = []  # the same, to be freed
        self._text = cast(Text, None)  # Llama.__init__ sets n_tokens before there is a text
        self._defer_replies = defer_replies
        self._n_seq_max = n_seq_max
        self._rpc_servers = rpc_servers
        if n_ctx and "n_batch" in kwargs:  # as llama.cpp does; llama_cpp would first make a row of logits for each
            kwargs["n_batch"] = min(int(kwargs["n_batch"]), n_ctx * n_seq_max)
        model_path = FileName(model_file(model_path))
        kwargs = self._with_speed(model_path, {**kwargs, "repack": repack, "unpack": unpack}, tuned and not rpc_servers)
        self.deltamem_path = None if deltamem_path is None else adapter_file(deltamem_path, model_path)
        if rpc_servers:
            connect(rpc_servers)
            kwargs.setdefault("n_gpu_layers", -1)  # llama_cpp's default, 0, would leave the servers idle
        self._overrides = overrides(model_path, self.unpack)
        if n_ctx == 0 and n_seq_max > 1:
            n_ctx = loading.trained_context(model_path)  # llama.cpp would divide it among the texts
        loading.check_header(model_path, kwargs.get("kv_overrides") or {})
        try:
            with uninterrupted() as self._pressed:
                self._load(model_path, n_ctx=n_ctx * n_seq_max, verbose=verbose, **kwargs)
        except KeyboardInterrupt:
            self.close()  # its traceback may stay long
            raise

        self.model_path = str(model_path)  # plain strings: answers and pickles hold them
        self.lora_path = None if self.lora_path is None else str(self.lora_path)
        if kwargs.get("seed") == 0:
            self._seed = 0  # llama_cpp takes 0 for no seed
        self._take_over()

    def _with_speed(self, model_path: str, kwargs: dict[str, Any], tuned: bool) -> dict[str, Any]:
        """Decides what changes speed alone: keeps what is of this class, and returns the keywords of `Llama.__init__`
        with the rest. `tuned`: takes what was tuned, where nothing else is asked for.
        """
        self.tuned: dict[str, Any] = {}
        if tuned and (record := kept(model_path, kwargs.get("n_gpu_layers", 0))) is not None:
            self.tuned = record.settings.keywords(kwargs)
        kwargs = {**kwargs, **self.tuned}
        self._repack = kwargs.pop("repack") is not False
        self.unpack = kwargs.pop("unpack") or NONE
        if self.unpack not in UNPACK:
            raise InputError(f"{option('unpack')} is one of {', '.join(UNPACK)}, not {shown(self.unpack)}")
        for name, n in zip(("n_threads", "n_threads_batch"), default_threads()):
            kwargs[name] = kwargs.get(name) or n
        return kwargs

    def _load(self, model_path: str, **kwargs: Any) -> None:
        """Calls `Llama.__init__`, and attaches the first adapter."""
        with library.silencing, library.errors_held() as log:
            if not can_be_mapped(model_path):
                kwargs["use_mmap"] = False
            try:
                super().__init__(model_path, **kwargs)
            except TemplateError as error:
                self.close()
                raise ModelError(f"{model_path}: its chat template cannot be read: {error}") from error
            except MemoryError as error:
                self.close()
                raise InputError(
                    f"{model_path}: there is no memory for such a context: lower {option('n_ctx')} or "
                    f"{option('n_batch')} ({error})"
                ) from error
            except (RuntimeError, ValueError) as error:
                self.close()
                if str(error).startswith("Failed to "):
                    if ADAPTER.is_one(Path(model_path)):
                        raise ModelError(
                            f"{model_path}: this is a δ-mem adapter: give it as {option('deltamem_path')}, and the "
                            f"base model as {option('model_path')}"
                        ) from error
                    raise ModelError(f"{model_path}: the model cannot be loaded{library.reason(log)}") from error
                raise
            try:
                # llama_cpp takes a null pointer for an adapter, and llama.cpp would follow it
                if self._lora_adapter is not None and not self._lora_adapter:
                    raise ModelError(f"{self.lora_path}: the LoRA adapter cannot be loaded{library.reason(log)}")
                self._stack.callback(_free, self._adapters)  # before context and model
                self._engine = Engine(Slots(self._ctx, self._batch, self.n_batch, model_path, self._n_seq_max))
                _open.add(self)
                self._attach_first()
            except (AdapterError, ModelError):
                self.close()
                raise

    def _take_over(self) -> None:
        """Replaces what `Llama.__init__` has set."""
        self._given_seed = self._seed  # each completion leaves another one
        if type(self.tokenizer_) is library.LlamaTokenizer:
            self.tokenizer_ = self.tokenizer()
        self._text = self._engine.text(home=0)  # the slot that llama_cpp.Llama uses
        # llama_cpp allocates rows that it never fills, and with a draft model only n_batch rows
        self.scores = np.empty((self.n_ctx() if self._logits_all else 0, self.n_vocab()), dtype=np.single)
        if self._logits_all:
            self._text.scores = self.scores
        self._slots.take(self._text)
        self._n_before = 0  # tokens before the sampled one
        self.finish_reason: str | None = None
        self._messages: list[Any] | None = None  # of the latest chat completion that was decoded
        self._asked: list[Any] | None = None  # of the next one

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        deltamem_repo: str | None = None,
        deltamem_filename: str | None = None,
        **kwargs: Any,
    ) -> DeltaMemLlama:
        """Loads a model from a Hugging Face repository, and an adapter from another. Needs the extra `hub`.

            DeltaMemLlama.from_pretrained("someone/base-GGUF", "*Q4_K_M.gguf", deltamem_repo="someone/adapter")

        Args:
            repo_id: the repository of the model.
            filename: its file or a pattern that only that file matches; of a model in shards, the first. None: its only
                GGUF file, or the PyTorch model, which is converted.
            additional_files: names or patterns of further files to fetch.
            local_dir, cache_dir: where huggingface_hub keeps the model; None: its own cache.
            local_dir_use_symlinks: no longer has an effect.
            deltamem_repo: the repository of the adapter; a PyTorch directory is converted.
            deltamem_filename: its file, its folder, or a pattern, if there are several.
            **kwargs: as `DeltaMemLlama`.

        Raises as `DeltaMemLlama`.
        """
        where = {key: value for key, value in (("local_dir", local_dir), ("cache_dir", cache_dir)) if value is not None}
        model = model_file(_hub_name(repo_id, filename), additional_files or (), **where)
        if deltamem_repo is not None:
            kwargs["deltamem_path"] = adapter_file(_hub_name(deltamem_repo, deltamem_filename), model)
        return cls(model, **kwargs)

    def _attach_first(self) -> None:
        path = self.deltamem_path
        if "deltamem.version" in self.metadata and not self.model_params.vocab_only:  # packed
            self._n_packed = n_packed(self.model_path)
            path = path or self.model_path
        if path is not None:
            self._attach(path)

    @property
    def _slots(self) -> Slots:
        return self._engine.slots

    @holding("_engine.lock")
    def _attach(self, path: str) -> None:
        """Replaces the attached adapter. If it raises AdapterError, the attached one stays."""
        load = (
            library.llama_deltamem_adapter_load_deferring
            if self._defer_replies
            else library.llama_deltamem_adapter_load
        )
        adapter = load(self.model, os.fsencode(path))
        if not adapter:
            raise AdapterError(naming(path, library.last_error()))
        try:
            self._slots.attach(adapter)
        except AdapterError as error:
            library.llama_deltamem_adapter_free(adapter)
            raise AdapterError(naming(path, str(error))) from None
        self._adapter = adapter
        self._slots.adapter_path = path
        _free(self._adapters)  # the previous one: contexts keep what they need of it
        self._adapters.append(adapter)

    @property
    def memory(self) -> Memory:
        """The memory of this object's own text."""
        return Memory(self, self._text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the base model in memory files: sha256 of name, sizes and tokenizer, the same for all quantisations,
        and with an adapter packed in.
        """
        architecture = self.metadata.get("general.architecture", "")
        keys = sorted(k for k in self.metadata if k.startswith((f"{architecture}.", "tokenizer.ggml.")))
        n_params = _llama.llama_model_n_params(self.model) - self._n_packed
        facts = [self.metadata.get("general.name", ""), self.n_vocab(), n_params]
        facts += [f"{key}={self.metadata[key]}" for key in keys]
        return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()

    #
    # fields in which llama_cpp.Llama keeps its text
    #

    @property
    def n_tokens(self) -> int:
        """Length of the text. Setting it lower goes back; the next tokens take the memory back too."""
        return 0 if self._text is None else self._text.n_tokens

    @n_tokens.setter
    def n_tokens(self, value: int) -> None:
        if self._text is not None:
            with self._text.turn:
                self._text.n_tokens = value

    @property
    def input_ids(self) -> npt.NDArray[np.intc]:
        """Token ids of the text, [n_ctx], read-only; the first n_tokens count."""
        tokens: npt.NDArray[np.intc] = self._text.position.log.tokens.view()
        tokens.flags.writeable = False
        return tokens

    @input_ids.setter
    def input_ids(self, value: npt.NDArray[np.intc]) -> None:
        if self._text is not None:  # Llama.__init__ sets an array of its own
            raise InputError("input_ids cannot be set: eval sets them")

    @property
    def model_params(self) -> Any:
        """llama_model_params, with `repack` and `unpack` as given. Ctrl-C ends the load."""
        return self._model_params

    @model_params.setter
    def model_params(self, value: Any) -> None:
        pressed = self._pressed
        value.progress_callback = _llama.llama_progress_callback(lambda *_: not pressed)  # false ends the load
        value.use_extra_bufts = self._repack
        if self._overrides is not None:
            value.tensor_buft_overrides = ctypes.addressof(self._overrides)
        self._model_params = value

    @property
    def context_params(self) -> Any:
        """llama_context_params, with n_seq_max as given."""
        params = self._context_params
        if params.embeddings:  # llama_cpp asks for one sequence per token of a batch, llama.cpp for a divisor of it
            n = min(params.n_batch, params.n_ubatch or params.n_batch)
            params.n_seq_max = next(k for k in range(max(1, min(params.n_seq_max, n)), 0, -1) if n % k == 0)
        return params

    @context_params.setter
    def context_params(self, value: Any) -> None:
        value.n_seq_max = self._n_seq_max
        value.kv_unified = False
        self._context_params = value

    def n_ctx(self) -> int:
        """Most tokens that a text can have."""
        return int(_llama.llama_n_ctx(self.ctx)) // self._n_seq_max

    #
    # decoding
    #

    @holding("_text.turn")
    def eval(self, tokens: Sequence[int], segments: Sequence[int] | None = None) -> None:
        """Decodes tokens after the present text: one ingest, in pieces of n_batch.

        Args:
            tokens: token ids.
            segments: for adapters that write per segment: one id per token. Ids do not decrease; -1 writes nothing. All
                tokens read the memory as it was before the call; then each segment writes once. None: each token is a
                segment of its own and writes when it is decoded.

        After going back (`n_tokens` set lower) the memory goes back too, and these tokens are written in place of the
        old ones. But if no token agrees, or only the first of the text, this is another text and the memory goes on.

        Raises InputError if the arguments do not fit, NotFiniteError if memory or logits stop being finite, DecodeError
        if llama.cpp fails; text and memory are then as before the call.
        """
        self._eval(tokens, segments=segments)

    def _eval(
        self,
        tokens: Sequence[int],
        undo: Position | None = None,
        segments: Sequence[int] | None = None,
        **options: Any,
    ) -> Position | None:
        """As `eval`, with options of `Engine.decode`, and its result; None without tokens."""
        self._slots.require_open()
        new = self._checked_tokens(tokens)
        ids = None if segments is None else self._checked_segments(new, segments)
        if len(new) == 0:
            return None
        text, position = self._text, self._text.position
        n_past = position.n_tokens
        if n_past < position.n and n_past + position.common(n_past, new) <= 1:
            text.require_room(n_past, len(new))
            undo = undo or position
            text.begin(n_past)  # at most the token that begins every text agrees: this is another text
        return text.eval(new, ids, drafted=self.draft_model is not None, undo=undo, **options)

    @property
    @holding("_engine.lock")
    def logits(self) -> npt.NDArray[np.float32]:
        """A copy of the logits after the latest token, float32 [n_vocab]. Raises InputError if there are none."""
        return self._slots.logits(self._text.require_row())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """As `Llama.eval_logits`: logits of every token with logits_all, else of the latest one, if there are any."""
        if self._logits_all:
            return deque(self._scores.tolist(), maxlen=self._n_ctx)
        try:
            return deque([self.logits.tolist()], maxlen=1)
        except InputError:
            return deque(maxlen=1)

    @_called_as(Llama.generate)
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As `Llama.generate`. At its end, text and memory hold no drafted token that was not taken.

        `stopping_criteria` are called with the decoded tokens, [n], and the logits that the next one was sampled from.
        Tokens given by `send` are guesses at what follows, like a draft model's; they need `logits_all=True`.
        Other texts may be decoded between two tokens. Raises InputError when it goes on after this text was changed,
        also by a callback.

        Raises NotFiniteError if memory or logits stop being finite: text and memory are then as before the prompt.

        When it ends by itself, `finish_reason` says why: "length" in a full context, "stop" after a stopping criterion.
        """
        options = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        del options["self"], options["tokens"]
        whole: Any = list(tokens) if isinstance(tokens, Iterable) else tokens
        yield from Continuation(self, whole, options).tokens()

    @_called_as(Llama.sample)
    @holding("_text.turn")
    @holding("_engine.lock")
    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """As `Llama.sample`: a token from the logits of the latest token, or with logits_all from those of token `idx`.
        The model's seed and the position decide it.

        Raises InputError if there are no logits of the present text and memory, and what logits processors raise.
        """
        row: int | npt.NDArray[np.float32] = self._text.require_row()
        if idx is None:  # not called by `generate`: use these options, not a reply's sampler
            sampler = self._seeded_sampler(derived(self._seed, self.n_tokens), *args, **kwargs)
        else:
            if idx != self.n_tokens - 1:
                if not self._logits_all or not 0 <= idx < self.n_tokens:
                    raise InputError(f"the logits of token {idx} are not there: load the model with logits_all=True")
                row = self.scores[idx]  # llama.cpp may have discarded them since
            sampler = self._sampler or self._init_sampler(*args, **kwargs)
        self._n_before = self.n_tokens if idx is None else idx + 1
        return sampler.sample(self._ctx, row)

    @_called_as(Llama._init_sampler)
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return self._seeded_sampler(self._seed, *args, **kwargs)

    def _seeded_sampler(self, seed: int, *args: Any, **kwargs: Any) -> Sampler:
        """As `_init_sampler`, with a seed that is not the model's."""
        return made_sampler(self, seed, *args, **kwargs)

    def set_seed(self, seed: int) -> None:
        """As `Llama.set_seed`; -1: a random seed each time. Raises InputError if it is no whole number."""
        super().set_seed(whole(seed, "seed"))
        self._given_seed = self._seed

    @_called_as(Llama.create_completion)
    def create_completion(self, prompt: str | Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As `Llama.create_completion`, with these rules for `max_tokens=0` and log probabilities.

        Args:
            prompt: text, or token ids that are decoded as they are.
            max_tokens: tokens to generate at most. 0: only decode the prompt; negative or None: to the end of the
                context.
            logprobs: how many of the likeliest tokens to list for each token of the text; needs `logits_all=True`.
            echo: whether the returned text begins with the prompt, whose tokens then have log probabilities too. The
                first token of a text has None.

        The lists have the sampled tokens, and with `echo` those of the prompt: all that were given as ids; of a text
        those that hold its characters. `top_logprobs` lists the likeliest first, and the token itself.
        A token's logits date from when it was decoded. Where a prompt begins as the present text, they come from the
        memory of that time. Call `reset()` first to decode all of it again.

        Raises InputError if the arguments do not fit or the prompt does not fit in the context.
        """
        arguments = _COMPLETE.bind(self, prompt, *args, **kwargs)
        arguments.apply_defaults()
        del arguments.arguments["self"]
        stream = arguments.arguments.pop("stream")
        with self._text.turn:
            completion = self._slots.call(Completion, self, **arguments.arguments)
            return self._stepwise(completion.streamed()) if stream else self._slots.call(completion.whole)

    def _stepwise(self, chunks: Generator[Any]) -> Iterator[Any]:
        """A stream that holds the turn for each piece, and releases it in between."""
        with contextlib.closing(chunks):
            while True:
                with self._text.turn:
                    chunk = self._slots.call(next, chunks, None)
                if chunk is None:
                    return
                yield chunk

    @_called_as(Llama.create_chat_completion)
    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As `Llama.create_chat_completion`.

        Messages that begin as those of the latest call continue that conversation, or go back in it; the memory goes
        back with them. If nothing agrees, or only the system prompt, it is another conversation: the memory goes on,
        and the common beginning is not decoded again.

        `logprobs=True` gives the log probability of each token of the reply; `top_logprobs` says how many of the
        likeliest tokens to list with it. Both need `logits_all=True`.
        """
        options = _CHAT.bind(self, messages, *args, **kwargs).arguments
        del options["self"]
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
            raise InputError(f"messages is a list of messages, not {shown_value(messages)}")
        options["messages"] = messages = list(messages)
        if self.chat_handler is None:
            if grammar := grammar_of_format(options.pop("response_format", None)):
                options["grammar"] = grammar
            with contextlib.suppress(AttributeError, TypeError):  # malformed: as the chat handler has it
                for choice in ("tool_choice", "function_call"):
                    check_forced_call(options.get("tools"), options.get("functions"), options.get(choice))
        asked = copy.deepcopy(messages)
        n_top = options.get("top_logprobs") or 0
        if options.get("logprobs"):
            options["top_logprobs"] = n_top  # with None there would be no log probabilities at all
        with self._text.turn, self._asking(asked):
            try:
                answer = super().create_chat_completion(**options)
            except DeltaMemError:
                raise
            except UnicodeEncodeError as error:
                raise InputError(f"the messages are no Unicode text: {error.reason}") from None
            except LlamaChatCompletionHandlerNotFoundException as error:
                raise InputError(str(error)) from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
                if self._asked is None or self.chat_handler is not None:  # raised while it generates, or by the user's
                    raise
                raise InputError(f"the model's chat format refuses these messages or options: {error}") from error
        if not isinstance(answer, Iterator):
            return _with_best(answer, n_top)
        return (_with_best(chunk, n_top) for chunk in self._streamed(asked, answer))

    def _streamed(self, asked: list[Any], chunks: Iterator[Any]) -> Iterator[Any]:
        with self._text.turn, self._asking(asked):  # only once the stream is consumed
            first = list(itertools.islice(chunks, 1))
        yield from first
        yield from chunks

    def _begins_another_chat(self) -> bool:
        """For `generate`, as it begins: whether it decodes a chat that is not the latest one."""
        if self._asked is None:
            return False
        before, self._messages, self._asked = self._messages, self._asked, None
        return before is not None and self.memory.attached and not _agree(before, self._messages)

    @contextlib.contextmanager
    def _asking(self, messages: list[Any]) -> Iterator[None]:
        """Tells `generate` that it decodes a chat of these messages, if it is called."""
        self._asked = messages
        try:
            yield
        finally:
            self._asked = None

    def _checked_tokens(self, tokens: Tokens) -> npt.NDArray[np.integer]:
        return token_ids(tokens, self._n_vocab)

    def _checked_segments(self, tokens: Tokens, segments: Sequence[int]) -> npt.NDArray[np.int32]:
        if not self.memory.attached:
            raise AdapterError("segments were given but no adapter is attached")
        if not self._slots.writes_by_segment:
            raise InputError("segments were given but the adapter writes per token: call eval without them")
        return segment_ids(segments, len(tokens))

    @_called_as(Llama.tokenize)
    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        """As `Llama.tokenize`."""
        return self._slots.call(super().tokenize, *args, **kwargs)

    @_called_as(Llama.detokenize)
    def detokenize(self, *args: Any, **kwargs: Any) -> bytes:
        """As `Llama.detokenize`."""
        return self._slots.call(super().detokenize, *args, **kwargs)

    def reset(self) -> None:
        """Forgets the text and keeps the memory."""
        # not Llama's, which empties the KV cache of all texts for hybrid models
        if self._text is not None:
            with self._text.turn:
                self._text.reset()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer(self)

    @holding("_text.turn")
    @holding("_engine.lock")  # each batch empties the KV cache of all texts
    def embed(
        self, input: str | Sequence[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """The vector of a text, a list of floats; for several texts a list of vectors. Without pooling each text has a
        list of vectors instead, one per token.

        Every text reads this object's memory; nothing is written, and the present text is forgotten.

        Args:
            normalize: whether vectors have length 1.
            truncate: whether to cut a text after as many tokens as fit: n_batch, or n_ubatch if a text must be decoded
                in one piece (pooling other than of the last token, models that look ahead). Otherwise InputError.
            return_count: whether to return the number of tokens too.

        Raises InputError if the model was not loaded with `embedding=True`, or a text has no tokens to pool;
        NotFiniteError if a vector is not finite.
        """
        self._slots.require_open()
        embedded, n_tokens = vectors(self, [input] if isinstance(input, str) else list(input), normalize, truncate)
        result = embedded[0] if isinstance(input, str) else embedded
        return (result, n_tokens) if return_count else result

    #
    # saving
    #

    @holding("_text.turn")
    @holding("_engine.lock")
    def save_state(self) -> DeltaMemState:
        """As `Llama.save_state`: the text with its KV cache, and the memory."""
        text = self._text
        if self.memory.attached:
            text.catch_up()
        data = kv_of(self)
        position = text.position
        n_log = max(position.n, position.n_tokens)
        return DeltaMemState(
            input_ids=self._input_ids.copy(),
            scores=self._scores.copy(),  # none without logits_all
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
            position=position.ended()._replace(log=position.log.without(n_log, n_log, n_log)),
            memory=self.memory.copy() if self.memory.attached else None,
            write=text.write,
            messages=self._messages,
            lost_by_failure=text.lost_by_failure,
        )

    @holding("_text.turn")
    @holding("_engine.lock")
    def load_state(self, state: LlamaState) -> None:
        """As `Llama.load_state`: text and memory as they were saved. A state without a memory, as plain llama_cpp saves
        it, leaves the present memory, and its tokens count as written.

        Raises InputError if the state is of another model, adapter or context; text and memory are then as before.
        """
        text, ours = self._text, state if isinstance(state, DeltaMemState) else None
        self._slots.require_open()
        if not isinstance(state, LlamaState):
            raise InputError(f"load_state takes what save_state returned, not {shown_value(state)}")
        if ours is None and self._n_seq_max > 1:
            raise InputError("a state that plain llama_cpp saved is for a context of one sequence")
        tokens = self._checked_tokens(state.input_ids[: state.n_tokens])
        n_ctx = len(ours.position.log.tokens) if ours else len(state.input_ids)
        if n_ctx != text.n_ctx if ours else len(tokens) > text.n_ctx:
            raise InputError(f"the state is of a context of {n_ctx} tokens, this one has {text.n_ctx}")
        if state.scores.ndim != 2 or state.scores.shape[1] != self.n_vocab():
            raise InputError("the state is of another model: its tokens are not those of this one")
        attached = self.memory.attached
        memory = ours.memory if ours else None
        reason = self.memory._misfit(memory) if memory is not None and attached else None
        if reason:
            raise InputError(f"the state: {reason}")
        text.renew()
        text.finish()
        load_kv(self, state)
        # a state of plain llama_cpp does not say which rows hold logits; NaN: not kept
        n_scored = min(len(state.scores), len(tokens)) if ours and self._logits_all else 0
        self.scores[:n_scored] = state.scores[:n_scored]
        self.scores[n_scored : len(tokens)] = np.nan
        if ours and memory is not None:
            n = len(ours.position.tokens)
            text.write = ours.write if attached else text.write
            text.position = ours.position._replace(
                log=ours.position.log.without(n, n, n),
                epoch=text.position.epoch + 1,
                adapter=self._slots.n_attached,
            )
            text.lost_kv(text.n_kv, ours.lost_by_failure)
            text.renew()
        else:
            text.position = text.position.with_text(tokens, ours.position.n_kv if ours else len(tokens))
        self._seed = state.seed
        self._messages = ours.messages if ours and memory is not None else None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: how to load the model again, and the memory. The text is decoded again when it is needed."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.update(
            deltamem_path=self.deltamem_path,
            defer_replies=self._defer_replies,
            n_ctx=state["n_ctx"] // self._n_seq_max,
            n_seq_max=self._n_seq_max,
            rpc_servers=self._rpc_servers,
            repack=self._repack,
            unpack=self.unpack,
            tokenizer=None if isinstance(self.tokenizer_, Tokenizer) else self.tokenizer_,
        )
        state["memory"] = None
        if self.memory.attached:
            state["memory"] = {
                "state": self.memory.state,
                "written": self._text.position.n_written,
                "write": self._text.write,
                "since": self._text.position.since,
            }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        memory = state.pop("memory")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if memory is None and self.memory.attached:
            self.memory.detach()
        elif memory is not None:
            self._text.become(memory["state"], memory["written"], memory["since"])
            self._text.write = memory["write"]

    def close(self) -> None:
        """Frees adapter, context and model. Closing twice is fine. Calls in other threads end with ModelError."""
        if self._is_closed:  # when Python ends, what follows may be gone
            return
        if hasattr(self, "model_path"):  # only if Llama.__init__ ran
            with self._slots.closing() if hasattr(self, "_engine") else contextlib.nullcontext():
                super().close()
                closed: Any = _Closed(self.model_path)
                self._ctx = self._model = self.tokenizer_ = closed
                self._is_closed = True
        self._adapter = None

    def __enter__(self) -> DeltaMemLlama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _with_llamas_keywords() -> inspect.Signature:
    """The signature of `DeltaMemLlama.__init__`, with llama_cpp's keywords in place of `kwargs`."""
    ours = inspect.signature(DeltaMemLlama.__init__)
    theirs = {name: each for name, each in inspect.signature(Llama.__init__).parameters.items() if name != "kwargs"}
    mine = [each for name, each in ours.parameters.items() if name != "kwargs"]
    return ours.replace(parameters=[*mine, *(each for name, each in theirs.items() if name not in ours.parameters)])


DeltaMemLlama.__init__.__signature__ = _with_llamas_keywords()  # type: ignore[attr-defined]

_open: weakref.WeakSet[DeltaMemLlama] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes the models that nobody closed. llama.cpp logs when it frees them, and later Python's part of that is gone.

    A model that a daemon thread uses stays open: that thread keeps it, and nobody frees it.
    """
    for llm in tuple(_open):
        if llm._engine.is_idle:
            llm.close()


class _Closed:
    """Stands in for the parts of a closed model: llama.cpp would follow pointers to freed memory."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path

    def __getattr__(self, name: str) -> Any:
        raise ModelError(f"{self._model_path}: the model is closed")


def _hub_name(repository: str, file: str | None) -> str:
    return f"{HUB}{repository}" if file is None else f"{HUB}{repository}:{file}"


def _free(adapters: list[library.llama_deltamem_adapter_p]) -> None:
    while adapters:
        library.llama_deltamem_adapter_free(adapters.pop())


def _with_best(answer: Any, n_top: int) -> Any:
    """A chat answer with at most n_top likeliest tokens per token. llama_cpp adds one if it sampled another."""
    for choice in answer["choices"]:
        for token in (choice.get("logprobs") or {}).get("content") or ():
            token["top_logprobs"] = token["top_logprobs"][:n_top]
    return answer


def _agree(before: list[Any], messages: list[Any]) -> bool:
    """Whether two conversations begin with the same message that is not a system prompt."""
    for mine, other in zip(before, messages):
        if mine != other:
            return False
        role = mine["role"] if isinstance(mine, Mapping) else getattr(mine, "role", None)  # templates take both
        if role not in ("system", "developer"):
            return True
    return False
