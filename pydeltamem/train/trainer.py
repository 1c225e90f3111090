"""One run of `deltamem train`: batches, loss, checkpoints to go on from, and what it came to."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, OutputError, TrainingError
from ..formats import kinds
from ..formats.atomic import replacing
from ..formats.checkpoint import CONFIG, WEIGHTS
from ..formats.outputs import check_target, make_folder, writing
from ..hub import is_name, model_file
from .conversations import Conversations, Example
from .heads import start_from_heads
from .model import load_frozen
from .packed import PackedBatch, PackedModel
from .padded import Batch, answer_logits
from .recall import NativeRecall
from .reference import DeltaMem, DeltaMemConfig, chunked_recurrence, fused_recurrence

HELD_OUT = 64  # conversations, a tenth of all at most, that measure the loss and train nothing
TEACHER_ANSWER = 48  # tokens that a teacher writes at most

# Share of the rate by the share of the steps that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)) + 0.02,
    "linear": lambda done: 1.02 - done,
    "constant": lambda done: 1.0,
}


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
        make_folder(self.out)
        for name, kind in ((WEIGHTS[0], kinds.PYTORCH), (CONFIG, kinds.CONFIG), ("loss.png", kinds.PNG)):
            check_target(self.out / name, kind)
        named = model_file(args.model) if is_name(args.model) else args.model
        self.model, self.tokenizer = load_frozen(named, args.dtype, args.device)
        self.data = Conversations(args.data, self.tokenizer, args.tail, args.max_tokens, bool(args.teacher))
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
        self.packed = self._packed()
        self.parameters = [p for p in self.memory.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.tokens, self.seconds, self.curve = 0, 0, 0.0, []
        self.mean: float | None = None  # of the loss
        self._resume()
        self.recall: NativeRecall | None = None
        if args.eval_every:
            held_out = [self.data[i] for i in range(self.n_held_out)]
            self.recall = NativeRecall(model_file(args.base or named), held_out, args.eval_questions)

    def _packed(self) -> PackedModel | None:
        """The fast form of a step, if model and memory have one. Raises InputError if an option needs it in vain."""
        args = self.args
        reason = PackedModel.refusal(self.model, self.memory)
        if reason is None and args.dropout:
            reason = "--dropout is for the padded form"
        if reason is None and args.form != "padded":
            return PackedModel(self.model, self.memory)
        for option, given in (
            ("--form packed", args.form == "packed"), ("--visible", args.visible), ("--teacher", args.teacher),
            ("--gate-weight", args.gate_weight),
        ):  # fmt: skip
            if given:
                raise InputError(f"{option}: needs the packed form of a step: {reason or '--form is padded'}")
        return None

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
                last = self.step == args.steps
                measured = self.recall is not None and (last or self.step % args.eval_every == 0)
                if last or measured or self.step % args.save_every == 0:
                    self._save()
                if measured:
                    self._measure(self.recall)
        self._plot()
        return self._report()

    def _update(self) -> float:
        args = self.args
        done = self.step / args.steps
        share = min((self.step + 1) / args.warm_up, SCHEDULES[args.schedule](done))
        for group in self.optimizer.param_groups:
            group["lr"] = args.rate * min(share, 1.0)
        draw = random.Random(args.seed * 1_000_003 + self.step)
        examples = [self.data[i] for i in self._draw(draw)]
        if args.visible:
            examples = [replace(example, visible=draw.random() < args.visible) for example in examples]
        self.memory.train()
        loss = self._loss(examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(example.earlier) for example in examples)
        return loss.item()

    def _loss(self, examples: list[Example]) -> Tensor:
        """The mean over the answers' tokens, with what the options add to it."""
        args = self.args
        if not args.teacher:
            logits, targets = self._student(examples)
            each = F.cross_entropy(logits, targets, reduction="none")
            weights = torch.tensor(told_weights(examples, args.wording), device=each.device)
            loss = (each * weights).sum() / weights.sum()
        else:
            examples = self._answered(examples)
            logits, targets = self._student(examples)
            taught = self._teacher(examples).log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), taught, reduction="batchmean", log_target=True)
            if args.teacher_share < 1:
                loss = args.teacher_share * loss + (1 - args.teacher_share) * F.cross_entropy(logits, targets)
        if args.gate_weight and self.packed:
            means = torch.stack(self.packed.gate_means)
            loss = loss + args.gate_weight * (means - args.gate_mean).pow(2).mean()
        return loss

    def _student(self, examples: Sequence[Example], empty: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [K, vocab], float32, of the answers' tokens, and those [K]. empty: no earlier turn was written."""
        if self.packed:
            packed = PackedBatch.of(examples, self.args.device)
            for begin, end, parent in zip(packed.runs.begin, packed.runs.end, packed.runs.parent):
                if empty and parent < 0:  # earlier turns
                    packed.writes[begin:end] = False
            return self.packed.logits(packed).float(), packed.targets
        batch = Batch.of(examples, self.args.device)
        if empty:
            batch = Batch(**{**vars(batch), "segments": torch.full_like(batch.segments, -1)})
        return answer_logits(self.model, self.memory, batch)[batch.answer_mask].float(), batch.answer[batch.answer_mask]

    @torch.no_grad()
    def _teacher(self, examples: Sequence[Example]) -> Tensor:
        """Logits [K, vocab] of the frozen model with the text before it."""
        if self.packed is None:
            raise InputError("--teacher: needs the packed form of a step")
        return self.packed.logits(PackedBatch.of(examples, self.args.device, memory=False), memory=False).float()

    @torch.no_grad()
    def _answered(self, examples: Sequence[Example]) -> list[Example]:
        """The same, with the teacher's greedy answers where the file has none."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id])
        answered = []
        for example in examples:
            asks = list(example.asks)
            for i, (question, segments, answer) in enumerate(asks):
                if answer:
                    continue
                given: list[int] = []
                while len(given) < TEACHER_ANSWER and not (given and given[-1] in ends):
                    # one more token than there is, whose logits nobody asks for
                    alone = replace(example, asks=[(question, segments, [*given, 0])], continued=[example.continued[i]])
                    given.append(int(self._teacher([alone])[-1].argmax()))
                asks[i] = (question, segments, given)
            answered.append(replace(example, asks=asks))
        return answered

    def _draw(self, draw: random.Random) -> list[int]:
        """A batch of conversations. The short ones come first: where little is said, what is remembered of it shows in
        the answer. Those of a padded batch are of similar length, so that few of its tokens are fillers."""
        n = self.args.batch
        ramp = self.args.short_first * self.args.steps
        share = min(1.0, 0.1 + 0.9 * self.step / ramp) if ramp else 1.0
        longest = min(len(self.by_size), max(n, round(share * len(self.by_size))))
        if self.packed:
            return [self.by_size[draw.randrange(longest)] for _ in range(n)]
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

    def _measure(self, recall: NativeRecall) -> None:
        row = {"step": self.step, "loss": self.mean, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        row.update(recall.measure(self.out))
        try:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(f"{self.out / 'log.jsonl'}: cannot be written: {error.strerror}") from error
        self.console.print(f"step {self.step}: of {row['questions']} held-out questions {row['right']:.0%} right")

    def _identity(self) -> dict[str, Any]:
        """What makes this run another one than any other; a longer one is the same."""
        options = ("batch", "rate", "clip", "dropout", "short_first", "max_tokens", "tail", "seed")
        options += ("init", "init_gain", "heads_gain", "write_bias", "schedule", "warm_up", "gate_weight", "gate_mean")
        options += ("visible", "wording", "teacher", "teacher_share")
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
    def _report(self) -> Report:
        self.memory.eval()
        sums, count = [0.0] * 4, 0
        for begin in range(0, self.n_held_out, self.args.batch):
            rows = [self.data[i] for i in range(begin, min(begin + self.args.batch, self.n_held_out))]
            if self.args.teacher:
                rows = self._answered(rows)
            lengths = [len(answer) for row in rows for _, _, answer in row.asks]
            count += len(lengths)
            for i in range(2):
                logits, targets = self._student(rows, empty=bool(i))
                sums[i] += len(lengths) * F.cross_entropy(logits, targets).item()
                hits = (logits.argmax(-1) == targets).split(lengths)
                sums[2 + i] += sum(bool(hit.all()) for hit in hits)
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


def told_weights(examples: Sequence[Example], wording: float) -> list[float]:
    """Weights of the answers' tokens in the loss, example by example: 1 for what only the memory can know, tokens that
    were told and that the question does not show; `wording` for the others.
    """
    weights = []
    for example in examples:
        told = set(example.earlier)
        for question, _, answer in example.asks:
            known = told.difference(question)
            weights += [1.0 if token in known else wording for token in answer]
    return weights
