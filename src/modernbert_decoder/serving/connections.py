"""Connections with little patience: clients that send half a request, or take nothing, are cut off in time.

It is uvicorn's own protocol with two clocks and a limit for the head of a request, which the parser does not
have; what is sent over a connection is not its business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES: Final = 1 << 16
_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
)


def impatient_protocol(*, head_seconds: float, write_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol for uvicorn's `http` setting.

    Args:
        head_seconds: for the head of a request to arrive, from its first byte or the connection's beginning.
        write_seconds: how long the client may take nothing of what is sent.
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
                    self.transport.write(_TOO_LARGE)
                    self.transport.close()

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

    return ImpatientProtocol


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
