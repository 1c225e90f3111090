"""Scores of answers as the field computes them: exact match, F1 and substring of SQuAD and HotpotQA, F1 of LoCoMo.

Normalisations follow the published scripts: SQuAD's and HotpotQA's `normalize_answer`, LoCoMo's, which also drops "and"
and compares stems.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_line(answer: str) -> str:
    """The first line of an answer."""
    return answer.strip().partition("\n")[0].strip()


def normalised(text: str) -> str:
    """SQuAD's normalize_answer: lower case without punctuation and articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, rights: Sequence[str]) -> float:
    """1 if the answer is one of the right ones."""
    return float(any(normalised(answer) == normalised(right) for right in rights))


def holds(answer: str, rights: Sequence[str]) -> float:
    """1 if one of the right answers is a part of the answer; one of which nothing is left must be all of it."""
    said = normalised(answer)
    return float(any(wanted in said if wanted else not said for wanted in map(normalised, rights)))


def f1(answer: str, rights: Sequence[str]) -> float:
    """The best token F1 with a right answer."""
    return max((_f1(normalised(answer).split(), normalised(right).split()) for right in rights), default=0.0)


def hotpot_f1(answer: str, right: str) -> float:
    """HotpotQA's F1: as F1, but yes, no and noanswer must match as a whole."""
    said, wanted = normalised(answer), normalised(right)
    if said != wanted and {said, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    return _f1(said.split(), wanted.split())


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    n = sum((Counter(said) & Counter(wanted)).values())
    return 2 * n / (len(said) + len(wanted)) if n else 0.0


#
# LoCoMo
#


def locomo_f1(answer: str, right: str, category: int) -> float:
    """LoCoMo's F1 of a category (1 to 4): over Porter stems.

    Of category 1 the mean over the comma-separated parts of the right answer, each with the best part of the answer; of
    category 3 only what stands before ";" is right.
    """
    if category == 3:
        right = right.split(";")[0].strip()
    if category != 1:
        return _f1(_stems(answer), _stems(right))
    parts = [_stems(part) for part in answer.split(",")]
    best = [max(_f1(part, _stems(wanted)) for part in parts) for wanted in right.split(",")]
    return sum(best) / len(best)


def _stems(text: str) -> list[str]:
    text = text.replace(",", "").lower().translate(_PUNCTUATION)
    return [_stem(word) for word in re.sub(r"\b(a|an|the|and)\b", " ", text).split()]


@functools.lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return str(stemmer().stem(word))


@functools.cache
def stemmer() -> Any:
    """nltk's Porter stemmer, LoCoMo's. Raises InputError if nltk is not installed."""
    try:
        from nltk.stem import PorterStemmer
    except ImportError:
        raise InputError("LoCoMo's score needs nltk: pip install 'pydeltamem[eval]'") from None
    return PorterStemmer()
