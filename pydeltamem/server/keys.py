"""API keys: who asks, without the keys in memory."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from ..errors import InputError


class Keys:
    """The keys that may use the server, as sha256.

    Args:
        path: a file with one key a line; empty lines and lines that begin with # do not count. None: no keys, and
            everybody who reaches the server is one owner.

    Raises InputError if the file cannot be read or holds no key.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._digests: list[bytes] = []
        if path is None:
            return
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{os.fspath(path)}: the keys cannot be read: {getattr(error, 'strerror', error)}"
            ) from error
        stripped = map(str.strip, lines)
        self._digests = [_digest(line) for line in stripped if line and not line.startswith("#")]
        if not self._digests:
            raise InputError(f"{os.fspath(path)}: holds no key: write one a line")

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, header: str | None) -> str | None:
        """The owner whose key an Authorization header holds; None if it is no key of ours. Without keys: ""."""
        if not self._digests:
            return ""
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = [digest for digest in self._digests if hmac.compare_digest(digest, given)]  # always all of them
        return found[0].hex() if found else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
