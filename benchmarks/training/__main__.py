"""`python -m benchmarks.training`: `mbd train pretrain` against the same Trainer with upstream's class.

A full run writes benchmarks/results/<date>-<cpu>-training.json and docs/training-benchmarks.md; `--quick` and
partial ones write JSON and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import describe_machine, harness_versions, slug
from benchmarks.peers import CACHE
from benchmarks.protocol import REPOSITORY
from benchmarks.results import from_json
from benchmarks.session import report
from benchmarks.summary import Spread
from benchmarks.training.cases import FULL, PRECISIONS, QUICK, available_precisions
from benchmarks.training.measure import measure
from benchmarks.training.report import FORMAT, TrainingResults, missing_ways, page
from modernbert_decoder.machine import usable_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=summary)
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: those the processor computes in"
    )
    parser.add_argument("--rounds", type=int, default=5)
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
        bandwidth=None,
        others_share=Spread.of(measured.others_shares) if measured.others_shares else None,
        is_quick=options.quick,
        rows=measured.rows,
        comparisons=measured.comparisons,
        losses=measured.losses,
    )


def is_complete(results: TrainingResults) -> bool:
    """Whether every way was measured at full length, and the losses compared."""
    return not results.is_quick and not missing_ways(results) and bool(results.losses)


def publish(results: TrainingResults) -> None:
    """Write the page."""
    (REPOSITORY / "docs" / "training-benchmarks.md").write_text(page(results), encoding="utf-8")
    report("wrote docs/training-benchmarks.md")


def load_results(path: Path) -> TrainingResults:
    """Results that a run wrote.

    Raises:
        ValueError: another format.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("format") != FORMAT:
        raise ValueError(f"{path.name} has format {stored.get('format')!r}, this version reads {FORMAT}")
    return from_json(TrainingResults, stored)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if options.render:
        results = load_results(options.render)
        if not is_complete(results):
            report("not published: ways are missing from this run")
            return 2
        publish(results)
        return 0
    results = run(options)
    folder = REPOSITORY / "benchmarks" / "results" if is_complete(results) else CACHE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.date}-{slug(results.machine['cpu'])}-training.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    report(f"wrote {path.name}")
    if is_complete(results):
        publish(results)
    else:
        print(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
