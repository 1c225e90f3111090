"""How an adapter replies in a chat: whether it ends, repeats itself, or says the message back.

    python tools/eval_replies.py -m smollm2 --adapters msw=smollm2 tsw=smollm2-tsw

`deltamem eval recall` asks questions only. Here the messages are the first two of each conversation in natural.jsonl,
which no adapter was trained on. Each chat begins with an empty memory, its text stays, replies are greedy. Prints for
the frozen model and each adapter, in % with a 95 % interval, how many replies end within --n-predict tokens, hold a run
of four words twice, and (of three words or more) have four fifths of their words from the message. --show N prints the
first N replies.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pydeltamem import Conversation, DeltaMemLlama, say_together
from pydeltamem.evals.bootstrap import wilson
from pydeltamem.evals.corpora import file_of
from pydeltamem.evals.items import records_of
from pydeltamem.evals.reader import attach

RUN = 4  # words
COPIED = 0.8


@dataclass(frozen=True)
class Reply:
    message: str
    text: str
    ended: bool

    @property
    def repeats(self) -> bool:
        words = words_of(self.text)
        runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
        return len(set(runs)) < len(runs)

    @property
    def copies(self) -> bool:
        words, message = words_of(self.text), set(words_of(self.message))
        return len(words) >= 3 and sum(word in message for word in words) >= COPIED * len(words)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def messages(n: int) -> list[list[str]]:
    """The user's first two messages of each conversation; some have one."""
    path = file_of("natural", None)
    assert path is not None  # it is in the package
    chats = [record["messages"] for record in records_of(path)]
    return [[m["content"] for m in chat if m["role"] == "user"][:2] for chat in chats][:n]


def replies(llm: DeltaMemLlama, chats: Sequence[Sequence[str]], n_predict: int, parallel: int) -> list[Reply]:
    """In the order of the messages."""
    found: list[Reply] = []
    for begin in range(0, len(chats), parallel):
        some = chats[begin : begin + parallel]
        talks = [Conversation(llm, n_predict=n_predict, temp=0.0) for _ in some]
        rows: list[list[Reply]] = [[] for _ in some]
        for turn in range(2):
            asked = {talk: chat[turn] for talk, chat in zip(talks, some) if turn < len(chat)}
            said = say_together(asked) if asked else {}
            for row, talk in zip(rows, talks):
                if talk in said:
                    row.append(Reply(asked[talk], said[talk].strip(), talk.finish_reason == "stop"))
        found += [reply for row in rows for reply in row]
        for talk in talks:
            talk.close()
    return found


def named(text: str) -> tuple[str, str]:
    """An adapter's name in the table, and its file."""
    name, _, file = text.partition("=")
    if not name or not file or name == "frozen":  # which the table calls the model alone
        raise argparse.ArgumentTypeError(f"{text}: is no NAME=FILE with another name than frozen: msw=adapter.gguf")
    return name, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, help="GGUF, or its name")
    parser.add_argument("--adapters", nargs="+", required=True, type=named, metavar="NAME=FILE")
    parser.add_argument("-n", type=int, default=90, help="chats (%(default)s)")
    parser.add_argument("--n-predict", type=int, default=128, help="tokens of a reply, at most (%(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--show", type=int, default=0, metavar="N")
    args = parser.parse_args()
    console, parallel = Console(highlight=False), 8
    table = Table("", "replies", "end", "repeat", "copy", "words", box=None)
    llm = DeltaMemLlama(
        args.model, n_ctx=1024, n_seq_max=parallel + 1, n_threads=args.threads, n_threads_batch=args.threads
    )
    for name, file in [("frozen", None), *args.adapters]:
        attach(llm, file)
        given = replies(llm, messages(args.n), args.n_predict, parallel)
        cells = []
        for right in ("ended", "repeats", "copies"):
            k = sum(getattr(reply, right) for reply in given)
            share, low, high = wilson(k, len(given))
            cells.append(f"{100 * share:.0f} ({100 * low:.0f}–{100 * high:.0f})")
        n_words = sorted(len(words_of(reply.text)) for reply in given)
        table.add_row(name, str(len(given)), *cells, str(n_words[len(n_words) // 2]))
        for reply in given[: args.show]:
            console.print(f"{name} > {reply.message}\n    {reply.text}", markup=False)
    console.print(table)


if __name__ == "__main__":
    main()
