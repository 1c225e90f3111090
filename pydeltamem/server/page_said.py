"""The conversation as the page draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from .page_markdown import Markdown
from .page_parts import printable
from .page_talk import FORGOTTEN, NOTE, Talk

N_SHOWN = 100  # messages that are drawn at first, the latest; and how many more each time
_NAMES = {"user": "You", "assistant": "The model"}


@dataclass
class _Drawn:
    role: str
    content: str
    is_past: bool  # no longer in the text
    element: Any
    body: Any  # shows the content


class Said:
    """The conversation of a tab.

    What is drawn already stays as it is: a screen reader reads only what is new, and a long conversation costs no more
    than a short one.
    """

    def __init__(self) -> None:
        self.earlier = ui.button("Show earlier messages", on_click=self._show_earlier)
        self.earlier.props("flat dense no-caps").classes("earlier")
        self.log = ui.element("div").classes("said").props('role=log aria-live=polite aria-label="Conversation"')
        self.earlier.set_visibility(False)
        self._name: str | None = None
        self._wanted: list[tuple[str, str, bool]] = []
        self._first = 0  # of those that are drawn
        self._drawn: list[_Drawn] = []
        self._live: _Drawn | None = None

    def draw(self, name: str, talk: Talk, hint: str, *, busy: bool) -> None:
        """Draws the conversation of a session. `hint`: what an empty one says. `busy`: the model answers now."""
        messages = [*((each, True) for each in talk.past), *((each, False) for each in talk.messages)]
        wanted = [(each["role"], printable(each.get("content") or ""), is_past) for each, is_past in messages]
        if not wanted:
            wanted = [(NOTE, hint, False)]
        if name != self._name or self._first >= len(wanted):
            self._name, self._first = name, max(0, len(wanted) - N_SHOWN)
            self._drop(0)
        self._wanted = wanted
        self._draw()
        if busy:
            self._live = self._add("assistant", "", False)
        # what changes with each piece is read when it is whole
        self.log.props["aria-busy"] = "true" if busy else "false"

    def stream(self, content: str) -> None:
        """The answer that the model gives now, as far as it is there."""
        if self._live is not None:
            self._live.content = self._live.body.content = content

    def _draw(self) -> None:
        wanted = self._wanted[self._first :]
        live, self._live = self._live, None
        if live is not None and len(wanted) == len(self._drawn) and wanted[-1][0] == live.role:  # it is over
            live.content = live.body.content = wanted[-1][1]
        n = _n_same([(drawn.role, drawn.content) for drawn in self._drawn], [each[:2] for each in wanted])
        self._drop(n)
        for drawn, (_, _, is_past) in zip(self._drawn, wanted):
            if drawn.is_past != is_past:
                drawn.is_past = is_past
                drawn.element.classes(add="past" if is_past else None, remove=None if is_past else "past")
        for each in wanted[n:]:
            self._add(*each)
        self.earlier.set_visibility(self._first > 0)

    def _drop(self, n: int) -> None:
        """Keeps the first n messages that are drawn."""
        for drawn in self._drawn[n:]:
            drawn.element.delete()
        del self._drawn[n:]

    def _add(self, role: str, content: str, is_past: bool) -> _Drawn:
        with self.log:
            element, body = _element(role, content)
        if is_past:
            element.classes("past")
        drawn = _Drawn(role, content, is_past, element, body)
        self._drawn.append(drawn)
        return drawn

    def _show_earlier(self) -> None:
        self._first = max(0, self._first - N_SHOWN)
        live = self._live
        self._drop(0)
        self._draw()
        if live is not None:
            self._live = self._add(live.role, live.content, False)


def _n_same(one: Sequence[object], other: Sequence[object]) -> int:
    """How many both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _element(role: str, content: str) -> tuple[Any, Any]:
    """An element of a message, and the one in it that shows the content."""
    if role == NOTE:
        label = ui.label(content).classes("note rule" if content == FORGOTTEN else "note")
        return label, label
    # a role is whatever a client has sent: a text, never a part of markup
    with ui.element("article").classes(f"message {role if role in _NAMES else 'other'}") as article:
        article.props["aria-label"] = _NAMES.get(role, printable(role))
        article.props["dir"] = "auto"
        if role == "assistant":
            return article, Markdown(content)
        return article, ui.label(content if role == "user" else f"{printable(role)}: {content}").classes("plain")
