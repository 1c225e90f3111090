"""Command-line arguments: a parser, and types for it. Each returns the value or says what is wrong with the text."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import InputError, shown_value
from ..runtime.names import nearest

LARGEST = 2**31 - 1  # what llama.cpp's numbers hold


def sentence(summary: str) -> str:
    """A summary as the description of a command."""
    return f"{summary[0].upper()}{summary[1:]}."


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a subparser itself refuses what it does not know, with its own usage and the nearest
    option. argparse leaves that to the outermost parser. Text may begin with a dash, and what begins as an option of
    one letter is no such option with its value: of llama.cpp's options -hf would be -h, and -no-cnv be -n.
    """

    def parse_known_args(  # type: ignore[override] # overloaded there
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        if args is not None:
            args = list(self._joined(args))
            self._refuse_unknown(args)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return namespace, unknown

    def _joined(self, args: Sequence[str]) -> Iterator[str]:
        """The arguments, with text that begins with a dash joined to its option: argparse takes it for an option."""
        options, rest = self._option_string_actions, iter(args)
        for arg in rest:
            if arg in options and options[arg].type is text and (given := next(rest, None)) is not None:
                is_text = given.startswith("-") and given not in options and given != "--"
                yield from (f"{arg}={given}",) if is_text else (arg, given)
            else:
                yield arg
            if arg == "--":
                yield from rest

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Refuses an option or a command that there is not, before argparse reports a missing argument instead."""
        commands = next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)
        rest, explains = iter(args), False
        for arg in rest:
            name, equals, _ = arg.partition("=")
            if arg == "--":
                return
            if arg.startswith("-"):
                found = [action for option, action in self._option_string_actions.items() if option.startswith(name)]
                if not found and " " not in name and not self._holds_number(name):
                    self._refuse(name)
                if commands and found and found[0].nargs is None and not equals:
                    next(rest, None)  # its value
                explains |= any(action.nargs == 0 for action in found)  # --help, --version
            elif commands and arg not in commands.choices:
                near = nearest(arg, commands.choices)
                self.error(f"there is no {self.prog} {arg}{near} ({self.prog} --help lists what there is)")
            elif commands:
                return  # what follows is the command's
        if commands and not explains:
            self.error(f"name one of these after {self.prog}: {', '.join(commands.choices)}")

    def _holds_number(self, arg: str) -> bool:
        """Whether it is a number, - alone, or an option of one letter with its number, as -t4."""
        if arg[:2] in self._option_string_actions:
            return re.fullmatch(r"-.-?[\d.,]+", arg) is not None
        return re.fullmatch(r"-(\.?\d.*)?", arg) is not None

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse drops what went wrong; here a full disk, or a reader that is gone, ends a command as ever."""
        if message and file is sys.stdout:
            file.write(message)
            file.flush()
        else:
            super()._print_message(message, file)

    def _refuse(self, arg: str) -> None:
        if arg.startswith("-"):
            self.error(f"there is no option {arg}{nearest(arg, self._option_string_actions)}")
        self.error(f"{arg} is one argument too many")


def text(given: str) -> str:
    """Text as UTF-8, whatever the locale is."""
    try:
        return utf8(given)
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{given!a} is not UTF-8 text") from None


def utf8(given: str, errors: str = "strict") -> str:
    """What was typed, as UTF-8 if the locale could not decode it. Raises UnicodeDecodeError if it is not UTF-8."""
    try:
        given.encode("utf-8")
        return given
    except UnicodeEncodeError:  # Python keeps bytes that the locale does not know as surrogates
        return os.fsencode(given).decode("utf-8", errors)


_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def unescaped(given: str) -> str:
    """Text with its escapes replaced by what they stand for, as llama.cpp's programs do it. Raises InputError if that
    is no UTF-8.
    """

    def meant(escape: re.Match[bytes]) -> bytes:
        name = escape[1]
        return bytes.fromhex(name[1:].decode()) if name[:1] == b"x" else _ESCAPES.get(name, name)

    try:
        return re.sub(rb"\\([nrt'\"\\]|x[0-9A-Fa-f]{2})", meant, given.encode()).decode()
    except UnicodeDecodeError:
        raise InputError(f"{shown_value(given)}: its escapes make no UTF-8: correct them, or add --no-escape") from None


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def at_least(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """A whole number in this range."""

    def check(text: str) -> int:
        value = integer(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not in {least} to {most}")
        return value

    return check


def count(text: str) -> int:
    """0 or more."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{value} is more than {LARGEST}")
    return value


def positive(text: str) -> int:
    """1 or more."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def finite(text: str) -> float:
    value = number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def not_negative(text: str) -> float:
    """0 or more, and finite."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def probability(text: str) -> float:
    """In [0, 1]."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 1")
    return value


def share(text: str) -> float:
    """In [0, 1)."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def positive_number(text: str) -> float:
    """Above 0, and finite."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def duration(text: str) -> float:
    """Seconds, 0 or more."""
    value = number(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def integers(text: str) -> list[int]:
    """Whole numbers with commas between, each 0 or more."""
    try:
        return [count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2,4") from None


def names(text: str) -> list[str]:
    """Names with commas between, each once."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names such as one,two")
    return found


def gpu_layers(text: str) -> int:
    """A number of layers; all or auto: -1."""
    return -1 if text in ("all", "auto") else at_least(-1)(text)
