"""Small parts of the page: buttons, dialogs, complaints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from ..errors import InputError
from .logs import log
from .records import StoreError, checked_name, told

ABOVE = 'anchor="top middle" self="bottom middle"'  # a tooltip that hides nothing below
# A key that is for the page, not for an input method that composes a word. Safari ends the word before it tells of the
# key, whose code is 229 then.
KEY = """(e) => {
    if (e.isComposing || e.keyCode === 229) return;
    emit();
}"""


def icon(name: str, label: str, do: Callable[[], Any]) -> ui.button:
    """A button that shows an icon."""
    button = ui.button(icon=name, on_click=do, color=None).props(f'flat round dense aria-label="{label}"')
    with button:
        ui.tooltip(label).props(ABOVE if name in ("arrow_upward", "stop") else "")
    return button


def complain(error: object) -> None:
    """Tells the user of an error."""
    text = printable(told(error))
    if isinstance(error, StoreError):
        log.error("an error of the store", exc_info=error)
    ui.notify(f"{text[:1].upper()}{text[1:]}", type="negative", position="top", close_button="Close", timeout=8000)


async def asked_name(text: str, action: str, name: str) -> str | None:
    """Asks for the name of a session, until it can be one; None if the user would rather not."""

    def submit() -> None:
        wanted = (field.value or "").strip()
        try:
            dialog.submit(checked_name(wanted) if wanted else None)
        except InputError as error:
            field.error = printable(str(error))

    with ui.dialog().props(_called(text)) as dialog, ui.card().classes("ask-card"):
        ui.label(text)
        field = ui.input("Name", value=name).props("autofocus outlined dense dir=auto").classes("full")
        field.on("keydown.enter", submit, js_handler=KEY)
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
            ui.button(action, on_click=submit).props("no-caps")
    answer: str | None = await dialog
    _drop(dialog)
    return answer


async def agreed(text: str, action: str) -> bool:
    """Asks whether to do something that cannot be undone."""
    with ui.dialog().props(_called(text)) as dialog, ui.card().classes("ask-card"):
        ui.label(text)
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat no-caps")
            ui.button(action, color="negative", on_click=lambda: dialog.submit(True)).props("autofocus no-caps")
    answer = bool(await dialog)
    _drop(dialog)
    return answer


def _called(text: str) -> str:
    """What a screen reader calls a dialog. No name of a session has quotes."""
    return f'aria-label="{text}"'


def _drop(dialog: ui.dialog) -> None:
    if not dialog.is_deleted:  # with its tab
        dialog.delete()


def count(n: int, what: str) -> str:
    """So many of them."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def printable(text: str) -> str:
    """A text that a browser can be sent: JSON may have half a character."""
    return text.encode("utf-8", "replace").decode()
