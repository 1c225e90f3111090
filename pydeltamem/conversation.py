"""`Conversation`: messages, the text that they make, and a memory that outlives it. Several share one model.

The rule of one write, and what happens to text and memory in each case, is in docs/reference/one-write.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import InputError, MemoryFileError, NotFiniteError
from .formats.memory_file import MemoryFileLock
from .llama import DeltaMemLlama
from .memory import Memory
from .runtime import library
from .runtime.engine import Request
from .runtime.history import Position, n_common
from .runtime.lock import all_of, holding
from .runtime.names import option
from .runtime.stream import Assembler, checked_grammar
from .runtime.text import Text


class Conversation:
    """One conversation with a model, in a slot of its own.

        llm = DeltaMemLlama(model_path=..., deltamem_path=..., n_ctx=4096)
        with Conversation(llm, system="Be brief.", memory_file="ada.memory") as ada:
            print(ada.say("My name is Ada."))

    When the text fills the context, its oldest turns leave it; the memory keeps what they wrote. With a memory file the
    memory is loaded from it, if it exists, and saved after each turn.

    A model holds n_seq_max texts at once. A conversation takes a slot when it is its turn, and gives it up to another
    that needs one; its memory moves at once, its text is read again, without writing, when it goes on.

    It may be used while a stream of it is open: that reply ends there, what was said so far counts, and the stream has
    no more pieces. It cannot be pickled or copied: `fork` makes a second one; messages and memory file can be kept.

    Each of `say`, `regenerate` and `edit` returns a reply; `stream`, `stream_regenerate` and `stream_edit` yield it in
    pieces as they come.

    Threads may share it, and its model (docs/reference/public-api.md). Each call is whole: others of this one wait for
    its end. What is said in other conversations meanwhile is decoded with it, in common batches.

    Args:
        llm: the model.
        system: system prompt, "" for none.
        memory_file: load the memory from there and save it there after each turn; nobody else may meanwhile.
        **options: of `say`, for every turn.

    Attributes:
        messages: what was said and is still in the text, as for `create_chat_completion`; the system prompt first.
        finish_reason: of the latest reply, "stop" or "length".
        n_dropped: messages that have left the text because the context was full.

    Raises MemoryFileError if the memory file is in use, damaged or of another adapter. If saving fails after a turn,
    the turn stays, and its reply is in `messages`. Once an adapter was attached or detached, the memory file is left as
    it is, and turns are refused until `open` or `close`.

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
        self.llm = llm
        self.options = _checked_options(llm, options)
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.finish_reason = "stop"
        self.n_dropped = 0
        self._text = llm._engine.text()
        self._reply: Reply | None = None  # in the making
        self._lock: MemoryFileLock | None = None
        self._n_attached = 0  # when the memory file was opened
        self.memory_file: str | None = None
        if memory_file is not None:
            self.open(memory_file)

    @property
    def memory(self) -> Memory:
        """The memory of this conversation, as `llm.memory`.

        Its `rollback` ends an open reply and takes text and memory back, but not `messages`: what they still say is
        read, and written, anew with the next turn. `undo` and `edit` take turns back.
        """
        return Memory(self.llm, self._text, self._end_reply)

    @property
    def n_tokens(self) -> int:
        """Length of the text."""
        return self._text.n_tokens

    #
    # talking
    #

    @holding("_text.turn")
    def say(self, content: str, **options: Any) -> str:
        """One turn: says `content` and returns the reply, without spaces that it begins with; `messages` has them.

        Options: `n_predict` (tokens at most; 0: only read; -1 or None: until the reply ends), `stop` (a string, or
        several), `seed`, and sampling as `Llama.generate` (temp, top_k, …); `grammar` may be text. `max_tokens` and
        `temperature` are what they are to `create_completion`. Raises InputError if an option is unknown or the turn
        does not fit in the context, MemoryFileError if the memory cannot be saved.
        """
        return self._whole_reply(_checked_content(content), options)

    def stream(self, content: str, **options: Any) -> Iterator[str]:
        """As `say`, in pieces as they come. Closing the iterator ends the reply; what was said so far counts."""
        yield from self._stream(_checked_content(content), options)

    @holding("_text.turn")
    def regenerate(self, **options: Any) -> str:
        """Another reply in place of the latest: text and memory go back to before it."""
        return self._whole_reply(None, options, instead=True)

    def stream_regenerate(self, **options: Any) -> Iterator[str]:
        """As `regenerate`, in pieces."""
        yield from self._stream(None, options, instead=True)

    @holding("_text.turn")
    def edit(self, content: str, **options: Any) -> str:
        """Says `content` in place of what was said last: text and memory go back to before that."""
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
        """Takes back the latest turn, what was said and the reply: text and memory are as before it.

        Raises InputError if there is none, or if another memory was put in place of this one since.
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
        """Reads a message without replying: "user", "assistant" or "system". Raises InputError if it does not fit."""
        self._ready()
        self.messages.append({"role": role, "content": _checked_content(content)})
        try:
            self._make_room(0)
            tokens = self._ended_tokens()
            if n_common(self._text.tokens, tokens) < len(tokens):
                unread = self._unread(tokens)
                self._text.eval(unread, self._segments(unread), keep_at=self._begun())
        except BaseException:
            self.messages.pop()
            raise
        self.save()

    @holding("_text.turn")
    def clear(self) -> None:
        """Forgets the text and keeps the memory, and the system prompt."""
        self._ready()
        text, messages = self._text, self._system()
        # what begins every text stays, as it is written already
        text.begin(n_common(text.tokens, self._ended_tokens(messages=messages)))
        self.messages = messages
        self.save()

    @holding("_text.turn")
    def fork(self) -> Conversation:
        """A second conversation that goes on from here by itself, with a memory of its own and no memory file."""
        self._end_reply()
        other = Conversation(self.llm, **self.options)
        other.messages = [dict(message) for message in self.messages]
        other.finish_reason, other.n_dropped = self.finish_reason, self.n_dropped
        other._text = self._text.fork()
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Conversation cannot be pickled or copied: keep its messages and memory file, or fork() it")

    def _end_reply(self) -> None:
        """If a stream is open, it ends here."""
        if self._reply is not None:
            self._reply.fail()

    def _ready(self) -> None:
        """Before anything is done with it."""
        self._end_reply()
        self._check_file()

    #
    # the memory file
    #

    @holding("_text.turn")
    def open(self, path: str | os.PathLike[str]) -> None:
        """From here on the memory is saved to `path` after each turn. If the file exists, it is loaded now."""
        self._end_reply()
        path = MemoryFileLock(path).path  # refuses what no file can be called
        path = os.path.abspath(path)  # also if the process goes to another folder
        lock, is_open = self._lock, True
        if lock is None or os.path.realpath(path) != os.path.realpath(lock.path):
            lock, is_open = MemoryFileLock(path), False
            lock.acquire()
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
        self._lock, self.memory_file = lock, path
        self._n_attached = self.llm._engine.slots.n_attached

    @holding("_text.turn")
    def save(self) -> None:
        """Saves the memory to the memory file, if there is one. Raises MemoryFileError if it cannot be saved, or if an
        adapter was attached or detached since the file was opened.
        """
        self._check_file()
        if self.memory_file is not None:
            self.memory.save(self.memory_file)

    @holding("_text.turn")
    def close(self) -> None:
        """Saves the memory, and gives up the memory file and the slot. Closing twice is fine.

        The file is left as it is if an adapter was attached or detached, or the model closed, since it was opened.
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
        """Whether there is a memory file, and the memory is still the one that was opened with it: an adapter that is
        attached, also the same one again, begins with empty memories.
        """
        slots = self.llm._engine.slots
        return self.memory_file is not None and slots.has_memory and slots.n_attached == self._n_attached

    def _check_file(self) -> None:
        """Raises MemoryFileError if there is a memory file that the memory must not be saved to any more."""
        self.llm._engine.slots.require_open()
        if self.memory_file is not None and not self._keeps_file:
            raise MemoryFileError(
                f"{self.memory_file}: no longer saved, as an adapter was attached or detached since the file was "
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
        """The messages, and what begins a reply."""
        return chat_prompt(self.llm, self.messages)[0]

    def _whole(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages, and what begins the next one."""
        if messages and messages[-1]["role"] == "user":
            return chat_prompt(self.llm, messages)[0]
        return self._ended_tokens(messages=messages)

    def _ended_tokens(self, n_messages: int | None = None, messages: list[dict[str, str]] | None = None) -> list[int]:
        """The first messages, up to where the content of the next one begins."""
        whole = self.messages if messages is None else messages
        messages = whole[:n_messages]
        following = whole[len(messages) : len(messages) + 1]
        if following:
            role = following[0]["role"]
        else:
            role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        # what two continuations agree on
        ways = [chat_prompt(self.llm, [*messages, {"role": role, "content": content}])[0] for content in "01"]
        return ways[0][: n_common(*ways)]

    def _said_last(self) -> int:
        """Where what the user said last stands in the messages. Raises InputError if there is nothing."""
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not said:
            raise InputError("there is nothing to take back: nothing was said, or it has left the text")
        return said[-1]

    def _unread(self, tokens: Sequence[int]) -> list[int]:
        """Goes back to where the text and `tokens` part. Returns those to read, at least one."""
        text = self._text
        n = min(n_common(text.tokens, tokens), len(tokens) - 1)
        position = text.position
        if n < min(position.n_tokens, position.n):
            # an ingest in segments is read as a whole, but for what the memory cannot take back
            n = max(position.ingest(n), min(n, position.floor))
        text.n_tokens = n
        return list(tokens[n:])

    def _begun(self) -> set[int]:
        """Where what is said now begins: a checkpoint is wanted there, to edit it."""
        return {len(self._ended_tokens(len(self.messages) - 1))}

    def _segments(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Adapters that write per segment read what is said as one: a message is a segment."""
        return np.zeros(len(tokens), dtype=np.int32) if self.memory.by_segment else None

    #
    # the context runs over
    #

    def _make_room(self, reserve: int) -> None:
        """Drops the oldest turns from the text until its messages and `reserve` tokens fit."""
        n_ctx = self._text.n_ctx
        n = len(self._prompt())
        if n + reserve <= n_ctx:
            return
        said = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        latest = [*self._system(), *self.messages[said[-1] if said else len(self._system()) :]]
        if len(chat_prompt(self.llm, latest)[0]) + reserve > n_ctx:
            raise InputError(f"that is too long for a context of {n_ctx} tokens: raise {option('n_ctx')} or say less")
        # more than is needed now, so that it does not happen in every turn
        while n + reserve > n_ctx - n_ctx // 8:
            n_dropped = self._n_oldest_turn()
            if n_dropped == 0:
                break
            self._drop(n_dropped)
            n = len(self._prompt())

    def _n_oldest_turn(self) -> int:
        """Messages of the oldest turn, from what the user says to what they say next; 0 if that is the latest one."""
        first = len(self._system())
        for i in range(first + 1, len(self.messages)):
            if self.messages[i]["role"] == "user":
                return i - first
        return 0

    def _drop(self, n_messages: int) -> None:
        """The oldest messages leave the text."""
        text, messages, first = self._text, self.messages, len(self._system())
        left = messages[:first] + messages[first + n_messages :]
        # all is worded before anything is changed: the template may refuse
        before, after = self._whole(messages), self._whole(left)
        start, end = (len(self._ended_tokens(n)) for n in (first, first + n_messages))
        n_read = n_common(text.tokens, before)
        reply = text.tokens[n_read:].tolist() if n_read == len(before) else []  # in the making
        if end <= n_read and before[:start] + before[end:] == after:
            text.n_tokens = n_read + len(reply)
            text.shift(start, end)
        else:  # a chat format that words the rest differently now: nothing of it is written again
            kept = after[: max(0, len(after) - len(before) + max(n_read, end))] + reply
            text.replace(kept, n_common(text.tokens, kept))
        messages[:] = left
        self.n_dropped += n_messages


class Reply(Request):
    """A reply: what is to be decoded next, and the text so far. It is in the making from `begin` until it has ended, or
    its conversation is used for something else.

    Args:
        content: what is said; None: what was said last.
        options: of `Conversation.say`.
        instead: in place of what was said last.
    """

    def __init__(
        self, conversation: Conversation, content: str | None, options: Mapping[str, Any], instead: bool = False
    ) -> None:
        super().__init__(conversation._text)
        self.conversation = conversation
        self.said = content
        self.options = {**conversation.options, **_checked_options(conversation.llm, options)}
        self.instead = instead
        self.content = ""
        self.pieces: list[str] = []  # that nobody has seen yet
        self.begun = False  # something but spaces was said
        self.n_tokens = 0
        self.finish_reason: str | None = None
        self._token = 0

    @property
    def is_open(self) -> bool:
        """Whether it is in the making."""
        return self.conversation._reply is self

    @property
    def is_given(self) -> bool:
        """As Request: a piece, if pieces are wanted, or the end."""
        return self.is_over or (self.goes_on and bool(self.pieces))

    def begin(self) -> None:
        """Enters what is said into the conversation. If that fails, the messages are as before."""
        conversation, options = self.conversation, dict(self.options)
        conversation._ready()
        llm, text, messages = conversation.llm, conversation._text, conversation.messages
        n_predict, stop, seed = (options.pop(name, None) for name in ("n_predict", "stop", "seed"))
        self.n_predict: int = -1 if n_predict is None else n_predict
        stop = [stop] if isinstance(stop, str) else list(stop or ())
        if options.get("logits_processor") is not None:
            self.thread = threading.get_ident()
            options["logits_processor"] = [functools.partial(_process, text, p) for p in options["logits_processor"]]
        with text.lock:
            self.sampler = llm._seeded_sampler(llm._seed if seed is None else seed, **options)

        start = conversation._said_last() if self.instead else len(messages)
        self.replaced = messages[start:]
        said = self.replaced[0]["content"] if self.said is None else self.said
        messages[start:] = [{"role": "user", "content": said}]
        try:
            conversation._make_room(min(text.n_ctx // 4, self.n_predict if self.n_predict >= 0 else 256))
            prompt, ends = chat_prompt(llm, messages)
            self.assembler = Assembler(llm._model.vocab, [*stop, *ends["stop"]])
            self.criteria = ends["stopping_criteria"]
            unread = conversation._unread(prompt)
            self.ask(unread, conversation._segments(unread), conversation._begun())
            self._before_prompt: Position | None = None
            self._n_dropped = conversation.n_dropped
            conversation._reply = self
        except BaseException:
            conversation._reply = None
            messages[-1:] = self.replaced
            raise

    def sampled(self, row: int) -> None:
        """As Request."""
        if self._before_prompt is None:
            self._before_prompt = self.before
        self._token = self.sampler.sample(self.conversation.llm._ctx, row)

    def follow(self) -> None:
        """As Request: the token sampled is said, and read next."""
        piece = self._push(self._token)
        self.content += piece
        piece = self.shown(piece)
        if piece:
            self.pieces.append(piece)
        if self.finish_reason:
            self.goes_on = False

    def _push(self, token: int) -> str:
        """Takes the token sampled after all that was read. Returns text; sets finish_reason at the end."""
        llm, text = self.conversation.llm, self.text
        if self.n_predict == 0:
            self.finish_reason = "length"
            return ""
        if llm._engine.slots.is_end(token):
            self.finish_reason = "stop"
            return self.assembler.finish()
        piece = self.assembler.push(token)
        self.n_tokens += 1
        if self.assembler.stopped:
            self.finish_reason = "stop"
            return piece
        if 0 < self.n_predict <= self.n_tokens or not self._has_room():
            self.finish_reason = "length"
            return piece + self.assembler.finish()
        if self.criteria is not None and self.criteria(text.tokens, np.zeros(0, dtype=np.single)):
            self.finish_reason = "stop"
            return piece
        self.ask([token])
        return piece

    def shown(self, piece: str) -> str:
        """What is returned of a piece. Many a model's first token is a word with the space before it: that is part of
        the message, whose tokens must stay those that were read, but of no use to a reader.
        """
        if not self.begun:
            piece = piece.lstrip(" ")
            self.begun = bool(piece)
        return piece

    def _has_room(self) -> bool:
        """Whether the reply can go on; a full context loses its oldest turn."""
        conversation, text = self.conversation, self.text
        if text.n_tokens < text.n_ctx:
            return True
        n_messages = conversation._n_oldest_turn()
        if n_messages == 0:
            return False
        conversation._drop(n_messages)
        return text.n_tokens < text.n_ctx

    def finish(self) -> None:
        """Enters what was said into the conversation, and saves its memory."""
        self._enter()
        self._save()

    def fail(self) -> None:
        """Ends it before its end: what could not be decoded is as if it had not been read; what was said so far counts.
        Nothing happens if it is no longer in the making.
        """
        # The garbage collector may end a stream in any thread at any moment, where nobody must wait for ever. Whoever
        # has the turn ends this reply anyway.
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
            self.content += self.assembler.finish()
            self._enter()
        else:
            self.conversation._reply = None
            self.conversation.messages[-1:] = self.replaced
        self.conversation.llm._engine.drop(self)
        if self.n_tokens > 0:
            self._save()

    def take_back(self) -> None:
        """The turn, with what was said so far, is as if it had not been. The memory file has nothing of it yet."""
        conversation, text = self.conversation, self.text
        before = self._before_prompt or self.before
        assert before is not None  # something was read
        conversation._reply = None
        conversation.messages[-1:] = self.replaced
        if conversation.n_dropped == self._n_dropped:
            if not text.restore(before):  # there is another memory since: as that was
                text.n_tokens = text.position.floor
                text.catch_up()
        else:  # text that stood before it has left: its memory, with what is left
            text.n_tokens = n_common(text.tokens, conversation._ended_tokens())
            if before.checkpoint is not None:
                text.become(before.checkpoint.state, before.checkpoint.n_written)

    def _enter(self) -> None:
        conversation = self.conversation
        conversation._reply = None
        conversation.messages.append({"role": "assistant", "content": self.content})
        conversation.finish_reason = self.finish_reason or "stop"

    def _save(self) -> None:
        if self.conversation._keeps_file:  # else the next turn says so
            self.conversation.save()


def say_together(asked: Mapping[Conversation, str], **options: Any) -> dict[Conversation, str]:
    """One turn of several conversations at once, in common batches. Returns the replies. Options as `say`.

    If the memory of one cannot be saved, all turns are made nevertheless, and MemoryFileError is raised at the end.
    """
    replies = dict.fromkeys(asked, "")
    with all_of(conversation._text.turn for conversation in asked):
        for conversation, piece in _speak(_asked(asked, options), in_pieces=False):
            replies[conversation] += piece
    return replies


def stream_together(asked: Mapping[Conversation, str], **options: Any) -> Iterator[tuple[Conversation, str]]:
    """As `say_together`, in pieces as they come. The conversations must be of one model; what one of them is told does
    not change what another one says. As many as the model has sequences (n_seq_max) go on at a time.
    """
    yield from _speak(_asked(asked, options))


def _asked(asked: Mapping[Conversation, str], options: Mapping[str, Any]) -> list[Reply]:
    if len({conversation.llm for conversation in asked}) > 1:
        raise InputError("conversations of different models cannot be decoded together")
    return [Reply(conversation, _checked_content(content), options) for conversation, content in asked.items()]


def _speak(waiting: list[Reply], in_pieces: bool = True) -> Generator[tuple[Conversation, str]]:
    """Makes replies, of conversations of one model, and yields their pieces; not `in_pieces`, when they are complete.

    Between two pieces any of the conversations may be used; its reply has then ended.
    """
    if not waiting:
        return
    engine = waiting[0].conversation.llm._engine
    with _turns(waiting):
        for reply in waiting:
            reply.goes_on = in_pieces
            reply.conversation._ready()
    active: list[Reply] = []
    errors: list[BaseException] = []  # of one reply: no reason to cut the other ones off
    try:
        while waiting or active:
            begins = waiting[: engine.slots.n_seq_max - len(active)]
            del waiting[: len(begins)]
            active += begins
            with _turns(active):
                for reply in begins:
                    reply.begin()
                active = [reply for reply in active if reply.is_open]  # others were used for something else by now
                if active:
                    engine.wait(active)
                over = [reply for reply in active if reply.is_over]
                for reply in over:
                    if isinstance(reply.error, NotFiniteError):
                        errors.append(reply.error)
                        reply.take_back()
                    elif reply.error is not None:
                        raise reply.error
                    elif reply.finish_reason is None:  # cancelled
                        reply.fail()
                    else:
                        try:
                            reply.finish()
                        except Exception as error:
                            errors.append(error)
                said = [(reply, piece) for reply in active for piece in reply.pieces if in_pieces or reply.is_over]
                for reply, _ in said:
                    reply.pieces = []
            for reply, piece in said:
                if reply.is_open or reply.finish_reason:  # not if it was used for something else by now
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
    """A logits processor, called with the tokens of `text`: llama_cpp gives it those of the model's own text."""
    return processor(text.tokens, scores)


def _checked_content(content: str) -> str:
    if not isinstance(content, str):
        raise InputError(f"a message is text, not {type(content).__name__}")
    return content


def _checked_options(llm: DeltaMemLlama, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a turn under their names here: `create_completion` calls some otherwise. Raises InputError."""
    options = dict(options)
    for name, other in (("n_predict", "max_tokens"), ("temp", "temperature")):
        if name in options and other in options:
            raise InputError(f"{name} and {other} are one option: give one of them")
    if "max_tokens" in options:
        options["n_predict"] = options.pop("max_tokens")
    if "temperature" in options:
        options["temp"] = options.pop("temperature")
    known = ["n_predict", "stop", "seed", *inspect.signature(llm._init_sampler).parameters]
    for name in options:
        if name not in known:
            raise InputError(f"{name} is no option of a turn: there are {', '.join(known)}")
    if not isinstance(options.get("n_predict") or 0, int):
        raise InputError(f"n_predict is a number of tokens, not {options['n_predict']!r}")
    grammar = options.get("grammar")
    if isinstance(grammar, str):
        options["grammar"] = checked_grammar(llm, grammar)
    elif grammar is not None and not isinstance(grammar, library.llama_cpp.LlamaGrammar):
        raise InputError(f"grammar is GBNF text or a LlamaGrammar, not {grammar!r}")
    return options


def chat_prompt(llm: DeltaMemLlama, messages: list[dict[str, str]]) -> tuple[list[int], dict[str, Any]]:
    """The tokens that create_chat_completion evaluates for these messages, and what ends a reply.

    The latter are the chat format's options stop and stopping_criteria. Raises InputError if its template fails.
    """
    from llama_cpp.llama_chat_format import get_chat_completion_handler

    llm._engine.slots.require_open()  # else llama_cpp would follow a null pointer
    catcher: Any = _PromptCatcher(llm)
    name = str(llm.chat_format)
    handler: Any = llm.chat_handler or llm._chat_handlers.get(name) or get_chat_completion_handler(name)
    try:
        handler(llama=catcher, messages=messages, stream=True)
    except Exception as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error
    return catcher.prompt, {"stop": catcher.stop, "stopping_criteria": catcher.stopping_criteria}


class _PromptCatcher:
    """Stands in for the model in a chat handler and keeps the prompt instead of evaluating it."""

    def __init__(self, llm: DeltaMemLlama) -> None:
        self._llm = llm
        self.prompt: list[int] = []
        self.stop: list[str] = []
        self.stopping_criteria: Any = None

    def create_completion(
        self, prompt: list[int], stop: list[str] | None = None, stopping_criteria: Any = None, **kwargs: Any
    ) -> Iterator[Any]:
        self.prompt, self.stop, self.stopping_criteria = prompt, stop or [], stopping_criteria
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
