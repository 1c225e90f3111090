"""The sessions of an owner as the page lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nicegui import ui

from .page_parts import count, icon
from .records import Record

N_LISTED = 100  # sessions in the drawer


class Sessions:
    """The list of a tab.

    Args:
        show: called with the name of a session that is chosen.
        new: called for a new one.
        tools: what can be done with the present one: icon, label and function. The first ones need it to be stored.
        n_stored: how many these are.

    Attributes:
        listed: the sessions.
    """

    def __init__(
        self,
        show: Callable[[str], object],
        new: Callable[[], object],
        tools: Sequence[tuple[str, str, Callable[[], object]]],
        n_stored: int,
    ) -> None:
        self.listed: list[Record] = []
        self._show, self._tools, self._n_stored = show, tools, n_stored
        self._here, self._is_stored = "", False
        ui.button("New session", icon="add", on_click=new).props("outline no-caps").classes("full")
        self._filter = ui.input("Find", on_change=self._draw).props("dense clearable dir=auto").classes("full")
        self._list = ui.element("ul").classes("names")
        self._more = ui.label("").classes("faint")

    def draw(self, listed: Sequence[Record], here: str, is_stored: bool) -> None:
        """Draws the list. `here`: the session that is shown, which need not be stored yet."""
        self.listed, self._here, self._is_stored = list(listed), here, is_stored
        self._draw()

    def _draw(self) -> None:
        wanted = (self._filter.value or "").lower()
        found = [record for record in self.listed if wanted in record.name.lower()]
        self._filter.set_visibility(len(self.listed) > 8)
        self._more.text = f"… and {len(found) - N_LISTED} more" if len(found) > N_LISTED else ""
        self._list.clear()
        with self._list:
            if self._here and not wanted and all(record.name != self._here for record in self.listed):
                self._draw_one(self._here, "new")
            for record in found[:N_LISTED]:
                self._draw_one(record.name, f"{count(record.turns, 'turn')}, {count(record.tokens, 'token')}")

    def _draw_one(self, name: str, about: str) -> None:
        here = name == self._here
        with ui.element("li").classes("here" if here else ""):
            with ui.element("button").classes("pick") as button:
                button.props(f"type=button {'aria-current=page' if here else ''}")
                button.on("click", lambda: self._show(name), args=[])
                ui.label(name).classes("cut").props("dir=auto")
                ui.label(about).classes("faint cut")
            if here:
                with ui.row().classes("tools"):
                    for each in self._tools[0 if self._is_stored else self._n_stored :]:
                        icon(*each).props("size=sm")
