"""Ctrl-C while libraries are being loaded: compiled ones lose it, or crash, when it meets their start-up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Within the block Ctrl-C is remembered; it takes effect at the end."""
    is_interrupted = False

    def remember(number: int, frame: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if is_interrupted:
        raise KeyboardInterrupt
