"""GBNF grammars of JSON schemas: llama_cpp's converter, where it lets text through that is no JSON, or takes a schema
for another.

llama_cpp's strings may hold line breaks and other control characters, and what a pattern excludes by a class may hold
quotes. Its constants and names of properties lose their escapes. Of a pattern it passes escapes, such as \\d, on to
GBNF, which has few, and leaves quotes and backslashes as they are.

It knows what a $ref refers to by the last part of its path only, so another rule may have that name. It follows no $ref
at the root, where classes that hold themselves have one, and none to the root. Of several types it keeps the names
only. Where any value may stand, it allows objects, or knows no grammar.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import shown_value
from . import library

_llama_grammar: Any = library.llama_cpp.llama_grammar
_PRIMITIVES, _RESERVED = _llama_grammar.PRIMITIVE_RULES, _llama_grammar.RESERVED_NAMES
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

# keywords that say nothing about values
_ANNOTATIONS = frozenset((
    "$anchor", "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description",
    "discriminator", "example", "examples", "readOnly", "title", "writeOnly",
))  # fmt: skip
_ANY = {"title": "any"}  # value; llama_cpp does not look at the items of an array if they are {}
_OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties"))
_MAX_PARTS = 20_000  # of a schema, each counted as often as something refers to it


class _Converter(_llama_grammar.SchemaConverter):  # type: ignore[misc]
    def _format_literal(self, literal: str) -> str:
        """The literal of a value in JSON, with its letters as they are: models seldom escape them."""
        plain = json.dumps(json.loads(literal), ensure_ascii=False)
        with contextlib.suppress(UnicodeEncodeError):  # half a character stays escaped
            plain.encode()
            literal = plain
        return '"' + "".join(_ESCAPES.get(each, each) for each in literal) + '"'

    def __init__(self, schema: Any, **options: Any) -> None:
        super().__init__(allow_fetch=False, dotall=False, raw_pattern=False, **options)
        self._schema = schema
        self._referred: dict[str, str] = {}  # $ref: the rule for it
        self._n_parts = 0

    def _resolve_ref(self, ref: str) -> str:
        """The rule for what a $ref refers to, which may refer to itself."""
        if ref not in self._referred:
            name = ref.rpartition("/")[2].lstrip("#") or "root"
            # stands for the real rule until there is one, so that no other gets its name
            rule = self._referred[ref] = self._add_rule(f"{name}-" if name in _RESERVED else name, f"ref {ref}")
            self._rules[rule] = self.visit(self._target(ref), rule)
        return self._referred[ref]

    def _target(self, ref: str) -> Any:
        """What a $ref refers to."""
        begin, *parts = ref.split("/")
        if begin != "#":
            raise ValueError(f"a $ref begins with #/, as names within the schema do, not as {shown_value(ref)}")
        target = self._schema
        for part in parts:
            part = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part) if isinstance(target, list) else part]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"there is nothing at {shown_value(ref)}") from None
        return target

    def visit(self, schema: Any, name: str) -> str:
        """The rule for a schema."""
        self._count()
        if schema is False:
            raise ValueError(f"no value is allowed for {name or 'the answer'}")
        schema = {} if schema is True else {key: each for key, each in schema.items() if key not in _ANNOTATIONS}
        if not schema and name:
            return self._add_primitive("value", _PRIMITIVES["value"])  # type: ignore[no-any-return]
        if "$ref" not in schema and "allOf" in schema:
            return self.visit(self._merged(schema), name)
        types = schema.get("type")
        if isinstance(types, list) and not {"$ref", "oneOf", "anyOf"} & schema.keys():
            if "enum" in schema or "const" in schema:
                del schema["type"]
            else:
                schema = {"anyOf": [{**schema, "type": each} for each in dict.fromkeys(types)]}
        if schema.get("prefixItems") and schema.get("items"):
            raise ValueError("items that follow prefixItems are not supported")
        if schema.get("items") in ({}, True) and "prefixItems" not in schema:
            schema["items"] = _ANY
        return super().visit(schema, name)  # type: ignore[no-any-return]

    def _merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """A schema without its allOf."""
        own = {key: each for key, each in schema.items() if key != "allOf" and key not in _ANNOTATIONS}
        if len(schema["allOf"]) == 1 and not own:
            return dict(schema["allOf"][0])
        merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for part in (*schema["allOf"], own):
            self._count()
            part = self._target(part["$ref"]) if "$ref" in part else part
            part = self._merged(part) if "allOf" in part else part
            if part.keys() - _OF_OBJECTS - _ANNOTATIONS or part.get("type", "object") != "object":
                raise ValueError("the parts of allOf are objects with properties, or there is only one part")
            merged["properties"] |= part.get("properties", {})
            merged["required"] += part.get("required", [])
        return merged

    def _count(self) -> None:
        """Ends a schema of few words whose objects refer to each other without end."""
        self._n_parts += 1
        if self._n_parts > _MAX_PARTS:
            raise ValueError(f"it has more than {_MAX_PARTS:,} parts")

    def _visit_pattern(self, pattern: str, name: str) -> str:
        plain = _UNITS.sub(_as_classes, pattern).replace("(?:", "(")
        plain = re.sub(r"([*+?}])\?", r"\1", plain)  # a lazy quantifier allows the same texts
        if re.search(r"[$^]", plain[1:-1]):
            raise ValueError(f"a pattern has ^ at its beginning and $ at its end only, not as {shown_value(pattern)}")
        return super()._visit_pattern(plain, name)  # type: ignore[no-any-return]


def json_schema_to_gbnf(schema: str, prop_order: Sequence[str] | None = None) -> str:
    """As llama_cpp's, whose exceptions it raises."""
    return _converted(schema, tuple(prop_order or ()))


@functools.lru_cache(maxsize=1)  # a forced call's is converted to check it, and then by llama_cpp's chat handler
def _converted(schema: str, prop_order: Sequence[str]) -> str:
    whole = json.loads(schema)
    converter = _Converter(whole, prop_order={name: i for i, name in enumerate(prop_order)})
    converter.visit(whole, "")
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
