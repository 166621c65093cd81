"""What bounds the speed of this machine: its processors, how fast memory can be read, the cache before it.

`mbd info`, `mbd bench` and the benchmarks share these measurements. It knows nothing of models.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_QUICK_BUFFER_BYTES: Final = 256 << 20
_LARGEST_BUFFER_BYTES: Final = 1 << 30
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# More threads than any machine has processors take minutes to start.
MAX_THREADS: Final = 1024


def usable_threads() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measuring_buffer(num_bytes: int | None = None) -> NDArray[np.int64]:
    """Memory that is really there: by default four times the last-level cache, from 256 MiB to 1 GiB."""
    if num_bytes is None:
        num_bytes = min(max(_QUICK_BUFFER_BYTES, 4 * (last_level_cache_bytes() or 0)), _LARGEST_BUFFER_BYTES)
    return np.ones(num_bytes // 8, np.int64)


def read_bandwidth(*, threads: int, buffer: NDArray[Any] | None = None, passes: int = 6) -> float:
    """Bytes per second at which `threads` threads read memory, each its own part: the best of a few passes.

    Sums, maxima and dot products of such an array all run at the same rate, so it is the memory's and not the
    arithmetic's.

    Args:
        threads: as many as the engine uses.
        buffer: what to read, larger than every cache; by default a new `measuring_buffer()`.
        passes: times to read it.
    """
    array = measuring_buffer() if buffer is None else buffer
    parts = np.array_split(array, threads)
    best_seconds = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))  # numpy lets go of the interpreter while it sums
            best_seconds = min(best_seconds, time.perf_counter() - start)
    return array.nbytes / best_seconds


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache of the first processor; None where the system does not tell (Linux does)."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [parse_cache_size(path.read_text()) for path in folder.glob("index*/size")]
    return max(sizes, default=None)


def parse_cache_size(text: str) -> int:
    """Bytes of a size as Linux writes it.

    >>> parse_cache_size("32768K"), parse_cache_size("512")
    (33554432, 512)
    """
    text = text.strip()
    unit = _UNITS.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit
