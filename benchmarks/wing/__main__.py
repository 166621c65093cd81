"""`python -m benchmarks.wing`: our PyTorch classes against upstream's, side by side on the CPU.

A full run writes benchmarks/results/<date>-<cpu>-pytorch.json and docs/benchmarks-pytorch.md; `--quick` and
partial ones write JSON and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.machine import describe_machine, harness_versions
from benchmarks.publishing import Publication
from benchmarks.session import report
from benchmarks.summary import Spread
from benchmarks.wing.cases import QUICK, SIZES, tasks_of, workload_of
from benchmarks.wing.measure import Comparison, Plan, Row, load_workers, measure_task
from benchmarks.wing.report import FORMAT, WingResults, page
from modernbert_decoder.machine import usable_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wing", description=summary)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9, help="most rounds of a task (default 9)")
    parser.add_argument(
        "--case-seconds", type=float, default=60, help="fewer, but 3, where they take longer (default 60)"
    )
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, tiny batches, 1 round: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> WingResults:
    """The whole run."""
    is_quick: bool = options.quick
    rounds = 1 if is_quick else options.rounds
    plan = Plan(options.threads, rounds, min(3, rounds), options.case_seconds)
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    shares: list[float] = []
    versions = harness_versions()
    for size in ("17m",) if is_quick else options.sizes:
        with ExitStack() as stack:
            workers, of_workers = load_workers(size, stack, threads=options.threads, report=report)
            versions.update(of_workers)
            for task in tasks_of(QUICK if is_quick else workload_of(size)):
                measured = measure_task(size, task, workers, plan=plan, report=report)
                rows += measured.rows
                comparisons += measured.comparisons
                shares += measured.others_shares
    return WingResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=options.threads,
        versions=versions,
        others_share=Spread.of(shares) if shares else None,
        is_quick=is_quick,
        rows=rows,
        comparisons=comparisons,
        notes=[],
    )


def is_complete(results: WingResults) -> bool:
    """Whether every task of every size was measured at full length."""
    measured = {(row.size, row.task) for row in results.rows}
    return not results.is_quick and measured >= {
        (size, task.name) for size in SIZES for task in tasks_of(workload_of(size))
    }


PUBLICATION = Publication(WingResults, FORMAT, "pytorch", "benchmarks-pytorch.md", page, is_complete)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    return PUBLICATION.render(options.render) if options.render else PUBLICATION.store(measure(options))


if __name__ == "__main__":
    sys.exit(main())
