"""`deltamem generate`: decodes a prompt and streams what follows."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from typing import TYPE_CHECKING

from ..errors import InputError
from .model_options import (
    add_memory_arguments,
    add_model_arguments,
    add_sampling_arguments,
    as_meant,
    load,
    memory_attached,
    memory_saved,
    note,
    read_text,
    sampling,
    tell_of_context,
)
from .parser import text

if TYPE_CHECKING:
    from ..llama import DeltaMemLlama


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_argument_group("prompt").add_mutually_exclusive_group()
    prompt.add_argument(
        "-p", "--prompt", type=text, metavar="TEXT", help="prompt; without -p and -f it is read from standard input"
    )
    prompt.add_argument("-f", "--file", metavar="FILE", help="file with the prompt, less the end of its last line")
    add_model_arguments(parser)
    add_memory_arguments(parser)
    add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--no-display-prompt", action="store_true", help="print only what is generated")
    output.add_argument("--no-perf", action="store_true", help="print no timings at the end")


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    llm = load(args)
    options = sampling(args, llm)
    n_predict, temperature = options.pop("n_predict"), options.pop("temp")
    tokens = llm.tokenize(prompt.encode("utf-8"), add_bos=llm._model.add_bos_token(), special=True)
    if not tokens:
        raise InputError("the prompt is empty: give some text with -p, -f or standard input")
    if len(tokens) >= llm.n_ctx():
        raise InputError(
            f"the prompt has {len(tokens)} tokens, the context holds {llm.n_ctx()}: raise --ctx-size or shorten it"
        )

    from ..runtime.completion import Completion
    from ..runtime.interrupt import interruptible

    tell_of_context(args, llm)
    if not llm.memory.attached and not args.no_memory:
        note(memory_attached(llm, args))
    out = sys.stdout
    with warnings.catch_warnings(record=True) as told:  # Python would print the place in the code, too
        completion = Completion(llm, tokens, max_tokens=n_predict, temperature=temperature, errors="replace", **options)
    for warning in told:
        note(f"[{warning.message}]")
    with memory_saved(llm.memory, args.save_memory):
        try:
            if not args.no_display_prompt:
                out.write(prompt)
                out.flush()
            for piece in interruptible(piece for piece, _ in completion.pieces()):
                out.write(piece)
                out.flush()
        except KeyboardInterrupt:
            note("")
            raise
        else:
            out.write("\n")
            out.flush()
            if completion.finish_reason == "length" and len(completion.generated) != n_predict:
                note(f"[the context of {llm.n_ctx()} tokens is full: the text was cut; raise --ctx-size]")
        finally:
            if not args.no_perf:
                _print_timings(llm, len(tokens), len(completion.generated))
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return as_meant(args.prompt, args)
    if args.file is not None:
        return _without_last_line_end(read_text(args.file))
    if sys.stdin.isatty():
        raise InputError("no prompt: give one with -p TEXT or -f FILE, or pipe it in")
    try:
        return _without_last_line_end(sys.stdin.buffer.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text") from error


def _without_last_line_end(text: str) -> str:
    """A prompt as llama.cpp takes it from a file: an editor, or echo, has ended its last line."""
    return re.sub(r"\r?\n\Z", "", text)


def _print_timings(llm: DeltaMemLlama, n_prompt: int, n_generated: int) -> None:
    from llama_cpp import llama_perf_context

    perf = llama_perf_context(llm.ctx)
    parts = []
    if perf.t_p_eval_ms > 0:
        parts.append(f"prompt: {n_prompt} tokens, {1000 * perf.n_p_eval / perf.t_p_eval_ms:.1f} tokens/s")
    if perf.t_eval_ms > 0:
        parts.append(f"generated: {n_generated} tokens, {1000 * perf.n_eval / perf.t_eval_ms:.1f} tokens/s")
    if parts:
        note("; ".join(parts))
