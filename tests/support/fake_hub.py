"""A small Hub on loopback, for uploads: it creates repositories and keeps the files that are committed."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class FakeHub:
    """The files of every repository by their path, and the messages of the commits."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    endpoint: str = ""

    def only(self) -> dict[str, bytes]:
        """The files of the only repository."""
        (files,) = self.files.values()
        return files

    def download(self, folder: str, to: Path) -> Path:
        """Write the files below a folder of the only repository."""
        to.mkdir(parents=True)
        for path, content in self.only().items():
            if path.startswith(f"{folder}/"):
                place = to / path.removeprefix(f"{folder}/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        return to

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a POST request."""
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'user'}/{given['name']}"
            self.files.setdefault(name, {})
            return {"url": f"http://127.0.0.1/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            listed = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in listed]}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                else:
                    value = line["value"]
                    self.files[found[1]][value["path"]] = base64.b64decode(value["content"])
            number = len(self.messages)
            return {"commitUrl": f"http://127.0.0.1/{found[1]}/commit/{number:040}", "commitOid": f"{number:040}"}
        raise KeyError(path)


def connect(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let this process talk to a fake Hub, although the tests are offline."""
    for name, value in {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    # Its endpoint is that of the time when it is made.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Inside, huggingface_hub and Transformers talk to a new fake Hub alone."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                code, answer = 200, hub.answer(self.path.partition("?")[0], body)
            except KeyError as error:
                code, answer = 404, {"error": str(error)}
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        connect(monkeypatch, hub.endpoint)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
