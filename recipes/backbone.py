"""Trains the backbone of the default model: a small Qwen3 that answers from its context in the world of world.py.

    python recipes/backbone.py build/default/hf

The rows of a batch have one length, drawn at random. One row in eight is a random sequence twice, without which recall
from the context does not form. Writes a Hugging Face directory with a SentencePiece tokenizer.
An interrupted run resumes where it was.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from pydeltamem.errors import DeltaMemError
from pydeltamem.evals.world import Fact, Turn, World
from pydeltamem.formats.atomic import replacing
from pydeltamem.formats.kinds import PYTORCH, TOKENIZER
from pydeltamem.formats.lock import held

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_cache": True,
}
BATCH_TOKENS = 4096
LENGTHS = (96, 128, 192, 256, 512)  # of a batch's rows, drawn at random
REPEATED = 1 / 8  # share of rows that are random tokens twice


def conversation(world: World, n_token: int, encode) -> tuple[list[int], list[float]]:
    """A dialogue of at least n_token tokens, and the weight of each token's loss: statements of facts cannot be
    predicted, answers can."""
    draw = world.random
    capacity = draw.choice((1, 2, 3, 4, 6, 8, 12))
    new = world.facts(capacity)
    known: list[Fact] = []
    ids: list[int] = []
    weights: list[float] = []

    def add(turn: Turn, weight: float) -> None:
        for role, text, share in ((USER, turn[0], 0.2), (ASSISTANT, turn[1], weight)):
            message = encode(role, text)
            ids.extend(message)
            weights.extend([share] * len(message))

    while len(ids) < n_token:
        kind = draw.random()
        if known and kind < 0.5:
            add(world.ask(draw.choice(known)) if draw.random() < 0.88 else world.ask_unknown(known), 1.0)
        elif new and kind < 0.8:
            said = [new.pop() for _ in range(1 if draw.random() < 0.8 else min(2, len(new)))]
            known += said
            turns = [world.tell(fact) for fact in said]
            add((" ".join(turn[0] for turn in turns), turns[-1][1]), 0.2)
        elif known and kind < 0.86:
            i = draw.randrange(len(known))
            known[i] = world.another(known[i])
            add(world.update(known[i]), 0.2)
        elif kind < 0.97:
            add(world.chatter(), 0.2)
        else:
            add(world.knowledge(), 0.5)
    return ids, weights


class Text:
    """Messages as tokens, each phrase encoded once."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, role: str, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text)
        return [self.tokenizer.piece_to_id(role), *self.known[text], self.tokenizer.piece_to_id(END)]

    def of_turn(self, turn: Turn) -> list[int]:
        """What the user says, and what the assistant answers."""
        return [*self(USER, turn[0]), *self(ASSISTANT, turn[1])]


