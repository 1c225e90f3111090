"""Whether the backbone of a benchmark answers as plain transformers does: the same prompts, greedy, in float32.

    python tools/eval_transformers.py hotpotqa locomo --model f32.gguf -n 50 -c 2048

The prompts are those of `deltamem eval`'s method `backbone`. transformers gets them as text, renders and tokenises
them with its own template and tokenizer, and decodes each from its beginning. Prints for each benchmark how many
prompts have the same tokens and how many answers are the same, and shows what differs. Exits with 1 if anything does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as InTurn
from transformers import AutoTokenizer

from pydeltamem.evals.asker import Ask, Asker
from pydeltamem.evals.benchmarks import BENCHMARKS
from pydeltamem.evals.items import Item, chosen, items_of
from pydeltamem.evals.run import Method, Prompts, units_of
from pydeltamem.evals.views import FULL
from pydeltamem.formats.gguf_header import Header
from pydeltamem.train.model import load_frozen

METHOD = Method("backbone", FULL)


def asked_by(asker: Asker, name: str, items: Sequence[Item], n_predict: int) -> list[tuple[Ask, str]]:
    """The prompts of a benchmark and the native runtime's greedy answers, in batches as `deltamem eval` makes them."""
    benchmark = BENCHMARKS[name]
    benchmark = replace(benchmark, n_predict=min(n_predict, benchmark.n_predict), sampling=lambda index, seed: {})
    prompts = Prompts(benchmark, items, asker, window=512, seed=0)
    found = []
    for unit in units_of(items, [METHOD], asker.parallel):
        asks = [prompts.ask(item, METHOD) for item in unit.items]
        asks = [replace(ask, options={**ask.options, "temp": 0.0}) for ask in asks]
        found += zip(asks, asker.answer(asks), strict=True)
    return found


class Transformers:
    """Plain transformers, with the weights of a GGUF in float32."""

    def __init__(self, path: Path):
        self.model, tokenizer = load_frozen(path, "float32")
        self.ends = tokenizer.ends
        self.tokenizer = AutoTokenizer.from_pretrained(str(path.resolve().parent), gguf_file=path.name)
        if Header(str(path)).keys.get("tokenizer.ggml.pre") == "smollm":  # transformers does not read this
            whole = self.tokenizer.backend_tokenizer
            whole.pre_tokenizer = InTurn([Digits(individual_digits=True), whole.pre_tokenizer])

    def tokens(self, text: str) -> list[int]:
        said = [{"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def answer(self, tokens: Sequence[int], n_predict: int) -> list[int]:
        given: list[int] = []
        done = self.model(torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1)
        while len(given) < n_predict:
            token = int(done.logits[0, -1].argmax())
            if token in self.ends:
                break
            given.append(token)
            done = self.model(torch.tensor([[token]]), past_key_values=done.past_key_values, use_cache=True)
        return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="+", choices=list(BENCHMARKS))
    parser.add_argument("--model", type=Path, required=True, help="GGUF in F32")
    parser.add_argument("--data", help="the folder of all data (DELTAMEM_DATA)")
    parser.add_argument("-n", type=int, default=50)
    parser.add_argument("-c", "--ctx-size", type=int, default=2048)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--n-predict", type=int, default=64, help="tokens of an answer, at most (%(default)s)")
    parser.add_argument("--kinds", help="only questions of these kinds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, plain, good = Console(stderr=True), Transformers(args.model), True
    table = Table("benchmark", "questions", "same tokens", "same answers", box=None)
    f32 = llama_cpp.GGML_TYPE_F32  # float16 in the KV cache decides near ties
    asker = Asker(args.model, n_ctx=args.ctx_size, threads=args.threads, type_k=f32, type_v=f32)
    for name in args.benchmarks:
        items = items_of(BENCHMARKS[name], args.data)
        if args.kinds:
            items = [item for item in items if item.kind in args.kinds.split(",")]
        asked = asked_by(asker, name, chosen(items, args.n, 42, (1, 1)), args.n_predict)
        n_same = n_answers = 0
        for ask, answer in track(asked, name, console=console, transient=True):
            text = ask.shared.text + ask.text
            tokens = plain.tokens(text)
            n_same += tokens == asker._prompt(text)
            given = plain.answer(tokens, ask.options["n_predict"])
            said = asker.llm.detokenize(given).decode("utf-8", errors="replace")
            if said.strip() == answer.strip():
                n_answers += 1
            else:
                console.print(
                    f"{name}: {ask.text[-120:]!r}\n  here: {answer!r}\n  transformers: {said!r}", markup=False
                )
        good &= n_same == n_answers == len(asked)
        table.add_row(name, str(len(asked)), str(n_same), str(n_answers))
    asker.close()
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
