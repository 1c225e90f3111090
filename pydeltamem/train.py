"""`deltamem train`: trains a memory on a frozen Hugging Face model, as the paper does.

Of each conversation the earlier turns are read with writes on; their text is thrown away; the last turn is answered
with only the state and a visible tail, and the next-token loss of the answer trains the memory's weights. Gradients go
through the state, over all the tokens that wrote it. The result is a published checkpoint for `deltamem convert`.

A line of the training file is a JSON object with `messages`, a list of {"role", "content"} that ends with the answer;
or with `messages` and `asks`, a list of such lists, each of which follows the same messages on its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import kinds
from .arguments import count, finite, integers, positive, positive_number, share
from .errors import InputError, ModelError, OutputError, TrainingError
from .files import replacing
from .outfile import check_target, writing

try:
    import torch
    from jinja2 import TemplateError
    from torch import Tensor
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError:
    raise InputError("deltamem train needs torch and transformers: pip install 'pydeltamem[train]'") from None

from .convert.checkpoint import CONFIG, HEADS, WEIGHTS
from .reference import DeltaMem, DeltaMemConfig, chunked_recurrence, find_attention, fused_recurrence

# The paper's write strategies: granularity and state heads.
STRATEGIES = {"tsw": ("token", 1), "ssw": ("message_mean", 1), "msw": ("token", 4)}
WARM_UP = 50  # steps
HELD_OUT = 64  # conversations, a tenth of all at most, that measure the loss and train nothing

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="HF_DIR", help="the model, which stays as it is")
    parser.add_argument("data", metavar="FILE.jsonl", help="conversations, one in a line: docs/training.md")
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

    training = parser.add_argument_group("training")
    training.add_argument(
        "--short-first", type=share, default=0.4, metavar="X",
        help="share of the steps in which longer and longer conversations come in (%(default)s; 0: all from the start)",
    )  # fmt: skip
    training.add_argument("--steps", type=positive, default=1000, metavar="N", help="steps of training (%(default)s)")
    training.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="conversations per step (%(default)s)"
    )
    training.add_argument(
        "--rate", type=positive_number, default=2e-3, metavar="X", help="highest learning rate (%(default)s)"
    )
    training.add_argument(
        "--dropout", type=share, default=0.0, metavar="P",
        help="share of the features of its input that the memory does without, other ones each time (%(default)s)",
    )  # fmt: skip
    training.add_argument(
        "--clip", type=positive_number, default=1.0, metavar="X", help="largest norm of a gradient (%(default)s)"
    )
    training.add_argument(
        "--max-tokens", type=positive, default=1024, metavar="N", help="last ones of the earlier turns (%(default)s)"
    )
    training.add_argument(
        "--tail", type=count, default=0, metavar="N", help="messages before the question left visible"
    )
    training.add_argument("--seed", type=count, default=1, help="seed of weights and batches (%(default)s)")
    training.add_argument(
        "--save-every", type=positive, default=100, metavar="N", help="steps between checkpoints (%(default)s)"
    )
    training.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name of it (%(default)s)"
    )
    training.add_argument(
        "--init", metavar="DIR", help="begin with the weights of this checkpoint, perhaps of another --strategy"
    )
    training.add_argument(
        "--init-gain", type=positive_number, default=1.0, metavar="X", help="times what that writes (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(stderr=True)
    report = Trainer(args, config_of(args), console).train()
    _print_report(report, Console())
    return 0


def config_of(args: argparse.Namespace) -> DeltaMemConfig:
    """What the options ask for. Raises InputError."""
    granularity, heads = STRATEGIES[args.strategy or "tsw"]
    corrections = tuple((args.corrections or "qo").lower())
    if not set(corrections) <= set(HEADS):
        raise InputError(f"--corrections {args.corrections}: must be letters of q, k, v, o")
    if args.init:
        given = [
            n for n in ("rank", "heads", "corrections", "layers", "alpha", "update", "heads_gain") if vars(args)[n]
        ]
        if given:
            option = given[0].replace("_", "-")
            raise InputError(f"--{option}: with --init it is that of the checkpoint: leave it out")
    return DeltaMemConfig(
        rank=args.rank or 8,
        alpha=args.alpha or 16.0,
        num_state_heads=args.heads or heads,
        memory_write_granularity=granularity,
        target_layers=tuple(args.layers or ()),
        delta_heads=corrections,
        beta_bias_init=-1.5 if args.write_bias is None else args.write_bias,
        state_update_mode=args.update or "standard",
    )


#
# conversations
#


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: what is read into the memory, and what is asked once its text is gone."""

    earlier: list[int]
    segments: list[int]  # of each of those tokens, the message that it belongs to
    asks: list[tuple[list[int], list[int], list[int]]]  # visible tail and question, their segments, answer


