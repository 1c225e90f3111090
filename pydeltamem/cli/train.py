"""The command `deltamem train`: its options, and the table at its end."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..formats.ending import ending_in_order
from ..train.options import DTYPES, SCHEDULES, STRATEGIES, Options
from .parser import count, finite, integers, positive, positive_number, probability, share

if TYPE_CHECKING:
    from ..train import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the model, which stays frozen: a GGUF, its name (deltamem pull), or a Hugging Face directory",
    )
    parser.add_argument("data", metavar="FILE.jsonl", help="conversations, one per line: docs/how-to/train.md")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory for the PyTorch checkpoint")

    _add_adapter(parser.add_argument_group("adapter"))
    _add_conversations(parser.add_argument_group("conversations"))
    _add_loss(parser.add_argument_group("loss"))
    _add_steps(parser.add_argument_group("steps"))
    _add_running(parser.add_argument_group("computing and saving"))


def _add_adapter(adapter: argparse._ArgumentGroup) -> None:
    adapter.add_argument(
        "--strategy", choices=tuple(STRATEGIES),
        help="what writes: every token (tsw), the mean of a message (ssw), every token to several heads (msw); default:"
        " tsw, or that of --init",
    )  # fmt: skip
    adapter.add_argument(
        "--defer", action="store_true",
        help="a turn, a message with its reply, reads what the turns before it wrote, and nothing of itself",
    )  # fmt: skip
    adapter.add_argument("--rank", type=positive, metavar="R", help="rank of the state (8)")
    adapter.add_argument("--heads", type=positive, metavar="H", help="state heads (1; 4 for msw)")
    adapter.add_argument("--corrections", metavar="QKVO", help="projections to correct (qo)")
    adapter.add_argument("--layers", type=integers, metavar="N,...", help="layers with memory (all)")
    adapter.add_argument("--alpha", type=positive_number, metavar="X", help="scale of a correction: alpha / rank (16)")
    adapter.add_argument(
        "--write-bias", type=finite, metavar="X",
        help="initial bias of the write gate; lower: writes replace less at first (-1.5, or that of --init)",
    )  # fmt: skip
    adapter.add_argument(
        "--update", choices=("standard", "lambda_outside", "no_lambda"),
        help="what a write does to the rest of the state; no_lambda: nothing (standard)",
    )  # fmt: skip
    adapter.add_argument(
        "--heads-gain", type=positive_number, metavar="X",
        help="start from the model's own copying heads, X times as strong (without it: from no correction)",
    )  # fmt: skip
    adapter.add_argument(
        "--start", choices=("zero", "random", "base_slice", "base_slice_fixed"),
        help="initial corrections without --heads-gain; the publication: base_slice_fixed (zero)",
    )  # fmt: skip
    adapter.add_argument(
        "--init", metavar="DIR", help="start from the weights of this PyTorch checkpoint, perhaps of another --strategy"
    )
    adapter.add_argument(
        "--init-gain",
        type=positive_number,
        default=Options.init_gain,
        metavar="X",
        help="factor on what the adapter of --init writes (%(default)s)",
    )


def _add_conversations(conversations: argparse._ArgumentGroup) -> None:
    conversations.add_argument(
        "--visible", type=share, default=Options.visible, metavar="P",
        help="share of the conversations whose text stays before the questions (%(default)s)",
    )  # fmt: skip
    conversations.add_argument(
        "--tail",
        type=count,
        default=Options.tail,
        metavar="N",
        help="messages before the question whose text stays (%(default)s)",
    )
    conversations.add_argument(
        "--max-tokens",
        type=positive,
        default=Options.max_tokens,
        metavar="N",
        help="decode only the last N tokens of the earlier turns (%(default)s)",
    )
    conversations.add_argument(
        "--ask-writes", type=probability, default=Options.ask_writes, metavar="P",
        help="share of the conversations whose questions and answers write, too (%(default)s)",
    )  # fmt: skip
    conversations.add_argument(
        "--rehearse", type=probability, default=Options.rehearse, metavar="P",
        help="share of the conversations that are rehearsed, so written twice, before their text goes (%(default)s)",
    )  # fmt: skip
    conversations.add_argument(
        "--by-turn", type=probability, default=Options.by_turn, metavar="P",
        help="for deferred writes: share of the conversations each of whose turns reads the turns before it, as in a"
        " chat; the others are read as one turn (%(default)s)",
    )  # fmt: skip
    conversations.add_argument(
        "--short-first", type=share, default=Options.short_first, metavar="X",
        help="share of the steps in which longer conversations are added gradually (%(default)s; 0: none)",
    )  # fmt: skip


def _add_loss(loss: argparse._ArgumentGroup) -> None:
    loss.add_argument(
        "--wording", type=positive_number, default=Options.wording, metavar="X",
        help="weight of answer tokens that were not told, or that the question shows; others: 1 (%(default)s)",
    )  # fmt: skip
    loss.add_argument(
        "--first-told", type=positive_number, default=Options.first_told, metavar="X",
        help="weight of the first token of what was told, which decides a greedy answer (%(default)s)",
    )  # fmt: skip
    loss.add_argument(
        "--teacher", choices=("context",),
        help="learn what the frozen model answers when it sees the text, instead of or besides the answers of the file",
    )  # fmt: skip
    loss.add_argument(
        "--teacher-share", type=positive_number, default=Options.teacher_share, metavar="X",
        help="share of the loss that comes from the teacher; 1: all of it (%(default)s)",
    )  # fmt: skip
    loss.add_argument(
        "--gate-weight", type=positive_number, metavar="X",
        help="weight of (mean write gate - --gate-mean)² in the loss; the publication: 0.01 (without it: none)",
    )  # fmt: skip
    loss.add_argument(
        "--gate-mean", type=finite, default=Options.gate_mean, metavar="X", help="see --gate-weight (%(default)s)"
    )


def _add_steps(steps: argparse._ArgumentGroup) -> None:
    steps.add_argument(
        "--steps", type=positive, default=Options.steps, metavar="N", help="steps of training (%(default)s)"
    )
    steps.add_argument(
        "--batch", type=positive, default=Options.batch, metavar="N", help="conversations per step (%(default)s)"
    )
    steps.add_argument(
        "--micro-batch", type=positive, metavar="N",
        help="compute a step's conversations N at a time, in less memory, to the same gradient (all at once)",
    )  # fmt: skip
    steps.add_argument(
        "--rate", type=positive_number, default=Options.rate, metavar="X", help="highest learning rate (%(default)s)"
    )
    steps.add_argument(
        "--warm-up",
        type=positive,
        default=Options.warm_up,
        metavar="N",
        help="steps in which the rate rises (%(default)s)",
    )
    steps.add_argument(
        "--schedule",
        choices=tuple(SCHEDULES),
        default=Options.schedule,
        help="schedule of the rate after the warm-up (%(default)s)",
    )
    steps.add_argument(
        "--clip",
        type=positive_number,
        default=Options.clip,
        metavar="X",
        help="largest norm of a gradient (%(default)s)",
    )
    steps.add_argument(
        "--dropout", type=share, default=Options.dropout, metavar="P",
        help="share of the adapter's input features to drop, others each time (%(default)s)",
    )  # fmt: skip
    steps.add_argument(
        "--average", type=share, metavar="D",
        help="save the moving average of the weights, of which D stays at each step (the last weights)",
    )  # fmt: skip
    steps.add_argument(
        "--seed", type=count, default=Options.seed, metavar="N", help="seed of weights and batches (%(default)s)"
    )


def _add_running(running: argparse._ArgumentGroup) -> None:
    running.add_argument(
        "--dtype", choices=DTYPES, default=Options.dtype,
        help="type of the frozen weights; auto: bfloat16 for a GGUF if the processor multiplies it (%(default)s)",
    )  # fmt: skip
    running.add_argument(
        "--form", choices=("auto", "packed", "padded"), default=Options.form,
        help="how to compute a step: conversations end to end, or padded, by the model's own modules (%(default)s)",
    )  # fmt: skip
    running.add_argument(
        "--device", metavar="DEVICE", help="device, as PyTorch names it (cuda, if PyTorch has one; else cpu)"
    )
    running.add_argument(
        "--save-every",
        type=positive,
        default=Options.save_every,
        metavar="N",
        help="steps between saves (%(default)s)",
    )
    running.add_argument(
        "--eval-every", type=positive, metavar="N",
        help="every N steps, have the native runtime answer held-out questions and log it in log.jsonl (never)",
    )  # fmt: skip
    running.add_argument(
        "--eval-questions",
        type=positive,
        default=Options.eval_questions,
        metavar="N",
        help="held-out questions each time (%(default)s)",
    )
    running.add_argument("--base", metavar="FILE", help="the model as GGUF, for --eval-every (MODEL, if that is one)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..train import Trainer  # which loads torch: not before the options are right

    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    with ending_in_order():
        report = Trainer(options, console).train()
    print_report(report, Console())
    return 0


def print_report(report: Report, console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_row("PyTorch checkpoint", report.out)
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("steps, tokens decoded", f"{report.steps:,}, {report.tokens:,}")
    table.add_row(
        "time", f"{report.seconds / 60:.1f} minutes, {report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    )
    held_out = report.held_out
    if held_out.n:
        table.add_row(
            f"{held_out.n} held out: loss",
            f"{held_out.loss:.4f} with the memory, {held_out.loss_without:.4f} with an empty one",
        )
        table.add_row("answers right", f"{held_out.right:.1%} with, {held_out.right_without:.1%} without")
    else:
        table.add_row("held out", "none of fewer than 10 conversations, nor of answers that stay")
    console.print(table)
    sys.stdout.flush()
