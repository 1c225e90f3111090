"""`deltamem demo`: tells a model some facts, throws the text away, and asks for them.

The same frozen model without a memory answers too, from the same empty context. The model is a real one if the package
has an adapter for it and the model can be fetched; else the small one of the package, with its world of a few hundred
words.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..conversation import Conversation
from ..errors import FetchError, InputError, OutputError
from ..evals.case import Case
from ..evals.reader import Asked, NativeReader
from ..evals.stories import STORIES
from ..evals.world import Turn, World, rivals
from ..hub import adapter_file, model_file
from ..models import MEMORIES, REAL_MODEL, default_files, real_adapter
from . import prompt
from .model_options import ADAPTER_HELP, MODEL_HELP, ended_by_ctrl_c, packed_adapter
from .parser import duration
from .picture import picture

N_CTX = 1024
MAX_REPLY = 64  # tokens
PICTURES = 16  # of states
HELP = """\
Tell it something ("{told}"), /forget to throw the text away, ask ("{asked}"). \
A message that ends with a question mark leaves the memory as it was.{limits}
/forget   throw the text away, keep the memory
/reset    empty the memory too
/facts    examples
/quit     leave (also Ctrl-D)"""
LIMITS = """ \
It knows the words of its small world only: names, cities, jobs, pets, colours, food, sports, music, languages."""


@dataclass(frozen=True)
class Cast:
    """The model that the demo shows, and its adapter."""

    model: str
    adapter: str
    is_small: bool  # it knows its small world only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interactive", action="store_true", help="talk to the model yourself")
    parser.add_argument(
        "-m", "--model", metavar="FILE",
        help=f"{MODEL_HELP}; else {REAL_MODEL}, or the small model if {REAL_MODEL} cannot be fetched",
    )  # fmt: skip
    parser.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    parser.add_argument("--strategy", choices=MEMORIES, help="use the small model, with its adapter of this kind")
    parser.add_argument(
        "--facts", type=int, choices=range(1, 17), default=4, metavar="N",
        help="facts to tell the small model (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed of what is told (another each time)")
    parser.add_argument(
        "--delay", type=duration, default=0.15, metavar="S", help="seconds of pause after a message (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    cast = _cast(args)
    console = Console(highlight=False)
    rehearses = not (cast.is_small or args.interactive)  # the small one was trained on texts written once
    with ended_by_ctrl_c():
        reader = NativeReader(cast.model, cast.adapter, n_ctx=N_CTX, parallel=1, rehearses=rehearses, unpack="rest")
    try:
        return _converse(console, reader, cast) if args.interactive else _show(console, reader, cast, args)
    finally:
        reader.close()


def _cast(args: argparse.Namespace) -> Cast:
    """The model to show. If it is not the real one, prints why."""
    if args.strategy and (args.model or args.deltamem):
        raise InputError("--strategy selects an adapter of the small model of the package: drop -m and --deltamem")
    if args.model or args.deltamem:
        model = model_file(args.model or REAL_MODEL)
        named = adapter_file(args.deltamem, model) if args.deltamem else packed_adapter(model)
        if named is None:
            raise InputError(f"--deltamem: name an adapter for {args.model}")
        return Cast(model, named, False)
    adapter = real_adapter()
    if not args.strategy:
        reason = f"this package has no adapter for {REAL_MODEL}"
        if adapter is not None:
            try:
                return Cast(model_file(REAL_MODEL), str(adapter), False)
            except (FetchError, OutputError) as error:  # no network, or no place to keep the model
                reason = str(error)
        print(f"The small model of the package is shown: {reason}.", file=sys.stderr)
    small, memories = default_files()
    return Cast(str(small), str(memories[args.strategy or "msw"]), True)


def _script(cast: Cast, args: argparse.Namespace) -> tuple[tuple[Turn, ...], list[Case]]:
    """What is told, and what is asked afterwards."""
    draw = random.Random(int(time.time()) if args.seed is None else args.seed)
    if not cast.is_small:
        story = draw.choice(STORIES)
        return story.turns, [Case("", "", story.turns, question, values) for question, values in story.asks]
    world = World(draw.randrange(1 << 32), part="new_pair")  # no adapter was trained on these facts
    facts = world.facts(args.facts)
    turns = [world.tell(fact) for fact in facts]
    for _ in range(3):
        turns.insert(world.random.randint(0, len(turns)), world.chatter())
    told = tuple(turns)
    return told, [Case("", "", told, world.ask(fact)[0], (fact.value,), rivals(fact)) for fact in facts]


def _show(console: Console, reader: NativeReader, cast: Cast, args: argparse.Namespace) -> int:
    turns, cases = _script(cast, args)
    n_token = reader.n_tokens(turns)
    memory = reader.read(turns)
    layers = reader.llm.memory.layers
    name = reader.llm.metadata.get("general.name", cast.model)
    console.print(
        f"A frozen model, {name}, decodes {len(turns)} messages and their replies, {n_token} tokens"
        f"{', twice' if reader.rehearses else ''}. Its memory: {memory.state.size} numbers in {len(layers)} layers.\n",
        markup=False,
    )
    for user, reply in turns:
        console.print(f"  you: {user}\n  it:  {reply}", markup=False)
        if console.is_terminal:
            time.sleep(args.delay)
    console.print(f"\nThe text is thrown away: {n_token} tokens are gone, the memory stays. Now it is asked.\n")

    questions = tuple(case.question for case in cases)
    with_memory = reader.answer([Asked(memory, (), questions)])[0]
    reader.attach(None)
    alone = reader.answer([Asked(None, (), questions)])[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("question", "with the memory", "", "the frozen model alone", ""):
        table.add_column(title)
    right = [0, 0]
    for case, *answers in zip(cases, with_memory, alone):
        cells = []
        for i, answer in enumerate(answers):
            good = case.is_right(answer)
            right[i] += good
            cells += [escape(answer), "[green]✓[/]" if good else "[red]✗[/]"]
        table.add_row(escape(case.question), *cells)
    table.add_section()
    table.add_row("right", f"{right[0]} of {len(cases)}", "", f"{right[1]} of {len(cases)}", "")
    console.print(table)
    _draw(console, memory.state, layers)
    console.print(
        "\n`deltamem demo --interactive` lets you tell it something yourself; `deltamem eval recall` measures it."
    )
    return 0


def _converse(console: Console, reader: NativeReader, cast: Cast) -> int:
    first = ("My name is Anna.", "What is my name?") if cast.is_small else ("I live in Lisbon.", "Where do I live?")
    help_ = HELP.format(told=first[0], asked=first[1], limits=LIMITS if cast.is_small else "")
    console.print(help_, markup=False)
    with Conversation(reader.llm, n_predict=MAX_REPLY, temp=0.0) as talk:
        for said in prompt.said({"/forget": (), "/reset": (), "/facts": (), "/help": (), "/quit": ()}):
            line = " ".join(said.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split())
            if line == "/quit":
                break
            if line == "/forget":
                n_token = talk.n_tokens
                talk.clear()
                console.print(f"{n_token} tokens of text are gone, the memory stays.")
            elif line == "/reset":
                talk.clear()
                talk.memory.reset()
                console.print("Text and memory are empty.")
            elif line == "/facts":
                for told, asked in _examples(cast):
                    console.print(f"  {told}  {asked}", markup=False)
            elif line.startswith("/"):
                console.print(help_, markup=False)
            elif line:
                _say(console, talk, line)
        state = talk.memory.state
        if state.any():
            _draw(console, state, reader.llm.memory.layers)
    return 0


def _say(console: Console, talk: Conversation, line: str) -> None:
    """One turn, which Ctrl-C ends. Prints an error if it does not fit; a full text loses its oldest turns."""
    before = talk.memory.copy()
    try:
        console.print(talk.say(line).strip(), markup=False)
    except InputError as error:
        console.print(str(error), markup=False)
        return
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        console.print("[stopped]", markup=False)
    if line.endswith("?"):
        talk.memory.restore(before)  # not write = False: adapters are trained with questions that write
    change = float(np.linalg.norm(talk.memory.state - before.state))
    console.print(f"[dim]the memory changed by {change:.2f}[/]" if change else "[dim]the memory was read[/]")


def _examples(cast: Cast) -> Sequence[tuple[str, str]]:
    if cast.is_small:
        world = World(int(time.time()))
        return [(world.tell(fact)[0], world.ask(fact)[0]) for fact in world.facts(5)]
    story = random.choice(STORIES)
    return list(zip((user for user, _ in story.turns), (question for question, _ in story.asks)))


def _draw(console: Console, state: npt.NDArray[np.float32], layers: Sequence[int]) -> None:
    """Draws the states of the layers with the largest norms: a picture per head, each layer on its own scale."""
    n_layer = max(1, PICTURES // state.shape[1])
    most = sorted(np.argsort(-np.linalg.norm(state.reshape(len(state), -1), axis=1), kind="stable")[:n_layer])
    which = "by layer and head" if len(most) == len(layers) else f"of the {len(most)} layers that hold most"
    console.print(f"\nThe memory after that, {which}; rows are values, columns are keys:")
    coloured = console.color_system is not None and not console.no_color
    pictures = [
        picture(
            matrix,
            float(np.abs(state[i]).max()),
            coloured,
            f"{layers[i]}" if state.shape[1] == 1 else f"{layers[i]}.{head}",
        )
        for i in most
        for head, matrix in enumerate(state[i])
    ]
    console.print(Columns(pictures, padding=(0, 1)))
