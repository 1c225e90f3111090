"""An answer as the page draws it: Markdown, in which HTML is text like any other. Only code is drawn as code."""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape

import markdown2  # type: ignore[import-untyped]
from nicegui import ui

_EXTRAS = ["fenced-code-blocks", "tables", "break-on-newline", "cuddled-lists", "code-friendly"]
# the tags that Markdown makes, as markdown2 writes them
_NAMES = "p|br|hr|h[1-6]|ul|ol|li|blockquote|pre|code|em|strong|a|img|table|thead|tbody|tr|th|td|div|span"
_ATTRIBUTE = r'(?:href|src|alt|title)="[^"<>]*"|class="codehilite"|class="\w{1,3}"|style="text-align:\w+;"'
_OTHER_TAG = re.compile(rf"<(?!/?(?:{_NAMES})(?: (?:{_ATTRIBUTE}))*(?: /)?>)")


class Markdown(ui.markdown):
    """As `ui.markdown`, but shows the tags that a model writes."""

    def __init__(self, content: str) -> None:
        super().__init__(content, extras=_EXTRAS)

    def _handle_content_change(self, content: str) -> None:
        html = as_html(content)
        if self._props.get("innerHTML") != html:
            self._props["innerHTML"] = html


@lru_cache(maxsize=256)  # the whole conversation is drawn again after each turn
def as_html(content: str) -> str:
    """Markdown as HTML. Tags in it are escaped, in code and elsewhere."""
    try:
        html = markdown2.markdown(content, extras=_EXTRAS, safe_mode="escape")
    except RecursionError:  # a model that repeats itself begins quotes in quotes, or sends nothing but tabs
        return f"<pre>{escape(content)}</pre>"
    return _OTHER_TAG.sub("&lt;", html)  # it leaves some that have no end
