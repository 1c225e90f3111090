"""Puts words that nobody has heard into a conversation, in place of what its answers hold.

A word that is made of tokens at random cannot be guessed: whoever answers with it has kept its tokens, one after the
other. The words of people that are hard to keep (names of persons and places, numbers) are such chains, too.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence

from pydeltamem.formats.gguf_header import Header
from swap import Messages, reworded

WORD = re.compile(r"[A-Za-z]{3,}")
SPACE = "\u0120"  # a space as vocabularies of GPT-2's kind write it
FIRST, NEXT = re.compile(SPACE + "[A-Za-z][a-z]{2,}"), re.compile("[a-z]{2,5}")
TOKENS = {1: 5, 2: 4, 3: 2}  # of a word, and how often
WORDS = (1, 1, 2, 3, 4)  # of a conversation that are exchanged, one of these
COMMON_WORDS = """
    about after again also and any are because been before but called can could did does doing down each even every
    for from gave get getting give going good got had has have haven her here his how into its just keep know last
    later less let like little long look made make mentioned more most much named never new next nice not nothing now
    off often old once one only our out over own people put quite really right said same saw say she should since
    some something soon still take tell than that the their them then there they thing think this through told too
    two under until use very want was way well went were what when where which who whose why will with without won
    would yes yet you your yours
"""
COMMON = frozenset(COMMON_WORDS.split())  # words that hold no value


def tokens_of(model: str | os.PathLike[str]) -> list[str]:
    """The tokens of a model, a GGUF, as it writes them."""
    return list(Header(model).keys["tokenizer.ggml.tokens"])


class Invented:
    """Exchanges words that answers hold, and that no question names, for new ones made of a model's tokens.

    vocabulary: tokens of a model whose tokenizer is of GPT-2's kind. Without tokens there is nothing to exchange.
    """

    def __init__(self, vocabulary: Sequence[str], draw: random.Random):
        self.random = draw
        self.first = [token.removeprefix(SPACE) for token in vocabulary if FIRST.fullmatch(token)]
        self.next = [token for token in vocabulary if NEXT.fullmatch(token)]

    def __call__(self, said: Messages, asks: list[Messages]) -> tuple[Messages, list[Messages]] | None:
        """None if no answer holds such a word."""
        told = dict.fromkeys(WORD.findall(" ".join(m["content"] for m in said if m["role"] == "user")))
        asked = {word.lower() for ask in asks for word in WORD.findall(ask[0]["content"])}
        answers = (word for ask in asks for word in WORD.findall(ask[-1]["content"]))
        values = [word for word in dict.fromkeys(answers) if word in told and word.lower() not in asked | COMMON]
        if not values:
            return None
        draw = self.random
        new = {word: self.word(word) for word in draw.sample(values, min(len(values), draw.choice(WORDS)))}

        def other(found: re.Match[str]) -> str:
            return new.get(found[0], found[0])

        return reworded(said, WORD, other), [reworded(ask, WORD, other) for ask in asks]

    def word(self, old: str) -> str:
        """A word of one to three tokens, with a capital if the old one has one."""
        draw = self.random
        (n,) = draw.choices(list(TOKENS), list(TOKENS.values()))
        new = draw.choice(self.first) + "".join(draw.choice(self.next) for _ in range(n - 1))
        return new[0].upper() + new[1:] if old[0].isupper() else new.lower()
