"""Connections with little patience: clients that send half a request, or take nothing, are cut off in time.

It is uvicorn's own protocol with two clocks, and a limit for the fields of a request, before and behind its
body, which the parser does not have. What cannot be read as a request is refused here, since nothing behind
ever sees it.
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
    431,
    f"the head of the request, or what stands around its body, is larger than {MAX_HEAD_BYTES} bytes",
    code="head_too_large",
)
_NOT_HTTP: Final = ApiError(400, "this is not a request of HTTP/1.1", code="invalid_http")


class _TooManyBytesError(Exception):
    """The fields of a request are too large."""


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
            self._is_in_head = self._is_in_message = self._has_body_come = False
            self._num_field_bytes = self._num_fed_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_clock.start(transport.abort)

        def data_received(self, data: bytes) -> None:
            if not self._head_clock.is_running and self._is_between_requests():
                self._head_clock.start(self.transport.abort)
            self._has_body_come = False
            super().data_received(data)
            if not self._is_between_requests():
                self._head_clock.stop()
            # Whole fields are counted where they come, and one that never ends here.
            self._num_fed_bytes = 0 if self._has_body_come else self._num_fed_bytes + len(data)
            is_too_large = self._is_in_message and self._num_fed_bytes > MAX_HEAD_BYTES
            if is_too_large and not self.transport.is_closing():
                self._refuse(_TOO_LARGE)

        def send_400_response(self, msg: str) -> None:
            self._refuse(_TOO_LARGE if self._num_field_bytes > MAX_HEAD_BYTES else _NOT_HTTP)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._is_in_head = self._is_in_message = True
            self._num_field_bytes = self._num_fed_bytes = 0

        def on_url(self, url: bytes) -> None:
            self._count(url)
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(name, value)
            if self._is_in_head:  # a field behind the body says nothing of the request
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._is_in_head = False
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._has_body_come = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._is_in_message = False
            super().on_message_complete()

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

        def _count(self, *parts: bytes) -> None:
            self._num_field_bytes += sum(map(len, parts))
            if self._num_field_bytes > MAX_HEAD_BYTES:
                raise _TooManyBytesError  # which has the parser stop, and uvicorn refuse the request

        def _refuse(self, error: ApiError) -> None:
            """Closes the connection; with an answer, unless another one is on its way.

            The answer is logged under its own id, a request that runs still under another one.
            """
            is_free = self._is_between_requests() or not (self.cycle.response_started or self.pipeline)
            if is_free:
                record, path = new_record(self.client), _path(self) if self._is_in_message else ""
                self.transport.write(_answer(error, record.request_id))
                log.ended(record, method=None, path=path, status=error.status_code)
            if is_free and not self._is_between_requests():  # it was answered in its place
                self.cycle.disconnected = True
                self.cycle.message_event.set()
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
