"""Tokens as bytes, and bytes as tokens.

llama_cpp's own `detokenize` drops every token of more than 32 bytes, and ends the process at a token id that the model
does not have; `tokenize` ends it at bytes beyond Unicode.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, shown_value
from . import library
from .values import whole

_llama = library.llama_cpp


def piece(vocab: Any, token: int, special: bool = False) -> bytes:
    """The bytes of a token in the vocabulary. Control tokens have none unless `special`."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = _llama.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def token_text(vocab: Any, token: int) -> str:
    """The name of a token in log probabilities: its text, or `bytes:\\xe2` if that is no UTF-8 by itself."""
    data = piece(vocab, token, special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def encoded(text: str, what: str) -> bytes:
    """The text as UTF-8. Raises InputError, which calls it `what`, if it holds half a character (a lone surrogate)."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is no Unicode text: {error.reason} at character {error.start}") from None


# what UTF-8 would be of characters after U+10FFFF: llama.cpp replaces all else that is no UTF-8
BEYOND_UNICODE = re.compile(rb"(?:\xf4[\x90-\xbf]|[\xf5-\xf7][\x80-\xbf])[\x80-\xbf]{2}")
REPLACEMENT = "\ufffd".encode()


class Tokenizer(library.LlamaTokenizer):
    """The tokenizer of a model."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """The tokens of a text, in which bytes that are no UTF-8 are the replacement character.

        Raises InputError if it is not given as bytes.
        """
        if not isinstance(text, bytes):
            raise InputError(f"tokenize takes the bytes of a text, as its encode() gives them, not {shown_value(text)}")
        tokens: list[int] = super().tokenize(BEYOND_UNICODE.sub(REPLACEMENT, text), add_bos, special)
        return tokens

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of tokens, without the space that the tokenizer put after a token that begins a text.

        Raises InputError if the model has no such token.
        """
        vocab, n_vocab = self._model.vocab, self._model.n_vocab()
        tokens = [whole(token, "a token id") for token in tokens]
        for token in tokens:
            if not 0 <= token < n_vocab:
                raise InputError(f"{token} is no token id of this model: they are 0 to {n_vocab - 1}")
        data = b"".join(piece(vocab, token, special) for token in tokens)
        begins = len(tokens) > 0 and tokens[0] == self._model.token_bos()
        return data.removeprefix(b" ") if begins else data
