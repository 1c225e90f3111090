"""What one browser tab sees, and what its buttons do. Imported only where the page is served: NiceGUI loads slowly."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from nicegui import app, ui
from nicegui.events import GenericEventArguments, UploadEventArguments

from ..errors import DeltaMemError, InputError
from ..formats.memory_file import MemorySnapshot
from .answer import Answer
from .logs import log
from .page_maps import Maps
from .page_parts import ABOVE, KEY, agreed, asked_name, complain, count, icon, printable
from .page_said import Said
from .page_sessions import Sessions
from .page_talk import Talk
from .records import NOTHING, Conflict, Identity, Record, SessionUnknown, checked_name, name_like
from .service import AsyncDeltaMem
from .state import Server

_HERE = Path(__file__).parent
# Enter sends; not on a touch screen, where it makes a new line
_ENTER = KEY.replace(
    "emit();",
    """if (e.shiftKey || matchMedia("(pointer: coarse)").matches) return;
    e.preventDefault();
    emit();""",
)
_HINT, _HINT_WITHOUT_MEMORY = (
    "Tell it something. Then forget the text and ask: the memory alone answers.",
    "Say something.",
)


class View:
    """The page of one tab.

    Args:
        session: the session to show first; empty: the latest one.
    """

    def __init__(self, server: Server, session: str = "") -> None:
        self.server = server
        self.client = ui.context.client
        self.name = session
        self.owner = ""
        self.record: Record | None = None
        self.talks: dict[str, Talk] = {}
        self.answer: Answer | None = None
        self.editing = False
        self.is_open = self.is_changing = False  # whether the session can be used; whether a button changes it
        self.temperature, self.max_tokens = 0.7, 512
        self._waits_for = ""

    @property
    def service(self) -> AsyncDeltaMem:
        return self.server.service

    @property
    def talk(self) -> Talk:
        return self.talks.setdefault(self.name, Talk())

    @property
    def busy(self) -> bool:
        """Whether the model answers."""
        return self.answer is not None

    async def open(self) -> None:
        """Builds the page. Goes on by itself once the browser is connected and the model is loaded."""
        self._build()
        self.client.on_delete(self._gone)
        ui.on("goes", self._gone)  # page.js
        ui.on("moves", self._go)
        await self.client.connected()
        if not self.client.is_deleted:
            self.dark.value = app.storage.tab.get("dark")
            await self._enter()

    def _gone(self) -> None:
        if self.answer is not None:
            self.answer.cancel()

    async def _enter(self) -> None:
        """The key, the model, the session: as soon as each is there."""
        if self.server.settings.keys:
            self.owner = app.storage.tab.get("owner", "")
            if not self.owner:
                self._ask_key()
                return
        if not await self._is_loaded():
            return
        try:
            if self.service.has_memory:
                await self._show_first()
            else:
                self.name = ""
                self._draw_talk()
        except DeltaMemError as error:  # the store fails
            complain(error)
            self.name = self.heading.text = self.name or "chat-1"
            self._draw_talk()
        self._let_in(True)
        ui.run_javascript("restoreDraft()")
        self._focus()

    async def _is_loaded(self) -> bool:
        """Waits for the model. False if it cannot be loaded, or the tab is closed."""
        while self.server._service is None and not self.client.is_deleted:
            failure = self.server.failure
            text = "The model is being loaded …" if failure is None else f"The model cannot be loaded: {failure}"
            self._wait(text, failure is None)
            if failure is not None:
                return False
            await asyncio.sleep(0.5)
        return not self.client.is_deleted

    def _let_in(self, is_open: bool) -> None:
        """Shows the conversation and what belongs to it, or hides it."""
        self.is_open = is_open
        has_memory = is_open and self.service.has_memory
        for element in (self.stage, self.foot, self.options):
            element.set_visibility(is_open)
        for element in (self.sessions_part, self.forget_button, self.memory_part):
            element.set_visibility(has_memory)
        self.gate.set_visibility(not is_open)
        self.no_memory.set_visibility(is_open and not has_memory)
        self.out.set_visibility(is_open and bool(self.server.settings.keys))

    #
    # the frame
    #

    def _build(self) -> None:
        style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        ui.add_head_html(f"<style>{style}</style>")
        ui.add_body_html(f"<script>{script}</script>")
        ui.colors(primary="#3b66a8", negative="#b3261e")
        self.dark = ui.dark_mode(None)
        with ui.header(fixed=True).classes("bar"):
            icon("menu", "Sessions", lambda: self.left.toggle())
            ui.label("δ-mem").classes("brand")
            self.heading = ui.label("").classes("grow cut").props("role=heading aria-level=1")
            icon("contrast", "Light, dark or as the system", self._switch_theme)
            icon("grid_on", "Memory", lambda: self.right.toggle())
        with ui.left_drawer(bordered=True, bottom_corner=True).props(
            'width=270 aria-label="Sessions" role=navigation'
        ) as self.left:
            self._build_sessions()
        with ui.right_drawer(bordered=True, bottom_corner=True).props(
            'width=330 aria-label="Memory" role=complementary'
        ) as self.right:
            self._build_memory()
        # drawers would ask a browser whether they are open, and fail where it answers late; it tells of it by itself
        self.client.connect_handlers.clear()
        with ui.column().classes("center") as self.gate:
            self._wait("Connecting …")
        with ui.element("div").classes("center") as self.stage:
            self.said = Said()
            self.actions = ui.element("div")
        with ui.footer(fixed=True).classes("bar") as self.foot:
            self._build_input()
        self._let_in(False)

    def _build_sessions(self) -> None:
        def doing(what: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
            return lambda: self._doing(what)

        def show(name: str) -> Awaitable[None]:
            return self._doing(lambda: self._show(name, moves=True))

        tools = [
            ("call_split", "Fork", doing(self._fork)),
            ("edit", "Rename", doing(self._rename)),
            ("delete", "Delete", doing(self._delete)),
        ]
        with ui.column().classes("side") as self.sessions_part:
            self.sessions = Sessions(self._found, show, self._new, tools, n_stored=1)
        with ui.column().classes("side") as self.out:
            ui.button("Forget the key", icon="logout", on_click=self._leave).props("flat no-caps")

    def _build_memory(self) -> None:
        with ui.column().classes("side") as self.memory_part:
            ui.label("Memory").classes("title").props("role=heading aria-level=2")
            self.facts = ui.label("").classes("faint")
            self.maps = Maps()
            with ui.row().classes("full pair"):
                self.export_button = ui.button("Export", icon="download", on_click=self._export)
                self.import_button = ui.button("Import", icon="upload")
            for button in (self.export_button, self.import_button):
                button.props("outline no-caps").classes("grow")
            bring = weakref.WeakMethod(self._import)  # FastAPI keeps what answers at an address, although that is gone
            self.upload = ui.upload(
                auto_upload=True,
                max_file_size=self.server.settings.max_body,
                on_upload=lambda event: (taken := bring()) and taken(event),
                on_rejected=lambda: complain("The file is too large for this server."),
            ).classes("away")
            self.import_button.on_click(lambda: self.upload.run_method("pickFiles"))
        self.no_memory = ui.label("No adapter is attached, so there is no memory.").classes("side faint")
        with ui.column().classes("side") as self.options:
            ui.label("Answers").classes("title").props("role=heading aria-level=2")
            with ui.row().classes("full pair"):
                temperature = ui.number("Temperature", min=0, max=2, step=0.1)
                max_tokens = ui.number("Tokens at most", min=1, step=64, precision=0, format="%d")
            for field, name in ((temperature, "temperature"), (max_tokens, "max_tokens")):
                field.classes("grow").props("dense").bind_value(self, name)

    def _build_input(self) -> None:
        with ui.column().classes("center writes"):
            with ui.row().classes("full hints"):
                self.status = ui.label("").classes("faint grow").props("role=status")
                self.cancel_button = ui.button("Cancel the edit", icon="close", on_click=self._cancel_edit)
                self.forget_button = ui.button("Forget the text", icon="layers_clear", on_click=self._forget_text)
                for button in (self.cancel_button, self.forget_button):
                    button.props("flat dense no-caps size=13px")
                with self.forget_button:
                    ui.tooltip("Keeps the memory only: what does it answer alone?").props(ABOVE)
            with ui.row().classes("full ask"):
                self.input = ui.textarea().classes("grow")
                self.input.props(
                    'dir=auto autogrow outlined dense rows=1 placeholder="Say something" '
                    'aria-label="Message" input-style="max-height: 30vh"'
                )
                self.input.on("keydown.enter", self._send, js_handler=_ENTER)
                ui.on("too_long", lambda: complain("This text is too long: the page takes 900 kB."))  # page.js
                self.input.on("keydown.esc", self._stop, js_handler=KEY)
                self.send_button = icon("arrow_upward", "Send", self._send).props("color=primary unelevated flat=false")
                self.stop_button = icon("stop", "Stop", self._stop).props("color=negative unelevated flat=false")
        self._draw_input()

    def _wait(self, text: str, spins: bool = True) -> None:
        if self._waits_for == text:
            return
        self._waits_for = text
        self.gate.clear()
        with self.gate, ui.row().classes("wait").props("role=status"):
            if spins:
                ui.spinner(size="1.5em")
            ui.label(text)

    def _ask_key(self) -> None:
        async def use() -> None:
            owner = self.server.settings.keys.owner(f"Bearer {field.value or ''}")
            field.value = ""
            if owner is None:
                complain("This is no key of this server.")
                return
            app.storage.tab["owner"] = owner  # its digest, not the key
            await self._enter()

        self.gate.clear()
        self._waits_for = ""
        with self.gate, ui.column().classes("wait"):
            ui.label("This server needs an API key. Sessions belong to their key.")
            field = ui.input("API key", password=True).props('outlined autocomplete=off aria-label="API key"')
            field.classes("full").on("keydown.enter", use, js_handler=KEY)
            ui.button("Use it", on_click=use).props("no-caps")
        field.run_method("focus")

    def _leave(self) -> None:
        app.storage.tab.pop("owner", None)
        self.input.value = ""  # whoever comes next gets no draft
        ui.navigate.to("/")

    def _switch_theme(self) -> None:
        order: list[bool | None] = [None, False, True]
        self.dark.value = order[(order.index(self.dark.value) + 1) % 3]
        app.storage.tab["dark"] = self.dark.value
        ui.notify({None: "As the system", False: "Light", True: "Dark"}[self.dark.value], timeout=1000)

    #
    # sessions
    #

    async def _found(self, containing: str, limit: int) -> list[Record]:
        return await self.service.list(self.owner, containing=containing, limit=limit)

    async def _show_first(self) -> None:
        """Shows the session that the tab was opened for; else, and if its name can be none, another one."""
        try:
            name = checked_name(self.name) if self.name else await self._latest()
        except InputError as error:
            complain(error)
            name = await self._free_name()
        await self._show(name)

    async def _latest(self) -> str:
        """The name of the latest session; of a new one if there is none."""
        found = await self._found("", 1)
        return found[0].name if found else await self._free_name()

    async def _stored(self, name: str) -> Record | None:
        """The session as the store has it; None if it has none."""
        try:
            return await self.service.get(name, self.owner)
        except SessionUnknown:
            return None

    async def _show(self, name: str, *, moves: bool = False) -> None:
        """Shows a session, which need not be there yet. If the store fails, the tab stays as it is. `moves`: the
        browser's "back" comes back from it.
        """
        name = checked_name(name)
        record = await self._stored(name)
        history, moves = ui.navigate.history, moves and name != self.name
        (history.push if moves else history.replace)(f"/?session={quote(name)}")
        self.name, self.record = name, record
        self._cancel_edit()
        known = self.talks.get(name)
        if known is None or known.seen != self._identity:  # it may have gone on in another tab
            self.talks[name] = Talk() if record is None else Talk.of(record)
        self.heading.text = name
        ui.page_title(f"{name} · δ-mem")
        ui.run_javascript(f"if (innerWidth < 1024) getElement({self.left.id}).hide()")
        self._draw_talk()
        self._draw_input()
        await self.sessions.draw(name, record)
        await self._draw_memory()
        self._take_keys()  # what had them may be gone

    @property
    def _identity(self) -> Identity:
        """Which commit of the session the store had at the latest look."""
        return NOTHING if self.record is None else self.record.identity

    async def _go(self, event: GenericEventArguments) -> None:
        """The browser went back or forth to a session."""
        if self.is_open and self.service.has_memory and event.args != self.name:
            await self._doing(lambda: self._show(event.args))
            ui.navigate.history.replace(f"/?session={quote(self.name)}")  # where it is, if it could not go

    async def _show_anew(self) -> None:
        """Shows the session as the store has it, because it is no longer what this tab shows."""
        ui.notify(
            "This session has gone on elsewhere. It is shown as it is now: nothing was changed here.",
            type="warning",
            position="top",
            close_button="Close",
            timeout=8000,
        )
        self.talks.pop(self.name, None)
        await self._show(self.name)

    async def _refresh(self) -> None:
        """Everything that the store knows, after something has changed."""
        self.record = await self._stored(self.name)
        await self.sessions.draw(self.name, self.record)
        await self._draw_memory()
        self._draw_input()

    async def _free_name(self, base: str = "chat") -> str:
        """A name that no session has: the one after a number that is taken, found without looking at all of them."""

        async def is_taken(n: int) -> bool:
            return named(n) in self.talks or await self._stored(named(n)) is not None

        def named(n: int) -> str:
            return f"{base[:120]}-{n}"

        taken, free = 0, 1
        while await is_taken(free):
            taken, free = free, 2 * free
        while free - taken > 1:
            n = (taken + free) // 2
            taken, free = (n, free) if await is_taken(n) else (taken, n)
        return named(free)

    async def _new(self) -> None:
        async def show() -> None:
            await self._show(await self._free_name(), moves=True)

        if self.record is not None or self.talk.messages:  # this one is not new
            await self._doing(show)
        self._focus()

    async def _fork(self) -> None:
        new = await asked_name("A second session that goes on from here", "Fork", await self._free_name(self.name))
        if not new:
            return
        await self._refresh()
        if self._identity != self.talk.seen:
            await self._show_anew()
            return
        forked = await self.service.fork(self.name, new, self.owner)
        self.talks[new] = self.talk.copy()
        self.talks[new].seen = forked.identity
        await self._show(new, moves=True)

    async def _rename(self) -> None:
        new = await asked_name("Another name for this session", "Rename", self.name)
        if not new or new == self.name:
            return
        if self.record is not None:
            await self.service.rename(self.name, new, self.owner)
            self.talk.seen = self.talk.seen._replace(version=self.talk.seen.version + 1)  # a commit
        self.talks[new] = self.talks.pop(self.name)
        await self._show(new)

    async def _delete(self) -> None:
        if not await agreed(f"Delete {self.name} and its memory for good?", "Delete"):
            return
        if self.record is not None:
            await self.service.delete(self.name, self.owner)
        self.talks.pop(self.name, None)
        await self._show(await self._latest())

    async def _forget_text(self) -> None:
        async def forget() -> None:
            if not await self._changed(self.service.forget_text):
                return
            self.talk.forget_text()
            self._cancel_edit()
            await self._refresh()
            self._draw_talk()

        await self._doing(forget)
        self._focus()

    async def _export(self) -> None:
        async def export() -> None:
            snapshot = await self.service.snapshot(self.name, self.owner)
            ui.download.content(snapshot.to_bytes(), f"{self.name}.memory")

        await self._doing(export)

    async def _import(self, event: UploadEventArguments) -> None:
        async def bring() -> None:
            snapshot = await asyncio.to_thread(MemorySnapshot.from_bytes, data)
            stem = name_like(Path(event.file.name).stem)  # of "ada (1)", as a second download is called
            name = await asked_name("The session to take this memory; one that is there loses its own", "Import", stem)
            if name:
                await self.service.replace(name, snapshot, self.owner)
                self.talks.pop(name, None)
                await self._show(name, moves=True)

        data = await event.file.read()
        self.upload.reset()
        await self._doing(bring)

    async def _doing(self, what: Callable[[], Awaitable[None]]) -> None:
        """Does something with a session, one thing at a time; one sentence if it fails."""
        if not self.is_open or self.is_changing:
            return
        if self.busy:
            complain("The model is answering: stop it first.")
            return
        self.is_changing = True
        try:
            self.server.count(self.owner)
            with self.client:  # a dialog outlives the row of the button that opened it
                await what()
        except DeltaMemError as error:
            complain(error)
        finally:
            self.is_changing = False

    #
    # turns
    #

    async def _send(self) -> None:
        text = (self.input.value or "").strip()
        if not text or self.busy or self.is_changing or not self.is_open:
            return
        edits, last, before = self.editing, self.talk.last, list(self.talk.messages)
        if edits:
            del before[-2:]
            self._cancel_edit(keep=True)
        if not await self._answered([*before, {"role": "user", "content": text}], replaces_last=edits, typed=True):
            self.editing = edits and self.talk.last == last  # that is still there
            self.input.value = text
            self._draw_input()
        self._focus()

    async def _regenerate(self) -> None:
        with self.client:  # the answer outlives the button
            await self._answered(self.talk.messages[:-1])
            self._focus()

    async def _answered(self, messages: list[dict[str, Any]], replaces_last: bool = False, typed: bool = False) -> bool:
        """Lets the model answer. False if the turn does not count; text and memory are then as before. `typed`: the new
        message is in the box.
        """
        if self.busy or self.is_changing or not self.is_open:
            return False
        before = self.talk.messages
        self.talk.messages = messages
        counts = is_stale = False
        of_session: dict[str, Any] = {}
        if self.name:
            of_session = {"session": self.name, "seen": self.talk.seen, "replaces_last": replaces_last}
        try:
            self.server.count(self.owner)
            self.answer = answer = self.service.chat(
                messages,
                **of_session,
                owner=self.owner,
                temperature=float(self.temperature or 0),
                max_tokens=int(self.max_tokens or 512),
            )
            self._draw_input()
            self._draw_talk()
            await answer.start()
            if typed:  # not before: the browser would tell of its empty box after the text is in it again
                self.input.value = ""
            await self._stream(answer)
            counts = answer.counts
        except Conflict:
            is_stale = True
        except DeltaMemError as error:
            complain(error)
        except Exception:
            log.exception("an answer of the page fails")
            complain("The server failed: its log says why.")
        finally:
            if self.answer is not None:
                self.server.metrics.answered(self.answer)
            self.talk.messages = before
            if counts:
                self.talk.messages = [*messages, {"role": "assistant", "content": answer.content}]
                self.talk.seen = NOTHING if answer.committed is None else answer.committed.identity
            self.answer = None
        if not self.client.is_deleted:
            self._draw_talk()
            try:
                if is_stale:
                    await self._show_anew()
                elif self.service.has_memory:
                    await self._refresh()
            except DeltaMemError as error:  # the turn counts all the same
                complain(error)
            self._draw_input()
        return counts

    async def _stream(self, answer: Answer) -> None:
        watching, drawing = asyncio.create_task(self._watch(answer)), None
        text, wait, since = "", 0.05, 0.0
        try:
            async for piece in answer:
                text += piece.text
                begin = time.monotonic()
                is_drawing = drawing is not None and not drawing.done()
                if is_drawing or begin - since < wait or self.client.is_deleted:
                    continue
                self.status.text = ""
                self.said.stream(printable(text))
                since = time.monotonic()
                wait = max(0.05, 10 * (since - begin))  # a long answer is drawn less often
                drawing = asyncio.create_task(self._drawn())
        finally:
            tasks = [each for each in (watching, drawing) if each is not None]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _drawn(self) -> None:
        """Waits until the browser has drawn what it was sent: a slow one would hear of no click otherwise."""
        with contextlib.suppress(TimeoutError):  # the connection broke
            await self.client.run_javascript("new Promise((done) => setTimeout(done))", timeout=10)

    async def _watch(self, answer: Answer) -> None:
        """The heat map while the model reads and answers."""
        while not self.client.is_deleted:
            state = answer.state
            if state is not None and state is not self.maps.state:
                self.maps.draw(state, self._layers)
                await self._drawn()
            await asyncio.sleep(0.25)

    def _stop(self) -> None:
        if self.answer is not None:
            self.answer.cancel()
        elif self.editing:
            self._cancel_edit()

    def _focus(self) -> None:
        """Lets the user type the next message, but not while a dialog waits: its own field would lose the keys."""
        if not self.is_changing:
            self._take_keys()

    def _take_keys(self) -> None:
        self.client.run_javascript("takeKeys()")  # page.js

    async def _changed(self, change: Callable[..., Awaitable[Record]]) -> bool:
        """Changes the session by a method of the service, if it is what this tab shows; otherwise shows it anew."""
        try:
            record = await change(self.name, self.owner, seen=self.talk.seen)
        except (Conflict, SessionUnknown):
            await self._show_anew()
            return False
        self.talk.seen = record.identity
        return True

    async def _undo(self) -> None:
        async def undo() -> None:
            has_session = bool(self.name) and self.service.has_memory
            if has_session and not await self._changed(self.service.undo):
                return
            self.talk.undo()
            self._draw_talk()
            if has_session:
                await self._refresh()
                self._draw_talk()

        if not self.is_changing:
            self._cancel_edit()
        await self._doing(undo)
        self._focus()

    def _edit(self) -> None:
        if self.talk.last is not None and not self.is_changing:
            self.editing = True
            self.input.value = printable(self.talk.last[0])
            self._draw_input()
            self._focus()

    def _cancel_edit(self, keep: bool = False) -> None:
        if self.editing:
            self.editing = False
            if not keep:
                self.input.value = ""
            self._draw_input()

    #
    # what is drawn
    #

    def _draw_input(self) -> None:
        self.send_button.set_visibility(not self.busy)
        self.stop_button.set_visibility(self.busy)
        self.cancel_button.set_visibility(self.editing)
        self.forget_button.set_enabled(not self.busy and self.record is not None and bool(self.record.text))
        self.status.text = "reading …" if self.busy else "editing the last message" if self.editing else ""
        self.export_button.set_enabled(self.record is not None)

    def _draw_talk(self) -> None:
        self.said.draw(self.name, self.talk, _HINT if self.service.has_memory else _HINT_WITHOUT_MEMORY, busy=self.busy)
        self.actions.clear()
        if not self.busy and (self.talk.past or self.talk.messages):
            with self.actions, ui.row().classes("actions"):
                self._draw_actions()

    def _draw_actions(self) -> None:
        if self.talk.last is not None:
            icon("refresh", "Regenerate the answer", self._regenerate).props("size=sm")
            icon("edit", "Edit the last message", self._edit).props("size=sm")
        if self.talk.messages or (self.record is not None and self.record.history):
            icon("undo", "Undo the last turn", self._undo).props("size=sm")

    @property
    def _layers(self) -> list[int]:
        """Those of the model that carry memory."""
        return [int(layer) for layer in self.service.about["layers"].split(",")]

    async def _draw_memory(self) -> None:
        record = self.record
        if record is None:
            self.facts.text = "Nothing is written yet."
            self.maps.draw(np.zeros(self.service.llm._engine.slots.shape, dtype=np.float32), self._layers)
            return
        snapshot = await self.service.snapshot_of(record)
        self.facts.text = (
            f"{count(record.tokens, 'token')} written in {count(record.turns, 'turn')}; {record.size / 1000:.1f} kB"
        )
        if record.adapter != self.service.adapter:
            self.facts.text += "; of another adapter than the attached one, so it cannot be gone on with"
        self.maps.draw(snapshot.state, snapshot.layers)
