"""`DeltaMemLlama.create_completion`: a prompt, what follows it, and the log probabilities of both.

llama_cpp's own takes the log probabilities of a prompt from the wrong row, generates to the end of the context when
`max_tokens` is 0, ignores `logit_bias` when `logits_processor` is given, and loses a reply that ends within a character
(docs/reference/llama-methods.md).
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import math
import random
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, shown_value
from . import library
from .assembler import Assembler
from .history import n_common
from .logprobs import Scored, listed, scored
from .model import Model
from .tokenizer import Tokenizer, encoded, piece
from .values import functions, number, stop_strings, whole

_llama = library.llama_cpp


class Completion:
    """One call of `create_completion`, with its arguments.

    errors: how bytes that are no UTF-8 are treated, as `bytes.decode`. Raises InputError if the arguments do not fit.

    Attributes:
        generated: the tokens so far.
        finish_reason: "stop" after the end of the text, a stop string or a criterion, "length" after max_tokens or in a
            full context.
    """

    def __init__(
        self,
        llm: Model,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None,
        temperature: float,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        suffix: str | None = None,
        logprobs: int | None = None,
        echo: bool = False,
        model: str | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        errors: str = "ignore",
        **sampling: Any,
    ) -> None:
        self.llm = llm
        self.logprobs, self.echo, self._errors = logprobs, echo, errors
        self.seed = None if seed is None else whole(seed, "seed")
        self._vocab = llm._model.vocab
        if logprobs is not None and whole(logprobs, "logprobs") < 0:
            raise InputError(f"logprobs is a number of tokens, 0 or more, not {logprobs}")
        if logprobs is not None and not llm._logits_all:
            raise InputError("logprobs needs the logits of every token: load the model with logits_all=True")
        max_tokens = None if max_tokens is None else whole(max_tokens, "max_tokens")
        if suffix is not None and not isinstance(suffix, str):
            raise InputError(f"suffix is text, not {shown_value(suffix)}")
        self._given = isinstance(prompt, str)
        given = prompt if isinstance(prompt, str) else llm._checked_tokens(prompt).tolist()
        self._is_empty = not given
        self.tokens, self._n_hidden, self._appended = self._tokenized(given, suffix)
        shown = self.tokens[self._n_hidden :]
        self.prompt = given if isinstance(given, str) else self._text(shown).decode(errors="replace")
        self.max_tokens = self._that_fit(max_tokens)
        self.stop = stop_strings(stop)
        self.generated: list[int] = []
        self.finish_reason = "length"
        self._n_bytes = 0  # of the text so far, where the caller gave a tokenizer
        criteria = functions(stopping_criteria, "stopping_criteria")
        self._criteria = _Criteria(criteria) if criteria else None
        self._about = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": llm.model_path if model is None else model,
        }
        processors = functions(logits_processor, "logits_processor")
        if logit_bias:
            processors.append(biased(logit_bias, llm.n_vocab()))
        self.sampling = {
            **sampling,
            "temp": number(temperature, "temperature"),
            "logits_processor": _llama.LogitsProcessorList(processors) if processors else None,
            "stopping_criteria": self._criteria,
        }

    #
    # the prompt
    #

    def _that_fit(self, max_tokens: int | None) -> int:
        """How many tokens the answer may have. Raises InputError if the context has no room for any."""
        n_ctx, n_prompt = self.llm.n_ctx(), len(self.tokens)
        if n_prompt > n_ctx or (n_prompt == n_ctx and max_tokens != 0):
            # llama_cpp.server parses these words for its clients
            raise InputError(f"Requested tokens ({n_prompt}) exceed context window of {n_ctx}: raise n_ctx")
        room = n_ctx - n_prompt
        return room if max_tokens is None or max_tokens < 0 else min(max_tokens, room)

    def _tokenized(self, prompt: str | Sequence[int], suffix: str | None) -> tuple[list[int], int, str]:
        """The tokens to decode, how many of them the tokenizer put before the prompt, and the text to append.

        With a suffix, a model that has tokens for infill writes the text between prompt and suffix.
        """
        llm, model = self.llm, self.llm._model
        marks = (_llama.llama_vocab_fim_pre, _llama.llama_vocab_fim_suf, _llama.llama_vocab_fim_mid)
        fill = [mark(self._vocab) for mark in marks]
        infill = suffix is not None and min(fill) >= 0
        before, after, middle = ([token] if infill else [] for token in fill)
        if isinstance(prompt, str):
            if prompt:
                before += llm.tokenize(encoded(prompt, "the prompt"), add_bos=False, special=not infill)
        else:
            before += prompt
        if infill and suffix:
            after += self._without_space(suffix)
        begin, end = [], []
        if isinstance(prompt, str) or infill:
            cls, sep = model.token_cls(), model.token_sep()
            if model.add_bos_token():
                begin = [cls if cls != -1 else llm.token_bos()]
            if model.add_eos_token() or sep != -1:
                end = [sep if sep != -1 else llm.token_eos()]
        begin, end = ([token for token in tokens if token >= 0] for tokens in (begin, end))
        first, second = (after, before) if llm.spm_infill else (before, after)
        tokens = [*begin, *first, *second, *middle, *end]
        if not tokens:
            if llm.token_bos() < 0:
                raise InputError("the prompt is empty, and the model has no token that begins a text: give a prompt")
            begin = tokens = [llm.token_bos()]
        if tokens[:2] == [llm.token_bos()] * 2:
            warnings.warn(
                "the prompt begins with the token that begins a text, and the tokenizer adds one too: leave it out",
                RuntimeWarning,
                stacklevel=4,
            )
        return tokens, len(begin), "" if suffix is None or infill else suffix

    def _without_space(self, text: str) -> list[int]:
        """Tokens of a text that continues another, without the space that some tokenizers put first."""
        mark = self.llm.tokenize("☺".encode(), add_bos=False)
        tokens = self.llm.tokenize(encoded(f"☺{text}", "the suffix"), add_bos=False)
        if tokens[: len(mark)] == mark:
            return tokens[len(mark) :]
        return self.llm.tokenize(text.encode(), add_bos=False)

    def _from_cache(self) -> None:
        """Loads the cached text that shares the longest beginning with the prompt, if the present text shares less."""
        llm = self.llm
        if llm.cache is None:
            return
        with contextlib.suppress(KeyError, InputError):  # there is none, or it belongs to another context
            state = copy.copy(llm.cache[self.tokens])
            state.memory = None  # the present one stays, and the text counts as written
            if n_common(state.input_ids[: state.n_tokens], self.tokens) > n_common(llm._text.tokens, self.tokens):
                llm.load_state(state)

    def _want_rows(self) -> None:
        """Has tokens whose logits were not kept decoded again: a saved state may lack logits."""
        llm, text = self.llm, self.llm._text
        n = min(n_common(text.tokens, self.tokens), len(self.tokens) - 1)
        lost = np.flatnonzero(np.isnan(llm.scores[:n, 0]))
        if len(lost):
            text.lost_kv(int(lost[0]))

    #
    # what follows
    #

    def pieces(self) -> Iterator[tuple[str, list[Scored]]]:
        """Text as it becomes certain, with its tokens if their log probabilities were asked for."""
        llm, scored = self.llm, self.logprobs is not None
        self._from_cache()
        if scored and self.echo:
            self._want_rows()
        llm._seed = random.Random(llm._seed).randint(0, 2**32) if self.seed is None else self.seed
        text = Assembler(self._vocab, self.stop, self._errors)
        waiting: list[Scored] = []
        if llm.verbose:
            llm._ctx.reset_timings()
        tokens = llm.generate(self.tokens, **self.sampling)
        try:
            token = next(tokens, None)
            if self.echo:
                yield self.prompt, self._prompt_scored() if scored else []
            while token is not None and len(self.generated) < self.max_tokens:
                if llm._engine.slots.is_end(token):
                    self.finish_reason = "stop"
                    break
                if scored:
                    row = llm.scores[len(self.tokens) + len(self.generated) - 1]
                    waiting.append(self._scored(token, len(self.prompt) + text.n_chars, row))
                self.generated.append(token)
                certain = text.push_bytes(self._bytes(token))
                if certain:
                    yield certain, waiting
                    waiting = []
                if text.stopped:
                    self.finish_reason = "stop"
                    break
                if len(self.generated) < self.max_tokens:
                    token = next(tokens, None)
            if self._criteria is not None and self._criteria.ended:
                self.finish_reason = "stop"
        finally:
            tokens.close()
        if llm.verbose:
            llm._ctx.print_timings()
        rest = text.finish() + self._appended
        if rest or waiting:
            yield rest, waiting
        if llm.cache is not None:
            llm.cache[self.tokens + self.generated] = llm.save_state()

    def _bytes(self, token: int) -> bytes:
        """What the latest token adds to the text."""
        llm = self.llm
        if isinstance(llm.tokenizer_, Tokenizer):
            data = piece(self._vocab, token)
            return data.removeprefix(b" ") if self._is_empty and len(self.generated) == 1 else data
        whole = llm.detokenize(self.generated, prev_tokens=self.tokens)
        if whole.endswith("\N{REPLACEMENT CHARACTER}".encode()):
            return b""  # the rest of the character may follow
        self._n_bytes, begin = len(whole), self._n_bytes
        return whole[begin:]

    def _text(self, tokens: Sequence[int]) -> bytes:
        """With the names of control tokens."""
        return b"".join(piece(self._vocab, token, special=True) for token in tokens)

    #
    # log probabilities
    #

    def _prompt_scored(self) -> list[Scored]:
        """The tokens of the prompt, without those that the tokenizer put before it."""
        decoder, n_chars, scored = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        shown = self.tokens[self._n_hidden :]
        # the space that some tokenizers put before a text is not part of it
        n_added = int(self._given and self._text(shown).startswith(b" " + self.prompt.encode()))
        for i, token in enumerate(shown, self._n_hidden):
            row = self.llm.scores[i - 1] if i > 0 else None
            scored.append(self._scored(token, min(max(0, n_chars - n_added), len(self.prompt)), row))
            n_chars += len(decoder.decode(piece(self._vocab, token, True)))
        return scored

    def _scored(self, token: int, offset: int, row: npt.NDArray[np.float32] | None) -> Scored:
        return scored(self._vocab, token, offset, row, self.logprobs or 0)

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        return None if self.logprobs is None else listed(scored)

    #
    # as OpenAI's API puts it
    #

    def _answer(self, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._about, "choices": [choice]}

    def whole(self) -> dict[str, Any]:
        """The response."""
        text, all_scored = "", []
        for each, tokens in self.pieces():
            text += each
            all_scored += tokens
        n_prompt, n = len(self.tokens), len(self.generated)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
        return {**self._answer(text, self._logprobs(all_scored), self.finish_reason), "usage": usage}

    def streamed(self) -> Generator[dict[str, Any]]:
        """Chunks of the response; the last one has no text and says why it ended."""
        for text, tokens in self.pieces():
            yield self._answer(text, self._logprobs(tokens), None)
        yield self._answer("", None, self.finish_reason)


class _Criteria:
    """Stopping criteria that note whether they ended the text."""

    def __init__(self, criteria: Sequence[Callable[..., Any]]) -> None:
        self._criteria, self.ended = criteria, False

    def __call__(self, ids: npt.NDArray[np.intc], logits: npt.NDArray[np.float32]) -> bool:
        self.ended = any([ends(ids, logits) for ends in self._criteria])
        return self.ended


def _is_no_id(token: Any) -> bool:
    """Whether a key is none that int() may turn into a token id: 5.7 is not 5, and true not 1."""
    return isinstance(token, bool) or (isinstance(token, float) and not token.is_integer())


def biased(logit_bias: Mapping[Any, float] | Iterable[tuple[Any, float]], n_vocab: int) -> Any:
    """A logits processor. A bias of False excludes its token. Raises InputError if a token or a bias is invalid."""
    try:
        given = dict(logit_bias)
        if any(value is True for value in given.values()) or any(_is_no_id(token) for token in given):
            raise TypeError
        bias = {int(token): -math.inf if value is False else float(value) for token, value in given.items()}
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"logit_bias is a mapping of token ids to numbers, not {shown_value(logit_bias)}") from None
    for token, value in bias.items():
        if math.isnan(value):
            raise InputError(f"logit_bias: what is given for token {token} is no number")
        if not 0 <= token < n_vocab:
            raise InputError(f"logit_bias: {token} is no token id of this model: they are 0 to {n_vocab - 1}")
    tokens = np.array(list(bias), dtype=np.intp)
    with np.errstate(over="ignore"):  # infinite, then
        values = np.array(list(bias.values()), dtype=np.float32)

    def process(ids: npt.NDArray[np.intc], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scores = scores.copy()
        scores[tokens] += values  # at once: there may be one for each token of the vocabulary
        return scores

    return process
