"""Options of the commands that run a model, named as in llama.cpp, and what they turn into."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ModelError, no_file
from ..formats.gguf_header import Header
from ..formats.memory_file import check_writable, read_memory_file
from ..hub import adapter_file, model_file
from .parser import (
    at_least,
    count,
    finite,
    gpu_layers,
    not_negative,
    positive,
    positive_number,
    probability,
    text,
    unescaped,
)

if TYPE_CHECKING:
    from ..llama import DeltaMemLlama
    from ..memory import Memory

DEFER_HELP = "replies read what was written before their message, not what the message and they themselves write"
MODEL_HELP = "model: GGUF, plain or packed, Hugging Face directory or name (deltamem pull)"
ADAPTER_HELP = "adapter: GGUF, PyTorch directory or name (not needed for a packed model)"

RANDOM = 2**32 - 1  # as a seed: another one each time, as for llama.cpp
MOST_BATCH = 1 << 20  # tokens that are decoded together: llama_cpp makes a row of logits for each

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


# By the sampler's keyword: the names of its option, the type, the default and the help.
SAMPLING: dict[str, tuple[tuple[str, ...], Callable[[str], Any], Any, str]] = {
    "temp": (("--temp", "--temperature"), not_negative, 0.8, "temperature (%(default)s; 0: greedy)"),
    "top_k": (("--top-k",), count, 40, "top-k (%(default)s; 0: off)"),
    "top_p": (("--top-p",), probability, 0.95, "top-p (%(default)s; 1: off)"),
    "min_p": (("--min-p",), probability, 0.05, "min-p (%(default)s; 0: off)"),
    "typical_p": (("--typical", "--typical-p"), probability, 1.0, "typical-p (1: off)"),
    "repeat_penalty": (("--repeat-penalty",), positive_number, 1.0, "repeat penalty (1: off)"),
    "presence_penalty": (("--presence-penalty",), finite, 0.0, "presence penalty (0: off)"),
    "frequency_penalty": (("--frequency-penalty",), finite, 0.0, "frequency penalty (0: off)"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, and how it is run."""
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", required=True, metavar="FILE", help=MODEL_HELP)
    group.add_argument("--lora", metavar="FILE", help="LoRA adapter GGUF")
    group.add_argument(
        "-c",
        "--ctx-size",
        type=count,
        default=4096,
        metavar="N",
        help="tokens of the context (%(default)s; 0: the model's)",
    )
    add_running_arguments(group)
    group.add_argument("--mlock", action="store_true", help="keep the model in RAM")
    group.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def add_running_arguments(group: argparse._ArgumentGroup) -> None:
    """Threads, machines and context; the defaults of what decides the speed are what `deltamem tune` found."""
    group.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (half of the usable CPUs)")
    group.add_argument(
        "-tb", "--threads-batch", type=positive, metavar="N", help="threads for prompts (as -t, or all CPUs)"
    )
    group.add_argument("--rpc", metavar="HOST:PORT,...", help="run layers on these machines too (deltamem rpc-server)")
    add_context_arguments(group, tuned=True)
    group.add_argument("--no-mmap", action="store_true", help="load the model instead of mapping it")


def add_context_arguments(group: argparse._ArgumentGroup, tuned: bool = False) -> None:
    """Options of a context, for every command that makes one.

    tuned: those that decide the speed are None if they are not given, for what `deltamem tune` found.
    """

    def of(default: Any) -> Any:
        return None if tuned else default

    size = at_least(1, MOST_BATCH)
    group.add_argument(
        "-b", "--batch-size", type=size, default=512, metavar="N", help="tokens of a batch (%(default)s)"
    )
    group.add_argument(
        "-ub", "--ubatch-size", type=size, default=of(512), metavar="N", help="tokens of a micro-batch (512)"
    )
    group.add_argument(
        "-ngl", "--gpu-layers", "--n-gpu-layers", type=gpu_layers, default=-1, metavar="N",
        help="layers on the GPU (all)",
    )  # fmt: skip
    group.add_argument(
        "-fa", "--flash-attn", nargs="?", const="on", default=of("off"), choices=("on", "off"),
        help="flash attention (off)",
    )  # fmt: skip
    for letter in "kv":
        group.add_argument(
            f"-ct{letter}", f"--cache-type-{letter}", choices=CACHE_TYPES, default=of("f16"), metavar="TYPE",
            help=f"type of {letter.upper()} in the KV cache: {', '.join(CACHE_TYPES)} (f16)",
        )  # fmt: skip
    add_unpack(group, of("none"))
    if tuned:
        group.add_argument(
            "--repack", action=argparse.BooleanOptionalAction,
            help="put weights into the layout of this CPU's fastest products when they are loaded (yes)",
        )  # fmt: skip
        group.add_argument(
            "--no-tune", action="store_true", help="ignore what deltamem tune found for this model and machine"
        )


def add_eval_arguments(parser: argparse.ArgumentParser, n_ctx: int) -> None:
    """Adds context and threads of a model that answers questions. n_ctx: tokens of the context with -m."""
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=count,
        metavar="N",
        help=f"tokens of the context ({n_ctx}; 0, or the small model: the model's)",
    )
    parser.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (half of the usable CPUs)")


