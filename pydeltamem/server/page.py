"""The page at /: chat, sessions and the memory as a heat map, by NiceGUI.

Everything comes from this server: the page asks no other one, and its Content-Security-Policy forbids it to.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.routing import Match, Mount

from .state import Server

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#3b66a8"/>'
    '<text x="16" y="24" font-size="24" font-family="serif" text-anchor="middle" fill="#fff">δ</text></svg>'
)
_RETURNS = 15.0  # seconds that a tab has to come back whose connection broke; then it is loaded anew
_HEADERS = {
    # NiceGUI writes scripts and styles into the page, and compiles templates in the browser
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "form-action 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def mount(app: FastAPI, server: Server) -> None:
    """Adds the page to the application. NiceGUI, which is imported here, has one page a process."""
    from nicegui import core, ui

    from .page_view import View

    @ui.page("/", title="δ-mem", language="en-US", dark=None)
    async def page(session: str = "") -> None:
        await View(server, session).open()

    # no Tailwind: its compiler would run in the browser
    options: dict[str, Any] = {"tailwind": False, "show_welcome_message": False, "reconnect_timeout": _RETURNS}
    ui.run_with(app, title="δ-mem", favicon=_ICON, **options)
    routes = app.router.routes
    mounted = next(route for route in routes if isinstance(route, Mount) and route.app is core.app)
    routes[routes.index(mounted)] = _Page("/", core.app)


class _Page(Mount):
    """The page and its files only. What else is unknown stays an error of the API."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        path = scope["path"]
        if path in ("/", "/favicon.ico") or path.startswith(("/_nicegui/", "/_nicegui_ws/")):
            return super().matches(scope)
        return Match.NONE, {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        await super().handle(scope, receive, answer)
