"""Whether an answer is right: whether it holds a value as a whole word, or words, however that is written.

Case, accents, articles, plurals and punctuation do not count. Numbers are alike in words and figures (four, 4, 4th),
times in 12 and 24 hours and in words (17:30, 5:30 pm, half past five), dates in either order (2 March, March 2nd). An
answer may leave out a value's am, pm or dollars, but not say am for pm.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

UNTOLD = re.compile(
    r"n't\b|\b(?:not|never|nothing|no idea|unknown|unsure)\b"
)  # what an answer says if nothing was told


def _words(text: str) -> list[str]:
    return text.split()


_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
)
_ORDINALS = _words(
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
    " fifteenth sixteenth seventeenth eighteenth nineteenth"
)
_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_UNITS = {word: i for words in (_ONES, _ORDINALS) for i, word in enumerate(words)}
_TIES = {word: 10 * i for i, word in enumerate(_TENS, 2)} | {
    word.removesuffix("y") + "ieth": 10 * i for i, word in enumerate(_TENS, 2)
}
_MONTHS = _words("january february march april may june july august september october november december")
_DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
# Other spellings of a word
_ALIKE = {
    **{month[:3]: month for month in _MONTHS if month not in ("march", "may")},  # to mar, may: words of their own
    **{day[:n]: day for day in _DAYS for n in (3, 4) if day[:n] not in ("wed", "sat", "sun")},
    "sept": "september",
    "midday": "noon",
    "%": "percent",
    "&": "and",
    "a.m": "am",
    "p.m": "pm",
    "morning": "am",
    "afternoon": "pm",
    "evening": "pm",
    "tonight": "pm",
}
_HALVES = ("am", "pm")
_DROPPED = {"a", "an", "the", "o'clock", "oclock"}
_PRONOUNS = {"he", "her", "him", "it", "me", "she", "them", "they", "us", "we", "who", "you"}
_WORD = re.compile(
    r"\d+:\d\d:\d\d|\d{1,2}:\d\d(?!\d)|\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)+|\d+(?=(?:st|nd|rd|th|am|pm)\b)|\d+"
    r"|[ap]\.m\b|o'clock|[^\W\d_]+|[%&]"
)


def is_right(answer: str, values: Collection[str], rivals: Iterable[str] = ()) -> bool:
    """Whether an answer is right.

    Args:
        values: any of these is right. None at all: nothing was told, and the answer must say so.
        rivals: what a right answer must not name too, in this spelling.
    """
    if not values:
        return UNTOLD.search(answer.lower().replace("’", "'")) is not None
    named = set(re.findall(r"\w+", answer))
    return any(holds(answer, value) for value in values) and named.isdisjoint(rivals)


def holds(text: str, value: str) -> bool:
    """Whether a text has a value in it, as a whole word or words."""
    words, wanted = normalised(text), normalised(value)
    if len(wanted) == 1 and wanted[0] in _PRONOUNS:  # The Who, the US: by itself, after "the" or in capitals
        name = wanted[0]
        return words == wanted or re.search(rf"\b(?:(?i:the {name})|{name.upper()})\b", text) is not None
    return bool(wanted) and any(_begin_alike(words[i:], wanted) for i in range(len(words)))


def _begin_alike(words: list[str], wanted: list[str]) -> bool:
    for i, word in enumerate(wanted):
        found = words[i] if i < len(words) else ""
        if found and (found == word or found in _plurals(word) or word in _plurals(found)):
            continue
        if word in _HALVES and found in _HALVES:
            return False
        return i > 0 and i == len(wanted) - 1 and word in (*_HALVES, "dollar")
    return True


def normalised(text: str) -> list[str]:
    """The words of a text as they are compared."""
    text = re.sub(r"(?<=\d)(?=[¼½¾])", " ", text.lower().replace("’", "'"))
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\$\s?(\d[\d,]*(?:\.\d+)?)", r"\1 dollar ", text)
    words = _WORD.findall(re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text))
    words = [_ALIKE.get(word, word) for word in map(_singular, words)]
    return _dates(_times(_numbers([word for word in words if word not in _DROPPED] or words)))


def _singular(word: str) -> str:
    """A word without the s of most plurals. Short words keep it: bus, his, this."""
    return word[:-1] if len(word) > 4 and word.endswith("s") and not word.endswith("ss") else word


def _plurals(word: str) -> tuple[str, ...]:
    """Plurals of a word that `_singular` does not see: dog, dogs; cherry, cherrie(s); box, boxe(s)."""
    if len(word) < 3 or not word.isalpha():
        return ()
    if re.search("[^aeiou]y$", word):
        return (word[:-1] + "ie",)
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        return (word + "e", word + "s")
    return (word + "s",)


def _numbers(words: list[str]) -> list[str]:
    """Numbers in figures: thirty four as 34, two hundred as 200."""
    found: list[str] = []
    joined = ""  # what the number so far ends with: tens may be followed by ones, a figure by hundred
    for word in words:
        if word in _TIES:
            found.append(str(_TIES[word]))
            joined = "tens"
        elif word in _UNITS:
            n = _UNITS[word]
            if joined == "tens" and 0 < n < 10:
                found[-1] = str(int(found[-1]) + n)
            else:
                found.append(str(n))
            joined = "ones"
        elif word in ("hundred", "thousand") and found and found[-1].isdecimal():
            found[-1] = str(int(found[-1]) * (100 if word == "hundred" else 1000))
            joined = ""
        else:
            is_number = re.fullmatch(r"\d+(?:,\d{3})+(?:\.\d+)?", word)
            found.append(word.replace(",", "") if is_number else word)
            joined = ""
    return found


def _times(words: list[str]) -> list[str]:
    """Times of day as hour.minutes and am or pm: half past 5 as 5.30, 17:30 as 5.30 pm, noon as 12 pm."""
    pairs = zip(words, [*words[1:], ""])
    words = [word for word, after in pairs if not (word in ("in", "at") and after in _HALVES)]
    found: list[str] = []
    i = 0
    while i < len(words):
        spoken = _spoken(words[i : i + 4])
        if spoken:
            minutes, n = spoken
            found.append(_clock(minutes // 60, minutes % 60))
            i += n
        elif time := re.fullmatch(r"(\d{1,2}):(\d\d)", words[i]):
            hour, minute = int(time[1]), int(time[2])
            found.append(_clock((hour - 1) % 12 + 1, minute))
            if hour > 12:
                found.append("pm")
            i += 1
        elif words[i] in ("noon", "midnight"):
            found += ["12", "pm" if words[i] == "noon" else "am"]
            i += 1
        else:
            decimal = re.fullmatch(r"0?(\d+)\.(\d\d)", words[i])  # 07.55: many write a time so
            found.append(_clock(int(decimal[1]), int(decimal[2])) if decimal else words[i].lstrip("0") or words[i])
            i += 1
    return found


def _clock(hour: int, minute: int) -> str:
    return f"{hour}.{minute:02}" if minute else str(hour)


def _spoken(words: list[str]) -> tuple[int, int] | None:
    """The minutes of half past 5, quarter to 5, 10 past 4, 10 minutes to 4, and how many words say it."""
    begins = {"half": 30, "quarter": 15}
    first = begins.get(words[0], int(words[0]) if words[0].isdecimal() else None)
    rest = words[1:]
    if rest[:1] == ["minute"]:
        rest = rest[1:]
    if first is None or first >= 60 or len(rest) < 2 or rest[0] not in ("past", "to") or not rest[1].isdecimal():
        return None
    hour = int(rest[1])
    if not 1 <= hour <= 12 or (rest[0] == "to" and first == 30):
        return None
    minutes = 60 * hour + (first if rest[0] == "past" else -first)
    return (minutes if minutes >= 60 else minutes + 720), len(words) - len(rest) + 2


def _dates(words: list[str]) -> list[str]:
    """Days after their month: 2 march, 2 of march and march 2 as march 2."""
    found = list(words)
    for i, word in enumerate(found):
        if word.isdecimal() and 1 <= int(word) <= 31:
            n = 1 if found[i + 1 : i + 2] == ["of"] else 0
            month = found[i + 1 + n : i + 2 + n]
            if month and month[0] in _MONTHS:
                found[i : i + 2 + n] = [month[0], word]
    return found
