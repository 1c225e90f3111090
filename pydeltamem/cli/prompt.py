"""Reads messages: from the terminal, where they may have several lines, or from a pipe, one per line."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .parser import utf8

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.key_binding import KeyBindings

FILE = "file"  # a command that takes the name of a file

HELP = """\
Alt-Enter, or \\ at the end of a line, begins another line; pasted text is one message; Tab completes commands."""


def said(commands: Mapping[str, str | Sequence[str]]) -> Iterator[str]:
    """The messages, one after the other: UTF-8, with surrogates for bytes that are not.

    Args:
        commands: the commands, which begin with a slash, and what Tab offers after each: FILE, or words.
    """
    is_seen = sys.stdout.isatty() or sys.stderr.isatty()  # else the prompt would go to a file
    return _typed(commands) if sys.stdin.isatty() and is_seen else _piped()


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")  # \r within a line stays
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _typed(commands: Mapping[str, str | Sequence[str]]) -> Iterator[str]:
    """Messages from the terminal. Ctrl-D ends them, or Ctrl-C on two empty prompts in a row."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        completer=_completer(commands),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_suspend=True,  # by Ctrl-Z, as while a reply is generated
        output=create_output(always_prefer_tty=True),  # replies may go to a file
    )
    interrupted = False
    while True:
        try:
            text = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            is_empty = not session.default_buffer.text  # else it throws away what was typed, as in a shell
            if interrupted and is_empty:
                return
            interrupted = is_empty
            if is_empty:
                print("Ctrl-C again, or Ctrl-D, leaves", file=sys.stderr, flush=True)
            continue
        interrupted = False
        yield utf8(text.strip("\r\n"), "surrogateescape")


def _keys() -> KeyBindings:
    """Enter ends the message, except after a backslash."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Mapping[str, str | Sequence[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            name, space, begun = document.text_before_cursor.partition(" ")
            if not space:
                words: Sequence[str] = list(commands)
                begun = name
            elif commands.get(name, ()) == FILE:
                yield from files.get_completions(Document(begun), event)
                return
            else:
                words = commands.get(name, ())
            yield from (Completion(word, -len(begun)) for word in words if word.startswith(begun))

    return Commands()
