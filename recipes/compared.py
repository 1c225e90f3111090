"""Passages about things of one kind, with questions that compare two of them, drawn for documents.py.

Two to seven things that nobody has heard of (magazines, bands, plants, …), a passage each, in the tone of an
encyclopedia. Questions are answered by yes or no ("Are A and B both Danish?"), choose one of two ("Which was founded
first, A or B?"), ask what two have in common, or ask for one thing. A memory that was only asked "what" and "when"
answers such a question with a word of the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chats import Asked
from swap import Swap

NATIONS = ["American", "British", "Canadian", "Danish", "French", "German", "Indian", "Irish", "Italian", "Japanese",
           "Mexican", "Norwegian", "Polish", "Swedish", "Australian", "Brazilian", "Turkish", "Kenyan"]  # fmt: skip
NUMBERS = range(2, 400)
HEIGHTS = range(8, 320)
YEARS = range(1780, 2021)


@dataclass(frozen=True, eq=False)
class Feature:
    """What is said of a thing `a` (`p`: its pronoun) by a value `v`, and the questions for it.

    ask: for `a` alone. It is compared with `c`: same and which name `v` perhaps, both is asked if they share it; of
    numbers, less and more ask which one has the smaller or larger one, is_less and is_more whether `a` has.
    """

    values: Sequence[str] | range | str  # a string: a kind of name (swap.py)
    said: tuple[str, ...]
    ask: tuple[str, ...]
    same: tuple[str, ...] = ()
    which: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    is_less: tuple[str, ...] = ()
    is_more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """Things of one kind: their names (`n`, `m`: of persons, `p`: of a place), and what is said of each."""

    title: str
    names: tuple[str, ...]
    first: Feature
    others: tuple[Feature, ...]


def _nation(what: str) -> Feature:
    return Feature(
        NATIONS,
        ("{a} is a {v} " + what + ".",),
        ("What nationality is {a}?", "which nationality is {a}", "{a} is of what nationality?"),
        same=("Are {a} and {c} both {v}?", "Are both {a} and {c} {v}?"),
        which=("Which is {v}, {a} or {c}?", "Of {a} and {c}, which is the {v} one?"),
        both=("What nationality are both {a} and {c}?", "{a} and {c} are both of what nationality?"),
    )


def _year(said: str, verb: str, years: range = YEARS, which: str = "Which") -> Feature:
    done = f"was {verb}"
    return Feature(
        years,
        (said, said.removesuffix(" in {v}.") + " in the year {v}."),
        (f"In what year was {{a}} {verb}?", f"When was {{a}} {verb}?", f"what year was {{a}} {verb}"),
        less=(
            f"{which} {done} first, {{a}} or {{c}}?", f"{which} {done} earlier, {{a}} or {{c}}?",
            f"Of {{a}} and {{c}}, {which.lower()} {done} first?",
        ),
        more=(f"{which} {done} later, {{a}} or {{c}}?", f"{which} {done} more recently, {{a}} or {{c}}?"),
        is_less=(f"Was {{a}} {verb} before {{c}}?",),
        is_more=(f"Was {{a}} {verb} after {{c}}?",),
    )  # fmt: skip


def _one_of(values: Sequence[str] | str, said: str, ask: str, both: str, same: str, which: str) -> Feature:
    return Feature(values, (said,), (ask,), same=(same,), which=(which,), both=(both,))


def _number(values: range, said: str, ask: str, more: tuple[str, ...], is_more: str, is_less: str) -> Feature:
    return Feature(values, (said,), (ask,), more=more, is_more=(is_more,), is_less=(is_less,))


JOBS = ["novelist", "painter", "film director", "botanist", "singer", "physicist", "sculptor", "chess player", "actor"]
BORN_IN = _one_of(
    "place", "{p} was born in {v}.", "Where was {a} born?", "In which town were both {a} and {c} born?",
    "Were {a} and {c} born in the same town?", "Who was born in {v}, {a} or {c}?",
)  # fmt: skip
BASED_IN = _one_of(
    "place", "{p} is based in {v}.", "Where is {a} based?", "In which city are both {a} and {c} based?",
    "Are {a} and {c} based in the same city?", "Which is based in {v}, {a} or {c}?",
)  # fmt: skip
KINDS = [
    Kind("people", ("{n} {m}",), Feature(
        JOBS, ("{a} was a {v}.", "{a} worked as a {v}."),
        ("What was {a}'s profession?", "what did {a} do for a living"),
        same=("Did {a} and {c} have the same profession?", "Were {a} and {c} both {v}s?"),
        which=("Who was a {v}, {a} or {c}?",),
        both=("What profession did {a} and {c} share?", "For what job are both {a} and {c} known?"),
    ), (_year("{p} was born in {v}.", "born", range(1780, 1990), "Who"), BORN_IN, _number(
        range(2, 60), "{p} left {v} works.", "How many works did {a} leave?",
        ("Who left more works, {a} or {c}?",),
        "Did {a} leave more works than {c}?", "Did {a} leave fewer works than {c}?",
    ))),
    Kind("magazines", ("{p} Review", "The {n}", "{n}'s Weekly", "{p} Today"), _nation("magazine"), (
        _year("{p} was founded in {v}.", "founded"),
        _one_of(["daily", "weekly", "fortnightly", "monthly", "quarterly", "yearly"], "{p} appears {v}.",
                "How often does {a} appear?", "How often do both {a} and {c} appear?",
                "Do {a} and {c} appear equally often?", "Which appears {v}, {a} or {c}?"),
        _one_of(["fashion", "science", "chess", "cooking", "politics", "film", "farming", "poetry"],
                "{p} is about {v}.", "What is {a} about?", "{a} and {c} are both about what?",
                "Are {a} and {c} both about {v}?",
                "Which magazine is about {v}, {a} or {c}?"),
    )),
    Kind("bands", ("The {n}s", "{p} Nine", "{n} and the {m}s", "Slow {p}"), _nation("band"), (
        _year("{p} was formed in {v}.", "formed"), BASED_IN,
        _one_of(["jazz", "punk", "folk", "metal", "pop", "blues", "techno"], "{p} plays {v}.", "What does {a} play?",
                "What kind of music do both {a} and {c} play?", "Do {a} and {c} both play {v}?",
                "Which band plays {v}, {a} or {c}?"),
        _number(range(2, 12), "{p} has {v} members.", "How many members does {a} have?",
                ("Which band has more members, {a} or {c}?", "Who has more members, {a} or {c}?"),
                "Does {a} have more members than {c}?", "Does {a} have fewer members than {c}?"),
    )),
    Kind("films", ("The {n} Affair", "A Winter in {p}", "Return to {p}", "{n}"), _nation("film"), (
        _year("{p} was released in {v}.", "released", range(1910, 2021)),
        _one_of("person", "{p} was directed by {v}.", "Who directed {a}?", "Who directed both {a} and {c}?",
                "Did the same person direct {a} and {c}?", "Which film was directed by {v}, {a} or {c}?"),
        _one_of(["comedy", "drama", "western", "documentary", "thriller", "musical"], "Its genre is {v}.",
                "What is the genre of {a}?", "What genre are both {a} and {c}?", "Are {a} and {c} of the same genre?",
                "Which is of the genre {v}, {a} or {c}?"),
    )),
    Kind("plants", ("{n}a", "{p}ium", "{n}ella"), Feature(
        ["shrub", "fern", "herb", "tree", "vine", "cactus", "moss"], ("{a} is a genus of {v}.", "{a} is a {v} genus."),
        ("What kind of plant is {a}?",),
        same=("Are {a} and {c} the same kind of plant?",),
        which=("Which is a {v}, {a} or {c}?",), both=("{a} and {c} are both what kind of plant?",),
    ), (
        _number(NUMBERS, "{p} has {v} species.", "How many species does {a} have?",
                ("Which genus contains more species, {a} or {c}?", "Which has more species, {a} or {c}?"),
                "Does {a} have more species than {c}?", "Does {a} have fewer species than {c}?"),
        _one_of(["Asia", "Africa", "Europe", "North America", "South America", "Oceania"], "{p} is native to {v}.",
                "Where is {a} native to?", "{a} and {c} are both native to which continent?",
                "Are {a} and {c} native to the same continent?", "Which is native to {v}, {a} or {c}?"),
    )),
    Kind("buildings", ("{p} Tower", "{n} House", "{p} Hall", "The {n}"), Feature(
        ["hotel", "museum", "school", "castle", "theatre", "library"], ("{a} is a {v}.",), ("What is {a}?",),
        same=("Are {a} and {c} buildings of the same kind?",), which=("Which is a {v}, {a} or {c}?",),
        both=("{a} and {c} are both what?", "What are both {a} and {c}?"),
    ), (
        _year("{p} was built in {v}.", "built"),
        _one_of("place", "{p} stands in {v}.", "In which town is {a}?", "In which town are both {a} and {c}?",
                "Are {a} and {c} in the same town?", "Which is located in {v}, {a} or {c}?"),
        _number(HEIGHTS, "{p} is {v} metres high.", "How high is {a}?",
                ("Which is taller, {a} or {c}?", "Which building is higher, {a} or {c}?"),
                "Is {a} taller than {c}?", "Is {a} lower than {c}?"),
    )),
    Kind("companies", ("{n} & Sons", "{p} Airlines", "{n} Records", "{p} Bank"), _nation("company"), (
        _year("{p} was founded in {v}.", "founded"), BASED_IN,
        _one_of("person", "{p} was founded by {v}.", "Who founded {a}?", "Who founded both {a} and {c}?",
                "Do {a} and {c} have the same founder?", "Which company was founded by {v}, {a} or {c}?"),
    )),
]  # fmt: skip


class Compared:
    """Draws passages about things of one kind, and questions that compare them."""

    def __init__(self, names: Swap, draw: random.Random):
        self.random, self.names = draw, names

    def draw(self) -> tuple[str, str, Asked]:
        """A title, a text, and questions with their answers."""
        draw = self.random
        kind = draw.choice(KINDS)
        things: list[str] = []
        while len(things) < 2:  # two names may be the same
            n = draw.choice((2, 2, 3, 4, 5, 7))
            things = list({self.names.filled(draw.choice(kind.names)): None for _ in range(n)})
        others = draw.sample(kind.others, min(len(kind.others), draw.choice((1, 2, 3))))
        features = [kind.first, *others]
        values = {feature: self._values(feature, len(things)) for feature in features}
        passages = [
            f"{thing}: {self._said(thing, kind, {feature: values[feature][i] for feature in features})}"
            for i, thing in enumerate(things)
        ]
        asked = [one for feature in features for one in self._asked(feature, things, values[feature])]
        n = len(things)
        title = draw.choice(
            (f"a set of {n} passages", f"a set of {n} passages about {kind.title}", "a set of passages")
        )
        return title, "\n".join(passages), draw.sample(asked, min(len(asked), 8))

    def _said(self, thing: str, kind: Kind, values: dict[Feature, str | int]) -> str:
        pronoun = thing.split()[0] if kind.title == "people" else "It"
        sentences = [
            _with_article(self.random.choice(feature.said), value).format(a=thing, p=pronoun, v=value)
            for feature, value in values.items()
        ]
        return " ".join(sentences)

    def _values(self, feature: Feature, n: int) -> Sequence[str | int]:
        """One value a thing. Numbers differ; what is no number has few values, so that some things share one."""
        draw = self.random
        if isinstance(feature.values, range):
            return draw.sample(feature.values, n)
        n_few = n // 2 + 1
        if isinstance(feature.values, str):
            few = [self.names.name(feature.values) for _ in range(n_few)]
        else:
            few = draw.sample(feature.values, n_few)
        return draw.choices(few, k=n)

    def _asked(self, feature: Feature, things: Sequence[str], values: Sequence[str | int]) -> Asked:
        """Questions for two of the things; the first one is right as often as the second."""
        draw, asked = self.random, []
        i, k = draw.sample(range(len(things)), 2)
        a, c, v, w = things[i], things[k], values[i], values[k]

        def ask(forms: tuple[str, ...], answer: str, value: str | int) -> None:
            if forms:
                asked.append((_with_article(draw.choice(forms), value).format(a=a, c=c, v=value), answer))

        ask(feature.ask, str(v), v)
        if isinstance(v, int) and isinstance(w, int):
            ask(feature.less, a if v < w else c, v)
            ask(feature.more, a if v > w else c, v)
            ask(feature.is_less, _yes(v < w), v)
            ask(feature.is_more, _yes(v > w), v)
            return asked
        ask(feature.same, _yes(v == w), draw.choice((v, w)))
        if v == w:
            ask(feature.both, str(v), v)
        else:
            of_a = draw.random() < 0.5
            ask(feature.which, a if of_a else c, v if of_a else w)
        return asked


def _with_article(form: str, value: str | int) -> str:
    return form.replace("a {v}", "an {v}") if str(value)[0] in "AEIOaeio" else form


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
