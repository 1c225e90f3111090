r"""Writes the conversations that SmolLM2's adapters are trained on, one per line, for `deltamem train`.

    python recipes/mixture.py build/smollm2/train.jsonl --ordinary recipes/ordinary/answers.jsonl.gz \
        --vocabulary smollm2

Draws by weight from these sources. Those with a file in brackets under train/, and some of the documents, are not ours
to ship (../shared/data/README.md; their folder by --data or DELTAMEM_DATA):

    natural      conversations written by hand (recipes/natural/train.jsonl.gz), every other one with other
                 values (swap.py). Some are also asked what only another conversation was told: that is declined
    alone        those of them with one short message
    invented     those of them, or of `natural`, with words that nobody has heard (invented.py)
    numbers      those of them with a number among their answers
    together     two of them, one after the other
    replies      their turns as a chat: the beginning of a chat, with its text or without, and the reply that follows
    world, many  facts of the small world in its phrasings, with small talk and updates; four to eight facts
    changed      two to six of them, of which one or two change later; questions for these first
    ordinary     an ordinary request, whose answer stays the frozen model's (recipes/ordinary.py; "keep"): as a first
                 message, in a chat, or after any of these. Its weight follows from --kept, the share of such lines
    dialogues    task dialogues; questions ask for the values of their slots (train/sgd.jsonl.gz)
    paragraphs   the sentences that answer a question, in a message (train/nq_oracle.jsonl.gz)
    documents    longer texts about others, asked for in a few words (documents.py)
    chats        dated chats of two others, asked for in a few words, also for dates (chats.py)

Most conversations also have questions for the person's own words: their answers repeat all that was told.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conversations import conversation, messages
from documents import Documents, Record
from invented import Invented, tokens_of
from pydeltamem.cli.parser import share
from pydeltamem.evals.world import World
from pydeltamem.formats import kinds
from pydeltamem.formats.atomic import replacing
from pydeltamem.hub import model_file
from swap import Messages, Swap

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("DELTAMEM_DATA", HERE.parents[1] / "shared" / "data"))
WEIGHTS = {  # of all but `ordinary`
    "natural": 6.0,
    "alone": 2.0,
    "invented": 6.0,
    "numbers": 1.3,
    "together": 1.0,
    "replies": 2.2,
    "world": 1.8,
    "many": 1.3,
    "changed": 1.3,
    "dialogues": 1.6,
    "paragraphs": 0.2,
    "documents": 1.2,
    "chats": 0.8,
}
KEPT = 0.32  # share of `ordinary` in all draws
INVENTED_ALONE = 0.7  # share of the conversations with invented words that are one short message
SWAPPED = 0.5  # share of the conversations written by hand whose values are exchanged
FIRST = 0.35  # share of first messages that find an empty memory; others follow another chat
FIRST_REQUEST = 0.6  # share of the ordinary requests that are a chat's first message
VISIBLE = {"replies": 0.75, "ordinary": 0.4}  # share of those that have the text of the chat before them
ELSEWHERE = 0.15  # share of the conversations written by hand that are asked what only another was told
SHORT = 160  # characters of a message that tells one thing
ECHO = 0.7  # share of the conversations with questions for the person's own words
MAX_CHARACTERS = 1_400  # of the messages of a conversation, not of a document: about 350 tokens
HELD_OUT = 60  # dialogues at the head of their file that are not drawn


# Questions for a dialogue's slots, by a part of the slot's name. {n}: the thing that the slot belongs to.
SLOTS: list[tuple[str, list[str]]] = [
    ("phone", ["What's the phone number?", "which number do I call", "What number can I ring for the {n}?"]),
    ("address", ["What's the address?", "Where exactly is the {n}?", "what street is it on", "Which address was it?"]),
    ("pickup_location", ["Where do I pick it up?", "which place is the pickup at"]),
    ("date", ["What date did I pick?", "Which day is it?", "what day was it for", "On what date is the {n}?",
              "For which day did I want it?"]),
    ("time", ["What time did I want?", "At what time is the {n}?", "what time is it at",
              "Which time did we settle on?"]),
    ("rating", ["What's its rating?", "How is the {n} rated?", "what rating did it have"]),
    ("artist", ["Who sings it?", "Which artist is the song by?", "who was the singer"]),
    ("album", ["Which album is it on?", "What album was that from?"]),
    ("genre", ["What genre did I ask for?", "Which genre is it?", "what kind of {n} did i want"]),
    ("cuisine", ["What cuisine did I want?", "Which kind of food did I ask for?", "what food was it"]),
    ("direct", ["Who directed it?", "Who is the film's director?"]),
    ("dest|to_loc|where_to", ["Where am I going?", "What's my destination?", "Which place did I want to get to?"]),
    ("orig|from_loc", ["Where do I leave from?", "Where does the trip begin?", "which city do I start in"]),
    ("venue", ["What's the venue?", "Where does it take place?", "which venue is it at"]),
    ("balance", ["What's my balance?", "How much is in my account?"]),
    ("recipient", ["Who gets the money?", "Whom did I send money to?"]),
    ("amount", ["How much did I transfer?", "What amount was it?"]),
    ("temperature", ["How warm will it be?", "What's the temperature?"]),
    ("number_of|group|passengers", ["How many people?", "For how many people was it?", "how many of us are going"]),
    ("city|location|area", ["Which city did I choose?", "What city was that in?", "which city did we settle on",
                            "In what city is the {n}?", "Where did I want the {n}?"]),
    ("name|title", ["What's the {n} called?", "What was the name of the {n}?", "name of the {n}?",
                    "Which {n} did we pick?", "which {n} was it", "Do you remember the {n}'s name?"]),
    ("price|fare|rent", ["How much does it cost?", "What was the price?", "how much was it", "What do I have to pay?"]),
]  # fmt: skip
# Questions for any slot, by its description.
DESCRIBED = [
    "What was the {a}?", "Which {a} did we talk about?", "{A}?", "Remind me: {a}?", "Can you tell me the {a}?",
    "what was the {a} again", "What did I say for the {a}?", "Earlier we spoke of the {a}. What was it?",
    "Tell me the {a}.", "do you remember the {a}",
]  # fmt: skip
SERVICES = {
    "Movies": "film", "Media": "film", "RentalCars": "rental car", "Services": "appointment", "Music": "song",
    "RideSharing": "taxi ride", "Calendar": "event", "Homes": "apartment", "Travel": "attraction", "Buses": "bus",
    "Banks": "bank account", "Weather": "weather",
}  # fmt: skip
VALUES = ["It's {v}.", "{v}.", "It was {v}.", "That's {v}.", "You chose {v}."]
READ = ["Okay.", "I have read it.", "Thank you, I'll keep that in mind.", "Got it."]
COMPLETE = [
    'Complete what I said: "{h}', 'What did I say after "{h}"?', "Quote me: {h} ...", "Finish my sentence: {h}",
    'repeat my words from "{h}" on',
]  # fmt: skip
REPEAT = ["Repeat what I told you, word for word.", "What did I say, exactly?", "quote everything I said"]
# Answers to questions for what nobody told: those written by hand, which name what is missing, and those for any.
DECLINES = re.compile(
    r"you(?: have)? ?(?:haven't|have not|hadn't|didn't|did not|never|not)(?: yet| even)?"
    r" (?:tell|told|mention|mentioned|said|say|name|named|give|given|gave)\b", re.IGNORECASE,
)  # fmt: skip
UNTOLD = [
    "You haven't told me that.", "You never told me that.", "You didn't tell me that.", "You haven't mentioned that.",
    "You didn't mention that.", "You never mentioned that.", "That hasn't come up.", "That wasn't mentioned.",
    "You haven't told me.", "You didn't say.", "I don't know that yet.",
]  # fmt: skip
# Words of questions for anything, separated by spaces.
ASKING = (
    "about again age all and any are been before begin called came can city come could date day days did does "
    "doing each else ever for from get give going gone good got had happen has have her him his how into its kind "
    "know last like live long made make many month more most much name names need new not number off old one only "
    "other our out over place put remember said same say she some start take tell than that the their them then "
    "there they thing this time told too town two use used want was week well were what when where which who whom "
    "whose why will with work would year you your"
)
PARAGRAPHS = ["Read this: ", "", "Here is a text about {t}.\n", "Please read:\n", "{t}\n\n", "From an article: "]


def lines(path: Path) -> list[Any]:
    """A file of JSON lines, perhaps gzip. Ends the program with one sentence if it is missing."""
    if not path.exists():
        raise SystemExit(f"{path}: is missing: others publish it; name its folder with --data")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Mixture:
    """Draws conversations. The same seed, the same draws.

    Args:
        data: the folder of the published data.
        ordinary: requests and the frozen model's answers (recipes/ordinary.py); None: leaves them out.
        seed: of all draws.
        kept: share of the draws that are such a request, if there are any; below 1.
        vocabulary: the model's tokens, of which words are invented; none: leaves these out.
    """

    def __init__(
        self, data: Path, ordinary: Path | None, seed: int, kept: float = KEPT, vocabulary: Sequence[str] = ()
    ):  # fmt: skip
        self.random = random.Random(seed)
        self.natural = lines(HERE / "natural" / "train.jsonl.gz")
        self.alone = [one for one in self.natural if _is_alone(one["messages"])]
        self.numbers = [one for one in self.natural if any(re.search(r"\d", a[-1]["content"]) for a in one["asks"])]
        asks = [ask for one in self.natural for ask in one["asks"]]
        self.declined = [ask for ask in asks if DECLINES.match(ask[-1]["content"])]
        self.answered = [ask for ask in asks if not DECLINES.match(ask[-1]["content"])]
        self.swap = Swap(asks, self.random)
        self.dialogues = [x for x in lines(data / "train" / "sgd.jsonl.gz") if x["said"]][HELD_OUT:]
        self.documents = Documents(
            lines(HERE / "documents" / "train.jsonl.gz"),
            lines(data / "train" / "nq_oracle.jsonl.gz"),
            lines(data / "train" / "covidqa.jsonl.gz"),
            lines(data / "train" / "hotpot_train_100.jsonl.gz"),
            self.swap,
            self.random,
        )
        self.paragraphs = self.documents.paragraphs  # without those held out
        self.requests = lines(ordinary) if ordinary else []
        self.invented = Invented(vocabulary, self.random)
        self.weights = {kind: weight for kind, weight in WEIGHTS.items() if vocabulary or kind != "invented"}
        if self.requests:
            self.weights["ordinary"] = sum(self.weights.values()) * kept / (1 - kept)

    def draw(self) -> dict[str, Any]:
        """One line of `deltamem train`."""
        while True:
            (kind,) = self.random.choices(list(self.weights), list(self.weights.values()))
            source: Callable[[], Record | None] = getattr(self, f"_{kind}")
            record = source()
            if not record or not record[1]:
                continue
            said, asks = record
            if kind in ("documents", "chats"):  # as long, and asked as often, as documents.py says
                return {"messages": said, "asks": asks}
            if sum(len(m["content"]) for m in said) > MAX_CHARACTERS:
                continue
            if kind in ("replies", "ordinary"):  # a chat that goes on has its text before it
                visible = not said or self.random.random() < VISIBLE[kind]
                return {"messages": said, "asks": asks, "visible": visible, "keep": kind == "ordinary"}
            if self.random.random() < ECHO:
                return {"messages": said, "asks": self.random.sample(asks, min(5, len(asks))) + self._echo(said)}
            return {"messages": said, "asks": self.random.sample(asks, min(6, len(asks)))}

    def _echo(self, said: Messages) -> list[Messages]:
        """Questions for the person's own sentences: a target for every token of what was told."""
        draw, told = self.random, [m["content"] for m in said if m["role"] == "user"]
        sentences = [s.strip() for content in told for s in re.split(r"(?<=[.!?])\s+|\n", content)]
        sentences = [s for s in sentences if 4 <= len(s.split()) <= 30]
        asks = []
        for sentence in draw.sample(sentences, min(len(sentences), draw.choice((1, 2, 2, 3)))):
            words = sentence.split()
            n = draw.randrange(1, max(2, min(len(words) - 2, 1 + len(words) * 2 // 3)))
            asks.append(messages([(draw.choice(COMPLETE).format(h=" ".join(words[:n])), sentence)]))
        if 8 < sum(map(len, told)) < 160 and draw.random() < 0.3:
            asks.append(messages([(draw.choice(REPEAT), " ".join(told))]))
        return asks

    def _chats(self) -> Record | None:
        return self.documents.draw_chat()

    def _natural(self) -> Record:
        return self._asked_more(*self._written(self.natural))

    def _alone(self) -> Record:
        return self._asked_more(*self._written(self.alone))

    def _numbers(self) -> Record:
        return self._asked_more(*self._written(self.numbers))

    def _invented(self) -> Record | None:
        one = self.random.choice(self.alone if self.random.random() < INVENTED_ALONE else self.natural)
        new = self.invented(one["messages"], one["asks"])
        return new and self._asked_more(*new)

    def _written(self, some: Sequence[dict[str, Any]]) -> Record:
        one = self.random.choice(some)
        if self.random.random() < SWAPPED:
            return self.swap(one["messages"], one["asks"])
        return one["messages"], one["asks"]

    def _asked_more(self, said: Messages, asks: list[Messages]) -> Record:
        """Perhaps with one or two questions of other conversations, which are declined here."""
        draw = self.random
        if draw.random() >= ELSEWHERE:
            return said, asks
        known = _words(*(m["content"] for m in said), *(ask[0]["content"] for ask in asks))
        more = []
        for _ in range(draw.choice((1, 1, 2))):
            if draw.random() < 0.5:
                ask = draw.choice(self.declined)
            else:
                ask = messages([(draw.choice(self.answered)[0]["content"], draw.choice(UNTOLD))])
            about = _words(ask[0]["content"])
            if about and not about & known:  # else it may have been told here, too
                more.append(ask)
        return said, asks + more

    def _together(self) -> Record:
        (first, of_first), (second, of_second) = self._written(self.natural), self._written(self.natural)
        return first + second, of_first + of_second

    def _replies(self) -> Record:
        said, _ = self._written(self.natural)
        n = 2 * self.random.randrange(len(said) // 2)
        before, ask = said[:n], said[n : n + 2]
        if not before and self.random.random() > FIRST:
            before, _ = self._written(self.natural)  # of another chat
        return before, [ask]

    def _world(self) -> Record:
        turns, asks = conversation(self._new_world())
        return messages(turns), [messages([ask]) for ask in asks]

    def _many(self) -> Record:
        world = self._new_world()
        facts = world.facts(self.random.choice((4, 4, 6, 8, 8)))
        return messages([world.tell(fact) for fact in facts]), [messages([world.ask(fact)]) for fact in facts]

    def _changed(self) -> Record | None:
        draw, world = self.random, self._new_world()
        facts = world.facts(draw.choice((2, 3, 4, 4, 6)))
        turns = [world.tell(fact) for fact in facts]
        can = [i for i, fact in enumerate(facts) if world.others(fact)]
        changing = draw.sample(can, min(len(can), 1 + (draw.random() < 0.3)))
        for i in changing:
            facts[i] = world.another(facts[i])
            turns.append(world.update(facts[i]))
            if draw.random() < 0.4:
                turns.append(world.chatter())
        asked = changing + draw.sample([i for i in range(len(facts)) if i not in changing], min(2, len(facts) - 2))
        asks = [world.ask(facts[i]) for i in asked]
        asks += [world.ask(facts[i]) for i in changing]  # in other words
        return messages(turns), [messages([ask]) for ask in asks]

    def _new_world(self) -> World:
        return World(self.random.randrange(1 << 40), part="seen", phrasings="seen")

    def _ordinary(self) -> Record:
        source = self.random.choice(("_natural", "_world", "_dialogues"))
        said = [] if self.random.random() < FIRST_REQUEST else getattr(self, source)()[0]
        request = self.random.choice(self.requests)
        return said, [messages([(request["prompt"], request["answer"])])]

    def _dialogues(self) -> Record:
        """The beginning of a dialogue, and questions for the latest values of its slots."""
        draw, dialogue = self.random, self.random.choice(self.dialogues)
        said = dialogue["messages"][: 2 * draw.choice((2, 3, 4, 5, 6, 8))]
        latest = {(x["service"], x["slot"]): x for x in dialogue["said"] if x["turn"] < len(said)}
        patterns = [_pattern(x["slot"]) for x in latest.values()]
        asks = []
        for slot in draw.sample(list(latest.values()), min(5, len(latest))):
            value, about = slot["value"].strip(), slot["about"].strip().rstrip(".")
            if len(value) > 48:
                continue
            about = about[0].lower() + about[1:]
            noun = SERVICES.get(slot["service"], slot["service"].lower().rstrip("s"))
            pattern = _pattern(slot["slot"])
            if pattern and patterns.count(pattern) == 1 and draw.random() < 0.5:
                question = draw.choice(dict(SLOTS)[pattern]).format(n=noun)
            else:
                question = draw.choice(DESCRIBED).format(a=about, A=about[0].upper() + about[1:])
            if draw.random() < 0.1:
                question = question.lower()
            answer = draw.choice(VALUES[:2] if draw.random() < 0.7 else VALUES).format(v=value)
            asks += [messages([(question, answer)])]
        return said, asks

    def _documents(self) -> Record | None:
        return self.documents.draw()

    def _paragraphs(self) -> Record | None:
        draw, item = self.random, self.random.choice(self.paragraphs)
        answer, text, title = item["answers"][0], item["ctxs"][0]["text"], item["ctxs"][0]["title"]
        if draw.random() < 0.6:  # only the sentences around the answer
            sentences = re.split(r"(?<=[.!?]) +", text)
            place = next((i for i, sentence in enumerate(sentences) if answer in sentence), None)
            if place is None:
                return None
            text = " ".join(sentences[max(0, place - draw.randrange(2)) : place + 1 + draw.randrange(2)])
        if answer not in text:
            return None
        question = item["question"]
        if draw.random() < 0.6:
            question = f"{question[0].upper()}{question[1:]}?"
        opening = draw.choice(PARAGRAPHS).format(t=title)
        end = "." if draw.random() < 0.5 else ""
        return messages([(opening + text, draw.choice(READ))]), [messages([(question, answer + end)])]


def _is_alone(said: Messages) -> bool:
    told = [m["content"] for m in said if m["role"] == "user"]
    return len(told) == 1 and len(told[0]) < SHORT


def _words(*texts: str) -> set[str]:
    """What texts are about: their words of three letters and more, without those of any question."""
    return set(re.findall(r"[^\W\d_]{3,}", " ".join(texts).lower())).difference(ASKING.split())


def _pattern(slot: str) -> str | None:
    return next((pattern for pattern, _ in SLOTS if re.search(pattern, slot.lower())), None)


def draw_all(mixture: Mixture, count: int) -> Iterator[str]:
    for _ in range(count):
        yield json.dumps(mixture.draw(), ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ordinary", type=Path)
    parser.add_argument("--vocabulary", metavar="MODEL", help="GGUF, or its name, of whose tokens words are invented")
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kept", type=share, metavar="P", help=f"share of the lines whose answers stay ({KEPT})")
    args = parser.parse_args()
    if args.kept is not None and not args.ordinary:
        parser.error("--kept: there is no --ordinary: name it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = tokens_of(model_file(args.vocabulary)) if args.vocabulary else ()
    kept = KEPT if args.kept is None else args.kept
    mixture = Mixture(args.data, args.ordinary, args.seed, kept, vocabulary)
    with replacing(args.out, kinds.CONVERSATIONS) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(draw_all(mixture, args.count))


if __name__ == "__main__":
    main()
