"""The read bandwidth of the machine as a worker, so that every round is measured beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.protocol import serve
from modernbert_decoder.machine import measuring_buffer, read_bandwidth

BUFFER_BYTES = 1 << 30


def main() -> None:
    """Serve the worker protocol."""
    buffer = measuring_buffer(BUFFER_BYTES)

    def measure(*, threads: int) -> Mapping[str, Any]:
        return {"bytes_per_second": read_bandwidth(threads=threads, buffer=buffer)}

    serve({"measure": measure})


if __name__ == "__main__":
    main()