def batch(world: World, text: Text) -> tuple[Tensor, Tensor]:
    """Tokens [B, T + 1] and the weights of the losses [B, T]."""
    n_token = world.random.choice(LENGTHS)
    first, last = 259, text.tokenizer.vocab_size() - 1
    rows, weights = [], []
    for _ in range(BATCH_TOKENS // n_token):
        if world.random.random() < REPEATED:
            half = (n_token + 1) // 2
            once = [world.random.randint(first, last) for _ in range(half)]
            rows.append((once + once)[: n_token + 1] + [first] * (n_token + 1 - 2 * half))
            weights.append([0.0] * (half - 1) + [0.3] * (n_token + 1 - half))
        else:
            ids, share = conversation(world, n_token + 1, text)
            rows.append(ids[: n_token + 1])
            weights.append(share[1 : n_token + 1])
    return torch.tensor(rows), torch.tensor(weights)


def train_tokenizer(
    directory: Path, seed: int, vocab_size: int, n: int = 60_000
) -> sentencepiece.SentencePieceProcessor:
    """Trains the tokenizer on n facts, in statements, questions and updates, and on n other turns."""
    world = World(seed)
    sentences = []
    for _ in range(n):
        turn = world.random.choice((world.chatter, world.knowledge, lambda: world.ask_unknown([])))()
        fact = world.facts(1)[0]
        sentences += [*turn, *world.tell(fact), *world.ask(fact), *world.update(fact)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=[USER, ASSISTANT],
        eos_piece=END,
        num_threads=1,
        minloglevel=2,
    )
    with replacing(directory / "tokenizer.model", TOKENIZER) as temporary:
        Path(temporary).write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_hf_tokenizer(directory: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """The same tokenizer for transformers: tokenizer.json and tokenizer_config.json."""
    pieces = {tokenizer.id_to_piece(i): i for i in range(tokenizer.vocab_size())}
    merges = []
    for piece, i in pieces.items():
        if not (tokenizer.is_control(i) or tokenizer.is_byte(i) or tokenizer.is_unknown(i)):
            parts = [(piece[:j], piece[j:]) for j in range(1, len(piece))]
            merges += sorted((p for p in parts if p[0] in pieces and p[1] in pieces), key=lambda p: pieces[p[0]])
    model = models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = Tokenizer(model)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", USER, ASSISTANT, END])
    fast.save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": END,
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def recall(model: Qwen3ForCausalLM, text: Text, seed: int, n_fact: int, n: int = 64) -> float:
    """Share of facts that the model recalls from its context: all tokens of the value are the most likely ones."""
    world, right = World(seed), 0
    for _ in range(n):
        facts = world.facts(n_fact)
        ids = [token for fact in facts for token in text.of_turn(world.tell(fact))]
        question, answer = world.ask(world.random.choice(facts))
        ids += text(USER, question)
        expected, value = text(ASSISTANT, answer), text.tokenizer.encode(told_value(answer, facts))
        best = model(torch.tensor([ids + expected]), use_cache=False).logits[0].argmax(-1)
        right += all(best[len(ids) + i - 1] == token for i, token in enumerate(expected) if token in value)
    return right / n


def told_value(answer: str, facts: list[Fact]) -> str:
    """The value of the fact that an answer tells."""
    return next(fact.value for fact in facts if fact.value in answer.replace(".", " ").split())


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024). torch's own multiplies in bfloat16, slowly where CPUs lack it."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)  # as large as AdamW's


def orthogonal(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to x, roughly, by five Newton-Schulz steps."""
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x if wide else x.T


def optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [Muon(matrices, rate), torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_share(step: int, cycles: Sequence[int]) -> float:
    """Share of the rate at a step: each cycle rises for 100 steps and falls to nothing over its last 40 %."""
    for n in cycles:
        if step < n:
            return min(1.0, (step + 1) / 100) * min(1.0, (n - step) / (0.4 * n))
        step -= n
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[1200, 800], help="steps of each cycle of the rate")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=2304)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    try:
        with held(args.directory):
            train(args)
    except DeltaMemError as error:
        sys.exit(str(error))


def train(args: argparse.Namespace) -> None:
    """Trains in a folder that no other run writes."""
    torch.manual_seed(args.seed)

    if (args.directory / "tokenizer.model").exists():
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.directory / "tokenizer.model"))
    else:
        tokenizer = train_tokenizer(args.directory, args.seed, args.vocab)
    write_hf_tokenizer(args.directory, tokenizer)
    text = Text(tokenizer)

    ids = {name: tokenizer.piece_to_id(piece) for name, piece in (("bos_token_id", "<s>"), ("eos_token_id", END))}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=tokenizer.vocab_size(), **CONFIG, **ids))
    steppers = optimizers(model, args.rate)
    checkpoint, step = args.directory / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        step = saved["step"]
        model.load_state_dict(saved["model"])
        for stepper, state in zip(steppers, saved["optimizers"]):
            stepper.load_state_dict(state)
    n_parameter = sum(p.numel() for p in model.parameters())
    print(f"{n_parameter / 1e6:.2f} million parameters, {tokenizer.vocab_size()} tokens, from step {step}", flush=True)

    log = (args.directory / "log.jsonl").open("a" if step else "w", encoding="utf-8")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("backbone", total=sum(args.steps), completed=step)
        begun, mean = time.monotonic(), 0.0
        while step < sum(args.steps):
            world = World(args.seed * 1_000_003 + step)
            share = rate_share(step, args.steps)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = args.rate * share
            loss = loss_of(model, *batch(world, text))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            step += 1
            mean = loss.item() if mean == 0 else 0.95 * mean + 0.05 * loss.item()
            progress.update(bar, advance=1, description=f"backbone, loss {mean:.3f}")
            if step % 100 == 0 or step == sum(args.steps):
                model.eval()
                row = {"step": step, "loss": mean, "seconds": round(time.monotonic() - begun)}
                row["recall"] = {n: recall(model, text, 7, n) for n in (1, 4, 8)}
                model.train()
                with replacing(checkpoint, PYTORCH) as temporary:
                    states = [stepper.state_dict() for stepper in steppers]
                    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, temporary)
                print(json.dumps(row), file=log, flush=True)  # after what it is of: no step is there twice
    model.save_pretrained(args.directory)


if __name__ == "__main__":
    main()
