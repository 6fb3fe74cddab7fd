"""A hub on 127.0.0.1 with one repository for each trouble: what it answers is what the real one does.

    stub/fine   whole                          stub/gated    401 without a token, 403 with one (licence not accepted)
    stub/none   404, no such repository        stub/busy     503
    stub/half   whole, but every download breaks off in the middle
    stub/closed 403 without a reason: a token without the right to read it

Any other revision of stub/fine than `main` and its commit is a 404. `hub()` runs it in a thread and gives its address;
a process reaches it with HF_ENDPOINT. `requests` lists what was asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "qwen2_5_vl"}', "model.safetensors": b"\0" * 200_000}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        self.server.requests.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = (parts[3], parts[4:]) if api else (parts[1], parts[2:])
        if trouble := self._trouble(name, rest):
            self._send(*trouble, body=body)
        elif not api:
            self._file(name, "/".join(rest[2:]), body)
        elif rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for path, data in FILES.items()]  # fmt: skip
            self._send(200, entries, body=body)
        elif rest[:1] == ["auth-check"]:
            self._send(200, {}, body=body)
        else:
            siblings = [{"rfilename": path} for path in FILES]
            info = {"id": f"stub/{name}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, info, body=body)

    def _trouble(self, name: str, rest: list[str]) -> tuple[int, object, dict[str, str]] | None:
        if name == "busy":
            return 503, {"error": "busy"}, {}
        if name == "gated":
            status = 403 if self.headers.get("Authorization") else 401
            return status, {"error": "restricted"}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
        if name == "closed":
            return 403, {"error": "Forbidden"}, {}
        if name not in ("fine", "half"):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        named = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree", "resolve") else "main"
        if named not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        return None

    def _file(self, name: str, path: str, body: bool) -> None:
        data = FILES[path]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if name == "half" and body:
            self._headers(200, len(data), headers)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self._headers(200, len(data), headers)
            if body:
                self.wfile.write(data)

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None, *, body: bool) -> None:
        data = json.dumps(value).encode()
        self._headers(status, len(data), {"Content-Type": "application/json", **(headers or {})})
        if body:
            self.wfile.write(data)

    def _headers(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


class Hub(ThreadingHTTPServer):
    """The server; `address` is what HF_ENDPOINT takes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
