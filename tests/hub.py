"""A Hub with one dataset, `owner/name`, whose files are those of a folder: as much of it as reading a dataset needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_API = "/api/datasets/owner/name"
_FILES = f"/datasets/owner/name/resolve/{COMMIT}/"


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """The address of such a Hub, which is there within the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if path in (_API, f"{_API}/revision/main", f"{_API}/revision/{COMMIT}"):
                self.send({"id": "owner/name", "sha": COMMIT, "siblings": [], "tags": [], "private": False})
            elif path.startswith(f"{_API}/revision/"):
                self.send({}, 404, {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"{_API}/tree/{COMMIT}"):
                below = folder / path.removeprefix(f"{_API}/tree/{COMMIT}").strip("/")
                every = "recursive=true" in self.path.lower()
                self.send([facts(file) for file in sorted(below.rglob("*") if every else below.glob("*"))])
            elif path.startswith(_FILES) and (folder / path.removeprefix(_FILES)).is_file():
                self.send_file((folder / path.removeprefix(_FILES)).read_bytes())
            else:
                code = "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"
                self.send({}, 404, {"X-Error-Code": code})

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send([facts(folder / name) for name in asked.get("paths", []) if (folder / name).exists()])

        def send_file(self, content: bytes) -> None:
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT}
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last or len(content)) + 1]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                self.send(part, 206, headers)
            else:
                self.send(content, 200, headers)

        def send(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    def facts(file: Path) -> dict[str, Any]:
        name = file.relative_to(folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "oid": "0" * 40, "size": file.stat().st_size}

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
