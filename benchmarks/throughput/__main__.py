"""`python -m benchmarks.throughput`: how many documents per second the engine and transformers classify.

A full run writes benchmarks/results/<date>-<cpu>-throughput.json, docs/throughput.md and its plot; `--quick`
and partial ones write JSON and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import CACHE
from benchmarks.publishing import Publication
from benchmarks.quality import shared_folder
from benchmarks.session import report
from benchmarks.throughput.corpora import CORPORA
from benchmarks.throughput.measure import Plan, load_workers, measure_corpus, measure_memory
from benchmarks.throughput.report import FORMAT, ThroughputResults, draw_memory, page
from modernbert_decoder.machine import usable_threads

SIZES = ("17m", "150m")
_MEMORY_TEXTS = 100_000
_QUICK_MEMORY_TEXTS = 4_000


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, short texts, 1 round: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, shared: Path) -> ThroughputResults:
    """The whole run."""
    folder = CACHE / "throughput"
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.threads, 1 if options.quick else options.rounds, folder, shared)
    sizes = ("17m",) if options.quick else options.sizes
    corpora = CORPORA[:1] if options.quick else CORPORA
    rows, memory, versions = [], [], harness_versions()
    for size in sizes:
        with ExitStack() as stack:
            peers = load_workers(size, plan, stack, report)
            for corpus in corpora:
                rows += measure_corpus(corpus, size, peers, plan, report)
            if size == "17m":
                count = _QUICK_MEMORY_TEXTS if options.quick else _MEMORY_TEXTS
                memory.append(measure_memory(size, plan, count, report))
            for each in peers.workers:
                versions.update(each.answer.get("versions", {}))
    return ThroughputResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=options.threads,
        versions=versions,
        is_quick=options.quick,
        rows=rows,
        memory=memory,
    )


def is_complete(results: ThroughputResults) -> bool:
    """Whether every corpus was measured at every size, at full length, and the memory of many texts."""
    measured = {(row.size, row.corpus) for row in results.rows}
    wanted = {(size, corpus.name) for size in SIZES for corpus in CORPORA}
    return not results.is_quick and measured >= wanted and bool(results.memory)


def draw(results: ThroughputResults, docs: Path) -> None:
    """The page's picture."""
    draw_memory(results.memory, docs / "throughput-memory.png")


PUBLICATION = Publication(ThroughputResults, FORMAT, "throughput", "throughput.md", page, is_complete, draw)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if options.render:
        return PUBLICATION.render(options.render)
    shared = shared_folder()
    if shared is None:
        report("the texts are not here: set MBD_SHARED to the folder that holds data/ and corpus/")
        return 2
    return PUBLICATION.store(measure(options, shared))


if __name__ == "__main__":
    sys.exit(main())
