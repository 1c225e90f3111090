"""The sessions of an owner as the page lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from nicegui import ui

from ..errors import DeltaMemError
from .page_parts import complain, count, icon
from .records import Record

N_LISTED = 100  # sessions in the drawer
_N_FEW = 8  # among which nobody has to search


class Sessions:
    """The list of a tab.

    Args:
        find: returns sessions whose name has a part, the latest first, at most so many.
        show: called with the name of a session that is chosen.
        new: called for a new one.
        tools: what can be done with the present one: icon, label and function. The first ones need it to be stored.
        n_stored: how many these are.
    """

    def __init__(
        self,
        find: Callable[[str, int], Awaitable[Sequence[Record]]],
        show: Callable[[str], object],
        new: Callable[[], object],
        tools: Sequence[tuple[str, str, Callable[[], object]]],
        n_stored: int,
    ) -> None:
        self._find, self._show, self._tools, self._n_stored = find, show, tools, n_stored
        self._here = ""
        self._record: Record | None = None
        ui.button("New session", icon="add", on_click=new).props("outline no-caps").classes("full")
        self._filter = ui.input("Find", on_change=self._search).props("dense clearable debounce=300 dir=auto")
        self._filter.classes("full").set_visibility(False)
        self._list = ui.element("ul").classes("names")
        self._more = ui.label("Older ones are found by their names.").classes("faint")

    async def draw(self, here: str, record: Record | None) -> None:
        """Draws the list. `here`: the session that is shown; `record`: as the store has it, None if it has none."""
        self._here, self._record = here, record
        wanted = self._filter.value or ""
        found = await self._find(wanted, N_LISTED + 1)
        if wanted != (self._filter.value or ""):
            return  # what is searched now comes by itself
        here, record = self._here, self._record
        if not wanted:
            self._filter.set_visibility(len(found) > _N_FEW)
        self._more.set_visibility(len(found) > N_LISTED)
        self._list.clear()
        with self._list:
            if here and not wanted and all(each.name != here for each in found[:N_LISTED]):
                self._draw_one(here, record)
            for each in found[:N_LISTED]:
                self._draw_one(each.name, each)

    async def _search(self) -> None:
        try:
            await self.draw(self._here, self._record)
        except DeltaMemError as error:
            complain(error)

    def _draw_one(self, name: str, record: Record | None) -> None:
        about = "new" if record is None else f"{count(record.turns, 'turn')}, {count(record.tokens, 'token')}"
        here = name == self._here
        with ui.element("li").classes("here" if here else ""):
            with ui.element("button").classes("pick") as button:
                button.props(f"type=button {'aria-current=page' if here else ''}")
                button.on("click", lambda: self._show(name), args=[])
                ui.label(name).classes("cut").props("dir=auto")
                ui.label(about).classes("faint cut")
            if here:
                with ui.row().classes("tools"):
                    for each in self._tools[self._n_stored if record is None else 0 :]:
                        icon(*each).props("size=sm")