class Conversations:
    """The lines of a training file. They are read when they are needed: only where they begin is kept.

    Raises InputError, naming file and line.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Any, tail: int = 0, max_tokens: int = 1024):
        self.path, self.tokenizer, self.tail, self.max_tokens = Path(path), tokenizer, tail, max_tokens
        self._offsets: list[int] = []
        self.checksum = 0
        self.sizes: list[int] = []  # of the lines: about in proportion to their tokens
        try:
            with open(self.path, "rb") as file:
                offset = 0
                for line in file:
                    if line.strip():
                        self._offsets.append(offset)
                        self.sizes.append(len(line))
                    offset += len(line)
                    self.checksum = zlib.crc32(line, self.checksum)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not self._offsets:
            raise InputError(f"{self.path}: holds no conversation")
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template to write conversations with"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> Example:
        with open(self.path, "rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        try:
            record = json.loads(line)
            messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
            if "asks" in record:
                asks = [[{"role": m["role"], "content": m["content"]} for m in ask] for ask in record["asks"]]
            else:  # the question is the user's last message
                n_answer = 2 if len(messages) > 1 and messages[-2]["role"] == "user" else 1
                messages, asks = messages[:-n_answer], [messages[-n_answer:]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{self.path}: conversation {i + 1} is not as `messages` should be: {error!r}") from error
        if not messages or not asks or any(not ask or ask[-1]["role"] != "assistant" for ask in asks):
            raise InputError(
                f"{self.path}: conversation {i + 1} must have earlier messages and end with the assistant's answer"
            )
        n_earlier = max(1, len(messages) - self.tail)  # the tail is written where it is visible, and once
        ids, segments = self._segmented(messages[:n_earlier])
        return Example(
            ids[-self.max_tokens :],
            segments[-self.max_tokens :],
            [self._ask(messages[n_earlier:] + ask) for ask in asks],
        )

    def _segmented(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Tokens, and for each the message that it belongs to."""
        ids: list[int] = []
        segments: list[int] = []
        for i in range(len(messages)):
            longer = self._tokens(messages[: i + 1])
            segments += [i] * (len(longer) - len(ids))
            ids = longer
        return ids, segments[: len(ids)]

    def _ask(self, messages: Messages) -> tuple[list[int], list[int], list[int]]:
        question = self._tokens(messages[:-1], add_generation_prompt=True)
        _, segments = self._segmented(messages[:-1])
        segments += segments[-1:] * (len(question) - len(segments))
        whole = self._tokens(messages)
        if whole[: len(question)] != question:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: its chat template writes a prompt in another way than a conversation"
                " that goes on"
            )
        return question, segments[: len(question)], whole[len(question) :]

    def _tokens(self, messages: Messages, **options: Any) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: its chat template refuses a conversation: {error}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Batch:
    """Examples side by side. Earlier turns and answers are filled up behind, questions before; that writes nothing."""

    earlier: Tensor  # [B, T]
    segments: Tensor  # [B, T], -1: filler
    owner: Tensor  # [A]: the example that each question belongs to
    question: Tensor  # [A, Q]
    question_segments: Tensor  # [A, Q], -1: filler
    answer: Tensor  # [A, N]
    answer_mask: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: str) -> Batch:
        asks = [(i, *ask) for i, example in enumerate(examples) for ask in example.asks]

        def fill(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
            longest = max(map(len, rows))
            space = [[value] * (longest - len(row)) for row in rows]
            return torch.tensor([s + r if left else r + s for r, s in zip(rows, space)], device=device)

        _, questions, of_questions, answers = zip(*asks)
        return cls(
            fill([example.earlier for example in examples], 0),
            fill([example.segments for example in examples], -1),
            torch.tensor([ask[0] for ask in asks], device=device),
            fill(questions, 0, left=True),
            fill(of_questions, -1, left=True),
            fill(answers, 0),
            fill([[1] * len(row) for row in answers], 0).bool(),
        )


#
# training
#


def answer_logits(model: Any, memory: DeltaMem, batch: Batch) -> Tensor:
    """Logits of each token of the answers, [A, N, vocab], with the earlier turns in the memory only."""
    memory.reset()
    with memory.segments(batch.segments):
        model(batch.earlier, use_cache=False, logits_to_keep=1)
    # one state for all if nothing was written
    memory.state = memory.state.expand(-1, len(batch.earlier), *memory.state.shape[2:])[:, batch.owner]

    # the question is an ingest of its own, and so is each token of the answer; what fillers write nobody reads
    mask = batch.question_segments >= 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with memory.segments(batch.question_segments):
        asked = model(
            batch.question, attention_mask=mask.long(), position_ids=positions, use_cache=True, logits_to_keep=1
        )
    whole = torch.cat([mask, batch.answer_mask], 1)[:, :-1]
    n_read = batch.answer.shape[1] - 1
    if n_read == 0:
        return asked.logits[:, -1:]
    behind = positions[:, -1:] + 1 + torch.arange(n_read, device=positions.device)
    answered = model(
        batch.answer[:, :-1],
        attention_mask=whole.long(),
        position_ids=behind,
        past_key_values=asked.past_key_values,
    )
    return torch.cat([asked.logits[:, -1:], answered.logits], 1)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.answer.flatten(), reduction="none")
    return (losses * batch.answer_mask.flatten()).sum() / batch.answer_mask.sum()


