"""Batches read side by side, each by a thread of its own.

Threads that share every call wait for each other at each of its operators and read what the other wrote;
where there are batches enough, each had better compute one alone. This module shares batches out among
threads; it knows nothing of sessions or texts.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, Generic, TypeVar

Batch = TypeVar("Batch")

# Lanes may be idle for this share of the time until the last of them is done, or they are not worth it.
_MAX_IDLE: Final = 0.2


def is_balanced(costs: Iterable[float], num_lanes: int) -> bool:
    """Whether lanes that take batches in this order are done at about the same time.

    >>> is_balanced([4, 4, 4, 4], 2), is_balanced([4, 4, 4], 2), is_balanced([9, 2, 2, 2, 2], 2)
    (True, False, True)
    """
    loads = [0.0] * num_lanes
    for cost in costs:
        heapq.heapreplace(loads, loads[0] + cost)
    return sum(loads) >= (1 - _MAX_IDLE) * num_lanes * max(loads)


class Lanes(Generic[Batch]):
    """Threads that take batches as they become free: the calling one, and further ones for the others.

    Args:
        process: one for each lane; carries out a batch.
    """

    def __init__(self, process: Sequence[Callable[[Batch], None]]) -> None:
        self._process = process
        self._executor = ThreadPoolExecutor(
            max(1, len(process) - 1), thread_name_prefix="modernbert-decoder-lane"
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def check(self) -> None:
        """To be called by `process` now and then: ends the batch if another lane has failed."""
        if self._stopped.is_set():
            raise _StoppedError

    def run(self, batches: Iterable[Batch]) -> None:
        """Carries out all batches; if one fails, the others are given up, and its error is raised.

        When it returns or raises, no lane is at work any more.
        """
        waiting = iter(batches)
        self._stopped.clear()
        first, *others = self._process
        futures: list[Future[None]] = []
        try:
            for process in others:
                futures.append(self._executor.submit(self._drive, process, waiting))
            self._drive(first, waiting)
        except _StoppedError:
            pass  # the error is that of the lane that failed
        except BaseException:
            self._stopped.set()
            raise
        finally:
            self._join(futures)
        for future in futures:
            error = future.exception()
            if error is not None and not isinstance(error, _StoppedError):
                raise error

    def close(self) -> None:
        """Ends the threads."""
        self._executor.shutdown()

    def _join(self, futures: Sequence[Future[None]]) -> None:
        interruption: BaseException | None = None
        while True:
            try:
                if all(future.done() for future in futures):
                    break
                wait(futures)
            except BaseException as error:  # of the user: the lanes end with what they are at
                self._stopped.set()
                interruption = error
        if interruption is not None:
            raise interruption

    def _drive(self, process: Callable[[Batch], None], waiting: Iterator[Batch]) -> None:
        try:
            while True:
                self.check()
                with self._lock:
                    batch = next(waiting, None)
                if batch is None:
                    return
                process(batch)
        except BaseException:
            self._stopped.set()
            raise


class _StoppedError(Exception):
    """Another lane has failed."""
