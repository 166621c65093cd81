"""What bounds this machine: plausible figures, whatever the machine."""

from __future__ import annotations

import numpy as np

from modernbert_decoder.machine import last_level_cache_bytes, measuring_buffer, read_bandwidth


def test_read_bandwidth_is_a_rate_of_the_given_buffer() -> None:
    assert read_bandwidth(threads=2, buffer=np.ones(1 << 16, np.int64), passes=2) > 0


def test_the_buffer_is_larger_than_the_last_level_cache_unless_asked_otherwise() -> None:
    assert measuring_buffer(4096).nbytes == 4096
    assert measuring_buffer().nbytes >= min(2 * (last_level_cache_bytes() or 0), 1 << 30)
