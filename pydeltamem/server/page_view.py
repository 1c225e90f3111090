"""What one browser tab sees, and what its buttons do. Imported only where the page is served: NiceGUI loads slowly."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from nicegui import app, ui
from nicegui.events import UploadEventArguments

from ..errors import DeltaMemError
from ..formats.memory_file import MemorySnapshot
from . import page_memory
from .application import Server
from .logs import log
from .page_markdown import Markdown
from .page_talk import FORGOTTEN, NOTE, Talk
from .service import Answer, AsyncDeltaMem, SessionUnknown, checked_name
from .store import Conflict, Record, StoreError, told

_HERE = Path(__file__).parent
N_LISTED = 100  # sessions in the drawer
# Enter sends; not while an input method composes, and not on a touch screen, where it makes a new line
_ENTER = """(e) => {
    if (e.shiftKey || e.isComposing || matchMedia("(pointer: coarse)").matches) return;
    e.preventDefault();
    emit();
}"""

_ABOVE = 'anchor="top middle" self="bottom middle"'  # a tooltip that hides nothing below


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
        self.listed: list[Record] = []
        self.answer: Answer | None = None
        self.editing = False
        self.is_open = self.is_changing = False  # whether the session can be used; whether a button changes it
        self.layer: int | None = None  # whose states are shown; None: of the layer that changed most
        self.temperature, self.max_tokens = 0.7, 512
        self._drawn: Any = None  # the state that the heat map shows
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
                await self._list()
                if not self.name and self.listed:
                    self.name = self.listed[0].name
                await self._show(self.name or self._free_name())
            else:
                self.name = ""
                self._draw_talk()
        except DeltaMemError as error:  # a name that cannot be one, or the store fails
            _complain(error)
            self.name = self._free_name()
            self.heading.text = self.name
            self._draw_talk()
        self._let_in(True)
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
        for element in (self.sessions, self.forget_button, self.memory_part):
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
            _icon("menu", "Sessions", lambda: self.left.toggle())
            ui.label("δ-mem").classes("brand")
            self.heading = ui.label("").classes("grow cut").props("role=heading aria-level=1")
            _icon("contrast", "Light, dark or as the system", self._switch_theme)
            _icon("grid_on", "Memory", lambda: self.right.toggle())
        with ui.left_drawer(bordered=True, bottom_corner=True).props(
            'width=270 aria-label="Sessions" role=navigation'
        ) as self.left:
            self._build_sessions()
        with ui.right_drawer(bordered=True, bottom_corner=True).props(
            'width=330 aria-label="Memory" role=complementary'
        ) as self.right:
            self._build_memory()
        with ui.column().classes("center") as self.gate:
            self._wait("Connecting …")
        with ui.element("div").classes("center") as self.stage:
            self.said = ui.element("div").classes("said").props('role=log aria-live=polite aria-label="Conversation"')
        with ui.footer(fixed=True).classes("bar") as self.foot:
            self._build_input()
        self._let_in(False)

    def _build_sessions(self) -> None:
        with ui.column().classes("side") as self.sessions:
            ui.button("New session", icon="add", on_click=self._new).props("outline no-caps").classes("full")
            self.filter = ui.input("Find", on_change=self._draw_sessions).props("dense clearable").classes("full")
            self.list = ui.element("ul").classes("names")
            self.more = ui.label("").classes("faint")
        with ui.column().classes("side") as self.out:
            ui.button("Forget the key", icon="logout", on_click=self._leave).props("flat no-caps")

    def _build_memory(self) -> None:
        with ui.column().classes("side") as self.memory_part:
            ui.label("Memory").classes("title").props("role=heading aria-level=2")
            self.facts = ui.label("").classes("faint")
            self.layers_map = ui.echart(
                page_memory.layers_chart(_zeros(1, 1, 1), [0]), on_point_click=lambda e: self._pick(e.value[1])
            ).classes("map")
            self.layers_map.props("role=img")
            self.pick = ui.select({-1: ""}, value=-1, label="States of", on_change=lambda e: self._pick(e.value))
            self.pick.props("dense options-dense").classes("full")
            self.state_map = ui.echart(page_memory.state_chart(_zeros(1, 1, 1))).classes("map square")
            self.state_map.props('role=img aria-label="States of the chosen layer"')
            with ui.row().classes("full pair"):
                self.export_button = ui.button("Export", icon="download", on_click=self._export)
                self.import_button = ui.button("Import", icon="upload")
            for button in (self.export_button, self.import_button):
                button.props("outline no-caps").classes("grow")
            self.upload = ui.upload(
                auto_upload=True,
                max_file_size=self.server.settings.max_body,
                on_upload=self._import,
                on_rejected=lambda: _complain("The file is too large for this server."),
            ).classes("away")
            self.import_button.on_click(lambda: self.upload.run_method("pickFiles"))
        self.no_memory = ui.label("No adapter is attached, so there is no memory.").classes("side faint")
        with ui.column().classes("side") as self.options:
            ui.label("Answers").classes("title").props("role=heading aria-level=2")
            with ui.row().classes("full pair"):
                ui.number("Temperature", min=0, max=2, step=0.1).classes("grow").props("dense").bind_value(
                    self, "temperature"
                )
                ui.number("Tokens at most", min=1, step=64, precision=0).classes("grow").props("dense").bind_value(
                    self, "max_tokens"
                )

    def _build_input(self) -> None:
        with ui.column().classes("center writes"):
            with ui.row().classes("full hints"):
                self.status = ui.label("").classes("faint grow").props("role=status")
                self.cancel_button = ui.button("Cancel the edit", icon="close", on_click=self._cancel_edit)
                self.forget_button = ui.button("Forget the text", icon="layers_clear", on_click=self._forget_text)
                for button in (self.cancel_button, self.forget_button):
                    button.props("flat dense no-caps size=13px")
                with self.forget_button:
                    ui.tooltip("Keeps the memory only: what does it answer alone?").props(_ABOVE)
            with ui.row().classes("full ask"):
                self.input = ui.textarea().classes("grow")
                self.input.props(
                    'autogrow outlined dense rows=1 placeholder="Say something" '
                    'aria-label="Message" input-style="max-height: 30vh"'
                )
                self.input.on("keydown.enter", self._send, js_handler=_ENTER)
                ui.on("too_long", lambda: _complain("This text is too long: the page takes 900 kB."))  # page.js
                self.input.on("keydown.esc", self._stop, args=[])
                self.send_button = _icon("arrow_upward", "Send", self._send).props(
                    "color=primary unelevated flat=false"
                )
                self.stop_button = _icon("stop", "Stop", self._stop).props("color=negative unelevated flat=false")
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
                _complain("This is no key of this server.")
                return
            app.storage.tab["owner"] = owner  # its digest, not the key
            await self._enter()

        self.gate.clear()
        self._waits_for = ""
        with self.gate, ui.column().classes("wait"):
            ui.label("This server needs an API key. Sessions belong to their key.")
            field = ui.input("API key", password=True).props('outlined autocomplete=off aria-label="API key"')
            field.classes("full").on("keydown.enter", use, args=[])
            ui.button("Use it", on_click=use).props("no-caps")
        field.run_method("focus")

    def _leave(self) -> None:
        app.storage.tab.pop("owner", None)
        ui.navigate.to("/")

    def _switch_theme(self) -> None:
        order: list[bool | None] = [None, False, True]
        self.dark.value = order[(order.index(self.dark.value) + 1) % 3]
        app.storage.tab["dark"] = self.dark.value
        ui.notify({None: "As the system", False: "Light", True: "Dark"}[self.dark.value], timeout=1000)

    #
    # sessions
    #

    async def _list(self) -> None:
        self.listed = await self.service.list(self.owner)
        self._draw_sessions()

    def _draw_sessions(self) -> None:
        wanted = (self.filter.value or "").lower()
        names = [record for record in self.listed if wanted in record.name.lower()]
        self.filter.set_visibility(len(self.listed) > 8)
        self.more.text = f"… and {len(names) - N_LISTED} more" if len(names) > N_LISTED else ""
        self.list.clear()
        with self.list:
            if self.name and not wanted and all(record.name != self.name for record in self.listed):
                self._draw_session(self.name, "new")
            for record in names[:N_LISTED]:
                self._draw_session(record.name, f"{_count(record.turns, 'turn')}, {_count(record.tokens, 'token')}")

    def _draw_session(self, name: str, about: str) -> None:
        here = name == self.name
        with ui.element("li").classes("here" if here else ""):
            with ui.element("button").classes("pick") as button:
                button.props(f"type=button {'aria-current=page' if here else ''}")
                button.on("click", lambda: self._doing(lambda: self._show(name)), args=[])
                ui.label(name).classes("cut")
                ui.label(about).classes("faint cut")
            if here:
                with ui.row().classes("tools"):
                    if self.record is not None:
                        _icon("call_split", "Fork", lambda: self._doing(self._fork)).props("size=sm")
                    _icon("edit", "Rename", lambda: self._doing(self._rename)).props("size=sm")
                    _icon("delete", "Delete", lambda: self._doing(self._delete)).props("size=sm")

    async def _show(self, name: str) -> None:
        """Shows a session, which need not be there yet."""
        self.name = checked_name(name)
        self._cancel_edit()
        await self._refresh()
        known = self.talks.get(name)
        if known is None or known.version != self._version:  # it may have gone on in another tab
            self.talks[name] = Talk() if self.record is None else Talk.of(self.record)
        self.heading.text = name
        ui.page_title(f"{name} · δ-mem")
        ui.navigate.history.replace(f"/?session={quote(name)}")
        ui.run_javascript(f"if (innerWidth < 1024) getElement({self.left.id}).hide()")
        self._draw_talk()

    @property
    def _version(self) -> int:
        """Of the session, as the store had it at the latest look."""
        return 0 if self.record is None else self.record.version

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
        try:
            self.record = await self.service.get(self.name, self.owner)
        except SessionUnknown:
            self.record = None
        await self._list()
        await self._draw_memory()
        self._draw_input()

    def _free_name(self, base: str = "chat") -> str:
        names = {record.name for record in self.listed} | set(self.talks)
        n = next(n for n in range(1, len(names) + 2) if f"{base}-{n}" not in names)
        return f"{base}-{n}"

    async def _new(self) -> None:
        if self.record is not None or self.talk.messages:  # this one is not new
            await self._doing(lambda: self._show(self._free_name()))
        self._focus()

    async def _fork(self) -> None:
        new = await _asked_name("A second session that goes on from here", "Fork", self._free_name(self.name))
        if not new:
            return
        await self._refresh()
        if self._version != self.talk.version:
            await self._show_anew()
            return
        forked = await self.service.fork(self.name, new, self.owner)
        self.talks[new] = self.talk.copy()
        self.talks[new].version = forked.version
        await self._show(new)

    async def _rename(self) -> None:
        new = await _asked_name("Another name for this session", "Rename", self.name)
        if not new or new == self.name:
            return
        checked_name(new)
        if self.record is not None:
            await self.service.rename(self.name, new, self.owner)
            self.talk.version += 1  # a commit
        self.talks[new] = self.talks.pop(self.name)
        await self._show(new)

    async def _delete(self) -> None:
        if not await _agreed(f"Delete {self.name} and its memory for good?", "Delete"):
            return
        if self.record is not None:
            await self.service.delete(self.name, self.owner)
        self.talks.pop(self.name, None)
        self.listed = await self.service.list(self.owner)
        await self._show(self.listed[0].name if self.listed else self._free_name())

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
            stem = Path(event.file.name).stem
            name = await _asked_name("The session to take this memory; one that is there loses its own", "Import", stem)
            if name:
                await self.service.replace(name, snapshot, self.owner)
                self.talks.pop(name, None)
                await self._show(name)

        data = await event.file.read()
        self.upload.reset()
        await self._doing(bring)

    async def _doing(self, what: Callable[[], Awaitable[None]]) -> None:
        """Does something with a session, one thing at a time; one sentence if it fails."""
        if not self.is_open or self.is_changing:
            return
        if self.busy:
            _complain("The model is answering: stop it first.")
            return
        self.is_changing = True
        try:
            self.server.count(self.owner)
            with self.client:  # a dialog outlives the row of the button that opened it
                await what()
        except DeltaMemError as error:
            _complain(error)
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
            of_session = {"session": self.name, "seen": self.talk.version, "replaces_last": replaces_last}
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
            _complain(error)
        except Exception:
            log.exception("an answer of the page fails")
            _complain("The server failed: its log says why.")
        finally:
            if self.answer is not None:
                self.server.metrics.answered(self.answer)
            self.talk.messages = before
            if counts:
                self.talk.messages = [*messages, {"role": "assistant", "content": answer.content}]
                self.talk.version = 0 if answer.committed is None else answer.committed.version
            self.answer = None
        if not self.client.is_deleted:
            self._draw_talk()
            try:
                if is_stale:
                    await self._show_anew()
                elif self.service.has_memory:
                    await self._refresh()
            except DeltaMemError as error:  # the turn counts all the same
                _complain(error)
            self._draw_input()
        return counts

    async def _stream(self, answer: Answer) -> None:
        watching = asyncio.create_task(self._watch(answer))
        text, wait, since = "", 0.05, 0.0
        try:
            async for piece in answer:
                text += piece.text
                begin = time.monotonic()
                if begin - since < wait or self.client.is_deleted:
                    continue
                self.status.text = ""
                self.live.content = text
                since = time.monotonic()
                wait = max(0.05, 10 * (since - begin))  # a long answer is drawn less often
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch(self, answer: Answer) -> None:
        """The heat map while the model reads and answers."""
        while not self.client.is_deleted:
            state = answer.state
            if state is not None and state is not self._drawn:
                self._draw_state(state)
            await asyncio.sleep(0.25)

    def _stop(self) -> None:
        if self.answer is not None:
            self.answer.cancel()
        elif self.editing:
            self._cancel_edit()

    def _focus(self) -> None:
        """Lets the user type the next message, but not while a dialog waits: its own field would lose the keys."""
        if not self.is_changing:
            self.input.run_method("focus")

    async def _changed(self, change: Callable[..., Awaitable[Record]]) -> bool:
        """Changes the session by a method of the service, if it is what this tab shows; otherwise shows it anew."""
        try:
            record = await change(self.name, self.owner, seen=self.talk.version)
        except (Conflict, SessionUnknown):
            await self._show_anew()
            return False
        self.talk.version = record.version
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
            self.input.value = self.talk.last[0]
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
        self.said.clear()
        with self.said:
            for message in self.talk.past:
                self._draw_message(message, "past")
            for message in self.talk.messages:
                self._draw_message(message)
            if self.busy:
                self.live = self._draw_message({"role": "assistant", "content": ""})
            elif not self.talk.past and not self.talk.messages:
                ui.label(
                    "Tell it something. Then forget the text and ask: the memory alone answers."
                    if self.service.has_memory
                    else "Say something."
                ).classes("note")
            else:
                self._draw_actions()

    def _draw_message(self, message: dict[str, Any], kind: str = "") -> Any:
        role, content = message["role"], message.get("content") or ""
        if role == NOTE:
            return ui.label(content).classes("note rule" if content == FORGOTTEN else "note")
        who = {"user": "You", "assistant": "The model"}.get(role, role)
        with ui.element("article").classes(f"message {role} {kind}").props(f'aria-label="{who}"'):
            if role == "assistant":
                return Markdown(content)
            return ui.label(content if role == "user" else f"{role}: {content}").classes("plain")

    def _draw_actions(self) -> None:
        with ui.row().classes("actions"):
            if self.talk.last is not None:
                _icon("refresh", "Regenerate the answer", self._regenerate).props("size=sm")
                _icon("edit", "Edit the last message", self._edit).props("size=sm")
            if self.talk.messages or (self.record is not None and self.record.history):
                _icon("undo", "Undo the last turn", self._undo).props("size=sm")

    async def _draw_memory(self) -> None:
        if self.record is None:
            shape = self.service.llm._engine.slots.shape
            self.facts.text = "Nothing is written yet."
            self._draw_state(_zeros(*shape))
            return
        snapshot = await self.service.snapshot_of(self.record)
        self.facts.text = (
            f"{_count(self.record.tokens, 'token')} written in {_count(self.record.turns, 'turn')}; "
            f"{self.record.size / 1000:.1f} kB"
        )
        self._draw_state(snapshot.state)

    def _draw_state(self, state: Any) -> None:
        self._drawn = state
        layers = [int(layer) for layer in self.service.about["layers"].split(",")]
        values = page_memory.singular_values(state)
        options = {-1: "the strongest layer"} | {i: f"layer {layer}" for i, layer in enumerate(layers)}
        if self.pick.options != options:
            self.pick.set_options(options, value=-1)
        self.layers_map.style(f"height: {min(420, 40 + max(9, min(28, 400 // len(layers))) * len(layers))}px")
        self.layers_map.props(f'aria-label="{page_memory.described(values, layers)}"')
        _redraw(self.layers_map, page_memory.layers_chart(values, layers))
        self._draw_layer()

    def _draw_layer(self) -> None:
        state = self._drawn
        n_head = state.shape[1]
        layer = int((state**2).sum((1, 2, 3)).argmax()) if self.layer is None else self.layer
        wide = math.ceil(math.sqrt(n_head))
        self.state_map.style(f"height: {30 + 300 * math.ceil(n_head / wide) // wide}px")
        _redraw(self.state_map, page_memory.state_chart(state[layer]))

    def _pick(self, layer: int) -> None:
        self.layer = layer if layer >= 0 else None
        self.pick.value = layer
        self._draw_layer()


#
# small things
#


def _icon(icon: str, label: str, do: Callable[[], Any]) -> ui.button:
    button = ui.button(icon=icon, on_click=do, color=None).props(f'flat round dense aria-label="{label}"')
    with button:
        ui.tooltip(label).props(_ABOVE if icon in ("arrow_upward", "stop") else "")
    return button


def _complain(error: object) -> None:
    text = told(error)
    if isinstance(error, StoreError):
        log.error("an error of the store", exc_info=error)
    ui.notify(f"{text[:1].upper()}{text[1:]}", type="negative", position="top", close_button="Close", timeout=8000)


async def _asked_name(text: str, action: str, name: str) -> str | None:
    """Asks for the name of a session; None if the user would rather not."""
    with ui.dialog() as dialog, ui.card().classes("ask-card"):
        ui.label(text)
        field = ui.input("Name", value=name).props("autofocus outlined dense").classes("full")
        field.on("keydown.enter", lambda: dialog.submit(field.value), args=[])
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
            ui.button(action, on_click=lambda: dialog.submit(field.value)).props("no-caps")
    answer: str | None = await dialog
    _drop(dialog)
    return (answer or "").strip() or None


async def _agreed(text: str, action: str) -> bool:
    with ui.dialog() as dialog, ui.card().classes("ask-card"):
        ui.label(text)
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat no-caps")
            ui.button(action, color="negative", on_click=lambda: dialog.submit(True)).props("autofocus no-caps")
    answer = bool(await dialog)
    _drop(dialog)
    return answer


def _drop(dialog: ui.dialog) -> None:
    if not dialog.is_deleted:  # with its tab
        dialog.delete()


def _redraw(chart: ui.echart, options: dict[str, Any]) -> None:
    chart.options.clear()
    chart.options.update(options)
    chart.update()


def _zeros(*shape: int) -> Any:
    return np.zeros(shape, dtype=np.float32)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
