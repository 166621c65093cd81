"""Interleaved rounds: both runtimes loaded at once, every task measured way after way, A B C A B C.

The first round warms up and is dropped. Ways of one task must come to the same result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.peers import model_folder
from benchmarks.protocol import Worker
from benchmarks.summary import Spread, pairwise_ratio
from benchmarks.wing.cases import OURS, UPSTREAM, Task

_SETTLE_SECONDS = 0.02
# Relative; losses and logits in float32, summed in different orders.
_TOLERANCE = 1e-4
# Less is what the allocator happens to keep or to give back.
_LEAST_GROWTH_BYTES = 32_000_000

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A task gets `rounds`, or as many as fit into `case_seconds`, but never fewer than `least_rounds`."""

    threads: int
    rounds: int
    least_rounds: int
    case_seconds: float


@dataclass(frozen=True)
class Row:
    """One way of a task; memory is that of one more round, before which free memory was given back.

    Attributes:
        peak_memory_bytes: of the process during the row, weights, gradients and AdamW's state included.
        growth_bytes: the part of it that came and went with the row.
    """

    size: str
    task: str
    runtime: str
    way: str
    tokens: int
    rounds: int
    seconds: Spread
    tokens_per_second: float
    peak_memory_bytes: int
    growth_bytes: int


@dataclass(frozen=True)
class Comparison:
    """How many times faster a way of ours is; above 1 we win.

    Attributes:
        ratio: of the times within each round.
        memory: our growth over theirs; below 1 we win. None where theirs is too little to compare.
    """

    size: str
    task: str
    way: str
    peer_way: str
    ratio: Spread
    memory: float | None


@dataclass(frozen=True)
class Round:
    """Every way's answer, and how much of the processors other programs took."""

    answers: list[dict[str, Any]]
    others_share: float | None
    seconds: float

    @property
    def is_quiet(self) -> bool:
        """Whether the machine was ours; taken for granted where the system does not tell."""
        return is_quiet(self.others_share)


@dataclass(frozen=True)
class Measured:
    """A task after all its rounds."""

    rows: list[Row]
    comparisons: list[Comparison]
    others_shares: list[float]


def load_workers(
    size: str, stack: ExitStack, *, threads: int, report: Report
) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each runtime, closed with the stack, and the versions they run."""
    folder = str(model_folder(size))
    workers, versions = {}, {}
    for runtime in (UPSTREAM, OURS):
        report(f"{size}: loading {runtime}")
        worker = stack.enter_context(
            Worker(
                [sys.executable, "-m", "benchmarks.wing.torch_worker"],
                environment={"OMP_NUM_THREADS": str(threads)},
            )
        )
        versions.update(worker.ask("load", runtime=runtime, model=folder, threads=threads)["versions"])
        workers[runtime] = worker
    return workers, versions


def measure_task(
    size: str, task: Task, workers: Mapping[str, Worker], *, plan: Plan, report: Report
) -> Measured:
    """Interleaved rounds of one task."""
    warm_up = one_round(task, workers)
    count = min(plan.rounds, max(plan.least_rounds, int(plan.case_seconds / warm_up.seconds)))
    report(f"{size}, {task.name}: {count} rounds of {warm_up.seconds:.1f} s")
    rounds: list[Round] = []
    while sum(each.is_quiet for each in rounds) < count and len(rounds) < MOST_REPEATS * count:
        rounds.append(one_round(task, workers))
    memory = one_round(task, workers, releases=True)
    return summarize(size, task, quietest(rounds, count), memory)


def one_round(task: Task, workers: Mapping[str, Worker], *, releases: bool = False) -> Round:
    """Every way once, each idle while another one is timed.

    Args:
        task: whose ways are timed.
        workers: by runtime.
        releases: every process first gives free memory back to the system. What a way needs can then be seen
            as growth, but getting the memory anew takes time.
    """
    start = time.monotonic()
    meter = ContentionMeter([each.process.pid for each in workers.values()])
    answers = []
    for way in task.ways:
        if releases:
            workers[way.runtime].ask("release")
        time.sleep(_SETTLE_SECONDS)
        answers.append(workers[way.runtime].ask(task.operation, **task.arguments, **way.flags))
    return Round(answers, meter.share(), time.monotonic() - start)


def quietest(rounds: Sequence[Round], count: int) -> list[Round]:
    """The `count` rounds in which others took least, in the order they were measured."""
    order = sorted(range(len(rounds)), key=lambda i: rounds[i].others_share or 0.0)
    return [rounds[i] for i in sorted(order[:count])]


def summarize(size: str, task: Task, rounds: Sequence[Round], memory: Round) -> Measured:
    """Rows of all ways, and comparisons of those that `Task.pairs` names.

    Args:
        size: of the model.
        task: that was measured.
        rounds: whose times count.
        memory: the round whose memory counts.

    Raises:
        ValueError: the ways came to different results.
    """
    for each in (*rounds, memory):
        check_agreement(size, task, [answer["check"] for answer in each.answers])
    seconds = {way: [each.answers[i]["seconds"] for each in rounds] for i, way in enumerate(task.ways)}
    growth = {way: memory.answers[i]["growth_bytes"] for i, way in enumerate(task.ways)}
    rows = [
        Row(
            size=size,
            task=task.name,
            runtime=way.runtime,
            way=task.way_name(way),
            tokens=task.tokens,
            rounds=len(rounds),
            seconds=Spread.of(seconds[way]),
            tokens_per_second=task.tokens / Spread.of(seconds[way]).median,
            peak_memory_bytes=memory.answers[i]["peak_memory_bytes"],
            growth_bytes=growth[way],
        )
        for i, way in enumerate(task.ways)
    ]
    comparisons = [
        Comparison(
            size=size,
            task=task.name,
            way=task.way_name(ours),
            peer_way=task.way_name(upstream),
            ratio=pairwise_ratio(seconds[upstream], seconds[ours]),
            memory=growth[ours] / growth[upstream] if growth[upstream] >= _LEAST_GROWTH_BYTES else None,
        )
        for ours, upstream in task.pairs()
    ]
    shares = [each.others_share for each in rounds if each.others_share is not None]
    return Measured(rows, comparisons, shares)


def check_agreement(size: str, task: Task, checks: Iterable[float]) -> None:
    """Raise unless all ways came to the same number.

    Raises:
        ValueError: they did not; the message names the numbers.
    """
    listed = list(checks)
    if max(listed) - min(listed) > _TOLERANCE * max(abs(each) for each in listed):
        raise ValueError(f"{size}, {task.name}: the ways came to different results: {listed}")
