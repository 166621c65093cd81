"""The matrix of cases: all workers of a size loaded at once, measured in interleaved rounds.

One round asks every worker once, A B C A B C, each idle while another one is timed, with the machine's read
bandwidth measured at the start of the round. The first round warms up and is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.costs_of_peers import step_bytes
from benchmarks.peers import Installed, start_worker
from benchmarks.protocol import Worker
from benchmarks.summary import Case, Samples, case_label

# Threads of a runtime that has just answered may still spin for some milliseconds.
_SETTLE_SECONDS = 0.02

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    A case gets `rounds`, or as many as fit into `case_seconds`, but never fewer than `least_rounds`; one
    whose warm-up round takes more than `longest_round_seconds` is left out, and said to be.
    """

    threads: int
    rounds: int
    least_rounds: int
    case_seconds: float
    longest_round_seconds: float


@dataclass(frozen=True)
class Loaded:
    """A worker with its model, and what it said when it loaded."""

    peer: str
    variant: str
    size: str
    worker: Worker
    answer: dict[str, Any]
    new_tokens: int


def measure_size(
    size: str,
    cases: Iterable[Case],
    peers: Mapping[str, Installed],
    bandwidth: Worker,
    *,
    plan: Plan,
    report: Report,
) -> tuple[list[Samples], list[Loaded], list[str]]:
    """All cases of one size, what the workers said when they loaded, and notes on cases left out."""
    samples: list[Samples] = []
    notes: list[str] = []
    with ExitStack() as stack:
        workers = load_workers(size, peers, stack, plan=plan, report=report)
        for case in cases:
            measured, note = measure_case(case, workers, bandwidth, plan=plan, report=report)
            samples += measured
            notes += [note] if note else []
    return samples, workers, notes


def load_workers(
    size: str, peers: Mapping[str, Installed], stack: ExitStack, *, plan: Plan, report: Report
) -> list[Loaded]:
    """One worker for every variant of every peer, closed with the stack."""
    loaded = []
    for installed in peers.values():
        for variant in installed.peer.variants:
            report(f"{size}: loading {installed.peer.name} {variant}")
            worker, answer = start_worker(installed, variant, size, threads=plan.threads)
            stack.callback(worker.close)
            loaded.append(
                Loaded(installed.peer.name, variant, size, worker, answer, installed.peer.new_tokens)
            )
    return loaded


def measure_case(
    case: Case, workers: Iterable[Loaded], bandwidth: Worker, *, plan: Plan, report: Report
) -> tuple[list[Samples], str | None]:
    """Interleaved rounds of one case, or a note on why it was left out."""
    workers = list(workers)
    samples = [
        Samples(
            each.peer,
            each.variant,
            case,
            each.new_tokens,
            step_bytes=step_bytes(each.peer, case, each.answer, new_tokens=each.new_tokens),
        )
        for each in workers
    ]
    warm_up = _round(case, workers, bandwidth, plan=plan)
    if warm_up.seconds > plan.longest_round_seconds:
        note = (
            f"{case_label(case)}, was left out: one round takes "
            f"{warm_up.seconds:.0f} s (--longest-round {warm_up.seconds + 1:.0f} includes it)."
        )
        report(note)
        return [], note
    num_rounds = min(plan.rounds, max(plan.least_rounds, int(plan.case_seconds / warm_up.seconds)))
    what = f"{case.size}: {case.sequences} x {case.prompt_tokens} tokens"
    report(f"{what}, {num_rounds} rounds of {warm_up.seconds:.1f} s")
    rounds: list[Round] = []
    while sum(each.is_quiet for each in rounds) < num_rounds and len(rounds) < MOST_REPEATS * num_rounds:
        rounds.append(_round(case, workers, bandwidth, plan=plan))
    for each in quietest(rounds, num_rounds):
        for i, answer in enumerate(each.answers):
            samples[i].add(answer, bandwidth=each.bandwidth, others_share=each.others_share)
    return samples, None


@dataclass(frozen=True)
class Round:
    """Every worker's answer, the read bandwidth, and how much of the processors other programs took."""

    answers: list[dict[str, Any]]
    bandwidth: float
    others_share: float | None
    seconds: float

    @property
    def is_quiet(self) -> bool:
        """Whether the machine was ours; taken for granted where the system does not tell."""
        return is_quiet(self.others_share)


def quietest(rounds: Sequence[Round], count: int) -> list[Round]:
    """The `count` rounds in which others took least, in the order they were measured."""
    order = sorted(range(len(rounds)), key=lambda i: rounds[i].others_share or 0.0)
    return [rounds[i] for i in sorted(order[:count])]


def _round(case: Case, workers: Sequence[Loaded], bandwidth: Worker, *, plan: Plan) -> Round:
    start = time.monotonic()
    meter = ContentionMeter([bandwidth.process.pid, *(each.worker.process.pid for each in workers)])
    rate = bandwidth.ask("measure", threads=plan.threads)["bytes_per_second"]
    answers = []
    for each in workers:
        time.sleep(_SETTLE_SECONDS)
        arguments = {"prompt": case.prompt_tokens, "sequences": case.sequences, "tokens": each.new_tokens}
        answers.append(each.worker.ask("decode", **arguments))
    return Round(answers, rate, meter.share(), time.monotonic() - start)
