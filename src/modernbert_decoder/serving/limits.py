"""Bodies of requests: read whole before anything else, within limits of size and time.

What is behind sees a request whose body is there, so nobody else has to think of clients that send half of
one, too much of one, or none of what they announced.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modernbert_decoder.serving.errors import ApiError
from modernbert_decoder.serving.sse import ClientGoneError

# Of a body that is too large so much is still taken off the connection, or the client would be cut off before
# it reads the answer.
_MOST_DISCARDED: Final = 8
# All bodies in memory at a time, as a multiple of the largest one.
_MOST_HELD: Final = 32
_CLOSE: Final = {"Connection": "close"}


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
            if refusal is not None:
                await refusal.response()(scope, receive, send)
            else:
                await self._app(scope, _replayed(b"".join(parts), receive), send)
        finally:
            self._held -= sum(map(len, parts))

    async def _refusal(self, receive: Receive, parts: list[bytes], *, announced: int) -> ApiError | None:
        """Appends the body's parts; why it is not taken, if it is not."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._read(receive, parts, announced=announced)
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} seconds"
            return ApiError(408, message, code="body_timeout", headers=_CLOSE)
        except ApiError as error:
            return error
        return None

    def _too_large(self, headers: dict[str, str] | None) -> ApiError:
        message = f"the body is larger than the {self._max_bytes} bytes that are taken"
        return ApiError(413, message, code="body_too_large", headers=headers)

    async def _read(self, receive: Receive, parts: list[bytes], *, announced: int) -> None:
        """Appends the body's parts.

        Raises:
            ClientGoneError: the client is gone.
            ApiError: 413, it is too large; 429, there are too many others.
        """
        if announced > _MOST_DISCARDED * self._max_bytes:
            raise self._too_large(_CLOSE)
        size, is_done = 0, False
        while not is_done:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            is_done = not message.get("more_body", False)
            size += len(part)
            if size <= self._max_bytes and self._held + len(part) <= _MOST_HELD * self._max_bytes:
                self._held += len(part)
                parts.append(part)
            elif size > _MOST_DISCARDED * self._max_bytes:
                break
        if size > self._max_bytes:
            raise self._too_large(None if is_done else _CLOSE)
        if size > sum(map(len, parts)):
            raise ApiError(
                429,
                "too many large requests arrive at once; try again in a second",
                code="queue_full",
                headers={"Retry-After": "1"},
            )


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
