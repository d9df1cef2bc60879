"""Small Hugging Face hubs on loopback: one takes what its user uploads, one refuses whoever asks."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL at which the handler answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Refusing(BaseHTTPRequestHandler):
    """Knows one gated repository, some/gated, and no other."""

    def do_GET(self):
        gated = "/some/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@dataclass
class FakeHub:
    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)  # repository → whether it is
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub with one user, whose token is `hf_good`, and the repositories he makes."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self._is_known():
                repository = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision")[0]
                if self.path.startswith("/api/whoami"):
                    self._answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
                elif repository in hub.private:
                    self._answer({"id": repository, "private": hub.private[repository], "tags": [], "siblings": []})
                else:
                    self._answer({"error": "not found"}, 404, "RepoNotFound")

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self._is_known():
                return
            if self.path == "/api/repos/create":
                wish = json.loads(body)
                name = f"{wish.get('organization') or 'me'}/{wish['name']}"
                hub.private.setdefault(name, wish.get("private", wish.get("visibility") == "private"))
                self._answer({"url": f"{hub.url}/{name}", "name": name})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._answer({"files": modes})
            elif "/commit/" in self.path:
                repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                rows = [json.loads(line) for line in body.splitlines()]
                files = [row["value"] for row in rows if row["key"] == "file"]
                hub.files[repository] = {file["path"]: base64.b64decode(file["content"]) for file in files}
                self._answer({"commitUrl": f"{hub.url}/{repository}/commit/0", "commitOid": "0" * 40, "success": True})
            else:
                self._answer({"error": f"no {self.path} here"}, 404)

        def _is_known(self) -> bool:
            if self.headers.get("Authorization") == "Bearer hf_good":
                return True
            self._answer({"error": "Invalid credentials"}, 401)
            return False

        def _answer(self, value, status: int = 200, code: str | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as hub.url:
        yield hub
