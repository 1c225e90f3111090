"""`deltamem chat`: a conversation at the terminal, with commands for the memory.

The text of the conversation lives in the context and is dropped from its beginning when that is full; the memory keeps
what it wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import DeltaMemError, InputError
from .options import (
    add_memory_arguments,
    add_model_arguments,
    add_sampling_arguments,
    load,
    memory_saved,
    note,
    sampling,
)

if TYPE_CHECKING:
    from .llama import DeltaMemLlama

HELP = """\
/save [FILE]     save the memory (default: the file of --save-memory, or the one saved or loaded last)
/load [FILE]     load a memory
/reset           empty the memory, keep the text
/clear           forget the text, keep the memory
/memory          what the memory holds, per layer
/write on|off    write memory, or only read it
/help            this list
/quit            leave (also Ctrl-D)
Ctrl-C stops a reply."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_memory_arguments(parser)
    add_sampling_arguments(parser)
    group = parser.add_argument_group("chat")
    group.add_argument("-sys", "--system-prompt", "--system", default="", metavar="TEXT", help="system prompt")


def run(args: argparse.Namespace) -> int:
    llm = load(args)
    chat = Chat(llm, args.system_prompt, sampling(args, llm), args.save_memory or args.load_memory)
    with memory_saved(llm, args.save_memory):
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing
            note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        for line in _lines():
            if line.startswith("/"):
                try:
                    if not chat.command(line):
                        break
                except DeltaMemError as error:
                    note(str(error))
            elif line.strip():
                chat.say(line)
    return 0


