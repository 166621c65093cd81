"""One scheduler shared by threads and open streams: whoever waits for a result drives it for all.

A caller submits its requests and steps until they have ended; requests of others advance in the same steps.
This module owns the lock and knows nothing of texts, models or sampling.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from modernbert_decoder.engine.outputs import StreamChunk
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.scheduler import Scheduler

Result = TypeVar("Result")


class Driver:
    """Serializes access to a scheduler.

    Attributes:
        scheduler: to be touched only through the driver while requests run.
        is_closed: whether closing was asked for; the requests end with the next step at the latest.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._lock = threading.Lock()
        self._aborted: deque[Request] = deque()
        self.is_closed = False

    @property
    def num_ended(self) -> int:
        """Changes whenever a request ended, in whoever's step."""
        return self.scheduler.num_ended

    def submit(self, groups: Sequence[Sequence[Request]]) -> None:
        """Queues the completions of several prompts, one group each.

        Raises:
            RuntimeError: the driver is closed.
        """
        with self._lock:
            if self.is_closed:
                raise RuntimeError("this LLM is closed; open a new one")
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
            RuntimeError: the driver is closed.
        """
        with self._lock:
            self._take_aborted()
            if self.is_closed:
                self._end_all()
                raise RuntimeError("this LLM is closed; open a new one")
            if self.scheduler.has_work:
                with suppress(Exception):  # which its requests are told
                    self._step()
            result = work()
        self._abort_if_free()
        return result

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends those that still run; at once, or at the end of the step that runs now.

        Never waits for the lock: a forgotten stream is ended by the garbage collector, which may run in the
        thread that holds it.
        """
        self._aborted.extend(request for request in requests if not request.is_finished)
        self._abort_if_free()

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

    def _end_all(self) -> None:
        self._aborted.clear()
        self.scheduler.fail_all(RuntimeError("the LLM was closed"))

    def _abort_if_free(self) -> None:
        """Aborts what is to be aborted unless someone holds the lock, who then does it on leaving."""
        while self._aborted and self._lock.acquire(blocking=False):
            try:
                self._take_aborted()
            finally:
                self._lock.release()

    def _take_aborted(self) -> None:
        while self._aborted:
            request = self._aborted.popleft()
            if not self.is_closed:
                self.scheduler.abort(request)
