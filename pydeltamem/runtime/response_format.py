"""What an answer is held to: a response format as OpenAI's API has it, and JSON schemas, as grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, shown
from . import library
from .json_grammar import json_schema_to_gbnf
from .stream import LlamaGrammar, grammar_bytes

_llama_grammar: Any = library.llama_cpp.llama_grammar
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")
_COUNT = re.compile(r"(?<=[{,])\s*([0-9]+)\s*(?=[,}])")  # in a pattern
_MAX_REPEATED = 100_000


def grammar_of_format(wanted: Any, name: str = "response_format") -> Any:
    """The LlamaGrammar of a response format as OpenAI's API has it; None for any text. Raises InputError, which names
    it `name`.
    """
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if wanted is None or kind == "text":
        return None
    if kind == "json_object" and wanted.get("schema") is None:
        return LlamaGrammar.from_string(_llama_grammar.JSON_GBNF, verbose=False)
    if kind == "json_object":
        return grammar_of_schema(wanted["schema"], name)
    if kind == "json_schema":
        given = wanted.get("json_schema", wanted)  # /v1/responses has no object of its own for it
        return grammar_of_schema(given.get("schema") if isinstance(given, Mapping) else None, name)
    raise InputError(f'{name}: type is "text", "json_object" or "json_schema", not {shown(repr(kind))}')


def grammar_of_schema(schema: Any, name: str) -> Any:
    """The LlamaGrammar of a JSON schema. Raises InputError, which names it `name`, if answers cannot be held to it:
    llama_cpp would drop it without a word.
    """
    try:
        if not isinstance(schema, dict):
            raise ValueError(f"it is an object, not {shown(repr(schema))}")
        if _n_repeated(schema) > _MAX_REPEATED:
            raise ValueError(f"it repeats more than {_MAX_REPEATED:,} times")
        grammar = json_schema_to_gbnf(json.dumps(schema))
        grammar_bytes(grammar, "its grammar")  # which llama.cpp's parser survives
        return LlamaGrammar.from_string(grammar, verbose=False)
    except Exception as error:
        raise InputError(f"{name}: answers cannot be held to this JSON schema: {error}") from error


def _n_repeated(schema: Any) -> int:
    """How often the grammar of a schema repeats its parts: llama_cpp writes out each of them."""
    n, left = 0, [schema]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            n += sum(count for key in _REPEATS if isinstance(count := value.get(key), int) and count > 0)
            if isinstance(value.get("pattern"), str):
                n += sum(map(int, _COUNT.findall(value["pattern"])))
    return n
