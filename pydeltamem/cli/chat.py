"""`deltamem chat`: a conversation at the terminal, with commands for the memory and for going back."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
from collections.abc import Generator
from typing import Any

from ..errors import DeltaMemError, InputError
from ..formats.memory_file import check_writable
from ..runtime.names import nearest
from . import prompt
from .model_options import (
    RANDOM,
    add_memory_arguments,
    add_model_arguments,
    add_sampling_arguments,
    load,
    memory_attached,
    memory_saved,
    note,
    sampling,
    tell_of_context,
)
from .parser import text

COMMANDS = {
    "/again": (),
    "/edit": (),
    "/undo": (),
    "/save": prompt.FILE,
    "/load": prompt.FILE,
    "/reset": (),
    "/clear": (),
    "/rehearse": (),
    "/memory": (),
    "/write": ("on", "off"),
    "/help": (),
    "/quit": (),
}

ALONE = ("again", "undo", "reset", "clear", "rehearse", "memory", "help", "quit", "exit")  # nothing may follow

HELP = f"""\
/again           replace the last reply by another
/edit TEXT       replace your last message by TEXT
/undo            take back the last turn
/save [FILE]     save the memory (default: the file of --memory or --save-memory, or the one saved or loaded last)
/load [FILE]     load a memory
/reset           empty the memory, keep the text
/clear           forget the text, keep the memory
/rehearse        decode the text once more and write it again, so that the memory may keep more of it
/memory          show what the memory holds, per layer
/write on|off    write the memory, or only read it
/help            this list
/quit            leave (also Ctrl-D)
Ctrl-C stops a reply or a command. {prompt.HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = add_memory_arguments(parser)
    group.add_argument(
        "--memory", metavar="FILE", help="the memory of this conversation: loaded if it exists, saved after each turn"
    )
    add_sampling_arguments(parser)
    group = parser.add_argument_group("chat")
    group.add_argument(
        "-sys", "--system-prompt", "--system", type=text, default="", metavar="TEXT", help="system prompt"
    )
    group.add_argument(
        "--rehearse", action="store_true",
        help="before /clear and at the end, decode the text once more and write it again: the memory may keep more",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.memory:
        for other in ("no_memory", "load_memory", "save_memory"):
            if getattr(args, other):
                raise InputError(f"--memory and --{other.replace('_', '-')} do not go together: drop one of them")
        check_writable(args.memory)

    llm = load(args)
    if args.rehearse and not llm.memory.attached:
        raise InputError("--rehearse: there is no memory to write the text to: name an adapter by --deltamem")
    from ..conversation import Conversation
    from ..runtime.chat_format import has_template

    options = sampling(args, llm)
    seed = options.pop("seed")
    conversation = Conversation(llm, system=args.system_prompt, **options)
    if llm.memory.attached:
        conversation.memory.restore(llm.memory.copy())
        conversation.memory.write = llm.memory.write
    if args.memory:
        conversation.open(args.memory)
    chat = Chat(conversation, args.memory or args.save_memory or args.load_memory, args.rehearse, seed)
    with contextlib.closing(conversation), memory_saved(conversation.memory, args.save_memory):
        if not has_template(llm):
            note(
                f"{llm.model_path}: has no chat template: messages stand in Llama 2's form, so answers may be poor."
                " deltamem generate goes on with a text as it is"
            )
        note(memory_attached(llm, args, conversation.memory.n_written if llm.memory.attached else 0))
        tell_of_context(args, llm)
        if sys.stdin.isatty():
            note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        for said in prompt.said(COMMANDS):
            try:
                if not said.startswith("/"):
                    chat.say(said)
                elif not chat.command(said):
                    break
            except DeltaMemError as error:
                note(str(error))
            except KeyboardInterrupt:
                if not sys.stdin.isatty():  # where nobody can say that the chat is to end
                    raise
                note("[stopped]")
        if args.rehearse:
            chat.rehearse()
    return 0


class Chat:
    """A conversation at the terminal: prints replies, and runs the commands.

    rehearses: whether the text is decoded and written once more before `/clear` forgets it.
    seed: of the seeds of the replies: each has another one, so that `/again` says something else. None: random ones.
    """

    def __init__(
        self, conversation: Any, memory_file: str | None = None, rehearses: bool = False, seed: int | None = None
    ) -> None:
        self.conversation = conversation
        self.memory_file = memory_file
        self.rehearses = rehearses
        self._seeds = random.Random(seed)

    def _seed(self) -> int:
        """The seed of the next reply."""
        return self._seeds.randrange(RANDOM)

    def say(self, said: str) -> None:
        """One turn."""
        if said.strip():
            self._print(self.conversation.stream(_readable(said), seed=self._seed()))

    def _print(self, pieces: Generator[str]) -> None:
        """Streams a reply to standard output. Ctrl-C ends it, and is raised; what was said so far counts."""
        from ..runtime.interrupt import interruptible

        conversation = self.conversation
        n_dropped, n_predict = conversation.n_dropped, conversation.options.get("n_predict")
        begun = False
        try:
            with contextlib.closing(pieces):
                for piece in interruptible(pieces):
                    begun = True
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            begun = True
            if conversation.finish_reason == "length" and (n_predict is None or n_predict < 0):
                note(" [the context is full: the reply was cut]")
        except KeyboardInterrupt:
            begun = True
            raise
        finally:
            if begun:  # even if the memory could not be saved
                sys.stdout.write("\n")
                sys.stdout.flush()
            n_dropped = conversation.n_dropped - n_dropped
            if n_dropped:
                stays = ", the memory stays" if conversation.memory.attached else ""
                note(f"[the context is full: the oldest {n_dropped} messages left the text{stays}]")

    def command(self, said: str) -> bool:
        """Runs one command. Returns False to leave."""
        name, *rest = said[1:].split(None, 1) or [""]
        argument = rest[0].strip() if rest else ""
        conversation, memory = self.conversation, self.conversation.memory
        if argument and name in ALONE:  # a message, perhaps: /reset how do I …
            raise InputError(f"/{name} takes nothing after it. Begin with a space to say it")
        if name in ("quit", "exit"):
            return False
        if name == "help":
            note(HELP)
        elif name == "again":
            self._print(conversation.stream_regenerate(seed=self._seed()))
        elif name == "edit" and argument:
            self._print(conversation.stream_edit(_readable(argument), seed=self._seed()))
        elif name == "edit":
            raise InputError("/edit TEXT: say what you meant")
        elif name == "undo":
            conversation.undo()
            note("took back the last turn")
        elif name == "save":
            file = self._file(argument)
            memory.save(file)
            self.memory_file = file
            note(f"memory saved to {file}")
        elif name == "load":
            file = self._file(argument)
            memory.load(file)
            self.memory_file = file
            conversation.save()
            note(f"memory loaded from {file}")
        elif name == "reset":
            memory.reset()
            conversation.save()
            note("the memory is empty")
        elif name == "clear":
            if self.rehearses:
                self.rehearse()
            conversation.clear()
            note("the text is forgotten, the memory stays")
        elif name == "rehearse":
            self.rehearse()
            note("the text was decoded and written once more")
        elif name == "memory":
            note(describe(memory))
        elif name == "write" and argument in ("on", "off"):
            memory.write = argument == "on"
            note(f"writes are {argument}")
        elif name == "write":
            raise InputError("/write on, or /write off")
        else:
            near = nearest(f"/{name}", COMMANDS) or ": /help lists them."
            raise InputError(f"/{_readable(name)} is no command{near} Begin with a space to say it")
        return True

    def rehearse(self) -> None:
        """Decodes and writes the text once more. Says so before: it takes as long as the text took."""
        conversation, memory = self.conversation, self.conversation.memory
        if memory.attached and conversation.n_tokens:
            note(f"rehearsing {conversation.n_tokens} tokens …")
        memory.rehearse()
        conversation.save()

    def _file(self, name: str) -> str:
        if name:
            file = os.path.expanduser(os.fsdecode(name.encode("utf-8", "surrogateescape")))
            try:
                os.lstat(file)
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:  # too long, or with a zero in it
                raise InputError(f"{file!a} cannot be a file name: {getattr(error, 'strerror', error)}") from error
            return file
        if not self.memory_file:
            raise InputError("name a file after it, such as ada.memory")
        return self.memory_file


def _readable(said: str) -> str:
    """Text, with a replacement character for what is not UTF-8."""
    return said.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def describe(memory: Any) -> str:
    """The memory in a few lines: sizes, and the norm of each layer's state."""
    state = memory.state
    n_layer, n_head, rank, _ = state.shape
    heads = "1 head" if n_head == 1 else f"{n_head} heads"
    lines = [
        f"{n_layer} layers, {heads} of rank {rank}, {state.nbytes / 1000:.1f} kB, {memory.n_written} tokens written, "
        f"writes are {'on' if memory.write else 'off'}; norm per layer:"
    ]
    norms = [f"{layer:3d}: {float((s * s).sum()) ** 0.5:<8.4g}" for layer, s in zip(memory.layers, state.astype(float))]
    lines += ["  ".join(norms[i : i + 6]).rstrip() for i in range(0, len(norms), 6)]
    return "\n".join(lines)