@dataclass
class Report:
    """What a training run came to."""

    out: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    held_out: int  # conversations that trained nothing
    loss: float  # on those
    loss_without: float  # the same with an empty memory
    right: float  # share of their answers whose every token is the most likely one
    right_without: float
    curve: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """One run of `deltamem train`; goes on from `checkpoint.pt` in the output directory if there is one."""

    def __init__(self, args: argparse.Namespace, config: DeltaMemConfig, console: Any):
        self.args, self.console = args, console
        self.out = Path(args.out)
        if not Path(args.model, "config.json").is_file():
            raise ModelError(f"{args.model}: is no Hugging Face model directory: it has no config.json")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{args.out}: cannot be written: {error.strerror}") from error
        for name, kind in ((WEIGHTS[0], kinds.PYTORCH), (CONFIG, kinds.CONFIG), ("loss.png", kinds.PNG)):
            check_target(self.out / name, kind)
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            self.model = AutoModelForCausalLM.from_pretrained(args.model).to(args.device)
        except (OSError, ValueError) as error:
            raise ModelError(f"{args.model}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self.model.eval().requires_grad_(False)
        self.data = Conversations(args.data, tokenizer, args.tail, args.max_tokens)
        self.n_held_out = min(HELD_OUT, len(self.data) // 10)
        self.by_size = sorted(range(self.n_held_out, len(self.data)), key=self.data.sizes.__getitem__)

        torch.manual_seed(args.seed)
        # token by token is several times faster where a small operation costs no launch
        form = fused_recurrence if args.device == "cpu" else chunked_recurrence
        if args.init:
            self.memory = DeltaMem.from_checkpoint(self.model, args.init, recurrence=form)
            self._change(config)
        else:
            self.memory = DeltaMem(self.model, config, recurrence=form)
            if args.heads_gain:
                start_from_heads(self.memory, self.model, args.heads_gain)
        for layer in self.memory.memories:
            layer.dropout = args.dropout
        self.memory.to(args.device)
        self.parameters = [p for p in self.memory.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.tokens, self.seconds, self.curve = 0, 0, 0.0, []
        self.mean: float | None = None  # of the loss
        self._resume()

    def train(self) -> Report:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        args = self.args
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            name = args.strategy or "memory"
            bar = progress.add_task(name, total=args.steps, completed=self.step)
            while self.step < args.steps:
                begun = time.monotonic()
                loss = self._update()
                self.seconds += time.monotonic() - begun
                self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
                if not math.isfinite(loss):
                    raise TrainingError(f"step {self.step}: the loss is {loss}: lower --rate or --clip and run again")
                if self.step % 10 == 0:
                    self.curve.append((self.step, self.mean))
                progress.update(bar, advance=1, description=f"{name}, loss {self.mean:.3f}")
                if self.step % args.save_every == 0 or self.step == args.steps:
                    self._save()
        self._plot()
        return self._report()

    def _update(self) -> float:
        args = self.args
        share = min((self.step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * self.step / args.steps)) + 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = args.rate * min(share, 1.0)
        examples = [self.data[i] for i in self._draw()]
        batch = Batch.of(examples, args.device)
        self.memory.train()
        loss = answer_loss(answer_logits(self.model, self.memory, batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(example.earlier) for example in examples)
        return loss.item()

    def _draw(self) -> list[int]:
        """A batch of conversations of similar length, so that few of its tokens are fillers. The short ones come first:
        where little is said, what is remembered of it shows in the answer."""
        draw, n = random.Random(self.args.seed * 1_000_003 + self.step), self.args.batch
        share = min(1.0, 0.1 + 0.9 * self.step / max(self.args.short_first * self.args.steps, 1e-9))
        longest = min(len(self.by_size), max(n, round(share * len(self.by_size))))
        candidates = sorted(draw.randrange(longest) for _ in range(4 * n))
        begin = draw.randrange(4) * n
        return [self.by_size[i] for i in candidates[begin : begin + n]]

    def _save(self) -> None:
        self.memory.save_checkpoint(self.out)
        saved = {
            "run": self._identity(), "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "curve": self.curve, "mean": self.mean, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
            "memory": self.memory.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        try:
            with replacing(self.out / "checkpoint.pt", kinds.PYTORCH) as temporary:
                torch.save(saved, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk by a RuntimeError
            raise OutputError(f"{self.out / 'checkpoint.pt'}: cannot be written: {error}") from error

    def _identity(self) -> dict[str, Any]:
        """What makes this run another one than any other; a longer one is the same."""
        options = ("batch", "rate", "clip", "dropout", "short_first", "max_tokens", "tail", "seed")
        options += ("init", "init_gain", "heads_gain", "write_bias")
        embedded = self.model.get_input_embeddings().weight.detach().cpu().contiguous()
        return {
            **{
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.memory.config).items()
            },
            **{f"--{name.replace('_', '-')}": getattr(self.args, name) for name in options},
            "the conversations": self.data.checksum,
            "the model": zlib.crc32(embedded.view(torch.uint8).numpy()),
        }

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            now = self._identity()
            differs = [name for name in now if saved["run"].get(name) != now[name]]
            if differs:
                raise InputError(f"{path}: is of another run, {differs[0]} differs: delete it or name another --out")
            self.memory.load_state_dict(saved["memory"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]
            self.curve, self.mean = [tuple(point) for point in saved["curve"]], saved["mean"]
            torch.set_rng_state(saved["random"])
            if len(saved["random_cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["random_cuda"])
        except InputError:
            raise
        except Exception as error:  # torch reports a damaged file by whatever its readers raise
            raise InputError(f"{path}: cannot be read: delete it or name another --out") from error
        self.console.print(f"{path}: goes on from step {self.step}")

    @torch.no_grad()
    def _change(self, config: DeltaMemConfig) -> None:
        """What the options change of the checkpoint that the run begins with. A message's mean has of each token a part
        only: it is written stronger."""
        args, of_checkpoint = self.args, self.memory.config
        if args.strategy:
            has, wanted = of_checkpoint.num_state_heads, config.num_state_heads
            if has != wanted:
                raise InputError(f"--init {args.init}: has {has} state heads, --strategy {args.strategy} has {wanted}")
            granularity = config.memory_write_granularity
            self.memory.config = replace(of_checkpoint, memory_write_granularity=granularity)
        for parameters in self.memory.memories:
            parameters.memory_v_proj *= args.init_gain
            if args.write_bias is not None:
                parameters.beta_bias.fill_(args.write_bias)

    @torch.no_grad()
    def _held_out(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        self.memory.eval()
        for begin in range(0, self.n_held_out, self.args.batch):
            rows = [self.data[i] for i in range(begin, min(begin + self.args.batch, self.n_held_out))]
            batch = Batch.of(rows, self.args.device)
            read = answer_logits(self.model, self.memory, batch)
            batch_without = Batch(**{**vars(batch), "segments": torch.full_like(batch.segments, -1)})
            yield batch, read, answer_logits(self.model, self.memory, batch_without)

    def _report(self) -> Report:
        sums, count = [0.0] * 4, 0
        for batch, *both in self._held_out():
            n = len(batch.owner)
            count += n
            for i, logits in enumerate(both):
                sums[i] += n * answer_loss(logits, batch).item()
                sums[2 + i] += ((logits.argmax(-1) == batch.answer) | ~batch.answer_mask).all(1).sum().item()
        loss, loss_without, right, right_without = (x / max(count, 1) for x in sums)
        return Report(
            os.fspath(self.out), sum(p.numel() for p in self.parameters), self.step, self.tokens, self.seconds,
            self.n_held_out, loss, loss_without, right, right_without, self.curve,
        )  # fmt: skip

    def _plot(self) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.console.print("no picture of the loss: pip install matplotlib")
            return
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss of the answers")
        axes.plot(*zip(*self.curve)) if self.curve else None
        axes.grid(alpha=0.3)
        with writing(self.out / "loss.png", kinds.PNG) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _print_report(report: Report, console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_row("checkpoint", report.out)
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("steps, tokens read", f"{report.steps:,}, {report.tokens:,}")
    table.add_row(
        "time", f"{report.seconds / 60:.1f} minutes, {report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    )
    if report.held_out:
        table.add_row(
            f"{report.held_out} held out: loss",
            f"{report.loss:.4f} with the memory, {report.loss_without:.4f} with an empty one",
        )
        table.add_row("answers right", f"{report.right:.1%} with, {report.right_without:.1%} without")
    else:
        table.add_row("held out", "none of fewer than 10 conversations")
    console.print(table)
    sys.stdout.flush()


#
# initial weights
#


@torch.no_grad()
def start_from_heads(memory: DeltaMem, model: Any, gain: float = 1.0) -> None:
    """Initial weights by which the memory reads and writes as the model's own copying heads do.

    A head's value and output weights make one matrix, which maps what stands at a token to what attending to it adds;
    its query and key weights make another, by which it matches (Elhage et al., A mathematical framework for transformer
    circuits, 2021; without rotary positions and norms). In each layer the half of the heads is taken whose first
    matrix best maps tokens to themselves. The memory's heads get the leading singular directions of both.
    """
    text = model.config.get_text_config()
    embedded = model.get_input_embeddings().weight.float()
    embedded = embedded / embedded.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    attentions = find_attention(model)
    n_head, n_kv = text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads
    rank, scale = memory.config.rank, memory.config.alpha / memory.config.rank
    for layer, parameters in zip(memory.layers, memory.memories):
        weight = {head: attentions[layer].weight(head).float() for head in HEADS}
        size = weight["q"].shape[0] // n_head
        found = []
        for i in range(n_head):
            q, kv = (slice(j * size, (j + 1) * size) for j in (i, i // (n_head // n_kv)))
            copy = weight["o"][:, q] @ weight["v"][kv]
            added = embedded @ copy.T
            itself = (added * embedded).sum(-1).mean() - added.mean(0) @ embedded.mean(0)
            found.append((itself.item(), copy, weight["q"][q].T @ weight["k"][kv]))
        found.sort(key=lambda head: -head[0])
        best = found[: max(n_head // 2, 1)]
        decomposed = [(torch.linalg.svd(copy), torch.linalg.svd(match)) for _, copy, match in best]
        for i in range(memory.config.num_state_heads):
            (out, strength, into), (asked, alike, kept) = decomposed[i % len(decomposed)]
            begin = i // len(decomposed) * rank
            some = slice(begin, min(begin + rank, size))
            rows = slice(i * rank, i * rank + some.stop - some.start)
            root, level = strength[some, None].sqrt(), (alike[some, None] / alike[0]).sqrt()
            parameters.memory_v_proj[rows] = root * into[some]
            parameters.memory_k_proj[rows] = level * kept[some]
            parameters.memory_q_proj[rows] = level * asked.T[some]
            if "o" in memory.config.delta_heads:
                parameters.delta_o_proj[:, rows] = gain / scale * (root * out.T[some]).T