def named_adapters(args: argparse.Namespace, name: str, taken: Collection[str] = ()) -> dict[str, str]:
    """The adapters of --adapters, by name, and that of --deltamem by this one. Raises InputError.

    taken: names that a table has already.
    """
    named = [item.partition("=")[::2] for item in args.adapters or ()]
    named += [(name, args.deltamem)] if args.deltamem else []
    adapters = dict(named)
    wrong = [item for item in adapters if not item or item in taken or set("/+,") & set(item)]
    if wrong or len(adapters) < len(named) or not all(adapters.values()):
        other = f"other than {', '.join(taken)}, and " if taken else ""
        raise InputError(
            f"--adapters {' '.join(args.adapters)}: give each adapter a name of its own, {other}without / + or ,:"
            " --adapters msw=adapter.gguf"
        )
    return adapters


def padded(n_ctx: int) -> int:
    """The tokens that a context holds if so many are asked for, as llama.cpp pads it."""
    return -(-n_ctx // 256) * 256


def add_unpack(group: argparse._ActionsContainer, default: str | None) -> None:
    """The option `--unpack`."""
    group.add_argument(
        "--unpack", choices=("none", "rest", "all"), default=default,
        help="which weights prompts multiply in BF16, if the CPU can: all, those not repacked (rest), or none (none)",
    )  # fmt: skip


def packed_adapter(model: str) -> str | None:
    """Where the adapter of a model is if none is named: in the model itself, if it is packed. Raises ModelError if that
    is no model.
    """
    keys = Header(model).keys
    if keys.get("adapter.type") == "deltamem":
        raise ModelError(f"{model}: this is a δ-mem adapter: give it as --deltamem, and the base model as --model")
    return model if "deltamem.version" in keys else None


def model_and_adapter(args: argparse.Namespace) -> tuple[str, str | None]:
    """The files of the model and of the adapter: the given one, or the model if it is packed."""
    model = model_file(args.model)
    packed = packed_adapter(model)  # raises now if it is no model
    return model, packed if args.deltamem is None else adapter_file(args.deltamem, model)


def add_memory_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adapter and memory. Returns the group."""
    group = parser.add_argument_group("memory")
    group.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    group.add_argument("--defer-replies", action="store_true", help=DEFER_HELP)
    group.add_argument("--no-memory", action="store_true", help="run the plain model")
    group.add_argument("--no-write", action="store_true", help="tokens read the memory and do not write it")
    group.add_argument("--load-memory", metavar="FILE", help="start from this memory")
    group.add_argument("--save-memory", metavar="FILE", help="save the memory at the end, also after Ctrl-C")
    return group


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What is generated and how."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n", "--n-predict", "--predict", type=at_least(-1), default=-1, metavar="N",
        help="tokens to generate (-1: until the end of the text or the context)",
    )  # fmt: skip
    group.add_argument("-s", "--seed", type=at_least(-1, RANDOM), default=-1, metavar="N", help="seed (-1: random)")

    for keyword, (names, kind, default, help) in SAMPLING.items():
        metavar = "N" if isinstance(default, int) else "X"
        group.add_argument(*names, dest=keyword, type=kind, default=default, metavar=metavar, help=help)
    group.add_argument(
        "--repeat-last-n", type=count, default=64, metavar="N", help="tokens to penalise (%(default)s; 0: off)"
    )
    group.add_argument(
        "-r", "--reverse-prompt", "--stop", type=text, action="append", default=[], metavar="TEXT",
        help="end the reply before this text (may be given several times)",
    )  # fmt: skip
    group.add_argument(
        "-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
        help="take \\n, \\t and the like in a prompt of -p, and in -r, for what they stand for (yes)",
    )  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="generate past the end of the text")
    grammar = group.add_mutually_exclusive_group()
    grammar.add_argument("--grammar", type=text, metavar="GBNF", help="grammar that the output must follow")
    grammar.add_argument("--grammar-file", metavar="FILE", help="file with a grammar")


def load(args: argparse.Namespace) -> DeltaMemLlama:
    """Loads the model with its adapter and memory. First checks everything that needs no model."""
    if args.no_memory and (args.load_memory or args.save_memory or args.no_write or args.defer_replies):
        raise InputError("--no-memory leaves no memory to load, save or read: drop it, or the memory options")
    if args.save_memory:
        check_writable(args.save_memory)
    if args.load_memory:
        read_memory_file(args.load_memory)
    if args.lora and not os.path.isfile(args.lora):
        raise InputError(no_file(args.lora, "LoRA file"))

    from ..llama import DeltaMemLlama

    model = model_file(args.model)
    adapter = adapter_file(args.deltamem, model) if args.deltamem and not args.no_memory else None
    with ended_by_ctrl_c():
        llm = DeltaMemLlama(
            model,
            deltamem_path=adapter,
            defer_replies=args.defer_replies,
            lora_path=args.lora,
            n_ctx=padded(args.ctx_size),
            **running_options(args),
            use_mlock=args.mlock,
            last_n_tokens_size=args.repeat_last_n,
            verbose=args.verbose,
        )
    if args.no_memory and llm.memory.attached:
        llm.memory.detach()
    if args.load_memory:
        llm.memory.load(args.load_memory)
    if args.save_memory or args.defer_replies:
        _ = llm.memory.state  # raises now if there is none
    if args.no_write:
        llm.memory.write = False
    return llm


def tell_of_context(args: argparse.Namespace, llm: DeltaMemLlama) -> None:
    """Prints that the context holds more tokens than were asked for, or that the model was trained on fewer."""
    asked, n_ctx, n_trained = args.ctx_size, padded(args.ctx_size), llm._model.n_ctx_train()
    if n_ctx != asked:
        note(f"--ctx-size {asked}: the context holds {n_ctx} tokens, because llama.cpp takes multiples of 256")
    if 0 < n_trained < asked:
        note(
            f"--ctx-size {asked}: the model was trained on texts of {n_trained} tokens; what follows after more may "
            "make no sense"
        )


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Within it Ctrl-C ends the process at once: for loading a model, of which nothing is left behind. Python would
    look at it only where llama.cpp asks whether to go on, between tensors.
    """
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, nor an application's
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def running_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_running_arguments` took, as keywords of DeltaMemLlama."""
    return {
        **context_options(args),
        **({} if args.repack is None else {"repack": args.repack}),
        "n_threads": args.threads,
        "n_threads_batch": args.threads_batch or args.threads,
        "rpc_servers": args.rpc,
        "tuned": not args.no_tune,
        "use_mmap": not args.no_mmap,
    }


def context_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_context_arguments` took without `tuned`, as keywords of DeltaMemLlama."""
    from ..runtime import library

    options = {"n_batch": args.batch_size, "n_gpu_layers": args.gpu_layers}
    given: dict[str, Any] = {"n_ubatch": args.ubatch_size, "unpack": args.unpack}
    if args.flash_attn is not None:
        given["flash_attn"] = args.flash_attn == "on"
    for letter in "kv":
        if name := getattr(args, f"cache_type_{letter}"):
            given[f"type_{letter}"] = getattr(library.llama_cpp, f"GGML_TYPE_{name.upper()}")
    return {**options, **{name: value for name, value in given.items() if value is not None}}


def memory_attached(llm: DeltaMemLlama, args: argparse.Namespace, n_written: int = 0) -> str:
    """Which memory the model has, in a line. n_written: tokens that were written to it."""
    if args.no_memory:
        return "memory: none (--no-memory)"
    if not llm.memory.attached:
        return "memory: none, this is the plain model (--deltamem FILE attaches an adapter)"
    parts = [f"memory: adapter {llm.deltamem_path or llm.model_path}"]
    file = getattr(args, "memory", None) or args.load_memory
    parts.append(f"memory of {file}, {n_written} tokens written" if file else "empty")
    return ", ".join(parts + ["only read"] * args.no_write)


@contextlib.contextmanager
def memory_saved(memory: Memory, path: str | None) -> Iterator[None]:
    """Saves the memory at the end, also after an error."""
    try:
        yield
    finally:
        if path:
            memory.save(path)


def sampling(args: argparse.Namespace, llm: DeltaMemLlama) -> dict[str, Any]:
    """Options of a turn, as `Conversation.say` takes them."""
    return {
        "n_predict": args.n_predict,
        **{keyword: getattr(args, keyword) for keyword in SAMPLING},
        "seed": random.randrange(RANDOM) if args.seed in (-1, RANDOM) else args.seed,
        "stop": [as_meant(each, args) for each in args.reverse_prompt],
        "grammar": _grammar(args, llm),
        "logits_processor": _ignore_eos(llm) if args.ignore_eos else None,
    }


def as_meant(text: str, args: argparse.Namespace) -> str:
    """A text of the command line, with what its escapes stand for unless --no-escape is given."""
    return unescaped(text) if args.escape else text


def read_text(path: str) -> str:
    """A text file as UTF-8, with its line ends as they are."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error


def _grammar(args: argparse.Namespace, llm: DeltaMemLlama) -> Any:
    from ..runtime.grammar import checked_grammar

    text = read_text(args.grammar_file) if args.grammar_file else args.grammar
    if args.grammar_file and not text:  # which llama.cpp takes for none
        raise InputError(f"{args.grammar_file}: is empty: name a file with a grammar, or drop --grammar-file")
    return checked_grammar(llm, text, args.grammar_file or "--grammar") if text else None


def _ignore_eos(llm: DeltaMemLlama) -> Any:
    import numpy as np
    from llama_cpp import LogitsProcessorList

    ends = [token for token in range(llm.n_vocab()) if llm._engine.slots.is_end(token)]

    def never_end(input_ids: Any, scores: Any) -> Any:
        scores[ends] = -np.inf
        return scores

    return LogitsProcessorList([never_end])


def note(text: str) -> None:
    """Prints a line to standard error, apart from the output."""
    print(text, file=sys.stderr, flush=True)
