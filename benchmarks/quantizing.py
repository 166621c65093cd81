"""Seconds to quantize every matrix of a released size, one at a time, on random values.

`python -m benchmarks.quantizing` prints them alone; a full run of benchmarks/run.py publishes them with the
rest. Only the rounding and packing is timed: no file is read or written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from modernbert_decoder.architecture import RELEASED_SIZES, DecoderArchitecture, released_architecture
from modernbert_decoder.machine import usable_threads
from modernbert_decoder.quantization import QuantizationScheme, fused_shapes, quantize

QUANTIZED_SIZE: Final = "1b"
QUANTIZED_DTYPES: Final = ("int8", "int4")


@dataclass(frozen=True)
class QuantizingTime:
    """All matrices of one size in one format."""

    size: str
    dtype: str
    threads: int
    num_matrices: int
    num_weights: int
    seconds: float


def quantizing_table(
    sizes: Iterable[str], *, threads: int, report: Callable[[str], None]
) -> list[QuantizingTime]:
    """One line per size and format."""
    times = []
    for size in sizes:
        for dtype in QUANTIZED_DTYPES:
            report(f"{size}: quantizing every matrix to {dtype}")
            times.append(time_quantizing(size, released_architecture(size), dtype, threads=threads))
    return times


def time_quantizing(
    size: str, architecture: DecoderArchitecture, dtype: str, *, threads: int
) -> QuantizingTime:
    """The sum over the matrices, each timed by itself; those of one shape share their random values."""
    scheme = QuantizationScheme.named(dtype)
    names_of_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in fused_shapes(architecture).items():
        if len(shape) == 2:
            names_of_shape.setdefault((shape[0], shape[1]), []).append(name)
    generator = np.random.default_rng(0)
    seconds = 0.0
    for shape, names in names_of_shape.items():
        values = generator.standard_normal(shape, dtype=np.float32)
        for name in names:
            start = time.perf_counter()
            quantize(values, scheme.format_of(name).fitted(shape[1]), name=name, threads=threads)
            seconds += time.perf_counter() - start
    return QuantizingTime(
        size,
        dtype,
        threads,
        num_matrices=sum(map(len, names_of_shape.values())),
        num_weights=sum(rows * columns * len(names) for (rows, columns), names in names_of_shape.items()),
        seconds=seconds,
    )


def time_cells(entry: QuantizingTime) -> list[str]:
    """A line of the table under `TIME_HEADER`."""
    return [
        entry.size,
        entry.dtype,
        str(entry.num_matrices),
        f"{entry.num_weights / 1e6:,.0f}",
        str(entry.threads),
        f"{entry.seconds:.1f}",
    ]


TIME_HEADER: Final = ("size", "precision", "matrices", "million weights", "threads", "seconds")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    from benchmarks.tables import table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizing", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(RELEASED_SIZES), default=[QUANTIZED_SIZE])
    parser.add_argument("--threads", type=int, default=usable_threads())
    options = parser.parse_args(arguments)
    entries = quantizing_table(
        options.sizes, threads=options.threads, report=lambda message: print(message, file=sys.stderr)
    )
    print(table(TIME_HEADER, map(time_cells, entries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
