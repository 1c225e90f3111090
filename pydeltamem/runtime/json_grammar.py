"""GBNF grammars of JSON schemas: llama_cpp's converter, where it lets text through that is no JSON.

llama_cpp's strings may hold line breaks and other control characters, and what a pattern excludes by a class may hold
quotes. Its constants and names of properties lose their escapes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from . import library

_llama_grammar: Any = library.llama_cpp.llama_grammar
_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|\[(\^?)((?:\\.|[^\]\\])*)\]')  # literals and classes of characters
_NEVER_RAW = r'"\\\x00-\x1F'  # in a string of JSON
_ESCAPES = {"\\": "\\\\", '"': '\\"'}  # of GBNF


class _Converter(_llama_grammar.SchemaConverter):  # type: ignore[misc]
    def _format_literal(self, literal: str) -> str:
        """The literal of a value in JSON, with its letters as they are: models seldom escape them."""
        plain = json.dumps(json.loads(literal), ensure_ascii=False)
        with contextlib.suppress(UnicodeEncodeError):  # half a character stays escaped
            plain.encode()
            literal = plain
        return '"' + "".join(_ESCAPES.get(each, each) for each in literal) + '"'


def json_schema_to_gbnf(schema: str, prop_order: Sequence[str] | None = None) -> str:
    """As llama_cpp's, whose exceptions it raises."""
    order = {name: i for i, name in enumerate(prop_order or ())}
    converter = _Converter(prop_order=order, allow_fetch=False, dotall=False, raw_pattern=False)
    converter.visit(converter.resolve_refs(json.loads(schema), "stdin"), "")
    return _PARTS.sub(_excluding, converter.format_grammar())


def _excluding(part: re.Match[str]) -> str:
    """A class of the characters that it does not name, without those that JSON wants escaped."""
    return f"[^{_NEVER_RAW}{part[2]}]" if part[1] else part[0]


def of_schema(schema: Any) -> Any:
    """A LlamaGrammar. Raises llama_cpp's exceptions for a schema that it cannot convert."""
    return _llama_grammar.LlamaGrammar.from_string(json_schema_to_gbnf(json.dumps(schema)), verbose=False)


def of_json() -> Any:
    """A LlamaGrammar of any object."""
    return _llama_grammar.LlamaGrammar.from_string(_llama_grammar.JSON_GBNF, verbose=False)


def install() -> None:
    """Has llama_cpp's chat handlers and `LlamaGrammar.from_json_schema` use these grammars."""
    _llama_grammar.json_schema_to_gbnf = json_schema_to_gbnf
