"""One benchmark run from start to `Results`: peers found, every part measured, notes on what was left out."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.additions import check_same_setting, with_cases
from benchmarks.cache_bytes import cache_table
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.matrix import Loaded, Plan, measure_size
from benchmarks.peers import Absent, Installed, find_peers
from benchmarks.protocol import Worker
from benchmarks.quality import parity_table, perplexity_table, shared_folder
from benchmarks.quantizing import QUANTIZED_SIZE, quantizing_table
from benchmarks.results import FORMAT, Results
from benchmarks.start_up import start_up_table
from benchmarks.step_overhead import overhead_table
from benchmarks.summary import ENGINE, TRANSFORMERS, Case, Samples, Spread, compare, make_row
from benchmarks.weight_bits import WeightBits


@dataclass(frozen=True)
class Request:
    """What to measure."""

    sizes: tuple[str, ...]
    prompts: tuple[int, ...]
    sequences: tuple[int, ...]
    peers: tuple[str, ...]
    interpreters: Mapping[str, str]
    plan: Plan
    is_quick: bool


def report(message: str) -> None:
    """Progress, on standard error."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {message}", file=sys.stderr, flush=True)


def run(request: Request) -> Results:
    """Measure everything that was asked for."""
    peers, absent = _found_peers(request)
    samples, loaded, notes = _matrix(request, peers)
    engine, transformers = peers.get(ENGINE), peers.get(TRANSFORMERS)
    threads, rounds = request.plan.threads, request.plan.rounds
    perplexity = []
    shared = shared_folder()
    if engine and shared:
        perplexity = perplexity_table(
            engine, shared, threads=threads, is_quick=request.is_quick, report=report
        )
    else:
        notes.append(
            "Perplexity was not measured: the held-out books are not here (set MBD_SHARED to their folder)."
        )
    bandwidths = [rate for each in samples for rate in each.bandwidths]
    others = [share for each in samples for share in each.others_shares]
    return Results(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=threads,
        versions=_versions(loaded),
        features={each.peer: each.answer["system_info"] for each in loaded if "system_info" in each.answer},
        bandwidth=Spread.of(bandwidths) if bandwidths else None,
        others_share=Spread.of(others) if others else None,
        is_quick=request.is_quick,
        absent=absent,
        rows=[make_row(each, threads=threads) for each in samples],
        comparisons=compare(samples),
        start_up=start_up_table(peers, sizes=request.sizes, rounds=rounds, report=report),
        overhead=overhead_table(engine, threads=threads, rounds=rounds, report=report) if engine else [],
        cache=cache_table(request.sizes),
        perplexity=perplexity,
        parity=parity_table(engine, transformers, threads=threads, report=report)
        if engine and transformers
        else [],
        notes=notes,
        weight_bits=_weight_bits(loaded),
        quantizing=quantizing_table(
            request.sizes if request.is_quick else (QUANTIZED_SIZE,), threads=threads, report=report
        ),
    )


def run_cases(request: Request, earlier: Results) -> Results:
    """Measure the cases that were asked for, and nothing else, into the results of an earlier run.

    Raises:
        ValueError: that was made on another machine, or with another number of threads.
    """
    threads = request.plan.threads
    check_same_setting(earlier, machine=describe_machine(), threads=threads)
    peers, _ = _found_peers(request)
    samples, loaded, notes = _matrix(request, peers)
    return with_cases(
        earlier,
        [make_row(each, threads=threads) for each in samples],
        compare(samples),
        notes=notes,
        date=datetime.date.today().isoformat(),
        versions=_versions(loaded),
    )


def _found_peers(request: Request) -> tuple[dict[str, Installed], list[Absent]]:
    """The peers that are here, and those that are not, which are reported."""
    peers, absent = find_peers(request.peers, request.interpreters)
    for each in absent:
        report(str(each))
    return peers, absent


def _matrix(
    request: Request, peers: Mapping[str, Installed]
) -> tuple[list[Samples], list[Loaded], list[str]]:
    samples: list[Samples] = []
    notes: list[str] = []
    loaded: list[Loaded] = []
    with Worker([sys.executable, "-m", "benchmarks.bandwidth"]) as bandwidth:
        for size in request.sizes:
            cases = [
                Case(size, sequences, prompt) for prompt in request.prompts for sequences in request.sequences
            ]
            measured, workers, left_out = measure_size(
                size, cases, peers, bandwidth, plan=request.plan, report=report
            )
            samples += measured
            loaded += workers
            notes += left_out
    return samples, loaded, notes


def _weight_bits(loaded: Sequence[Loaded]) -> list[WeightBits]:
    return [
        WeightBits(
            each.size,
            each.variant,
            8 * each.answer["body_bytes_per_weight"],
            8 * each.answer["vocabulary_bytes_per_weight"],
        )
        for each in loaded
        if each.peer == ENGINE
    ]


def _versions(loaded: Sequence[Loaded]) -> dict[str, str]:
    versions = harness_versions()
    for each in loaded:
        versions.update(each.answer.get("versions", {}))
    return versions
