"""Where the time of a training step goes, and how near its products are to what the processor can.

    python tools/bench_train.py smollm2 build/smollm2/train.jsonl --init recipes/smollm2/msw --threads 1

Runs the same steps of `deltamem train` twice: by PyTorch's profiler, for the time of each part, and by its counter of
operations. Between the steps it multiplies two large matrices of the model's type: the roofline. Its time is the least
that these products can take here; attention, norms and sums come on top. Nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pydeltamem.train import Options, PackedBatch, Trainer

PARTS = {
    "products with weights": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "_Attention"),
    "activations, norms, rotary positions": ("_RmsNorm", "_Swiglu", "_Rotate"),
    "the memory's recurrence": ("_Recurrence",),
    "softmax of the vocabulary": ("aten::_log_softmax", "aten::nll_loss"),
}
REST = "copies, sums, the optimizer"
SIDE = 2048  # of the matrices that measure the roofline


def roofline(dtype: torch.dtype) -> float:
    """Operations per second of one product of two square matrices."""
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    begun = time.perf_counter()
    torch.mm(a, b)
    return 2 * SIDE**3 / (time.perf_counter() - begun)


def part_of(name: str) -> str:
    return next((part for part, names in PARTS.items() if name.startswith(names)), REST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF, its name, or a Hugging Face directory")
    parser.add_argument("data", help="conversations, as for deltamem train")
    parser.add_argument("--init", help="PyTorch checkpoint to begin from")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            args.model, args.data, folder, init=args.init, batch=args.batch, max_tokens=args.max_tokens, short_first=0,
            steps=10 * args.steps, strategy=None if args.init else "msw", heads_gain=None if args.init else 0.5,
        )  # fmt: skip
        trainer = Trainer(options, console)
        if trainer.objective.packed is None:
            raise SystemExit(f"{args.model}: has no packed form of a step, which this measures")
        trainer.update()
        dtype = next(trainer.model.parameters()).dtype
        seconds: dict[str, float] = defaultdict(float)
        wall, peaks, operations = 0.0, [roofline(dtype)], 0
        first = trainer.step
        for _ in range(args.steps):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                begun = time.perf_counter()
                trainer.update()
                wall += time.perf_counter() - begun
            for event in profiled.key_averages():
                seconds[part_of(event.key)] += event.self_cpu_time_total / 1e6
            peaks.append(roofline(dtype))
        packed, decoded = trainer.objective.packed, []
        logits = packed.logits

        def counting(batch: PackedBatch, memory: bool = True) -> torch.Tensor:
            decoded.append(len(batch.ids))
            return logits(batch, memory)

        packed.logits = counting  # type: ignore[method-assign]
        trainer.step = first  # the same conversations again
        for _ in range(args.steps):
            with FlopCounterMode(display=False) as counter:
                trainer.update()
            counts = counter.get_flop_counts()["Global"]
            operations += sum(count for name, count in counts.items() if str(name) in ("aten.mm", "aten.addmm"))

    peak, total = statistics.median(peaks), sum(seconds.values())
    table = Table("part", "share of a step, %", "s a step", title=f"{args.steps} steps, {str(dtype).split('.')[-1]}")
    for part in (*PARTS, REST):
        table.add_row(part, f"{100 * seconds[part] / total:.0f}", f"{seconds[part] / args.steps:.2f}")
    console.print(table)
    products = seconds["products with weights"]
    console.print(f"tokens decoded: {sum(decoded) / args.steps:,.0f} a step, {sum(decoded) / wall:,.0f} a second")
    console.print(
        f"products with weights: {operations / products / 1e9:,.0f} GFLOP/s, {operations / products / peak:.0%} of one"
        f" product of {SIDE} × {SIDE} ({peak / 1e9:,.0f}; {min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f})"
    )
    console.print(f"a step: {wall / args.steps:.2f} s, {wall * peak / operations:.1f} times its products at that rate")


if __name__ == "__main__":
    main()
