"""`python -m benchmarks.experiments`: every change against what is shipped, and docs/experiments.md.

A full run writes benchmarks/results/experiments-<date>-<cpu>.json and docs/experiments.md; a quick or partial
one prints the page and writes neither.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

from benchmarks.experiments.catalogue import EXPERIMENTS
from benchmarks.experiments.page import full_page
from benchmarks.experiments.study import FORMAT, Request, Study, run
from benchmarks.machine import slug
from benchmarks.peers import ENGINE_CACHE
from benchmarks.protocol import REPOSITORY
from benchmarks.results import load, save
from benchmarks.shapes import SHAPES
from modernbert_decoder.machine import usable_threads

DEFAULT_SIZES = ("17m", "150m")
PAGE = REPOSITORY / "docs" / "experiments.md"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(DEFAULT_SIZES))
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="experiments whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="17m, 2 rounds: does it work at all")
    parser.add_argument("--render", type=Path, metavar="JSON", help="write the page again, measuring nothing")
    return parser.parse_args(arguments)


def make_request(options: argparse.Namespace) -> Request:
    """What the command line asks for."""
    words = options.only or [""]
    chosen = tuple(each for each in EXPERIMENTS if any(word in each.name for word in words))
    if options.quick:
        return Request(("17m",), options.threads, rounds=2, experiments=chosen, is_quick=True)
    return Request(tuple(options.sizes), options.threads, options.rounds, experiments=chosen)


def is_complete(request: Request) -> bool:
    """Whether the run may replace the published page."""
    return not request.is_quick and request.experiments == EXPERIMENTS and request.sizes == DEFAULT_SIZES


def report(message: str) -> None:
    """Progress, on standard error."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {message}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if options.render:
        PAGE.write_text(full_page(load(Study, options.render, format=FORMAT)), encoding="utf-8")
        return 0
    os.environ["MBD_CACHE"] = str(ENGINE_CACHE)
    request = make_request(options)
    study = run(request, report)
    if not is_complete(request):
        print(full_page(study))
        return 0
    path = (
        REPOSITORY / "benchmarks" / "results" / f"experiments-{study.date}-{slug(study.machine['cpu'])}.json"
    )
    save(study, path)
    PAGE.write_text(full_page(study), encoding="utf-8")
    report(f"wrote {path.name} and docs/experiments.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
