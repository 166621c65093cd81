"""A prompt's completions between the engine's thread, which makes them, and a reader on an event loop.

The thread collects what requests have for the reader and wakes it; the reader takes it when it likes. This
module knows nothing of scheduling.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic

from modernbert_decoder.engine.outputs import StreamChunk
from modernbert_decoder.engine.request import Request
from modernbert_decoder.errors import EngineClosedError, EngineFailedError, RequestTimeoutError


class Ticket:
    """The completions of one prompt, and what their reader on an event loop has not taken yet.

    Args:
        requests: of one prompt.
        loop: the reader's.
        is_streamed: the reader wants chunks, and not only the end.
        timeout: seconds from now on.

    Attributes:
        is_ended: all is there: nothing will be added.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        loop: asyncio.AbstractEventLoop,
        is_streamed: bool,
        timeout: float,
    ) -> None:
        self.requests = requests
        self.loop = loop
        self.timeout = timeout
        self.deadline = monotonic() + timeout
        self.is_ended = False
        self._is_streamed = is_streamed
        self._chunks: deque[StreamChunk] = deque()
        self._error: Exception | None = None
        self._is_closed = False
        self._news = asyncio.Event()

    @property
    def is_waiting(self) -> bool:
        """Whether it has not had its turn yet."""
        return not self.is_ended and not self.requests[0].admitted_at

    # What the reader does, on its event loop:

    async def next_chunk(self) -> StreamChunk | None:
        """What was added since the last call, one completion at a time; None at the end.

        Raises:
            Exception: what ended it, once.
        """
        while not self._is_closed:
            self._news.clear()
            is_ended = self.is_ended  # looked at first: chunks come before the end
            if self._chunks:
                return self._chunks.popleft()
            if is_ended:
                self._is_closed = True
                if self._error is not None:
                    raise self._error
                return None
            await self._news.wait()
        return None

    async def end(self) -> None:
        """Waits for the end.

        Raises:
            Exception: what ended it.
        """
        while not self.is_ended:
            self._news.clear()
            if not self.is_ended:
                await self._news.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Has `next_chunk` return None from now on, also where it is waited for."""
        self._is_closed = True
        self._chunks.clear()
        self._news.set()

    def wake(self) -> None:
        """Has the reader look again."""
        self._news.set()

    # What the engine does, on its thread:

    def collect(self) -> bool:
        """Takes what the requests have for the reader; whether that is news.

        Until a reader takes its chunks, no more are made: what follows is collected in the requests, and
        comes as one. So a slow reader holds no more than two chunks of each completion.
        """
        is_ended = all(request.is_finished for request in self.requests)
        if not is_ended and (not self._is_streamed or self._chunks):
            return False
        has_text = any(request.token_ids for request in self.requests)
        if is_ended:
            self._error = self._reason(has_text=has_text)
        if self._is_streamed and has_text:
            for request in self.requests:
                chunk = request.next_chunk()
                if chunk is not None:
                    self._chunks.append(chunk)
        self.is_ended = is_ended
        return is_ended or bool(self._chunks)

    def fail(self, error: Exception) -> None:
        """Ends it with an error; what was not delivered is lost."""
        self._error = error
        self.is_ended = True

    def _reason(self, *, has_text: bool) -> Exception | None:
        """What to raise at the end, if it is no regular one."""
        for request in self.requests:
            if isinstance(request.error, EngineFailedError | EngineClosedError):
                return own_copy(request.error)
            if request.error is not None:
                return request.error
        if has_text:
            return None
        if self.requests[0].finish_reason == "timeout":
            return RequestTimeoutError(f"the request had no turn, or no token, in {self.timeout:g} seconds")
        return EngineClosedError("the engine was closed before this request had its turn")


def own_copy(error: EngineFailedError | EngineClosedError) -> Exception:
    """The error for one of many callers, each of whom adds its own traceback."""
    own = type(error)(*error.args)
    own.__cause__ = error
    return own
