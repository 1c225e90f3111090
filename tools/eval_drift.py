"""How far a memory moves a model's answers to ordinary requests.

    python tools/eval_drift.py -m smollm2 --adapters msw=smollm2 --requests ../shared/data/eval/ifeval.jsonl

IFEval counts a request as right or wrong, so that 541 of them tell a change of a fifth from none. Here the frozen model
answers greedily, and both it and the model with the memory decode request and answer. Prints the Kullback-Leibler
divergence of their distributions, in nats a token, by the token's place in the answer, and how often both would say the
same next token, each with a 95 % interval over the requests. The memory is empty at first, or has heard a chat of
natural.jsonl (--heard), which no adapter was trained on; either way the request is written to it, as in a chat.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval_replies import named
from pydeltamem import Conversation, DeltaMemLlama, say_together
from pydeltamem.evals.bootstrap import Estimate, Sample
from pydeltamem.evals.corpora import file_of
from pydeltamem.evals.items import records_of
from pydeltamem.runtime.chat_format import chat_prompt

PLACES = (0, 16, 64, 192, 512)  # tokens of an answer, where ranges begin and end


def answers_of(frozen: DeltaMemLlama, requests: list[str], parallel: int) -> list[str]:
    """The frozen model's greedy answers."""
    answers: list[str] = []
    for begin in range(0, len(requests), parallel):
        some = requests[begin : begin + parallel]
        talks = [Conversation(frozen, n_predict=PLACES[-1], temp=0.0) for _ in some]
        said = say_together(dict(zip(talks, some)))
        answers += [said[talk] for talk in talks]
        for talk in talks:
            talk.close()
    return answers


def chats(n: int) -> list[list[dict[str, str]]]:
    """Chats to hear, again from the first one if there are fewer."""
    path = file_of("natural", None)
    assert path is not None  # it is in the package
    found = [record["messages"] for record in records_of(path)]
    return [found[i % len(found)] for i in range(n)]


def log_probs(llm: DeltaMemLlama, prompt: list[int], answer: list[int]) -> npt.NDArray[np.float32]:
    """Of each token of the answer, given all before it: [n, vocabulary]."""
    llm.reset()
    llm.eval(prompt + answer[:-1])
    logits = np.array(llm.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1])
    logits -= logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def shown(of: Estimate, factor: float = 1.0, digits: int = 3) -> str:
    return f"{factor * of.value:.{digits}f} ({factor * of.low:.{digits}f}–{factor * of.high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, help="GGUF, or its name")
    parser.add_argument("--adapters", nargs="+", required=True, type=named, metavar="NAME=FILE")
    parser.add_argument("--requests", type=Path, required=True, help='JSON lines with "prompt"')
    parser.add_argument("-n", type=int, default=64, help="requests, evenly from the whole file (%(default)s)")
    parser.add_argument("--heard", action="store_true", help="the memory has heard a chat before each request")
    parser.add_argument("-c", "--ctx-size", type=int, default=2048, help="context (%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--unpack", choices=("none", "rest", "all"), default="none")
    args = parser.parse_args()
    console, parallel = Console(highlight=False), 8

    options = {"n_threads": args.threads, "n_threads_batch": args.threads, "unpack": args.unpack}
    asked = [record["prompt"] for record in records_of(args.requests)]
    asked = asked[:: max(1, len(asked) // args.n)][: args.n]
    with DeltaMemLlama(args.model, n_ctx=args.ctx_size, n_seq_max=parallel + 1, **options) as frozen:
        given = answers_of(frozen, asked, parallel)

    models = {
        name: DeltaMemLlama(args.model, deltamem_path=file, n_ctx=args.ctx_size, logits_all=True, **options)
        for name, file in [("frozen", None), *args.adapters]
    }
    ranges = list(itertools.pairwise(PLACES))
    scores: dict[str, list[list[list[float]]]] = {
        name: [[] for _ in range(len(ranges) + 1)] for name, _ in args.adapters
    }
    heard = chats(len(asked)) if args.heard else []
    for i, (request, answer) in enumerate(track(list(zip(asked, given)), console=console, transient=True)):
        prompt = chat_prompt(models["frozen"], [{"role": "user", "content": request}])
        tokens = models["frozen"].tokenize(answer.encode(), add_bos=False)[: PLACES[-1]]
        tokens = tokens[: args.ctx_size - len(prompt)]
        if not tokens:
            continue
        expected = log_probs(models["frozen"], prompt, tokens)
        for name, _ in args.adapters:
            llm = models[name]
            llm.memory.reset()
            if heard:
                llm.reset()
                llm.eval(chat_prompt(llm, heard[i]))
            found = log_probs(llm, prompt, tokens)
            drift = (np.exp(expected) * (expected - found)).sum(axis=-1)
            for j, (begin, end) in enumerate(ranges):
                scores[name][j].append(drift[begin:end].tolist())
            scores[name][-1].append((expected.argmax(-1) == found.argmax(-1)).astype(float).tolist())

    table = Table("", *scores, box=None)
    for j in range(len(ranges) + 1):
        cells = []
        for name, of in scores.items():
            values = [row for row in of[j] if row]  # not all answers are so long
            as_share = (100.0, 1) if j == len(ranges) else ()
            cells.append(shown(Sample({name: values}, [None] * len(values)).mean(name), *as_share) if values else "–")
        title = "same next token, %" if j == len(ranges) else f"nats, tokens {ranges[j][0]} to {ranges[j][1] - 1}"
        table.add_row(title, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
