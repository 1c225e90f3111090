"""The command `deltamem train`: its options, and the table at its end."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from ..train.model import DTYPES
from ..train.options import SCHEDULES, STRATEGIES, Options
from ..train.report import Report
from ..train.trainer import Trainer
from .parser import count, finite, integers, positive, positive_number, share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    import torch

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the model, which stays as it is: a GGUF, its name (deltamem pull), or a Hugging Face directory",
    )
    parser.add_argument("data", metavar="FILE.jsonl", help="conversations, one in a line: docs/how-to/train.md")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="checkpoint directory to write")

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--strategy", choices=tuple(STRATEGIES),
        help="every token writes (tsw), the mean of a message (ssw), every token to several heads (msw); tsw, or that"
        " of --init",
    )  # fmt: skip
    memory.add_argument("--rank", type=positive, metavar="R", help="rank of the state (8)")
    memory.add_argument("--heads", type=positive, metavar="H", help="state heads (1; 4 for msw)")
    memory.add_argument("--corrections", metavar="QKVO", help="projections that are corrected (qo)")
    memory.add_argument("--layers", type=integers, metavar="N,...", help="layers with memory (all)")
    memory.add_argument("--alpha", type=positive_number, metavar="X", help="scale of a correction: alpha / rank (16)")
    memory.add_argument(
        "--write-bias", type=finite, metavar="X",
        help="initial bias of the write gate; lower: the memory starts out forgetting less (-1.5, or that of --init)",
    )  # fmt: skip

    memory.add_argument(
        "--update", choices=("standard", "lambda_outside", "no_lambda"),
        help="what a write does to the rest of the state; no_lambda: nothing (standard)",
    )  # fmt: skip

    memory.add_argument(
        "--heads-gain", type=positive_number, metavar="X",
        help="begin as the model's own copying heads, X times as strong (without it: with no correction at all)",
    )  # fmt: skip

    memory.add_argument(
        "--start", choices=("zero", "random", "base_slice", "base_slice_fixed"),
        help="initial corrections without --heads-gain; the publication: base_slice_fixed (zero)",
    )  # fmt: skip

    training = parser.add_argument_group("training")
    training.add_argument(
        "--dtype", choices=DTYPES, default=Options.dtype,
        help="of the frozen model; auto: bfloat16 of a GGUF where the processor multiplies it (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--form", choices=("auto", "packed", "padded"), default=Options.form,
        help="of a step: conversations end to end, or side by side by the model's own modules (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--short-first", type=share, default=Options.short_first, metavar="X",
        help="share of the steps in which longer and longer conversations come in (%(default)s; 0: all from the start)",
    )  # fmt: skip
    training.add_argument(
        "--steps", type=positive, default=Options.steps, metavar="N", help="steps of training (%(default)s)"
    )
    training.add_argument(
        "--batch", type=positive, default=Options.batch, metavar="N", help="conversations per step (%(default)s)"
    )
    training.add_argument(
        "--rate", type=positive_number, default=Options.rate, metavar="X", help="highest learning rate (%(default)s)"
    )
    training.add_argument("--warm-up", type=positive, default=Options.warm_up, metavar="N", help="steps (%(default)s)")
    training.add_argument(
        "--schedule", choices=tuple(SCHEDULES), default=Options.schedule, help="of the rate after that (%(default)s)"
    )
    training.add_argument(
        "--gate-weight", type=positive_number, metavar="X",
        help="weight of (mean write gate - --gate-mean)² in the loss; the publication: 0.01 (without it: none)",
    )  # fmt: skip
    training.add_argument("--gate-mean", type=finite, default=Options.gate_mean, metavar="X", help="(%(default)s)")
    training.add_argument(
        "--visible", type=share, default=Options.visible, metavar="P",
        help="share of the conversations whose text stays before the questions (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--wording", type=positive_number, default=Options.wording, metavar="X",
        help="weight of an answer's tokens that were not told, or that its question shows; others: 1 (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--teacher", choices=("context",),
        help="learn what the frozen model says with the text before it, instead of or beside the answers of the file",
    )  # fmt: skip
    training.add_argument(
        "--teacher-share", type=positive_number, default=Options.teacher_share, metavar="X",
        help="of the loss that is the teacher's; 1: all of it (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--dropout", type=share, default=Options.dropout, metavar="P",
        help="share of the features of its input that the memory does without, other ones each time (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--clip",
        type=positive_number,
        default=Options.clip,
        metavar="X",
        help="largest norm of a gradient (%(default)s)",
    )
    training.add_argument(
        "--max-tokens",
        type=positive,
        default=Options.max_tokens,
        metavar="N",
        help="last ones of the earlier turns (%(default)s)",
    )
    training.add_argument(
        "--tail", type=count, default=Options.tail, metavar="N", help="messages before the question left visible"
    )
    training.add_argument("--seed", type=count, default=Options.seed, help="seed of weights and batches (%(default)s)")
    training.add_argument(
        "--save-every",
        type=positive,
        default=Options.save_every,
        metavar="N",
        help="steps between checkpoints (%(default)s)",
    )
    training.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name of it (%(default)s)"
    )
    training.add_argument(
        "--eval-every", type=positive, metavar="N",
        help="steps between answers of the native runtime to held-out questions, logged in log.jsonl (never)",
    )  # fmt: skip
    training.add_argument(
        "--eval-questions",
        type=positive,
        default=Options.eval_questions,
        metavar="N",
        help="questions of those (%(default)s)",
    )
    training.add_argument("--base", metavar="FILE", help="the model as GGUF, for --eval-every (MODEL, if that is one)")
    training.add_argument(
        "--init", metavar="DIR", help="begin with the weights of this checkpoint, perhaps of another --strategy"
    )
    training.add_argument(
        "--init-gain",
        type=positive_number,
        default=Options.init_gain,
        metavar="X",
        help="times what that writes (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    report = Trainer(options, console).train()
    print_report(report, Console())
    return 0


def print_report(report: Report, console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_row("checkpoint", report.out)
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("steps, tokens read", f"{report.steps:,}, {report.tokens:,}")
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
        table.add_row("held out", "none of fewer than 10 conversations")
    console.print(table)
    sys.stdout.flush()
