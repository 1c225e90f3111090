"""Other processes of Python that this one starts."""

from __future__ import annotations

import os


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`. With it `python -m` imports nothing that lies in the current folder, which
    may be anybody's (from Python 3.11 on).
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **more}
