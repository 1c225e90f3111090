"""Facts of one word that is made of tokens drawn at random: `deltamem eval recall --tasks words`.

No model can guess such a word, so a right answer has kept each of its tokens and their order. Names and numbers are
chains of this kind, too; those of people are harder to count.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from ..errors import InputError
from .case import Case
from .reader import Reader

SIZES = (1, 2, 3)  # tokens of a word
TRIES = 10_000  # draws of a word
FIRST, NEXT = re.compile(r" ?[A-Z][a-z]{2,}"), re.compile(r"[a-z]{2,5}")
REPLY = "Okay, I've noted it."
PHRASES = (  # what is told of the word {w}, and the question for it
    ("My cat is called {w}.", "What is my cat called?"),
    ("i live on {w} street now, its noisy", "which street do i live on?"),
    ("We named the boat {w}, don't laugh.", "What's the name of our boat?"),
    ("mr {w}, my boss, shouted at me again", "who is my boss"),
    ("I bought a lamp. The brand is {w}.", "Which brand is my lamp?"),
    ("My favourite café, {w}, is closing down.", "Which café is closing?"),
    ("The hint for my password is {w}.", "What's the hint for my password?"),
    ("Our team is the {w} Rovers and we lost 3-0.", "What is my team called?"),
    ("I'm reading a novel about a planet with the name {w}.", "Which planet is my novel about?"),
    ("The new pupil in my class is called {w}.", "Who is new in my class?"),
    ("I grew up in {w}, a tiny village.", "In which village did I grow up?"),
    ("they gave me {w} against the cough", "what did they give me against my cough"),
    ("The horse that I ride on Sundays is {w}.", "Which horse do I ride?"),
    ("Our wifi is called {w}.", "What's the name of our wifi?"),
    ("Grandma's maiden name was {w}.", "What was Grandma's maiden name?"),
    ("the band i saw last night: {w}. loud!", "which band did i see"),
)


def cases(n: int, seed: int, reader: Reader) -> Iterator[Case]:
    """`n` questions for each size of a word. The same seed and vocabulary, the same questions.

    Raises InputError if the vocabulary has no tokens that such words can be made of.
    """
    pieces = reader.pieces()
    first = sorted({piece.strip() for piece in pieces if FIRST.fullmatch(piece)})
    following = sorted({piece for piece in pieces if NEXT.fullmatch(piece)})
    for size in SIZES:
        draw = random.Random(f"words {seed} {size}")
        for i in range(n):
            told, question = PHRASES[i % len(PHRASES)]
            word = _word(draw, size, first, following, reader)
            turns = ((told.format(w=word), REPLY),)
            yield Case("words", f"{size} token{'s' if size > 1 else ''}", turns, question, (word,), size=size)


def _word(draw: random.Random, size: int, first: list[str], following: list[str], reader: Reader) -> str:
    """A word of so many tokens after a space."""
    for _ in range(TRIES if first and following else 0):
        word = draw.choice(first) + "".join(draw.choices(following, k=size - 1))
        if reader.n_tokens_of(f"called {word}") == size + reader.n_tokens_of("called"):
            return word
    raise InputError(f"words: the model's vocabulary has no words of {size} tokens: leave the task out")
