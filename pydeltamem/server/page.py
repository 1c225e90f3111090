"""The page at /: chat, sessions and the memory as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

if TYPE_CHECKING:
    from .application import Server


def mount(app: FastAPI, server: Server) -> None:
    """Adds the page to the application."""
