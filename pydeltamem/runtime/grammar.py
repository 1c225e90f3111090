"""Grammars that answers follow: GBNF as callers give it, and those of response formats and JSON schemas."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, shown, shown_value
from . import library
from .json_grammar import json_schema_to_gbnf
from .model import Model

_llama = library.llama_cpp
_llama_grammar: Any = _llama.llama_grammar  # mypy does not know its types
LlamaGrammar: Any = _llama_grammar.LlamaGrammar

_MAX_NESTED = 2000
_PARENTHESES = re.compile(r'"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?|#[^\n]*|([()])', re.DOTALL)
_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")
_COUNT = re.compile(r"(?<=[{,])\s*([0-9]+)\s*(?=[,}])")  # in a pattern
_MAX_REPEATED = 100_000
_parsable: weakref.WeakSet[Any] = weakref.WeakSet()  # grammars
_checked_grammars: weakref.WeakSet[Any] = weakref.WeakSet()


def checked_grammar(llm: Model, text: Any, name: str = "grammar") -> Any:
    """A GBNF grammar, text or a LlamaGrammar, for sampling. Raises InputError, which names it `name`, if llama.cpp
    cannot use it.
    """
    from llama_cpp._utils import suppress_stdout_stderr

    # llama_cpp would follow the null pointer of a grammar that cannot be parsed; llama.cpp's parser prints why
    grammar = LlamaGrammar.from_string(text, verbose=False) if isinstance(text, str) else text
    if not isinstance(grammar, LlamaGrammar):
        raise InputError(f"{name} is GBNF text or a LlamaGrammar, not {shown_value(grammar)}")
    if grammar in _checked_grammars:
        return grammar
    _check_parsable(grammar, name)
    gbnf = grammar._grammar.encode()
    with library.silencing, library.errors_held() as log, suppress_stdout_stderr(disable=llm.verbose):
        sampler = llm._engine.slots.call(
            lambda: _llama.llama_sampler_init_grammar(llm._model.vocab, gbnf, grammar._root.encode())
        )
        reason = library.reason(log)
        log.clear()
    if not sampler:
        raise InputError(f"{name}: not a valid GBNF grammar with a root rule{reason}")
    _llama.llama_sampler_free(sampler)
    _checked_grammars.add(grammar)
    return grammar


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
    raise InputError(f'{name}: type is "text", "json_object" or "json_schema", not {shown_value(kind)}')


def grammar_of_schema(schema: Any, name: str) -> Any:
    """The LlamaGrammar of a JSON schema. Raises InputError, which names it `name`, if answers cannot be held to it:
    llama_cpp would drop it without a word.
    """
    try:
        if not isinstance(schema, dict):
            raise ValueError(f"it is an object, not {shown_value(schema)}")
        if _n_repeated(schema) > _MAX_REPEATED:
            raise ValueError(f"it repeats more than {_MAX_REPEATED:,} times")
        grammar = LlamaGrammar.from_string(json_schema_to_gbnf(json.dumps(schema)), verbose=False)
        _check_parsable(grammar, "its grammar")
        return grammar
    except Exception as error:
        raise InputError(f"{name}: answers cannot be held to this JSON schema: {error}") from error


def check_forced_call(tools: Any, functions: Any, choice: Any) -> None:
    """Raises InputError if the answer must call a function whose parameters it cannot be held to: llama_cpp would hold
    it to any JSON.
    """
    if not isinstance(choice, Mapping):
        return
    name = choice.get("name") or (choice.get("function") or {}).get("name")
    offered = [*(functions or ()), *(tool.get("function") or {} for tool in tools or ())]
    for function in offered:
        if function.get("name") == name and "parameters" in function:
            grammar_of_schema(function["parameters"], f"the parameters of {shown(name)}")


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


def _n_nested(grammar: str) -> int:
    """How deep the parentheses of a grammar are nested at most."""
    depth = deepest = 0
    for match in _PARENTHESES.finditer(grammar):
        if match[1] is not None:
            depth = depth + 1 if match[1] == "(" else max(depth - 1, 0)
            deepest = max(deepest, depth)
    return deepest


def _check_parsable(grammar: Any, name: str) -> None:
    """Raises InputError, which names it `name`, if llama.cpp's parser would not survive a LlamaGrammar."""
    if grammar in _parsable:
        return
    text = grammar._grammar
    if "\0" in text:  # where the parser would take the text for ended
        raise InputError(f"{name}: it has a null character")
    if _n_nested(text) > _MAX_NESTED:  # the parser calls itself for each, until the stack ends
        raise InputError(f"{name}: its parentheses are nested deeper than {_MAX_NESTED:,} levels")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: no UTF-8: {error.reason} at character {error.start}") from None
    _parsable.add(grammar)
