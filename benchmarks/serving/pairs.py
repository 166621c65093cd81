"""Two ways of doing the same, in one process and in turn: A B, B A, and ratios within each round.

The first round warms up. Rounds in which other programs took processor time are measured again, as in
benchmarks/matrix.py, and the quietest are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.peers import CACHE
from benchmarks.summary import Spread
from modernbert_decoder.machine import usable_threads

# Between the two: the threads of one model sleep before those of the other are timed.
_SETTLE_SECONDS = 0.01

Measure = Callable[[int], float]
"""Takes the number of a round; gives what was measured in it, seconds or a rate."""


@dataclass(frozen=True)
class Pair:
    """What both measured, and the second divided by the first within each round."""

    first: Spread
    second: Spread
    ratio: Spread
    rounds: int


def measure_pair(first: Measure, second: Measure, *, rounds: int) -> Pair:
    """Alternates until there are enough quiet rounds, or twice as many as are wanted."""
    done: list[tuple[float | None, float, float]] = []
    number = 0
    while number <= MOST_REPEATS * rounds:
        meter = ContentionMeter([])
        values: dict[int, float] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            time.sleep(_SETTLE_SECONDS)
            values[which] = (first, second)[which](number)
        if number:
            done.append((meter.share(), values[0], values[1]))
        number += 1
        if sum(is_quiet(share) for share, _, _ in done) >= rounds:
            break
    kept = sorted(done, key=lambda each: each[0] or 0.0)[:rounds]
    return Pair(
        Spread.of(one for _, one, _ in kept),
        Spread.of(other for _, _, other in kept),
        Spread.of(other / one for _, one, other in kept),
        len(kept),
    )


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """What every comparison of two engines can be told."""
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--json", type=Path, help="write the rows there")


def use_engine_cache() -> None:
    """Keeps packed weights and graphs with those of the other benchmarks, unless a folder is set."""
    os.environ.setdefault("MBD_CACHE", str(CACHE / "engine"))


def save(rows: Sequence[Any], path: Path | None) -> None:
    """Writes dataclasses as a JSON list, if there is a path."""
    if path:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
