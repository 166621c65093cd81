"""`push_to_hub` against a Hub that is a small server on the loopback interface, in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch_models import ours, random_ids

from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM

PUSH = """
import sys
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
model = ModernBertDecoderForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("org/model", token="hf_made_up")
"""


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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a Hub, and the folder in which it keeps what is pushed."""
    folder = tmp_path / "pushed"
    folder.mkdir()
    handler = type("Handler", (HubHandler,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_pushed_model_arrives_whole(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, pushed = hub
    model, ids = ours(local_attention=20), random_ids(70)
    model.save_pretrained(tmp_path / "model")
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PUSH, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in pushed.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= names
    loaded = ModernBertDecoderForCausalLM.from_pretrained(pushed)
    assert loaded.config.sliding_window == 10
    saved = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
