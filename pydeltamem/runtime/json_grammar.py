"""GBNF grammars of JSON schemas: llama_cpp's converter, where it lets text through that is no JSON.

llama_cpp's strings may hold line breaks and other control characters, and what a pattern excludes by a class may hold
quotes. Its constants and names of properties lose their escapes. Of a pattern it passes escapes, such as \\d, on to
GBNF, which has few, and leaves quotes and backslashes as they are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from . import library

_llama_grammar: Any = library.llama_cpp.llama_grammar
_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(\^?)((?:\\.|[^\]\\])*)\]')  # literals and classes of characters
_NEVER_RAW = r'"\\\x00-\x1F'  # in a string of JSON
_ESCAPES = {"\\": "\\\\", '"': '\\"'}  # of GBNF

_ESCAPED = r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)"
_ITEMS = re.compile(rf"{_ESCAPED}|.", re.DOTALL)  # of a class
_UNITS = re.compile(  # of a pattern, what is not passed on as it is: escapes, classes, and what JSON wants escaped
    rf'{_ESCAPED}|\[(\^?)((?:\\.|[^\]\\])*)\]|["\x00-\x1F]', re.DOTALL
)
_LAST = 0x10FFFF
_CLASSES = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
          (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)],
}  # fmt: skip
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}
_IN_JSON = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\\\"}  # behind a backslash

Range = tuple[int, int]  # the first and the last character


class _Converter(_llama_grammar.SchemaConverter):  # type: ignore[misc]
    def _format_literal(self, literal: str) -> str:
        """The literal of a value in JSON, with its letters as they are: models seldom escape them."""
        plain = json.dumps(json.loads(literal), ensure_ascii=False)
        with contextlib.suppress(UnicodeEncodeError):  # half a character stays escaped
            plain.encode()
            literal = plain
        return '"' + "".join(_ESCAPES.get(each, each) for each in literal) + '"'

    def _visit_pattern(self, pattern: str, name: str) -> str:
        plain = _UNITS.sub(_as_classes, pattern).replace("(?:", "(")
        plain = re.sub(r"([*+?}])\?", r"\1", plain)  # a lazy quantifier allows the same texts
        if re.search(r"[$^]", plain[1:-1]):
            raise ValueError(f"a pattern has ^ at its beginning and $ at its end only, not as {pattern!r}")
        return super()._visit_pattern(plain, name)  # type: ignore[no-any-return]


def json_schema_to_gbnf(schema: str, prop_order: Sequence[str] | None = None) -> str:
    """As llama_cpp's, whose exceptions it raises."""
    return _converted(schema, tuple(prop_order or ()))


@functools.lru_cache(maxsize=1)  # a forced call's is converted to check it, and then by llama_cpp's chat handler
def _converted(schema: str, prop_order: Sequence[str]) -> str:
    order = {name: i for i, name in enumerate(prop_order)}
    converter = _Converter(prop_order=order, allow_fetch=False, dotall=False, raw_pattern=False)
    converter.visit(converter.resolve_refs(json.loads(schema), "stdin"), "")
    return _PARTS.sub(_excluding, converter.format_grammar())


def _excluding(part: re.Match[str]) -> str:
    """A class of the characters that it does not name, without those that JSON wants escaped."""
    return f"[^{_NEVER_RAW}{part[2]}]" if part[1] else part[0]


def _as_classes(unit: re.Match[str]) -> str:
    """A part of a pattern as a class whose characters stand in JSON as they are, and as the escapes of the others."""
    escape, negated, items = unit.groups()
    is_excluding = bool(negated) or escape in ("D", "W", "S")
    ranges = _ranges(unit[0] if items is None else items)
    if negated:
        ranges = _others(ranges)
    plain = _others([*_others(ranges), (0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
    ways = ["[" + "".join(map(_in_class, plain)) + "]"] if plain else []
    if not is_excluding:
        held = (code for code in _IN_JSON if any(first <= code <= last for first, last in ranges))
        ways += [rf"\\{_IN_JSON[code]}" for code in held]
    if not ways:
        raise ValueError(f"{unit[0]!r} in a pattern stands for no character")
    return ways[0] if ways == ways[:1] and plain else f"({'|'.join(ways)})"


def _ranges(items: str) -> list[Range]:
    """The characters of the items of a class, or of an escape."""
    ranges: list[Range] = []
    each = [_of_escape(escape[1]) if escape[1] else [(ord(escape[0]),) * 2] for escape in _ITEMS.finditer(items)]
    hyphens = [escape[0] == "-" for escape in _ITEMS.finditer(items)]
    i = 0
    while i < len(each):
        first, last = each[i], each[i + 2] if hyphens[i + 1 : i + 2] == [True] and i + 2 < len(each) else None
        if last is None or _is_class(first) or _is_class(last):
            ranges += first
            i += 1
            continue
        if first[0][0] > last[0][0]:
            raise ValueError(f"[{items}] in a pattern has a range that ends before it begins")
        ranges.append((first[0][0], last[0][0]))
        i += 3
    return ranges


def _is_class(ranges: Sequence[Range]) -> bool:
    return len(ranges) > 1 or ranges[0][0] != ranges[0][1]


def _of_escape(escape: str) -> list[Range]:
    """What stands behind a backslash, as the characters that it means."""
    if len(escape) > 1:
        return [(int(escape[1:], 16),) * 2]
    if escape.lower() in _CLASSES:
        ranges = _CLASSES[escape.lower()]
        return ranges if escape.islower() else _others(ranges)
    if escape in _CONTROLS:
        return [(_CONTROLS[escape],) * 2]
    if escape.isalnum():
        raise ValueError(f"\\{escape} in a pattern is not supported")
    return [(ord(escape),) * 2]


def _others(ranges: Sequence[Range]) -> list[Range]:
    """All characters but these."""
    others, at = [], 0
    for first, last in sorted(ranges):
        if at < first:
            others.append((at, first - 1))
        at = max(at, last + 1)
    return [*others, (at, _LAST)] if at <= _LAST else others


def _in_class(characters: Range) -> str:
    """A range in a class of GBNF."""
    ends = [chr(code) if chr(code).isalnum() and code < 0x80 else rf"\U{code:08X}" for code in characters]
    return ends[0] if characters[0] == characters[1] else "-".join(ends)


# for llama_cpp's chat handlers and `LlamaGrammar.from_json_schema`
_llama_grammar.json_schema_to_gbnf = json_schema_to_gbnf
