"""Jobs that only read texts, beside running streams: a few threads prepare and use what the engine computes.

Waiting jobs take turns between clients. What a job asks of the network is computed by the engine's thread,
between two steps; before that it is asked here whether the job is still wanted. This module knows nothing of
texts and models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, TypeVar

from modernbert_decoder.engine.waiting import FairQueue
from modernbert_decoder.errors import EngineClosedError, QueueFullError

Result = TypeVar("Result")

# Jobs read at a time. Each holds keys and values of a batch; two keep the network busy.
_NUM_READERS: Final = 4
_RETRY_SECONDS: Final = 5.0


class ReadingJob(Generic[Result]):
    """Work for one caller.

    Attributes:
        client: for whom.
        future: its result.
        ended_by: why it is no longer wanted, if it is not.
    """

    def __init__(self, work: Callable[[], Result], *, client: str) -> None:
        self.work = work
        self.client = client
        self.future: Future[Result] = Future()
        self.ended_by: Exception | None = None


class ReadingDesk:
    """Takes jobs and has them done, a few at a time.

    Args:
        max_waiting: most jobs that wait beyond those that are done.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._executor = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="modernbert-decoder-reading")
        self._current = threading.local()
        self._lock = threading.Lock()
        self._waiting: FairQueue[ReadingJob[Any]] = FairQueue()
        self._running: set[ReadingJob[Any]] = set()
        self._num_readers = 0
        self._is_refusing = False
        self._idle: list[Future[None]] = []

    @property
    def num_jobs(self) -> int:
        """Jobs that run or wait."""
        with self._lock:
            return len(self._waiting) + len(self._running)

    def submit(self, work: Callable[[], Result], *, client: str) -> ReadingJob[Result]:
        """Queues a job.

        Raises:
            QueueFullError: too many wait already.
            EngineClosedError: it takes no more.
        """
        job = ReadingJob(work, client=client)
        with self._lock:
            if self._is_refusing:
                raise EngineClosedError("the engine is closing and takes no more requests")
            if len(self._waiting) + len(self._running) >= self._max_waiting + _NUM_READERS:
                raise QueueFullError(_RETRY_SECONDS)
            if self._num_readers < _NUM_READERS:
                try:
                    self._executor.submit(self._read)
                except RuntimeError as error:  # the interpreter is about to end
                    raise EngineClosedError("the engine is closed") from error
                self._num_readers += 1
            self._waiting.append(job)
        return job

    def check(self) -> None:
        """To be called on the thread of a job before each of its steps.

        Raises:
            Exception: why the job is no longer wanted.
        """
        job: ReadingJob[Any] | None = getattr(self._current, "job", None)
        if job is not None and job.ended_by is not None:
            raise job.ended_by

    def end(self, job: ReadingJob[Any]) -> None:
        """Gives up a job unless it is done; where it runs, with its next piece of work."""
        with self._lock:
            self._end(job, EngineClosedError("the job was given up"))
            self._announce_idle()

    def refuse(self) -> None:
        """Takes no more jobs."""
        with self._lock:
            self._is_refusing = True

    def end_all(self) -> None:
        """Gives up all jobs."""
        with self._lock:
            for job in (*self._waiting, *self._running):
                self._end(job, EngineClosedError("the engine was closed before the texts were read"))
            self._announce_idle()

    def when_idle(self) -> Future[None]:
        """Done once no job is left."""
        future: Future[None] = Future()
        with self._lock:
            self._idle.append(future)
            self._announce_idle()
        return future

    def close(self) -> None:
        """Ends the threads once no job is left, and waits for that."""
        self.refuse()
        self._executor.shutdown()

    def _end(self, job: ReadingJob[Any], error: Exception) -> None:
        job.ended_by = error
        if job in self._waiting:
            self._waiting.remove(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _announce_idle(self) -> None:
        if self._waiting or self._running:
            return
        for future in self._idle:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
        self._idle.clear()

    def _read(self) -> None:
        """Does waiting jobs until none is left."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_readers -= 1
                    return
                job = self._waiting.pop()
                self._running.add(job)
            self._do(job)
            with self._lock:
                self._running.discard(job)
                self._announce_idle()
            del job

    def _do(self, job: ReadingJob[Any]) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        self._current.job = job
        try:
            result = job.work()
        except BaseException as error:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        finally:
            self._current.job = None
