"""A hub on this machine that speaks as much of the API as a push needs, and remembers what it got."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories by name: whether they are private, and their files.

    Attributes:
        refuses: the status that everything is answered with, if any.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.refuses: int | None = None
        self.tokens: set[str | None] = set()
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        if self.refuses is not None:
            return self.refuses, {"error": "not you"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            there = name in self.repos
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos.setdefault(name, {"private": private, "files": {}})
            return (409 if there else 200), {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        name, _, rest = name.partition("/commit/")
        if rest:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos[name]["files"][line["value"]["path"]] = content
            return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if method == "GET" and name.partition("/revision/")[0] in self.repos:
            name = name.partition("/revision/")[0]
            return 200, {
                "id": name,
                "modelId": name,
                "private": self.repos[name]["private"],
                "siblings": [],
                "tags": [],
            }
        return 404, {"error": f"nothing at {path}"}


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A hub while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            status, tree = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
