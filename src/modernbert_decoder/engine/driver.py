"""One scheduler shared by threads and open streams: whoever waits for a result drives it for all.

A caller submits its requests and steps until they have ended; requests of others advance in the same steps.
This module owns the lock and knows nothing of texts, models or sampling.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from modernbert_decoder.engine.outputs import StreamChunk
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.errors import EngineClosedError, InputError

Result = TypeVar("Result")


class Carrier(Protocol):
    """Carries out work between two steps."""

    def __call__(self, work: Callable[[], Result], /) -> Result:
        """The result of `work`, when it was its turn."""


class Driver:
    """Serializes access to a scheduler.

    Attributes:
        scheduler: to be touched only through the driver while requests run.
        is_closed: whether closing was asked for; the requests end with the next step at the latest.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._lock = threading.Lock()
        self._aborted: deque[tuple[Request, str]] = deque()
        self._carrier: Carrier | None = None
        self.is_closed = False

    @property
    def num_ended(self) -> int:
        """Changes whenever a request ended, in whoever's step."""
        return self.scheduler.num_ended

    @property
    def is_carried(self) -> bool:
        """Whether somebody drives without pause, and computes for others between two steps."""
        return self._carrier is not None

    def attach(self, carrier: Carrier) -> None:
        """Has `compute` done by someone who drives without pause, and would leave others no turn.

        Raises:
            InputError: there is one already.
        """
        if self._carrier is not None:
            raise InputError("this LLM is driven by an AsyncLLM already; use that one, or close it first")
        self._carrier = carrier

    def detach(self, carrier: Carrier) -> bool:
        """Has `compute` done by whoever calls it, again; False if somebody else carries by now."""
        if self._carrier != carrier:
            return False
        self._carrier = None
        return True

    def check_open(self) -> None:
        """Refuses what is asked of a closed driver.

        Raises:
            EngineClosedError: it is closed.
        """
        if self.is_closed:
            raise EngineClosedError("this LLM is closed; open a new one")

    def submit(self, groups: Sequence[Sequence[Request]]) -> None:
        """Queues the completions of several prompts, one group each: all of them or, if one is refused, none.

        Raises:
            EngineClosedError: the driver is closed.
            InputError: a prompt needs more memory than there may be.
        """
        with self._lock:
            self.check_open()
            for group in groups:
                self.scheduler.check(group)
            for group in groups:
                self.scheduler.submit(group)
        self._abort_if_free()

    def step(self) -> None:
        """Advances every running request by one step."""
        with self._lock:
            self._take_aborted()
            self._step()
        self._abort_if_free()

    def advance(self, requests: Sequence[Request]) -> tuple[list[StreamChunk], list[Request]]:
        """What was added to `requests` since the last call, and those of them that go on.

        Takes a step first, unless one of them has ended in another caller's.
        """
        with self._lock:
            self._take_aborted()
            if not any(request.is_finished for request in requests):
                self._step()
            chunks = [chunk for request in requests if (chunk := request.next_chunk())]
            running = [request for request in requests if not request.is_finished]
        self._abort_if_free()
        return chunks, running

    def compute(self, work: Callable[[], Result]) -> Result:
        """Carries out `work` between two steps, and such a step before it: who reads drives, too.

        Raises:
            EngineClosedError: the driver is closed.
        """
        if self._carrier is not None:
            return self._carrier(work)
        with self._lock:
            self._take_aborted()
            if self.scheduler.has_work:
                with suppress(Exception):  # which its requests are told
                    self._step()
            result = self._compute(work)
        self._abort_if_free()
        return result

    def compute_alone(self, work: Callable[[], Result]) -> Result:
        """Carries out `work` between two steps of others.

        Raises:
            EngineClosedError: the driver is closed.
        """
        with self._lock:
            result = self._compute(work)
        self._abort_if_free()
        return result

    def abort(self, requests: Sequence[Request], reason: str = "aborted") -> None:
        """Ends those that still run; at once, or at the end of the step that runs now.

        Never waits for the lock: a forgotten stream is ended by the garbage collector, which may run in the
        thread that holds it.
        """
        self._aborted.extend((request, reason) for request in requests if not request.is_finished)
        self._abort_if_free()

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error, and leaves the scheduler empty."""
        with self._lock:
            self._aborted.clear()
            self.scheduler.fail_all(error)

    def close(self) -> None:
        """Ends every request with an error, which its caller gets; nothing can be submitted afterwards.

        The lock is not fair: a caller that steps again and again could keep it for long. So closing is
        announced first, and whoever steps next carries it out.
        """
        self.is_closed = True
        with self._lock:
            self._end_all()

    def _step(self) -> None:
        if self.is_closed:
            self._end_all()
        else:
            self.scheduler.step()

    def _compute(self, work: Callable[[], Result]) -> Result:
        if self.is_closed:
            self._end_all()
        self.check_open()
        return work()

    def _end_all(self) -> None:
        self._aborted.clear()
        self.scheduler.fail_all(EngineClosedError("the LLM was closed"))

    def _abort_if_free(self) -> None:
        """Aborts what is to be aborted unless someone holds the lock, who then does it on leaving."""
        while self._aborted and self._lock.acquire(blocking=False):
            try:
                self._take_aborted()
            finally:
                self._lock.release()

    def _take_aborted(self) -> None:
        while self._aborted:
            request, reason = self._aborted.popleft()
            if not self.is_closed:
                self.scheduler.abort(request, reason)
