"""Two networks timed in turn: rounds in which both are asked, and ratios within each round.

Within a round they alternate every few steps, the order changing from turn to turn (A B, B A): a machine's
speed drifts within fractions of a second. The first round warms up, and rounds in which other programs took
processor time are measured again, as in benchmarks/matrix.py.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet

# Above this gain or loss, and with three quarters of the rounds on the same side of 1, a ratio is a finding.
NOTEWORTHY = 0.02
# A change this many times slower needs no precision.
HOPELESS = 4
# Between turns: the shipped threads sleep again, the caches are what they are.
SETTLE_SECONDS = 0.01
_WARM_STEPS = 2


class Timeable(Protocol):
    """What can be timed: one sequence at a time."""

    def prefill(self, ids: Sequence[int]) -> int: ...

    def step(self, ids: Sequence[int]) -> int: ...


@dataclass(frozen=True)
class Plan:
    """How much is measured: a round is some turns of both, a turn a prefill and the steps behind it."""

    rounds: int
    turns: int
    steps: int
    prompt: tuple[int, ...]
    settle_seconds: float = SETTLE_SECONDS


@dataclass(frozen=True)
class Side:
    """One of the two, and the processors its calling thread may use (None: as it is)."""

    network: Timeable
    processors: frozenset[int] | None = None


@dataclass(frozen=True)
class Turn:
    """What one network took in one turn."""

    prefill_seconds: float
    step_seconds: list[float]


@dataclass(frozen=True)
class Times:
    """Medians of one round."""

    prefill_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the shipped configuration: median and quartiles of the rounds' ratios."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, shipped: Sequence[float], changed: Sequence[float]) -> Ratio:
        """From the times of the same rounds.

        >>> Ratio.of([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
        Ratio(median=2.0, lower=2.0, upper=2.5)
        """
        ratios = [a / b for a, b in zip(shipped, changed, strict=True)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0])
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, lower, upper)

    def verdict(self, noise: float = 0.0) -> str:
        """`faster`, `slower` or `no difference`, where equal configurations differed by `noise`.

        >>> [Ratio(*each).verdict() for each in ((1.05, 1.01, 1.1), (1.05, 0.99, 1.1), (0.9, 0.8, 0.95))]
        ['faster', 'no difference', 'slower']
        >>> Ratio(1.05, 1.01, 1.1).verdict(noise=0.06)
        'no difference'
        """
        least = max(NOTEWORTHY, noise)
        if self.median >= 1 + least and self.lower > 1:
            return "faster"
        if self.median <= 1 - least and self.upper < 1:
            return "slower"
        return "no difference"


@dataclass(frozen=True)
class Pair:
    """One round of both."""

    shipped: Times
    changed: Times
    others_share: float | None

    @property
    def is_quiet(self) -> bool:
        """Whether the machine was ours; taken for granted where the system does not tell."""
        return is_quiet(self.others_share)


def compare(shipped: Side, changed: Side, plan: Plan) -> list[Pair]:
    """Rounds of both in turn, the quietest `plan.rounds` of them; one that is hopelessly slow gets one."""
    warm_up = measure_pair(shipped, changed, plan)
    if warm_up.changed.step_seconds > HOPELESS * warm_up.shipped.step_seconds:
        return [warm_up]
    pairs: list[Pair] = []
    while sum(each.is_quiet for each in pairs) < plan.rounds and len(pairs) < MOST_REPEATS * plan.rounds:
        pairs.append(measure_pair(shipped, changed, plan))
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].others_share or 0.0)
    return [pairs[i] for i in sorted(order[: plan.rounds])]


def measure_pair(shipped: Side, changed: Side, plan: Plan) -> Pair:
    """One round: turns of both, the order alternating."""
    meter = ContentionMeter(())
    samples: dict[bool, list[Turn]] = {False: [], True: []}
    for i in range(plan.turns):
        for is_changed in (False, True) if i % 2 == 0 else (True, False):
            samples[is_changed].append(take_turn(changed if is_changed else shipped, plan))
    return Pair(_median(samples[False]), _median(samples[True]), meter.share())


def take_turn(side: Side, plan: Plan) -> Turn:
    """A prefill of the prompt and decode steps behind it, on the side's processors."""
    time.sleep(plan.settle_seconds)
    if side.processors is None:
        return _time(side.network, plan)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, side.processors)
    try:
        return _time(side.network, plan)
    finally:
        os.sched_setaffinity(0, before)


def _time(network: Timeable, plan: Plan) -> Turn:
    start = time.perf_counter()
    token = network.prefill(plan.prompt)
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(_WARM_STEPS + plan.steps):
        start = time.perf_counter()
        token = network.step((token,))
        steps.append(time.perf_counter() - start)
    return Turn(prefill, steps[_WARM_STEPS:])


def _median(turns: Sequence[Turn]) -> Times:
    return Times(
        statistics.median(turn.prefill_seconds for turn in turns),
        statistics.median(step for turn in turns for step in turn.step_seconds),
    )
