"""`python -m benchmarks.throughput`: how many documents per second the engine and transformers classify.

A full run writes benchmarks/results/<date>-<cpu>-throughput.json, docs/throughput.md and its plot; `--quick`
and partial ones write JSON and print the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import describe_machine, harness_versions, slug
from benchmarks.peers import CACHE
from benchmarks.protocol import REPOSITORY
from benchmarks.quality import shared_folder
from benchmarks.results import from_json
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
            workers = load_workers(size, plan, stack, report)
            for corpus in corpora:
                rows += measure_corpus(corpus, size, workers, plan, report)
            if size == "17m":
                count = _QUICK_MEMORY_TEXTS if options.quick else _MEMORY_TEXTS
                memory.append(measure_memory(size, plan, count, report))
            for each in workers:
                versions.update(each.answer.get("versions", {}))
    return ThroughputResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=options.threads,
        versions=versions,
        bandwidth=None,
        rows=rows,
        memory=memory,
    )


def publish(results: ThroughputResults) -> None:
    """Write the page and the plot."""
    docs = REPOSITORY / "docs"
    (docs / "throughput.md").write_text(page(results), encoding="utf-8")
    draw_memory(results.memory, docs / "throughput-memory.png")
    report("wrote docs/throughput.md and docs/throughput-memory.png")


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if options.render:
        publish(from_json(ThroughputResults, json.loads(options.render.read_text(encoding="utf-8"))))
        return 0
    shared = shared_folder()
    if shared is None:
        report("the texts are not here: set MBD_SHARED to the folder that holds data/ and corpus/")
        return 2
    results = measure(options, shared)
    is_full = not options.quick and tuple(options.sizes) == SIZES
    folder = REPOSITORY / "benchmarks" / "results" if is_full else CACHE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.date}-{slug(results.machine['cpu'])}-throughput.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
    report(f"wrote {path.name}")
    if is_full:
        publish(results)
    else:
        print(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
