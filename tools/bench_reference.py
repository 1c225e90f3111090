"""Compares the native speed with that of PyTorch, `pydeltamem.train.reference`, on one shape (`make bench-reference`).

    python tools/bench_reference.py --pairs 10 [--ftype q4_k_m f16] [--flash-attn off on] [--repack on off]
                                    [--unpack none all]

Weights are random. PyTorch runs in bfloat16, with the KV cache and the fused attention of transformers. It computes the
recurrence of a prompt both token by token, as published, and in chunks. The sides take turns: each decodes a prompt
into an empty cache and single tokens after it. Prints tokens per second, and the median ratio of times over the pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers

from pydeltamem.bench.models import synthetic_files
from pydeltamem.bench.pairs import median_interval
from pydeltamem.bench.runs import Model, Options, Runner
from pydeltamem.bench.synthetic import SHAPES
from pydeltamem.runtime import library
from pydeltamem.runtime.unpacking import NONE, UNPACK
from pydeltamem.train.recurrence import chunked_recurrence, recurrence
from pydeltamem.train.reference import DeltaMem

FORMS = {"token by token": recurrence, "in chunks": chunked_recurrence}


class Reference:
    """The same shape in PyTorch, with the hooks of `DeltaMem`."""

    def __init__(self, name: str) -> None:
        shape = SHAPES[name]
        config = transformers.Qwen3Config(
            vocab_size=shape.n_vocab, hidden_size=shape.n_embd, intermediate_size=shape.n_ff,
            num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, num_key_value_heads=shape.n_head_kv,
            head_dim=shape.head_dim, max_position_embeddings=shape.n_ctx, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        self.model = transformers.Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.memory = DeltaMem(self.model)
        self.n_vocab = shape.n_vocab

    @torch.inference_mode()
    def run(self, form: str, n_prompt: int, n_decode: int) -> tuple[float, float]:
        """Seconds of the prompt, and of the single tokens after it."""
        self.memory.recurrence = FORMS[form]
        self.memory.reset()
        prompt = torch.randint(0, self.n_vocab, (1, n_prompt))
        start = perf_counter()
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        middle = perf_counter()
        for token in torch.randint(0, self.n_vocab, (n_decode, 1, 1)):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return middle - start, perf_counter() - middle


def native(shape: str, ftype: str, flash_attn: bool, repack: bool, unpack: str, n_ctx: int, n_threads: int) -> Runner:
    path, adapter = synthetic_files(shape, ftype, "f16", 8, 1)
    options = Options(path, n_ctx, 512, 512, n_threads, 0, flash_attn, "f16", "f16", repack=repack, unpack=unpack)
    return Runner(Model(library.llama_cpp, options), adapter)


def in_bf16(unpack: str) -> str:
    return "" if unpack == NONE else f", {unpack} in BF16"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b", choices=[name for name in SHAPES if name.startswith("qwen3")])
    parser.add_argument("--ftype", nargs="+", default=["q4_k_m", "f16"])
    parser.add_argument("--flash-attn", nargs="+", default=["off", "on"], choices=("off", "on"))
    parser.add_argument(
        "--repack", nargs="+", default=["on"], choices=("on", "off"), help="weights when they are loaded"
    )
    parser.add_argument(
        "--unpack", nargs="+", default=["none"], choices=UNPACK, help="weights that prompts multiply in BF16"
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    reference = Reference(args.shape)
    n_ctx = args.prompt + args.decode + 1
    runners = {
        f"{ftype}, flash attention {choice}{', not repacked' * (repack == 'off')}{in_bf16(unpack)}": native(
            args.shape, ftype, choice == "on", repack == "on", unpack, n_ctx, args.threads
        )
        for ftype in args.ftype
        for choice in args.flash_attn
        for repack in args.repack
        for unpack in args.unpack
    }
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"prompt": [], "decode": []} for name in (*FORMS, *runners)
    }  # fmt: skip
    for pair in range(-1, args.pairs):  # the first one warms up
        times = {form: reference.run(form, args.prompt, args.decode) for form in FORMS}
        for name, runner in runners.items():
            prompt = runner.prompt(args.prompt)[0] / 1e9
            times[name] = prompt, runner.decode(args.prompt, args.decode)[0] / 1e9
        if pair >= 0:
            for name, (prompt, decode) in times.items():
                seconds[name]["prompt"].append(prompt)
                seconds[name]["decode"].append(decode)
        print(f"\r{pair + 1} of {args.pairs}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    results = {}
    for what, n_tokens in (("prompt", args.prompt), ("decode", args.decode)):
        print(f"{what} of {n_tokens} tokens")
        for form in FORMS:
            print(f"  PyTorch bf16, {form}: {n_tokens / median(seconds[form][what]):.2f} tokens/s")
            for name in runners:
                ratios = [theirs / ours for theirs, ours in zip(seconds[form][what], seconds[name][what])]
                low, high, _ = median_interval(ratios)
                print(
                    f"    {name:42} {n_tokens / median(seconds[name][what]):8.2f} tokens/s, {median(ratios):.2f} × as"
                    f" fast ({low:.2f} to {high:.2f}, {args.pairs} pairs)"
                )
                found = {"ratio": median(ratios), "low": low, "high": high, "pairs": args.pairs}
                results.setdefault(f"{what}, {name}", {})[form] = found
    if args.json:
        args.json.write_text(json.dumps({"results": results, "seconds": seconds}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
