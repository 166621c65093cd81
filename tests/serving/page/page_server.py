"""A server with the page's files and scripted answers, so that tests decide what arrives and when.

It stands in for the real one where that cannot be made to fail, stall or write a certain text on demand. It
sends the headers that the page is promised, the content security policy among them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_PATIENCE_SECONDS = 20.0  # a script that waits for a browser gives up after this

DONE = "[DONE]"
END_WITHOUT_DONE = object()  # in a script: the body ends as if nothing were missing
DROP = object()  # in a script: the connection is cut
UNTIL_CLIENT_LEAVES = object()  # in a script: waits until the browser closes the connection

Script = Iterator[Any]


@dataclass
class Answer:
    """A whole answer, of any status."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, *, param: str | None = None, **headers: str) -> Answer:
    error = {"message": message, "type": "error", "param": param, "code": None}
    return Answer({"error": error}, status, {name.replace("_", "-"): v for name, v in headers.items()})


def chunk(
    text: str,
    *tokens: tuple[str, float] | tuple[str, float, dict[str, float]],
    finish: str | None = None,
) -> dict[str, Any]:
    """A chunk of a streamed completion; a token is its text, log-probability and alternatives."""
    logprobs = {
        "tokens": [token[0] for token in tokens],
        "token_logprobs": [token[1] for token in tokens],
        "top_logprobs": [token[2] if len(token) > 2 else {token[0]: token[1]} for token in tokens],
    }
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return {"object": "text_completion", "choices": [choice]}


def usage(completion_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": completion_tokens}}


class PageServer:
    """Answers with what its attributes say; used as a context manager."""

    def __init__(self) -> None:
        self.models: Any = [{"id": "storyteller", "task": "generate", "max_model_len": 1024}]
        self.complete: Callable[[dict[str, Any]], Answer | Script] = lambda body: iter([DONE])
        self.classify: Callable[[dict[str, Any]], Answer] = lambda body: refusal(404, "no classifier")
        self.api_key: str | None = None
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.client_left = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/"

    def __enter__(self) -> PageServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for called, body in self.requests if called == path]

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> Answer | Script:
        self.requests.append((path, body))
        if self.api_key and key != f"Bearer {self.api_key}":
            return refusal(401, "Incorrect API key.")
        if path == "/v1/models":
            return self.models if isinstance(self.models, Answer) else Answer({"data": self.models})
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/classify":
            return self.classify(body)
        if path == "/tokenize":
            return Answer({"count": len(body["prompt"].split()), "max_model_len": 1024})
        return refusal(404, "not found")

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                name = {"/": "index.html"}.get(self.path, self.path.removeprefix("/page/"))
                file = resources.files("modernbert_decoder") / "serving" / "page" / name
                if "/" not in name and file.is_file():
                    self._send(200, file.read_bytes(), {"Content-Type": _MEDIA_TYPES[name.split(".")[-1]]})
                else:
                    self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: dict[str, Any]) -> None:
                answer = server.answer(self.path, body, self.headers.get("Authorization"))
                if isinstance(answer, Answer):
                    data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                    self._send(answer.status, data, {"Content-Type": "application/json", **answer.headers})
                else:
                    self._stream(answer)

            def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Connection", "close")  # or a stopped server would go on answering
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, script: Script) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.send_header("Connection", "close")
                self.end_headers()
                for item in script:
                    if isinstance(item, threading.Event):
                        item.wait(_PATIENCE_SECONDS)
                    elif item is UNTIL_CLIENT_LEAVES:
                        self._wait_for_client_to_leave()
                        return
                    elif item is DROP:
                        self.close_connection = True
                        return
                    elif item is END_WITHOUT_DONE:
                        break
                    elif isinstance(item, bytes):
                        self._write(item)
                    else:
                        data = item if isinstance(item, str) else json.dumps(item)
                        self._write(f"data: {data}\n\n".encode())
                self.wfile.write(b"0\r\n\r\n")

            def _write(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                self.wfile.flush()

            def _wait_for_client_to_leave(self) -> None:
                self.connection.settimeout(_PATIENCE_SECONDS)
                try:
                    left = self.connection.recv(1) == b""
                except ConnectionError:
                    left = True
                if left:
                    server.client_left.set()
                self.close_connection = True

        return Handler