class Chat:
    """One conversation: its turns, and the commands."""

    def __init__(
        self, llm: DeltaMemLlama, system_prompt: str, options: dict[str, Any], memory_file: str | None
    ) -> None:
        self.llm = llm
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.turns: list[dict[str, str]] = []
        self.options = options
        self.memory_file = memory_file

    def say(self, text: str) -> None:
        """One turn: streams the reply to standard output. Ctrl-C ends it; what was said so far counts."""
        self.turns.append({"role": "user", "content": text})
        reply = ""
        try:
            self._make_room()
            for piece in self._stream():
                reply += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note(" [stopped]")
        except InputError as error:
            self.turns.pop()
            note(str(error))
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.turns.append({"role": "assistant", "content": reply})

    def command(self, line: str) -> bool:
        """Runs one command line. Returns False to leave."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        memory = self.llm.memory
        if name in ("quit", "exit"):
            return False
        if name == "help":
            note(HELP)
        elif name == "save":
            memory.save(self._file(argument))
            note(f"memory saved to {self.memory_file}")
        elif name == "load":
            memory.load(self._file(argument))
            note(f"memory loaded from {self.memory_file}")
        elif name == "reset":
            memory.reset()
            note("the memory is empty")
        elif name == "clear":
            self.llm.reset()
            self.turns.clear()
            note("the text is forgotten, the memory stays")
        elif name == "memory":
            note(describe(self.llm))
        elif name == "write" and argument in ("on", "off"):
            memory.write = argument == "on"
            note(f"writes are {argument}")
        elif name == "write":
            raise InputError("/write on, or /write off")
        else:
            raise InputError(f"/{name} is no command: /help lists them")
        return True

    def _file(self, name: str) -> str:
        self.memory_file = name or self.memory_file
        if not self.memory_file:
            raise InputError("name a file")
        return self.memory_file

    def _stream(self) -> Iterator[str]:
        from .stream import TextStream, interruptible

        prompt, options = self._prompt(self.turns)
        stream = TextStream(self.llm, prompt, **options)
        yield from interruptible(iter(stream))
        if stream.finish_reason == "length" and self.options["n_predict"] <= 0:
            note(" [the context is full: the reply was cut]")

    def _prompt(self, turns: list[dict[str, str]]) -> tuple[list[int], dict[str, Any]]:
        """The tokens of these turns in the model's chat format, and the options with the format's stop strings."""
        tokens, ends = chat_prompt(self.llm, self.system + turns)
        return tokens, {**self.options, **ends, "stop": [*self.options["stop"], *ends["stop"]]}

    def _make_room(self) -> None:
        """Drops the oldest turns until the new one and a reply fit, and reads the others again without writing."""
        n_ctx = self.llm.n_ctx()
        n_predict = self.options["n_predict"]
        reserve = min(n_ctx // 4, n_predict if n_predict > 0 else 256)
        tokens, _ = self._prompt(self.turns)
        if len(tokens) + reserve <= n_ctx:
            return
        n_unread = len(tokens) - self.llm.longest_token_prefix(self.llm._input_ids.tolist(), tokens)
        n_turns = len(self.turns)
        turns = self.turns
        while len(tokens) + reserve > n_ctx:
            if len(turns) < 3:
                raise InputError(f"that is too long for a context of {n_ctx} tokens: raise --ctx-size or say less")
            turns = turns[2:]
            tokens, _ = self._prompt(turns)
        self.turns = turns
        note(f"[the context is full: the oldest {n_turns - len(turns)} messages leave the text, the memory keeps]")
        self.llm.reset()
        with _writes_off(self.llm):
            self.llm.eval(tokens[: max(0, len(tokens) - n_unread)])


def chat_prompt(llm: DeltaMemLlama, messages: list[dict[str, str]]) -> tuple[list[int], dict[str, Any]]:
    """The tokens that create_chat_completion evaluates for these messages, and what ends a reply.

    The latter are the chat format's options stop and stopping_criteria. Raises InputError if its template fails.
    """
    from llama_cpp.llama_chat_format import get_chat_completion_handler

    catcher = _PromptCatcher(llm)
    name = llm.chat_format
    handler = llm.chat_handler or llm._chat_handlers.get(name) or get_chat_completion_handler(name)
    try:
        handler(llama=catcher, messages=messages, stream=True)
    except Exception as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error
    return catcher.prompt, {"stop": catcher.stop, "stopping_criteria": catcher.stopping_criteria}


class _PromptCatcher:
    """Stands in for the model in a chat handler and keeps the prompt instead of evaluating it."""

    def __init__(self, llm: DeltaMemLlama) -> None:
        self._llm = llm
        self.prompt: list[int] = []
        self.stop: list[str] = []
        self.stopping_criteria: Any = None

    def create_completion(
        self, prompt: list[int], stop: list[str] | None = None, stopping_criteria: Any = None, **kwargs: Any
    ) -> Iterator[Any]:
        self.prompt, self.stop, self.stopping_criteria = prompt, stop or [], stopping_criteria
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def describe(llm: DeltaMemLlama) -> str:
    """The memory in a few lines: sizes, and the norm of each layer's state."""
    state = llm.memory.state
    n_layer, n_head, rank, _ = state.shape
    lines = [
        f"{n_layer} layers, {n_head} heads of rank {rank}, {state.nbytes / 1000:.1f} kB, "
        f"writes are {'on' if llm.memory.write else 'off'}; norm per layer:"
    ]
    norms = [
        f"{layer:3d}: {float((s * s).sum()) ** 0.5:<8.4g}" for layer, s in zip(llm.memory.layers, state.astype(float))
    ]
    lines += ["  ".join(norms[i : i + 6]).rstrip() for i in range(0, len(norms), 6)]
    return "\n".join(lines)


@contextlib.contextmanager
def _writes_off(llm: DeltaMemLlama) -> Iterator[None]:
    memory = llm.memory
    if not memory.attached or not memory.write:
        yield
        return
    memory.write = False
    try:
        yield
    finally:
        memory.write = True


def _lines() -> Iterator[str]:
    """Lines of the terminal or of a pipe. At the terminal, Ctrl-C on two prompts in a row ends them."""
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            if interrupted:
                return
            interrupted = True
            note("Ctrl-C again, or /quit, leaves")
            continue
        interrupted = False
        yield line
