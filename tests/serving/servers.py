"""A server in a thread, and raw requests to it."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from modernbert_decoder.engine.async_llm import AsyncLLM, EngineStats
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.serving.app import create_app
from modernbert_decoder.serving.models import OpenModel, Registry
from modernbert_decoder.serving.server import ApiServer
from modernbert_decoder.serving.settings import ModelSource, ServerSettings

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    url: str
    address: tuple[str, int]
    api: ApiServer
    registry: Registry

    def engine(self, name: str) -> AsyncLLM:
        engine = self.registry.get(name).engine
        assert engine is not None
        return engine

    def stats(self, name: str) -> EngineStats:
        return self.engine(name).stats()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=WAIT_SECONDS, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=WAIT_SECONDS, **options)

    def until_idle(self, name: str) -> EngineStats:
        """Asks again and again, a bounded number of times, until the model computes and queues nothing."""
        for _ in range(20_000):
            stats = self.stats(name)
            if not stats.num_running and not stats.num_waiting and not stats.num_reading:
                return stats
            self.get("/health")
        raise AssertionError(f"requests are left over: {stats}")


@contextmanager
def running(
    sources: Sequence[ModelSource],
    *,
    open_model: OpenModel | None = None,
    is_awaited: bool = True,
    when_ready: Callable[[], None] | None = None,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Starts a server on a free port, and stops it at the end."""
    app = create_app(
        ServerSettings(models=sources, port=0, **{"grace": 5.0, **settings}), open_model=open_model
    )
    addresses: queue.Queue[tuple[str, int]] = queue.Queue()
    api = ApiServer(app, announce=lambda host, port: addresses.put((host, port)), when_ready=when_ready)
    thread = threading.Thread(target=api.run)
    thread.start()
    try:
        address = addresses.get(timeout=WAIT_SECONDS)
        started = RunningServer(f"http://{address[0]}:{address[1]}", address, api, app.state.context.registry)
        if is_awaited:
            _wait_until_ready(started)
        yield started
    finally:
        api.should_exit = True
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the server did not stop"


def _wait_until_ready(server: RunningServer) -> None:
    for _ in range(20_000):
        if server.get("/ready").status_code == 200:
            return
        assert server.api.failure is None, server.api.failure
    raise AssertionError("the server did not become ready")


class Gate:
    """Lets the calls of a runtime through, or holds them; or makes one of them fail.

    Args:
        llm: whose runtime it is.
        method: "step" for completions, "read" for texts that are only read.
    """

    def __init__(self, llm: LLM, method: str = "step") -> None:
        self._call = getattr(llm._runtime, method)
        self.is_open = threading.Event()
        self.is_open.set()
        self.error: Exception | None = None
        setattr(llm._runtime, method, self)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        assert self.is_open.wait(WAIT_SECONDS)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self._call(*arguments, **settings)


def until(condition: Callable[[], bool], server: RunningServer) -> None:
    """Asks again and again, a bounded number of times."""
    for _ in range(20_000):
        if condition():
            return
        server.get("/health")
    raise AssertionError("it never came true")


def events(response: httpx.Response) -> list[Any]:
    """The values of a whole stream, which must end as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def raw_request(path: str, body: bytes, *, headers: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    ).encode() + body


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=WAIT_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def metric(server: RunningServer, line: str) -> float:
    """The value of one line of /metrics, 0 if it is not there."""
    for each in server.get("/metrics").text.splitlines():
        name, _, value = each.rpartition(" ")
        if name == line:
            return float(value)
    return 0.0
