"""One run of `deltamem train`: its steps, and the PyTorch checkpoints to go on from."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import random
import sys
import time
import weakref
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, TrainingError
from ..formats import kinds
from ..formats.atomic import leftovers
from ..formats.checkpoint import CONFIG, WEIGHTS
from ..formats.disk_errors import disk_errors
from ..formats.lock import held
from ..formats.outputs import check_target, make_folder, writing
from ..hub import model_file, model_path
from .average import Average
from .conversations import Conversations
from .heads import start_from_heads
from .model import load_frozen
from .objective import Objective
from .options import SCHEDULES, Options, flag
from .recall import NativeRecall
from .recurrence import chunked_recurrence, fused_recurrence
from .reference import DeltaMem, DeltaMemConfig, torch_save
from .report import Report, measure, plot

LOG = "log.jsonl"
LEFT = 600  # seconds, longer than any save takes: a temporary file that old is nobody's
RELEASE = 60  # seconds from one release of unused memory to the next
OF_WEIGHT = 4096  # values of each weight that tell one model from another
HELD_OUT = 64  # conversations that only measure the loss; at most a tenth of all


class Trainer:
    """One run of `deltamem train`. It goes on from `checkpoint.pt` in the output directory if there is one. It holds
    the lock of that directory until it has trained.

    console: of rich, for the progress bar and messages.

    Raises InputError, ModelError, CheckpointError or OutputError.
    """

    def __init__(self, options: Options, console: Any):
        self.options, self.console = options, console
        config = options.adapter()
        self.out = Path(options.out)
        if options.init and self.out.exists() and os.path.exists(options.init) and self.out.samefile(options.init):
            raise InputError(f"{self.out}: holds the weights of --init, which stay: name another --out")
        make_folder(self.out)
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(self.out))
            self._open(config)
            self._held = stack.pop_all()
        weakref.finalize(self, self._held.close)  # one that nobody trains keeps no folder

    def _open(self, config: DeltaMemConfig) -> None:
        """Opens model, conversations and what a run has saved."""
        options = self.options
        if (self.out / WEIGHTS[1]).exists():
            raise InputError(f"{self.out / WEIGHTS[1]}: holds other weights for the same files: name another --out")
        for name, kind in (
            (WEIGHTS[0], kinds.PYTORCH), (CONFIG, kinds.CONFIG), (LOG, kinds.CONVERSATIONS),
            ("loss.png", kinds.PNG),
        ):  # fmt: skip
            check_target(self.out / name, kind)
        _clear(self.out)
        named = model_path(options.model)
        self.model, self.tokenizer = load_frozen(named, options.dtype, options.device)
        self.data = Conversations(options.data, self.tokenizer, options.tail, options.max_tokens, bool(options.teacher))
        self.n_held_out = min(HELD_OUT, len(self.data) // 10)
        self.by_size = sorted(range(self.n_held_out, len(self.data)), key=self.data.sizes.__getitem__)

        torch.manual_seed(options.seed)
        # on a CPU, where small operations cost no launch, token by token is several times faster
        form = fused_recurrence if options.device == "cpu" else chunked_recurrence
        if options.init:
            self.memory = DeltaMem.from_checkpoint(self.model, options.init, recurrence=form)
            self._apply_to_init(config)
        else:
            self.memory = DeltaMem(self.model, config, recurrence=form)
            if options.heads_gain:
                start_from_heads(self.memory, self.model, options.heads_gain)
        if options.by_turn < 1 and not self.memory.config.deferred:
            raise InputError(f"--by-turn {options.by_turn}: only deferred writes know turns: add --defer")
        for layer in self.memory.memories:
            layer.dropout = options.dropout
        self.memory.to(options.device)
        self.objective = Objective(self.model, self.tokenizer, self.memory, options)
        if self.objective.packed is None:
            self.data.refuse_packed_only()
        self.parameters = [p for p in self.memory.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.average = Average(self.parameters, options.average)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[tuple[int, float]] = []  # steps and the loss
        self.mean: float | None = None  # moving average of the loss
        self._goes_on = self._resume()
        self.recall: NativeRecall | None = None
        if options.eval_every:
            held_out = [self.data[i] for i in range(self.n_held_out)]
            self.recall = NativeRecall(model_file(options.base or named), held_out, options.eval_questions)
            self.recall.check(self.memory)

    def train(self) -> Report:
        """Does the steps that are left. To be called once."""
        with self._held:
            self._train()
            self._plot()
        return self.report()

    def _train(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        options = self.options
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            name = options.strategy or "adapter"
            bar = progress.add_task(name, total=options.steps, completed=self.step)
            if self.recall and self._is_measured() and self.step not in map(_step_of, self._log()):
                self._measure(self.recall)  # it was killed before it had
            released = time.monotonic()
            while self.step < options.steps:
                begun = time.monotonic()
                loss = self.update()
                if begun - released > RELEASE:
                    released = begun
                    release_memory()
                self.seconds += time.monotonic() - begun
                self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
                if self.step % 10 == 0:
                    self.curve.append((self.step, self.mean))
                progress.update(bar, advance=1, description=f"{name}, loss {self.mean:.3f}")
                if self.step == options.steps or self._is_measured() or self.step % options.save_every == 0:
                    self._save()
                if self.recall and self._is_measured():
                    self._measure(self.recall)

    def _is_measured(self) -> bool:
        """Whether what is recalled after this step goes to the log."""
        steps, every = self.options.steps, self.options.eval_every
        return every is not None and self.step > 0 and (self.step == steps or self.step % every == 0)

    def update(self) -> float:
        """One step. Returns its loss. Raises TrainingError, before it changes weights, if a gradient is not finite."""
        options = self.options
        done = self.step / options.steps
        share = min((self.step + 1) / options.warm_up, SCHEDULES[options.schedule](done))
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate * min(share, 1.0)
        draw = random.Random(options.seed * 1_000_003 + self.step)
        examples = [self.data[i] for i in self.draw(draw)]
        if options.visible:
            stays = [draw.random() < options.visible for _ in examples]
            examples = [replace(e, visible=e.visible or stay) for e, stay in zip(examples, stays)]
        if options.ask_writes < 1:
            examples = [replace(example, ask_writes=draw.random() < options.ask_writes) for example in examples]
        if options.rehearse:
            examples = [replace(example, rehearsed=draw.random() < options.rehearse) for example in examples]
        if options.by_turn < 1:
            examples = [e if draw.random() < options.by_turn else replace(e, turns=()) for e in examples]
        self.memory.train()
        found = self.objective.backward(examples)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip).item()
        if not (math.isfinite(found) and math.isfinite(norm)):
            saved = f", perhaps with --init {self.out}" if (self.out / WEIGHTS[0]).exists() else ""
            raise TrainingError(
                f"step {self.step + 1}: the loss is {found}, the norm of its gradient {norm}: lower --rate or --clip,"
                f" with another --out{saved}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        self.tokens += sum(len(example.earlier) for example in examples)
        return found

    def draw(self, draw: random.Random) -> list[int]:
        """Indices of a batch of conversations. Short ones come first: there the answer depends most on what was
        remembered. A padded batch has conversations of similar length, so that it needs little padding.
        """
        n = self.options.batch
        ramp = self.options.short_first * self.options.steps
        share = min(1.0, 0.1 + 0.9 * self.step / ramp) if ramp else 1.0
        longest = min(len(self.by_size), max(n, round(share * len(self.by_size))))
        if self.objective.packed:
            return [self.by_size[draw.randrange(longest)] for _ in range(n)]
        candidates = sorted(draw.randrange(longest) for _ in range(4 * n))
        begin = draw.randrange(4) * n
        return [self.by_size[i] for i in candidates[begin : begin + n]]

    def _save(self) -> None:
        with self.average.in_place():
            self.memory.save_checkpoint(self.out)
        if not self._goes_on:  # its rows are of an earlier run, whose weights are gone now
            with disk_errors(self.out / LOG):
                (self.out / LOG).unlink(missing_ok=True)
            self._goes_on = True
        saved = {
            "run": self._identity(), "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "curve": self.curve, "mean": self.mean, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
            "memory": self.memory.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
        }  # fmt: skip
        path = self.out / "checkpoint.pt"
        with writing(path, kinds.PYTORCH) as temporary:
            torch_save(saved, temporary, path)

    def _measure(self, recall: NativeRecall) -> None:
        row = {"step": self.step, "loss": self.mean, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        row.update(recall.measure(self.out))
        with writing(self.out / LOG, kinds.CONVERSATIONS) as temporary:
            rows = [line for line in self._log() if -1 < _step_of(line) < self.step]  # others were not saved
            temporary.write_text("\n".join([*rows, json.dumps(row), ""]), encoding="utf-8")
        self.console.print(f"step {self.step}: of {row['questions']} held-out questions {row['right']:.0%} right")

    def _log(self) -> list[str]:
        path = self.out / LOG
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []

    def _identity(self) -> dict[str, Any]:
        """What identifies this run. A run of more steps is the same run."""
        layers = 0  # a fine-tuned model often has the embeddings of its base
        for weight in self.model.parameters():
            layers = _crc32(weight.flatten()[:OF_WEIGHT], layers)
        return {
            **_settings(self.memory.config, self.options),
            "--form": "packed" if self.objective.packed else "padded",
            "the conversations": self.data.checksum,
            "the model": _crc32(self.model.get_input_embeddings().weight),
            "the model's layers": layers,
        }

    def _resume(self) -> bool:
        """Whether there is a run to go on with."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            now = self._identity()
            # one of an earlier release lacks what was added since, and ran as without it
            was = {**now, **_settings(DeltaMemConfig(), Options("", "", "")), **saved["run"]}
            differs = dict.fromkeys(_OPTION_OF.get(name, name) for name in now if was[name] != now[name])
            if differs:
                raise InputError(
                    f"{path}: is of a run that differs in {', '.join(differs)}: delete it or name another --out"
                )
            if saved["step"] > self.options.steps:
                raise InputError(
                    f"{path}: has {saved['step']} steps, more than --steps {self.options.steps}: delete it or name"
                    " another --out"
                )
            self.memory.load_state_dict(saved["memory"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.load(saved.get("average", []))
            self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]
            self.curve, self.mean = [tuple(point) for point in saved["curve"]], saved["mean"]
            torch.set_rng_state(saved["random"])
            if len(saved["random_cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["random_cuda"])
        except InputError:
            raise
        except Exception as error:  # torch passes on whatever its readers raise
            raise InputError(f"{path}: cannot be read: delete it or name another --out") from error
        self.console.print(f"{path}: goes on from step {self.step}")
        return True

    @torch.no_grad()
    def _apply_to_init(self, config: DeltaMemConfig) -> None:
        """Applies the options to the PyTorch checkpoint of --init. --init-gain makes writes stronger: the mean
        of a message has only a part of each token.
        """
        options, of_checkpoint = self.options, self.memory.config
        if options.strategy:
            has, wanted = of_checkpoint.num_state_heads, config.num_state_heads
            if has != wanted:
                raise InputError(
                    f"--init {options.init}: has {has} state heads, --strategy {options.strategy} has {wanted}"
                )
        if options.strategy or options.defer:
            granularity = config.memory_write_granularity
            self.memory.config = replace(of_checkpoint, memory_write_granularity=granularity)
        for parameters in self.memory.memories:
            parameters.memory_v_proj.mul_(options.init_gain)
            if options.write_bias is not None:
                parameters.beta_bias.fill_(options.write_bias)

    def report(self) -> Report:
        """The results so far."""
        with self.average.in_place():
            held_out = measure(self.objective, [self.data[i] for i in range(self.n_held_out)])
        n = sum(p.numel() for p in self.parameters)
        return Report(os.fspath(self.out), n, self.step, self.tokens, self.seconds, held_out, self.curve)

    def _plot(self) -> None:
        try:
            plot(self.curve, self.out / "loss.png")
        except ImportError:
            self.console.print("no picture of the loss: pip install matplotlib")


# the options that decide what a run computes, besides those of `Options.adapter`
OF_RUN = (
    "batch", "rate", "clip", "dropout", "short_first", "max_tokens", "tail", "seed", "init", "init_gain", "heads_gain",
    "write_bias", "schedule", "warm_up", "gate_weight", "gate_mean", "visible", "wording", "teacher", "teacher_share",
    "ask_writes", "first_told", "rehearse", "average", "by_turn",
)  # fmt: skip


# what a user knows a part of the identity by: the option that sets a field of the configuration
_OPTION_OF = {
    "rank": "--rank", "alpha": "--alpha", "num_state_heads": "--heads", "memory_write_granularity": "--strategy",
    "target_layers": "--layers", "delta_heads": "--corrections", "beta_bias_init": "--write-bias",
    "state_update_mode": "--update", "output_init": "--start", "the model's layers": "the model",
}  # fmt: skip


def _settings(config: DeltaMemConfig, options: Options) -> dict[str, Any]:
    """The configuration and the options of a run, as `checkpoint.pt` holds them."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {**fields, **{flag(name): getattr(options, name) for name in OF_RUN}}


def _crc32(weight: torch.Tensor, before: int = 0) -> int:
    values: Any = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return zlib.crc32(values, before)


def release_memory() -> None:
    """Gives memory that the heap does not use back to the system, if the C library is glibc. Tensors of batches of many
    sizes leave gaps: in ninety steps of sixteen conversations 11 GB became resident, of which 2.8 were in use.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _clear(out: Path) -> None:
    """Removes what runs that were killed while they saved have left, but not what another may be writing."""
    for name in ("checkpoint.pt", WEIGHTS[0], CONFIG, LOG, "loss.png"):
        for leftover in leftovers(out / name):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFT:
                    leftover.unlink()


def _step_of(line: str) -> int:
    """The step of a line of log.jsonl; -1: it was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
