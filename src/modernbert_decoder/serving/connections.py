"""Connections with little patience: clients that send half a request, or take nothing, are cut off in time.

It is uvicorn's own protocol with two clocks and a limit for the head of a request, which the parser does not
have. What cannot be read as a request is refused here, since nothing behind ever sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from modernbert_decoder.serving.access_log import RequestLog, new_record
from modernbert_decoder.serving.errors import ApiError

MAX_HEAD_BYTES: Final = 1 << 16
_TOO_LARGE: Final = ApiError(
    431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes", code="head_too_large"
)
_NOT_HTTP: Final = ApiError(400, "this is not a request of HTTP/1.1", code="invalid_http")


def impatient_protocol(
    *, head_seconds: float, write_seconds: float, log: RequestLog
) -> type[HttpToolsProtocol]:
    """A protocol for uvicorn's `http` setting.

    Args:
        head_seconds: for the head of a request to arrive, from its first byte or the connection's beginning.
        write_seconds: how long the client may take nothing of what is sent.
        log: is told of what is refused.
    """

    class ImpatientProtocol(HttpToolsProtocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_clock = _Clock(head_seconds)
            self._write_clock = _Clock(write_seconds)
            self._is_in_head, self._num_head_bytes = False, 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_clock.start(transport.abort)

        def data_received(self, data: bytes) -> None:
            if not self._head_clock.is_running and self._is_between_requests():
                self._head_clock.start(self.transport.abort)
            super().data_received(data)
            if not self._is_between_requests():
                self._head_clock.stop()
            if self._is_in_head:
                self._num_head_bytes += len(data)
                if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                    self._refuse(_TOO_LARGE)

        def send_400_response(self, msg: str) -> None:
            self._refuse(_NOT_HTTP)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._is_in_head, self._num_head_bytes = True, 0

        def on_headers_complete(self) -> None:
            self._is_in_head = False
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_clock.start(self.transport.abort)

        def resume_writing(self) -> None:
            self._write_clock.stop()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_clock.stop()
            self._write_clock.stop()
            super().connection_lost(exc)

        def _is_between_requests(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle  # None at first, other than its type says
            return cycle is None or cycle.response_complete

        def _refuse(self, error: ApiError) -> None:
            """Closes the connection; with an answer, unless another one is on its way."""
            record = new_record(self.client)
            if self._is_between_requests() or not self.cycle.response_started:
                self.transport.write(_answer(error, record.request_id))
            if self._is_between_requests():  # or the request's own end will be logged
                log.ended(record, method=None, path=_path(self), status=error.status_code)
            self.transport.close()

    return ImpatientProtocol


def _answer(error: ApiError, request_id: str) -> bytes:
    """A whole answer as it is sent."""
    response = error.response()
    lines = [
        b"HTTP/1.1 %d %s" % (error.status_code, HTTPStatus(error.status_code).phrase.encode()),
        b"connection: close",
        b"x-request-id: " + request_id.encode(),
        *(name + b": " + value for name, value in response.raw_headers),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)


def _path(protocol: HttpToolsProtocol) -> str:
    """The path of the request whose head is being read, as far as it came."""
    try:
        return httptools.parse_url(protocol.url).path.decode("ascii")
    except (AttributeError, httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        return ""  # there is none yet


class _Clock:
    """Calls something when it has run out."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and neither stopped nor has run out."""
        return self._handle is not None

    def start(self, run_out: Callable[[], object]) -> None:
        """Starts anew."""
        self.stop()
        self._handle = asyncio.get_running_loop().call_later(self._seconds, run_out)

    def stop(self) -> None:
        """Does nothing where it is not running."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
