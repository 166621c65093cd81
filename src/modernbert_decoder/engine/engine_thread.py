"""The thread that drives a scheduler for readers on event loops: it steps, delivers, and listens in between.

Whoever asks for something leaves a command and goes on; nobody waits for a step but work that needs the
network itself. While there is nothing to do, the thread sleeps in its executor. This module knows requests
and their ends; prompts, results and arguments are the business of `AsyncLLM`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Final, TypeVar

from modernbert_decoder.engine.driver import Driver
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.engine.ticket import Ticket, own_copy
from modernbert_decoder.errors import (
    EngineClosedError,
    EngineFailedError,
    QueueFullError,
    UserError,
)

_LOGGER: Final = logging.getLogger(__name__)
Result = TypeVar("Result")

# The last so many ends say how fast requests come to theirs now.
_ENDS_REMEMBERED: Final = 64
# What a refused client is told when too few requests have ended to know better, and at least and at most.
_UNKNOWN_RETRY_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = (1.0, 60.0)


class EngineThread:
    """Drives one scheduler.

    Args:
        driver: of the scheduler.
        max_waiting: most prompts that wait beyond those for which there are free slots.
        max_kv_bytes: most keys and values that admitted requests may come to; None: what the slots hold.
        before_reading: is called on the thread of whoever reads, before each piece of that.

    Raises:
        InputError: another one drives it already.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        max_waiting: int,
        max_kv_bytes: int | None,
        before_reading: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._max_waiting = max_waiting
        self._before_reading = before_reading
        driver.attach(self.compute)
        self.scheduler: Scheduler = driver.scheduler
        self._usual_kv_bytes = self.scheduler.max_kv_bytes
        if max_kv_bytes is not None:
            self.scheduler.max_kv_bytes = max_kv_bytes
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="modernbert-decoder-engine")
        # The lock guards what others touch: whether it runs, whether it is open, and who waits. Commands are
        # left without it, as the garbage collector may leave some wherever it runs.
        self._lock = threading.Lock()
        self._is_running = False
        self._is_refusing = False
        self._waiting: list[Ticket] = []
        self._commands: deque[Callable[[], None]] = deque()
        # Everything below is the thread's own.
        self._live: dict[Ticket, None] = {}
        self._pieces: deque[_Piece] = deque()
        self._idle: list[Future[None]] = []
        self._ended_at: deque[float] = deque(maxlen=_ENDS_REMEMBERED)
        self._next_deadline = math.inf
        self._turn_began: float | None = None  # which others read

    @property
    def turn_seconds(self) -> float:
        """How long the turn that the thread takes now, a step or a piece of reading, has been running."""
        began = self._turn_began
        return 0.0 if began is None else monotonic() - began

    @property
    def num_waiting(self) -> int:
        """Prompts that have not had their turn."""
        with self._lock:
            return self._count_waiting()

    def check_open(self) -> None:
        """Refuses requests once `refuse` was called.

        Raises:
            EngineClosedError: it was.
        """
        if self._is_refusing:
            raise EngineClosedError("the engine is closing and takes no more requests")

    def submit(self, ticket: Ticket) -> None:
        """Queues the requests of a ticket.

        Raises:
            InputError: they need more memory than there may be.
            QueueFullError: too many wait already.
            EngineClosedError: it takes no more.
        """
        self.scheduler.check(ticket.requests)
        with self._lock:
            self.check_open()
            if self._count_waiting() >= self._max_waiting + self.scheduler.num_free:
                raise QueueFullError(self._retry_after())
            self._waiting.append(ticket)
            self._leave(partial(self._begin, ticket))

    def end(self, ticket: Ticket) -> None:
        """Ends what still runs of a ticket, with the next step at the latest; never waits for anything."""
        if not ticket.is_ended:
            self._commands.append(partial(self._driver.abort, ticket.requests))

    def compute(self, work: Callable[[], Result], /) -> Result:
        """The result of `work`, carried out between two steps; to be called on other threads only.

        Raises:
            EngineClosedError: the engine or the model is closed.
        """
        self._before_reading()
        future: Future[Result] = Future()
        with self._lock:
            self._leave(partial(self._pieces.append, _Piece(work, future)))
        return future.result()

    def refuse(self) -> None:
        """Takes no more requests."""
        with self._lock:
            self._is_refusing = True

    def end_all(self) -> None:
        """Ends all requests with what they have."""
        with self._lock:
            self._leave(self._end_all)

    def when_idle(self) -> Future[None]:
        """Done once no request is left."""
        future: Future[None] = Future()
        with self._lock:
            self._leave(partial(self._idle.append, future))
        return future

    def close(self) -> None:
        """Ends the thread once it has nothing left to do, and waits for that; the driver is free again."""
        self.refuse()
        self._executor.shutdown()
        self.detach()

    def detach(self) -> None:
        """Leaves the driver as it was found: those who read do it themselves again."""
        if self._driver.detach(self.compute):
            self.scheduler.max_kv_bytes = self._usual_kv_bytes

    def _leave(self, command: Callable[[], None]) -> None:
        """Leaves a command, and sets the thread to work unless it is."""
        self._commands.append(command)
        if not self._is_running:
            try:
                self._executor.submit(self._run)
            except RuntimeError as error:  # shut down, if only because the interpreter is about to end
                self._commands.clear()
                raise EngineClosedError("the engine is closed") from error
            self._is_running = True

    def _count_waiting(self) -> int:
        self._waiting = [ticket for ticket in self._waiting if ticket.is_waiting]
        return len(self._waiting)

    def _retry_after(self) -> float:
        """Seconds in which half of those that wait will probably have ended."""
        least, most = _RETRY_SECONDS
        ended_at = tuple(self._ended_at)
        if len(ended_at) < 2:
            return _UNKNOWN_RETRY_SECONDS
        seconds_each = (monotonic() - ended_at[0]) / len(ended_at)
        return min(most, max(least, seconds_each * len(self._waiting) / 2))

    # On the thread:

    def _run(self) -> None:
        """Works until there is nothing left to do; whatever fails, the thread goes on."""
        is_done = False
        while not is_done:
            self._turn_began = monotonic()
            try:
                self._turn()
                is_done = self._is_done()
            except BaseException as error:
                _LOGGER.exception("the engine failed and ends every request; it goes on with new ones")
                with suppress(BaseException):  # readers have been told by then, and the next step may succeed
                    self._recover(error)
        self._turn_began = None

    def _is_done(self) -> bool:
        if self._live or self._pieces:
            return False
        self._ended_at.clear()  # idle time is not what requests take
        with self._lock:
            self._is_running = bool(self._commands)
            return not self._is_running

    def _turn(self) -> None:
        """Commands, one step and what it gave, one piece of reading: none waits for more than one of each."""
        for _ in range(len(self._commands)):
            self._commands[0]()
            self._commands.popleft()  # only now: what failed is told so, or tried again
        if monotonic() >= self._next_deadline:
            self._end_late()
        if self._live:
            try:
                if self.scheduler.has_work:
                    self._driver.step()
            finally:
                self._deliver()
        if self._pieces:
            self._pieces[0].carry_out(self._driver)
            self._pieces.popleft()
        while self._idle and not self._live:
            future = self._idle.pop()
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _recover(self, error: BaseException) -> None:
        """Ends everything with an error, wherever the failure left it."""
        failure = EngineFailedError(f"a step of the engine failed: {error!r}")
        tickets = tuple(self._live)
        for ticket in tickets:
            if not ticket.is_ended:
                ticket.fail(own_copy(failure))
        self._live.clear()
        try:
            self._driver.fail_all(failure)
        finally:
            self._announce(tickets)
            if self._pieces and self._pieces[0].has_begun:
                self._pieces.popleft().fail(own_copy(failure))

    def _begin(self, ticket: Ticket) -> None:
        if ticket.is_ended:
            return
        self._live[ticket] = None
        self._next_deadline = min(self._next_deadline, ticket.deadline)
        try:
            self._driver.submit([ticket.requests])
        except (UserError, EngineClosedError) as error:  # the model was closed meanwhile
            for request in ticket.requests:
                request.fail(error)

    def _end_late(self) -> None:
        now = monotonic()
        for ticket in self._live:
            if ticket.deadline <= now:
                self._driver.abort(ticket.requests, "timeout")
        self._next_deadline = min(
            (ticket.deadline for ticket in self._live if ticket.deadline > now), default=math.inf
        )

    def _end_all(self) -> None:
        for ticket in self._live:
            self._driver.abort(ticket.requests)

    def _deliver(self) -> None:
        """Hands on what the last step gave."""
        news = []
        for ticket in tuple(self._live):
            if ticket.collect():
                news.append(ticket)
            if ticket.is_ended:
                del self._live[ticket]
                self._ended_at.append(monotonic())
        self._announce(news)

    def _announce(self, tickets: Iterable[Ticket]) -> None:
        """Wakes the readers; one call wakes all of a loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        for ticket in tickets:
            by_loop.setdefault(ticket.loop, []).append(ticket)
        for loop, own in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, own)
            except RuntimeError:  # the loop is closed: nobody reads any more
                for ticket in own:
                    self._driver.abort(ticket.requests)


class _Piece:
    """Work for another thread, and where that waits for the result."""

    def __init__(self, work: Callable[[], Any], future: Future[Any]) -> None:
        self._work = work
        self._future = future
        self.has_begun = False

    def carry_out(self, driver: Driver) -> None:
        """Does it; its own errors are its owner's."""
        self.has_begun = True
        try:
            result = driver.compute_alone(self._work)
        except Exception as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Ends it, unless it has ended, with an error."""
        if not self._future.done():
            self._future.set_exception(error)


def _wake(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.wake()
