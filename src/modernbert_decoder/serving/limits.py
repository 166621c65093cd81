"""Bodies of requests: read whole before anything else, within limits of size and time.

What is behind sees a request whose body is there, so nobody else has to think of clients that send half of
one, too much of one, or none of what they announced.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.sse import ClientGoneError

# Of a body that is too large so much, and for so long, is taken off the connection behind the answer: a
# client that only reads once it has sent everything would otherwise be cut off before.
_MOST_DISCARDED: Final = 8
_DISCARDING_SECONDS: Final = 5.0
# All bodies in memory at a time, as a multiple of the largest one.
_MOST_HELD: Final = 32
_CLOSE: Final = {"Connection": "close"}


@dataclass(frozen=True)
class _Refusal:
    """Why a body is not taken.

    Attributes:
        error: the answer.
        bytes_to_discard: that may follow, and are taken off the connection.
    """

    error: ApiError
    bytes_to_discard: int = 0


class BodyLimit:
    """Reads bodies.

    Args:
        app: what is behind.
        max_bytes: of one body.
        seconds: for one to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on the request with its body, or answers that it cannot be taken."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            refusal = await self._refusal(receive, parts, announced=_announced(scope))
            if refusal is None:
                await self._app(scope, _replayed(b"".join(parts), receive), send)
        finally:
            self._held -= sum(map(len, parts))
            parts.clear()  # a refusal goes on for seconds, and nobody counts them any more
        if refusal is not None:
            await _refuse(refusal, receive, send)

    async def _refusal(self, receive: Receive, parts: list[bytes], *, announced: int) -> _Refusal | None:
        """Appends the body's parts; why it is not taken, if it is not.

        Raises:
            ClientGoneError: the client is gone.
        """
        if announced > self._max_bytes:
            can_end = announced <= _MOST_DISCARDED * self._max_bytes
            return self._too_large(announced if can_end else 0)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._read(receive, parts)
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} seconds"
            return _Refusal(ApiError(408, message, code="body_timeout", headers=_CLOSE))

    async def _read(self, receive: Receive, parts: list[bytes]) -> _Refusal | None:
        """Appends the body's parts until it is there, or is not to be taken."""
        size, is_done = 0, False
        while not is_done:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            is_done = not message.get("more_body", False)
            size += len(part)
            if size > self._max_bytes:
                left = _MOST_DISCARDED * self._max_bytes - size
                return self._too_large(0 if is_done else max(0, left))
            if self._held + len(part) > _MOST_HELD * self._max_bytes:
                return self._too_many(0 if is_done else self._max_bytes)
            self._held += len(part)
            parts.append(part)
        return None

    def _too_large(self, bytes_to_discard: int) -> _Refusal:
        message = f"the body is larger than the {self._max_bytes} bytes that are taken"
        return _Refusal(ApiError(413, message, code="body_too_large", headers=_CLOSE), bytes_to_discard)

    def _too_many(self, bytes_to_discard: int) -> _Refusal:
        error = ApiError(
            429,
            "too many large requests arrive at once; try again in a second",
            code="queue_full",
            headers={"Retry-After": "1", **_CLOSE},
        )
        return _Refusal(error, bytes_to_discard)


async def _refuse(refusal: _Refusal, receive: Receive, send: Send) -> None:
    """Answers at once, and closes the connection only when what may follow has been taken off it."""
    response = refusal.error.response()
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    if refusal.bytes_to_discard:
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARDING_SECONDS):
                await _discard(receive, refusal.bytes_to_discard)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    else:
        await send({"type": "http.response.body", "body": response.body, "more_body": False})


async def _discard(receive: Receive, most: int) -> None:
    """Reads until the body or the connection has ended, or more than `most` bytes came."""
    is_done = False
    while not is_done and most >= 0:
        message = await receive()
        most -= len(message.get("body", b""))
        is_done = not message.get("more_body", False)  # there is none in a disconnection either


def _announced(scope: Scope) -> int:
    """The body's length as its head says, 0 if it does not."""
    lengths = [bytes(value) for name, value in scope["headers"] if name == b"content-length"]
    is_number = len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 20
    return int(lengths[0]) if is_number else 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then whatever comes from the server."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
