"""The tokenizer and chat template of a GGUF, by llama.cpp itself, so that training sees the tokens that run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from ..errors import ModelError


class GgufTokenizer:
    """The part of transformers' tokenizer interface that training needs. transformers' own tokenizer of a GGUF gives
    other tokens than llama.cpp for SentencePiece vocabularies.

    ends: tokens that end a reply, of which eos_token_id is only one.

    Raises ModelError if the file has no vocabulary, or a chat template that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        from llama_cpp import llama_vocab_is_eog
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        from ..runtime.library import Llama

        self.name_or_path = os.fspath(path)
        try:
            self._vocabulary = Llama(self.name_or_path, vocab_only=True, verbose=False)
        except TemplateError as error:
            raise ModelError(f"{self.name_or_path}: its chat template cannot be read: {error}") from error
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{self.name_or_path}: its vocabulary cannot be read: {error}") from error
        self.chat_template: str | None = self._vocabulary.metadata.get("tokenizer.chat_template")
        self.eos_token_id: int = self._vocabulary.token_eos()
        self.bos_token_id: int = self._vocabulary.token_bos()
        tokens, vocab = range(self._vocabulary.n_vocab()), self._vocabulary._model.vocab
        self.ends = frozenset(token for token in tokens if llama_vocab_is_eog(vocab, token))
        eos, bos = self._text(self.eos_token_id), self._text(self.bos_token_id)
        self._formatters: dict[bool, Any] = {}
        for asked in (False, True) if self.chat_template else ():
            self._formatters[asked] = Jinja2ChatFormatter(str(self.chat_template), eos, bos, asked)

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        ids = self._vocabulary.tokenize(text.encode("utf-8"), add_bos=add_special_tokens, special=True)
        return {"input_ids": ids}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: Literal[False] = False, add_generation_prompt: bool = False
    ) -> str:
        """The messages as text. Raises jinja2's TemplateError if the template refuses them."""
        try:
            return self._formatters[add_generation_prompt](messages=messages).prompt
        except ValueError as error:  # a template calls raise_exception
            raise TemplateError(str(error)) from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._vocabulary.detokenize(list(ids), special=True).decode("utf-8", errors="replace")

    def _text(self, token: int) -> str:
        return self.decode([token]) if token >= 0 else ""
