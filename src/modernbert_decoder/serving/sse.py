"""Server-sent events, and clients that vanish: work for a client ends with its connection.

This module knows connections and bytes; what the events say is the caller's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Final, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

DONE: Final = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


def event(data: Mapping[str, Any]) -> bytes:
    """One event with a JSON value, in which there may be pydantic's models."""
    # In ASCII: some clients split lines at every separator that Unicode knows, inside of texts too.
    return b"data: " + to_json(data, ensure_ascii=True) + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes its connection.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _ended(task, gone)


class EventStream(Response):
    """A response that sends events as they come, and closes their source when the client is gone.

    Args:
        events: encoded by `event`; closed in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.background = None
        self.status_code = 200
        self._events = events
        # A proxy that collects the answer before it hands it on would defeat its purpose.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything, unless the client is gone first."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnection(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _ended(sending, gone)
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnection(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
