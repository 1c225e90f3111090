"""A stand-in for the Hugging Face hub on the loopback interface: it serves huggingface_hub from a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GATED = "gated"  # a file of this name makes the repository private


class StandInHub:
    """Repositories are folders `root/OWNER/NAME`; each has one commit, which is the digest of its files."""

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[str] = []  # the paths asked for, in order
        self.is_down = False  # answers 503

    def files(self, repository: str) -> dict[str, bytes]:
        folder = self.root / repository
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Yields its address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        if self.hub.is_down:
            return self._answer(503, b"")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not match and not resolve:
            return self._answer(404, b"")
        files = self.hub.files((match or resolve)[1])
        if not files:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if GATED in files:
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        commit = _sha1(b"".join(name.encode() + data for name, data in files.items()))
        if resolve:
            if resolve[2] not in files:
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            data = files[resolve[2]]
            return self._answer(200, data, {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit})
        if match[2] == "tree":
            answer = [{"type": "file", "path": n, "size": len(d), "oid": _sha1(d)} for n, d in files.items()]
        else:
            answer = {"id": match[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass
