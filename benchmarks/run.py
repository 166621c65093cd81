"""`python benchmarks/run.py`: measure the engine and its peers side by side, and publish the tables.

A full run writes benchmarks/results/<date>-<cpu>.json, the table in the README, docs/benchmarks.md and
docs/benchmarks.png. A quick or partial one writes the JSON and prints the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.coverage import DEFAULT_PROMPTS, DEFAULT_SEQUENCES, DEFAULT_SIZES, is_complete
from benchmarks.machine import slug
from benchmarks.matrix import Plan
from benchmarks.page import full_page
from benchmarks.peers import CACHE, PEERS
from benchmarks.plot import draw
from benchmarks.protocol import REPOSITORY
from benchmarks.readme import readme_section
from benchmarks.results import FORMAT, Results, load, save
from benchmarks.session import Request, report, run, run_cases
from benchmarks.shapes import SHAPES
from benchmarks.tables import replace_between
from modernbert_decoder.machine import usable_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__.splitlines()[0])
    names = [peer.name for peer in PEERS]
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(DEFAULT_SIZES))
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=list(DEFAULT_PROMPTS), help="prompt lengths"
    )
    parser.add_argument("--sequences", nargs="+", type=int, default=list(DEFAULT_SEQUENCES))
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=15, help="most rounds of a case (default 15)")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=90,
        help="fewer rounds, but 3, where they take longer (default 90)",
    )
    parser.add_argument(
        "--longest-round",
        type=float,
        default=90,
        help="a case whose rounds take longer is left out, with a note (default 90 seconds)",
    )
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, prompt 128, 2 rounds: does it work at all")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    parser.add_argument(
        "--add-to", type=Path, metavar="JSON", help="measure only the cases, and put them into these results"
    )
    for peer in PEERS:
        default = os.environ.get(peer.environment_variable, sys.executable)
        parser.add_argument(
            f"--{peer.name.replace('.', '-')}-python",
            dest=peer.name,
            default=default,
            help=f"the Python that has {peer.name} (or {peer.environment_variable})",
        )
    options = parser.parse_args(arguments)
    if options.add_to and (options.quick or options.render):
        parser.error("--add-to goes neither with --quick nor with --render")
    return options


def make_request(options: argparse.Namespace) -> Request:
    """What the command line asks for."""
    interpreters = {peer.name: getattr(options, peer.name) for peer in PEERS}
    if options.quick:
        plan = Plan(
            options.threads,
            rounds=2,
            least_rounds=1,
            case_seconds=20,
            longest_round_seconds=options.longest_round,
        )
        return Request(("17m",), (128,), (1, 8), tuple(options.peers), interpreters, plan, is_quick=True)
    plan = Plan(
        options.threads,
        rounds=options.rounds,
        least_rounds=min(3, options.rounds),
        case_seconds=options.case_seconds,
        longest_round_seconds=options.longest_round,
    )
    lists = (tuple(options.sizes), tuple(options.prompts), tuple(options.sequences), tuple(options.peers))
    return Request(*lists, interpreters, plan, is_quick=False)


def publish(results: Results) -> None:
    """Write the README's table, the page and the plot."""
    readme, docs = REPOSITORY / "README.md", REPOSITORY / "docs"
    readme.write_text(
        replace_between(readme.read_text(encoding="utf-8"), readme_section(results)), encoding="utf-8"
    )
    (docs / "benchmarks.md").write_text(full_page(results), encoding="utf-8")
    draw(results, docs / "benchmarks.png")
    report("wrote the README's table, docs/benchmarks.md and docs/benchmarks.png")


def _place(results: Results, folder: Path) -> Path:
    """Where results go: those that are not published, elsewhere than into `folder`."""
    kind = "" if is_complete(results) else "-quick" if results.is_quick else "-partial"
    folder = folder if is_complete(results) else CACHE / "results"
    return folder / f"{results.date}-{slug(results.machine['cpu'])}{kind}.json"


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if options.render:
        results = load(Results, options.render, format=FORMAT)
        if not is_complete(results):
            report(
                "not published: this run lacks start-up, overhead, perplexity or parity, or cases of which "
                "its notes do not say why"
            )
            return 2
        publish(results)
        return 0
    if options.add_to:
        results = run_cases(make_request(options), load(Results, options.add_to, format=FORMAT))
        path = options.add_to
    else:
        results = run(make_request(options))
        path = _place(results, options.output)
    save(results, path)
    report(f"wrote {path.name}")
    if is_complete(results):
        publish(results)
    else:
        print(full_page(results))
        draw(results, path.with_suffix(".png"))
        report("a partial run: README and docs are left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
