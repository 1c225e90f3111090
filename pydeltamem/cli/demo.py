"""`deltamem demo`: tells the package's small model some facts, throws the text away, and asks.

Beside it the same frozen model without a memory, which has the same empty context. The states are drawn as they change.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..evals.reader import MAX_ANSWER, NativeReader
from ..evals.world import World, is_recalled
from ..models import MEMORIES, default_files
from . import prompt
from .parser import duration
from .picture import picture

HELP = """\
Tell it something ("My name is Anna.", "I live in Lima."), /forget to throw the text away, ask ("Where do I live?").
It knows the words of its small world only: names, cities, jobs, pets, colours, food, sports, music, months, languages.
/forget   throw the text away, keep the memory     /reset   empty the memory too     /facts   examples     /quit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interactive", action="store_true", help="tell it facts of your own")
    parser.add_argument("--strategy", choices=MEMORIES, default="msw", help="which of its memories (%(default)s)")
    parser.add_argument(
        "--facts", type=int, choices=range(1, 17), default=4, metavar="N", help="facts told (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="which facts (others each time)")
    parser.add_argument(
        "--delay", type=duration, default=0.15, metavar="S", help="pause after a message (%(default)s s)"
    )


def run(args: argparse.Namespace) -> int:
    model, memories = default_files()
    console = Console(highlight=False)
    with ExitStack() as stack:
        reader = NativeReader(model, memories[args.strategy])
        plain = NativeReader(model, None)
        stack.callback(reader.llm.close)
        stack.callback(plain.llm.close)
        if args.interactive:
            return _converse(console, reader)
        return _show(console, reader, plain, args)


def _show(console: Console, reader: NativeReader, plain: NativeReader, args: argparse.Namespace) -> int:
    seed = int(time.time()) if args.seed is None else args.seed
    world = World(seed, part="new_pair")  # none of them was told so while the memory was trained
    facts = world.facts(args.facts)
    turns = [world.tell(fact) for fact in facts]
    for _ in range(3):
        turns.insert(world.random.randint(0, len(turns)), world.chatter())
    n_token = reader.n_tokens(turns)
    state = reader.llm.memory.state
    console.print(
        f"A frozen model of {plain.llm.metadata.get('general.name', 'the package')} reads {len(turns)} turns,"
        f" {n_token} tokens. Its memory: {state.size} numbers in {len(reader.llm.memory.layers)} layers"
        f" ({args.strategy.upper()}).\n"
    )
    reader.begin(write=True)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=20, transient=True) as live:
            for i, turn in enumerate(turns):
                reader.read([turn])
                said = Group(
                    *(Text(f"  you: {user}\n  it:  {answer}") for user, answer in turns[max(0, i - 3) : i + 1])
                )
                live.update(Group(said, Text(), _states(console, reader)))
                time.sleep(args.delay)
    else:
        for turn in turns:
            reader.read([turn])
    for user, answer in turns:
        console.print(f"  you: {user}\n  it:  {answer}")
    console.print("\nThe memory after that; rows are values, columns are keys, a picture for each layer and head:")
    console.print(_states(console, reader))
    reader.forget_text()
    console.print(f"\nThe text is thrown away: {n_token} tokens are gone, the memory stays. Now it is asked.\n")

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("question", "with the memory", "", "the frozen model alone", ""):
        table.add_column(name)
    right = [0, 0]
    kept = reader.llm.memory.state
    for fact in facts:
        question, _ = world.ask(fact)
        reader.forget_text()
        reader.llm.memory.state = kept  # each question meets the memory as the conversation left it
        plain.begin(write=False)
        answers = [reader.answer(question), plain.answer(question)]
        marks = []
        for i, answer in enumerate(answers):
            good = is_recalled(answer, fact)
            right[i] += good
            marks.append("[green]✓[/]" if good else "[red]✗[/]")
        table.add_row(question, answers[0], marks[0], answers[1], marks[1])
    table.add_section()
    table.add_row("right", f"{right[0]} of {len(facts)}", "", f"{right[1]} of {len(facts)}", "")
    console.print(table)
    console.print(
        "\n`deltamem demo --interactive` lets you tell it something yourself; `deltamem eval recall` measures it."
    )
    return 0


def _converse(console: Console, reader: NativeReader) -> int:
    reader.begin(write=True)
    console.print(HELP)
    for said in prompt.said({"/forget": (), "/reset": (), "/facts": (), "/help": (), "/quit": ()}):
        line = " ".join(said.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split())
        if not line:
            continue
        if line == "/quit":
            break
        if line == "/forget":
            n_token = reader.llm.n_tokens
            reader.forget_text()
            console.print(f"{n_token} tokens of text are gone, the memory stays.")
        elif line == "/reset":
            reader.begin(write=True)
            console.print("Text and memory are empty.")
        elif line == "/facts":
            world = World(int(time.time()))
            for fact in world.facts(5):
                console.print(f"  {world.tell(fact)[0]}  {world.ask(fact)[0]}", markup=False)
        elif line.startswith("/"):
            console.print(HELP)
        elif (n_token := reader.n_tokens([(line, "")])) + MAX_ANSWER > reader.llm.n_ctx():
            console.print(f"That is too long: {n_token} tokens, the model reads {reader.llm.n_ctx()}.")
        elif reader.llm.n_tokens + n_token + MAX_ANSWER > reader.llm.n_ctx():
            console.print("The text is full: /forget it.")
        else:
            before = reader.llm.memory.state
            console.print(reader.answer(line), markup=False)
            change = float(np.linalg.norm(reader.llm.memory.state - before))
            console.print(_states(console, reader))
            console.print(f"[dim]the memory changed by {change:.2f}[/]")
    return 0


def _states(console: Console, reader: NativeReader) -> Columns:
    state = reader.llm.memory.state
    largest = float(np.abs(state).max())
    coloured = console.color_system is not None and not console.no_color
    if not np.isfinite(largest):
        raise InputError("the memory holds values that are not finite")
    pictures = [
        picture(matrix, largest, coloured, f"{layer}" if len(heads) == 1 else f"{layer}.{head}")
        for layer, heads in zip(reader.llm.memory.layers, state)
        for head, matrix in enumerate(heads)
    ]
    return Columns(pictures, padding=(0, 1))
