"""Hubs on the loopback interface, for processes of a test's own; one that takes an upload is here."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REPOSITORY = "org/model"


class HubHandler(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that an upload asks for; it keeps the files of the commit."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._send(404, {}, error="EntryNotFound")  # there is no model card yet

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}/org/model"
        if self.path == "/api/repos/create":
            self._send(200, {"url": address, "id": "org/model"})
        elif self.path.startswith("/api/models/org/model/preupload/"):
            stated = json.loads(body)["files"]
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in stated
            ]
            self._send(200, {"files": files})
        elif self.path.startswith("/api/models/org/model/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    (self.folder / entry["value"]["path"]).write_bytes(content)
            commit = "0123456789abcdef0123456789abcdef01234567"
            self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{address}/commit/{commit}"})
        else:
            self._send(200, {})  # the check of the model card's header

    def _send(self, status: int, content: object, *, error: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def loopback_hub(folder: Path) -> Iterator[str]:
    """The address of a Hub that keeps in a folder what is pushed to `REPOSITORY`."""
    folder.mkdir()
    with serving(type("Handler", (HubHandler,), {"folder": folder})) as address:
        yield address


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on the loopback interface that answers with this handler."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def hub_environment(endpoint: str, *, home: Path, offline: bool = False) -> dict[str, str]:
    """That of a process which knows this Hub only."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return environment | {"HF_TOKEN": "hf_made_up", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
