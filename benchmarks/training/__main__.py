"""`python -m benchmarks.training`: `mbd train pretrain` against the same Trainer with upstream's class.

A full run writes benchmarks/results/<date>-<cpu>-training.json and docs/benchmarks-training.md; `--quick` and
partial ones write JSON and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import CACHE
from benchmarks.publishing import Publication
from benchmarks.session import report
from benchmarks.summary import Spread
from benchmarks.training.cases import FULL, PRECISIONS, QUICK, available_precisions
from benchmarks.training.measure import measure
from benchmarks.training.report import FORMAT, LEAST_ROUNDS, TrainingResults, missing_ways, page
from modernbert_decoder.machine import usable_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=summary)
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: those the processor computes in"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"default 5; fewer than {LEAST_ROUNDS} are not published"
    )
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="tiny documents, 1 round: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> TrainingResults:
    """The whole run."""
    machine = describe_machine()
    folder = CACHE / "training"
    folder.mkdir(parents=True, exist_ok=True)
    load = QUICK if options.quick else FULL
    load = load.with_precisions(options.precisions or available_precisions(machine["flags"]))
    rounds = 1 if options.quick else options.rounds
    measured = measure(load, folder, rounds=rounds, threads=options.threads, report=report)
    return TrainingResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=machine,
        threads=options.threads,
        versions=harness_versions() | measured.versions,
        others_share=Spread.of(measured.others_shares) if measured.others_shares else None,
        is_quick=options.quick,
        rows=measured.rows,
        comparisons=measured.comparisons,
        losses=measured.losses,
    )


def is_complete(results: TrainingResults) -> bool:
    """Whether every way was measured at full length and often enough, and the losses compared."""
    if any(row.rounds < LEAST_ROUNDS for row in results.rows):
        return False
    return not results.is_quick and not missing_ways(results) and bool(results.losses)


PUBLICATION = Publication(TrainingResults, FORMAT, "training", "benchmarks-training.md", page, is_complete)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    return PUBLICATION.render(options.render) if options.render else PUBLICATION.store(run(options))


if __name__ == "__main__":
    sys.exit(main())
