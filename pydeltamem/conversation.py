"""`Conversation`: messages, the text that they make, and a memory that outlives it. Several share one model.

docs/reference/one-write.md has the rule of one write, and says what happens to text and memory in each case.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import InputError, MemoryFileError, NotFiniteError, shown_value
from .formats.memory_lock import MemoryFileLock
from .llama import DeltaMemLlama
from .memory import Memory
from .runtime.chat_format import caught_prompt, chat_prompt
from .runtime.generation import Generation
from .runtime.grammar import checked_grammar
from .runtime.history import before_content, n_common
from .runtime.lock import all_of, holding
from .runtime.names import option
from .runtime.sampling import derived
from .runtime.text import Text
from .runtime.tokenizer import encoded
from .runtime.values import functions, stop_strings, whole


class Conversation:
    """One conversation with a model, in a slot of its own.

        llm = DeltaMemLlama(model_path=..., deltamem_path=..., n_ctx=4096)
        with Conversation(llm, system="Be brief.", memory_file="ada.memory") as ada:
            print(ada.say("My name is Ada."))

    When the text fills the context, its oldest turns leave it; the memory keeps what they wrote. With a memory file,
    the conversation loads the memory from it if it exists, and saves the memory after each turn.

    A model holds n_seq_max texts at once. A conversation takes a slot for its turn, and loses it to another one that
    needs it. On its next turn its state is copied back, and its text is decoded again without writing.

    It may be used while one of its streams is open: that reply ends, what was said so far counts, and the stream yields
    nothing more. It cannot be pickled or copied: `fork` makes a second one, and messages and memory file can be kept.

    `say`, `regenerate` and `edit` return a reply; `stream`, `stream_regenerate` and `stream_edit` yield it in pieces as
    they come.

    Threads may share it, and its model (docs/reference/threads.md). Calls on one conversation run one after the
    other. Turns of several conversations at the same time are decoded in common batches.

    Args:
        llm: the model.
        system: system prompt, "" for none.
        memory_file: load the memory from this file and save it there after each turn. Nobody else may use the file
            meanwhile.
        **options: of `say`, for every turn.

    Attributes:
        messages: what was said and is still in the text, as for `create_chat_completion`; the system prompt first.
        finish_reason: of the latest reply, "stop" or "length".
        n_dropped: messages that have left the text because the context was full.

    Raises MemoryFileError if the memory file is in use, is damaged or belongs to another adapter. If saving fails after
    a turn, the turn stays, and its reply is in `messages`. After an adapter was attached or detached, the memory file
    stays as it is, and turns are refused until `open` or `close`.

    If the memory or the logits stop being finite, the turn raises NotFiniteError and is taken back, with what was said
    so far; the memory file stays as it is.
    """

    def __init__(
        self,
        llm: DeltaMemLlama,
        *,
        system: str = "",
        memory_file: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(llm, DeltaMemLlama):
            raise InputError(f"a Conversation needs a DeltaMemLlama, not {llm!r}")
        self.llm = llm
        self.options = _checked_options(llm, options)
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": _checked_content(system)})
        self.finish_reason = "stop"
        self.n_dropped = 0
        self._n_seeds = 0  # that were drawn
        self._text = llm._engine.text()
        self._reply: Reply | None = None  # in progress
        self._lock: MemoryFileLock | None = None
        self._n_attached = 0  # when the memory file was opened
        self.memory_file: str | None = None
        if memory_file is not None:
            self.open(memory_file)

    @property
    def memory(self) -> Memory:
        """The memory of this conversation, as `llm.memory`.

        Its `rollback` ends an open reply and takes text and memory back, but not `messages`: the next turn decodes and
        writes again what they still say. `undo` and `edit` take turns back.
        """
        return Memory(self.llm, self._text, self._end_reply)

    @property
    def n_tokens(self) -> int:
        """Length of the text."""
        return self._text.n_tokens

    @property
    def tokens(self) -> list[int]:
        """Token ids of the text."""
        ids: list[int] = self._text.tokens.tolist()
        return ids

    #
    # talking
    #

    @holding("_text.turn")
    def say(self, content: str, **options: Any) -> str:
        """One turn: says `content` and returns the reply, without spaces at its beginning; `messages` has them.

        Options: `n_predict` (tokens at most; 0: only decode it; -1 or None: until the reply ends), `stop` (a string, or
        several), `seed` (None: another one for each reply, which the model's seed decides), and sampling as
        `Llama.generate` (temp, top_k, …); `grammar` may be text. `max_tokens` and `temperature` are other names of
        `n_predict` and `temp`.

        Raises InputError if an option is unknown or the turn does not fit in the context, MemoryFileError if the memory
        cannot be saved.
        """
        return self._whole_reply(_checked_content(content), options)

    def stream(self, content: str, **options: Any) -> Iterator[str]:
        """As `say`, in pieces as they come. Closing the iterator ends the reply; what was said so far counts."""
        yield from self._stream(_checked_content(content), options)

    @holding("_text.turn")
    def regenerate(self, **options: Any) -> str:
        """Replaces the latest reply by another: text and memory go back to before it."""
        return self._whole_reply(None, options, instead=True)

    def stream_regenerate(self, **options: Any) -> Iterator[str]:
        """As `regenerate`, in pieces."""
        yield from self._stream(None, options, instead=True)

    @holding("_text.turn")
    def edit(self, content: str, **options: Any) -> str:
        """Says `content` in place of the user's last message: text and memory go back to before that."""
        return self._whole_reply(_checked_content(content), options, instead=True)

    def stream_edit(self, content: str, **options: Any) -> Iterator[str]:
        """As `edit`, in pieces."""
        yield from self._stream(_checked_content(content), options, instead=True)

    def _whole_reply(self, content: str | None, options: dict[str, Any], instead: bool = False) -> str:
        return "".join(piece for _, piece in _speak([Reply(self, content, options, instead)], in_pieces=False))

    def _stream(self, content: str | None, options: dict[str, Any], instead: bool = False) -> Iterator[str]:
        with contextlib.closing(_speak([Reply(self, content, options, instead)])) as pieces:
            for _, piece in pieces:
                yield piece

    @holding("_text.turn")
    def undo(self) -> None:
        """Takes back the latest turn, the user's message and the reply: text and memory are as before it.

        Raises InputError if there is none, or if the memory was replaced since.
        """
        self._ready()
        start = self._said_last()
        taken = self.messages[start:]
        del self.messages[start:]
        try:
            n = self._text.position.common(0, self._ended_tokens())
            self._text.back(min(n, self._text.n_tokens))
        except BaseException:
            self.messages += taken
            raise
        self.save()

    @holding("_text.turn")
    def add(self, role: str, content: str) -> None:
        """Decodes a message without replying: "user", "assistant" or "system". Raises InputError if it does not fit."""
        self._ready()
        if not isinstance(role, str):
            raise InputError(f'a role is text, as "user", not {shown_value(role)}')
        self.messages.append({"role": role, "content": _checked_content(content)})
        try:
            self._make_room(0)
            tokens = self._ended_tokens()
            if n_common(self._text.tokens, tokens) < len(tokens):
                begun, was = self._begun(), self._text.position
                undecoded = self._undecoded(tokens)
                self._text.eval(undecoded, self._segments(undecoded), keep_at=begun, undo=was)
        except BaseException:
            self.messages.pop()
            raise
        self.save()

    @holding("_text.turn")
    def clear(self) -> None:
        """Forgets the text. Keeps the memory and the system prompt."""
        self._ready()
        text, messages = self._text, self._system()
        # the beginning that every text shares stays: it is written already
        text.begin(n_common(text.tokens, self._ended_tokens(messages=messages)))
        self.messages = messages
        self.save()

    @holding("_text.turn")
    def fork(self) -> Conversation:
        """A second conversation that goes on from here on its own, with its own memory and no memory file."""
        self._end_reply()
        other = Conversation(self.llm, **self.options)
        other.messages = [dict(message) for message in self.messages]
        other.finish_reason, other.n_dropped, other._n_seeds = self.finish_reason, self.n_dropped, self._n_seeds
        other._text = self._text.fork()
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Conversation cannot be pickled or copied: keep its messages and memory file, or fork() it")

    def _next_seed(self) -> int:
        """The seed of the next reply: the model's decides it, but another reply to the same words is another."""
        self._n_seeds += 1
        return derived(self.llm._given_seed, self._n_seeds)

    def _end_reply(self) -> None:
        """Ends an open stream."""
        if self._reply is not None:
            self._reply.fail()

    def _ready(self) -> None:
        """Called before every use: ends an open stream and checks the memory file."""
        self._end_reply()
        self._check_file()

    #
    # the memory file
    #

    @holding("_text.turn")
    def open(self, path: str | os.PathLike[str]) -> None:
        """Saves the memory to `path` after each turn from now on. If the file exists, loads it first."""
        self._end_reply()
        path = MemoryFileLock(path).path  # refuses names that no file can have
        path = os.path.abspath(path)  # the process may change its folder
        lock, is_open = self._lock, True
        if lock is None or os.path.realpath(path) != os.path.realpath(lock.path):
            lock, is_open = MemoryFileLock(path), False
            lock.acquire()
        n_attached = self.llm._engine.slots.n_attached  # before: an adapter that comes meanwhile empties the memory
        try:
            if os.path.exists(path):
                self.memory.load(path)
            else:
                self.memory.save(path)
        except BaseException:
            if not is_open:
                lock.release()
            raise
        if self._lock is not None and not is_open:
            self._lock.release()
        self._lock, self.memory_file, self._n_attached = lock, path, n_attached

    @holding("_text.turn")
    def save(self) -> None:
        """Saves the memory to the memory file, if there is one. Raises MemoryFileError if it cannot be written, or if
        an adapter was attached or detached since the file was opened.
        """
        with self._text.lock:  # nobody attaches an adapter, which empties the memory, between the check and the copy
            self._check_file()
            path = self.memory_file
            if path is None:
                return
            kept = self.memory.copy()
        kept.save(path)

    @holding("_text.turn")
    def close(self) -> None:
        """Saves the memory, and releases the memory file and the slot. Closing twice is fine.

        The file stays as it is if an adapter was attached or detached, or the model closed, since it was opened.
        """
        try:
            self._end_reply()
            if self._keeps_file:
                self.save()
        finally:
            if self._lock is not None:
                self._lock.release()
            self._lock = self.memory_file = None
            slots = self.llm._engine.slots
            with slots.lock:
                if slots.is_open:
                    slots.leave(self._text)

    @property
    def _keeps_file(self) -> bool:
        """Whether there is a memory file, and the memory still belongs to it: attaching an adapter, even the same one
        again, empties all memories.
        """
        slots = self.llm._engine.slots
        return self.memory_file is not None and slots.has_memory and slots.n_attached == self._n_attached

    def _check_file(self) -> None:
        """Raises MemoryFileError if the memory no longer belongs to its memory file."""
        self.llm._engine.slots.require_open()
        if self.memory_file is not None and not self._keeps_file:
            raise MemoryFileError(
                f"{self.memory_file}: no longer saved, because an adapter was attached or detached since the file was "
                "opened: open() it again, or close() the conversation"
            )

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    #
    # messages as tokens
    #

    def _system(self) -> list[dict[str, str]]:
        return self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []

    def _prompt(self) -> list[int]:
        """Tokens of the messages, and of the beginning of a reply."""
        return chat_prompt(self.llm, self.messages)

    def _whole(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of messages, and of the beginning of the next one."""
        if messages and messages[-1]["role"] == "user":
            return chat_prompt(self.llm, messages)
        return self._ended_tokens(messages=messages)

    def _ended_tokens(self, n_messages: int | None = None, messages: list[dict[str, str]] | None = None) -> list[int]:
        """Tokens of the first messages, up to where the content of the next one begins."""
        whole = self.messages if messages is None else messages
        messages = whole[:n_messages]
        following = whole[len(messages) : len(messages) + 1]
        if following:
            role = following[0]["role"]
        else:
            role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        return before_content(functools.partial(chat_prompt, self.llm), messages, {"role": role})

    def _said_last(self) -> int:
        """Index of the user's last message. Raises InputError if there is none."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not said:
            raise InputError("there is no turn to take back: nothing was said yet, or the turn has left the text")
        return said[-1]

    def _undecoded(self, tokens: Sequence[int]) -> list[int]:
        """Goes back to where the text and `tokens` differ. Returns the tokens to decode, at least one."""
        text = self._text
        n = min(n_common(text.tokens, tokens), len(tokens) - 1)
        position = text.position
        if n < min(position.n_tokens, position.n):
            # an ingest in segments is decoded as a whole, except for what the memory cannot take back
            n = max(position.ingest(n), min(n, position.floor))
        text.n_tokens = n
        return list(tokens[n:])

    def _begun(self) -> set[int]:
        """Where the content of the latest message begins: `edit` needs a checkpoint there."""
        return {len(self._ended_tokens(len(self.messages) - 1))}

    def _segments(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Segment ids for adapters that write per segment: a message is one segment."""
        return np.zeros(len(tokens), dtype=np.int32) if self.memory.by_segment else None

    #
    # a full context
    #

    def _make_room(self, reserve: int) -> None:
        """Drops the oldest turns from the text until its messages and `reserve` tokens fit."""
        n_ctx = self._text.n_ctx
        n = len(self._prompt())
        if n + reserve <= n_ctx:
            return
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        latest = [*self._system(), *self.messages[said[-1] if said else len(self._system()) :]]
        if len(chat_prompt(self.llm, latest)) + reserve > n_ctx:
            what = "system prompt and message are" if self._system() else "the message is"
            raise InputError(f"{what} too long for a context of {n_ctx} tokens: raise {option('n_ctx')} or say less")
        # more than is needed now, so that not every turn drops one
        while n + reserve > n_ctx - n_ctx // 8:
            n_dropped = self._n_oldest_turn()
            if n_dropped == 0:
                break
            self._drop(n_dropped)
            n = len(self._prompt())

    def _n_oldest_turn(self) -> int:
        """Number of messages of the oldest turn, from one user message to the next; 0 if it is the latest turn."""
        first = len(self._system())
        for i in range(first + 1, len(self.messages)):
            if self.messages[i]["role"] == "user":
                return i - first
        return 0

    def _drop(self, n_messages: int) -> None:
        """Drops the oldest messages from the text."""
        text, messages, first = self._text, self.messages, len(self._system())
        left = messages[:first] + messages[first + n_messages :]
        # apply the template before changing anything: it may refuse
        before, after = self._whole(messages), self._whole(left)
        start, end = (len(self._ended_tokens(n)) for n in (first, first + n_messages))
        n_read = n_common(text.tokens, before)
        reply = text.tokens[n_read:].tolist() if n_read == len(before) else []  # in progress
        if end <= n_read and before[:start] + before[end:] == after:
            text.n_tokens = n_read + len(reply)
            text.shift(start, end)
        else:  # the template now words the rest differently: nothing of it is written again
            kept = after[: max(0, len(after) - len(before) + max(n_read, end))] + reply
            text.replace(kept, n_common(text.tokens, kept))
        messages[:] = left
        self.n_dropped += n_messages


class Reply(Generation):
    """A reply: what to decode next, and the text so far. It is in progress from `begin` until it ends, or until its
    conversation is used for something else.

    Args:
        content: the user's message; None: the last one again.
        options: of `Conversation.say`.
        instead: whether it replaces the user's last message and what follows.
    """

    def __init__(
        self, conversation: Conversation, content: str | None, options: Mapping[str, Any], instead: bool = False
    ) -> None:
        super().__init__(conversation._text)
        self.conversation = conversation
        self.said = content
        llm = conversation.llm
        self.options = {**_checked_options(llm, conversation.options), **_checked_options(llm, options)}
        self.instead = instead
        self.begun = False  # whether something other than spaces was said

    @property
    def is_open(self) -> bool:
        """Whether it is in progress."""
        return self.conversation._reply is self

    def begin(self) -> None:
        """Enters the user's message into the conversation. If that fails, the messages are as before."""
        conversation, options = self.conversation, dict(self.options)
        conversation._ready()
        llm, text, messages = conversation.llm, conversation._text, conversation.messages
        n_predict, stop, seed = (options.pop(name, None) for name in ("n_predict", "stop", "seed"))
        n_predict = -1 if n_predict is None else n_predict
        processors = functions(options.get("logits_processor"), "logits_processor")
        if processors:
            self.calls_back = True
            options["logits_processor"] = [functools.partial(_process, text, each) for each in processors]
        with text.lock:
            sampler = llm._seeded_sampler(conversation._next_seed() if seed is None else seed, **options)

        start = conversation._said_last() if self.instead else len(messages)
        self.replaced = messages[start:]
        said = self.replaced[0]["content"] if self.said is None else self.said
        messages[start:] = [{"role": "user", "content": said}]
        try:
            conversation._make_room(min(text.n_ctx // 4, n_predict if n_predict >= 0 else 256))
            asked = caught_prompt(llm, messages)
            self.prepare(
                llm,
                sampler,
                n_predict=n_predict,
                stop=[*stop_strings(stop), *asked.stop],
                criteria=asked.stopping_criteria,
            )
            begun, was = conversation._begun(), text.position
            undecoded = conversation._undecoded(asked.prompt)
            self.ask(undecoded, conversation._segments(undecoded), begun)
            self.undo = was
            self._before_prompt = None
            self._n_dropped = conversation.n_dropped
            conversation._reply = self
        except BaseException:
            conversation._reply = None
            messages[-1:] = self.replaced
            raise

    def shown(self, piece: str) -> str:
        """The part of a piece that is returned. Many models begin with a token that has a space before its word. The
        space stays in the message, whose tokens must be those in the text, but no reader needs it.
        """
        if not self.begun:
            piece = piece.lstrip(" ")
            self.begun = bool(piece)
        return piece

    def has_room(self) -> bool:
        """As Generation. Drops the oldest turn from a full context."""
        conversation, text = self.conversation, self.text
        if text.n_tokens < text.n_ctx:
            return True
        n_messages = conversation._n_oldest_turn()
        if n_messages == 0:
            return False
        conversation._drop(n_messages)
        return text.n_tokens < text.n_ctx

    def finish(self) -> None:
        """Enters the reply into the conversation, and saves the memory."""
        self._enter()
        self._save()

    def fail(self) -> None:
        """Ends it early: what was not decoded is taken back; what was said so far counts. Does nothing if it is no
        longer in progress.
        """
        # The garbage collector may end a stream in any thread at any moment, which must not wait forever. The thread
        # that has the turn ends this reply anyway.
        turn = self.conversation._text.turn
        if not turn.acquire(timeout=1):
            return
        try:
            if self.is_open:
                self._fail()
        finally:
            turn.release()

    def _fail(self) -> None:
        if self.n_tokens > 0:
            self.content += self.rest()
            self._enter()
        self.conversation.llm._engine.drop(self)
        if self.n_tokens > 0:
            self._save()
        else:
            self.take_back()

    def take_back(self) -> None:
        """Takes back the turn, with what was said so far. The memory file has nothing of it yet."""
        conversation, text = self.conversation, self.text
        before = self._before_prompt or self.undo
        assert before is not None  # it began
        conversation._reply = None
        conversation.messages[-1:] = self.replaced
        if conversation.n_dropped == self._n_dropped:
            if not text.restore(before):  # the memory was replaced since: back to that one as it was
                text.n_tokens = text.position.floor
                text.catch_up()
        else:  # earlier text has left the context: the memory as it was, with the rest of the text
            text.n_tokens = n_common(text.tokens, conversation._ended_tokens())
            if before.checkpoint is not None:
                text.become(before.checkpoint.state, before.checkpoint.n_written)

    def _enter(self) -> None:
        conversation = self.conversation
        conversation._reply = None
        conversation.messages.append({"role": "assistant", "content": self.content})
        conversation.finish_reason = self.finish_reason or "stop"

    def _save(self) -> None:
        if self.conversation._keeps_file:  # else the next turn raises
            self.conversation.save()


def say_together(asked: Mapping[Conversation, str], **options: Any) -> dict[Conversation, str]:
    """One turn of several conversations at once, in common batches. Returns the replies. Options as `say`.

    If one memory cannot be saved, all turns are still made, and MemoryFileError is raised at the end.
    """
    waiting = _asked(asked, options)
    replies = dict.fromkeys(asked, "")
    with all_of(conversation._text.turn for conversation in asked):
        for conversation, piece in _speak(waiting, in_pieces=False):
            replies[conversation] += piece
    return replies


def stream_together(asked: Mapping[Conversation, str], **options: Any) -> Iterator[tuple[Conversation, str]]:
    """As `say_together`, but yields the replies in pieces. The conversations must share one model. What one of them is
    told does not change what another one says. At most n_seq_max of them go on at a time.
    """
    yield from _speak(_asked(asked, options))


def _asked(asked: Mapping[Conversation, str], options: Mapping[str, Any]) -> list[Reply]:
    if not isinstance(asked, Mapping) or not all(isinstance(each, Conversation) for each in asked):
        raise InputError(f"what is said together is a dict of conversations and messages, not {shown_value(asked)}")
    if len({conversation.llm for conversation in asked}) > 1:
        raise InputError("conversations of different models cannot be decoded together")
    return [Reply(conversation, _checked_content(content), options) for conversation, content in asked.items()]


def _speak(waiting: list[Reply], in_pieces: bool = True) -> Generator[tuple[Conversation, str]]:
    """Makes replies of conversations of one model, and yields their pieces; without `in_pieces` only complete replies.

    Between two pieces any of the conversations may be used; that ends its reply.
    """
    if not waiting:
        return
    engine = waiting[0].conversation.llm._engine
    with _turns(waiting):
        for reply in waiting:
            reply.goes_on = in_pieces
            reply.conversation._ready()
    active: list[Reply] = []
    errors: list[BaseException] = []  # of single replies: the others go on
    try:
        while waiting or active:
            begins = waiting[: engine.slots.n_seq_max - len(active)]
            del waiting[: len(begins)]
            active += begins
            with _turns(active):
                for reply in begins:
                    reply.begin()
                active = [reply for reply in active if reply.is_open]  # not those whose conversation was used since
                if active:
                    engine.wait(active)
                over = [reply for reply in active if reply.is_over and reply.is_open]  # a callback may have ended it
                for reply in over:
                    if isinstance(reply.error, NotFiniteError):
                        errors.append(reply.error)
                        reply.take_back()
                        continue
                    reply.check()
                    try:
                        reply.finish()
                    except Exception as error:
                        errors.append(error)
                said = [(reply, piece) for reply in active for piece in reply.pieces if in_pieces or reply.is_over]
                for reply, _ in said:
                    reply.pieces = []
            for reply, piece in said:
                if reply.is_open or reply.finish_reason:  # not if its conversation was used since
                    yield reply.conversation, piece
            active = [reply for reply in active if reply.is_open]
    except BaseException as error:
        for reply in active:
            try:
                reply.fail()
            except Exception as failure:
                errors.append(failure)
        if not isinstance(error, GeneratorExit):
            raise
    if errors:
        raise errors[0]


def _turns(replies: Iterable[Reply]) -> contextlib.AbstractContextManager[None]:
    return all_of(reply.conversation._text.turn for reply in replies)


def _process(text: Text, processor: Callable[..., Any], _: Any, scores: npt.NDArray[np.single]) -> Any:
    """Calls a logits processor with the tokens of `text`; llama_cpp would give it those of the model's own text."""
    return processor(text.tokens, scores)


def _checked_content(content: str) -> str:
    if not isinstance(content, str):
        raise InputError(f"a message is text, not {type(content).__name__}")
    encoded(content, "a message")
    return content


def _checked_options(llm: DeltaMemLlama, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a turn, with the aliases of `create_completion` replaced by our names. Raises InputError."""
    options = dict(options)
    for name, other in (("n_predict", "max_tokens"), ("temp", "temperature")):
        if name in options and other in options:
            raise InputError(f"{name} and {other} are the same option: give only one of them")
    if "max_tokens" in options:
        options["n_predict"] = options.pop("max_tokens")
    if "temperature" in options:
        options["temp"] = options.pop("temperature")
    known = ["n_predict", "stop", "seed", *inspect.signature(llm._init_sampler).parameters]
    for name in options:
        if name not in known:
            raise InputError(f"{name} is no option of a turn: the options are {', '.join(known)}")
    if options.get("n_predict") is not None:
        options["n_predict"] = whole(options["n_predict"], "n_predict")
    stop_strings(options.get("stop"))
    functions(options.get("logits_processor"), "logits_processor")
    if options.get("grammar") is not None:
        options["grammar"] = checked_grammar(llm, options["grammar"])
    return options
