"""`python -m benchmarks.serving`: our server against llama.cpp's and transformers' under 1, 8 and 32 clients.

A full run writes benchmarks/results/<date>-<cpu>-serving.json and docs/serving-benchmarks.md; `--quick` and
partial ones write JSON and print the page, which says what they lack. llama-server is the one that
`make llama-server` builds, or that the variable MBD_LLAMA_SERVER names.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import Absent
from benchmarks.publishing import Publication
from benchmarks.serving.load import LoadResult, Workload, run_load
from benchmarks.serving.report import (
    CLIENTS,
    FORMAT,
    FULL_ROUNDS,
    FULL_SECONDS,
    SIZES,
    Group,
    Line,
    ServingResults,
    is_complete,
    page,
)
from benchmarks.serving.servers import (
    RunningServer,
    Setup,
    fastest,
    llama,
    ours,
    transformers,
)
from benchmarks.session import report
from modernbert_decoder.machine import usable_threads

_PAIRS = (("int8", "Q8_0"), ("int4", "Q4_0"))
_PREFIX_WORDS = 600
_WARM_UP_SECONDS = 2.0
_QUICK_ROUNDS, _QUICK_SECONDS = 1, 5.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=FULL_ROUNDS)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS, help="of one measurement")
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, 1 round of 5 seconds: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    parser.add_argument("--partial", action="store_true", help="with --render: though they are not whole")
    options = parser.parse_args(arguments)
    if options.partial and not options.render:
        parser.error("--partial goes with --render")
    if options.quick:
        options.sizes, options.rounds, options.seconds = ["17m"], _QUICK_ROUNDS, _QUICK_SECONDS
    return options


def groups(options: argparse.Namespace, absent: list[Absent]) -> list[Group]:
    """What is measured side by side, each with its setups and workload."""
    found: list[Group] = []
    threads = options.threads
    for size in options.sizes:
        for dtype, gguf_type in _PAIRS:
            peer = llama(size, gguf_type, threads=threads)
            setups: list[Setup] = [ours(size, dtype, threads=threads), fastest(size, dtype, threads=threads)]
            if isinstance(peer, Absent):
                absent.append(peer)
            else:
                setups.append(peer)
            found.append(
                Group(f"{size}, {dtype} and {gguf_type}", setups, Workload(), tuple(options.clients))
            )
    other = transformers("17m")
    if isinstance(other, Absent):
        absent.append(other)
    else:
        pair = [ours("17m", "float32", threads=threads), other]
        workload = Workload(extra={"temperature": 0})
        found.append(Group("17m, float32 and transformers serve", pair, workload, (1, 8)))
    cached = [
        ours(
            "150m", "int8", threads=threads, options=("--prefix-cache", size), variant=f"prefix cache {size}"
        )
        for size in ("0", "256MiB")
    ]
    shared = Workload(prefix_words=_PREFIX_WORDS, prompt_words=(8, 16), output_tokens=(16,))
    found.append(Group("150m, prompts that share a long beginning", cached, shared, (8,)))
    guessing = [
        ours("storyteller", "int8", threads=threads, options=("--draft", draft), variant=f"draft {draft}")
        for draft in ("off", "lookup")
    ]
    copying = Workload(prompt_words=(200,), output_tokens=(256,))
    found.append(Group("storyteller, one client, long greedy completions", guessing, copying, (1,)))
    return found


def measure(group: Group, options: argparse.Namespace, absent: list[Absent]) -> list[Line]:
    """All setups of a group, round by round: A B A B."""
    rounds, seconds = options.rounds, options.seconds
    lines: list[Line] = []
    with ExitStack() as stack:
        running: list[RunningServer] = []
        for setup in group.setups:
            report(f"{group.name}: starting {setup.server} {setup.variant}")
            try:
                running.append(stack.enter_context(RunningServer(setup, threads=options.threads)))
            except RuntimeError as error:
                absent.append(Absent(setup.server, f"it does not run here: {error}", "see its own message"))
        for each in running:
            _load(each, group, clients=2, seconds=_WARM_UP_SECONDS, salt="warm-up")
        for clients in group.clients:
            kept: list[tuple[float, list[LoadResult]]] = []
            num_quiet = 0
            while num_quiet < rounds and len(kept) < MOST_REPEATS * rounds:
                meter = ContentionMeter([each.process_id for each in running])
                salt = f"{clients} clients, round {len(kept)}"
                results = [
                    _load(each, group, clients=clients, seconds=seconds, salt=salt) for each in running
                ]
                share = meter.share()
                num_quiet += is_quiet(share)
                kept.append((share or 0.0, results))
                rates = ", ".join(f"{each.tokens_per_second:.0f} tok/s" for each in results)
                report(f"{group.name}, {clients} clients, round {len(kept)}: {rates}")
            chosen = quietest(kept, rounds)
            for i, each in enumerate(running):
                of_server = [results[i] for results in chosen]
                of_first = [results[0] for results in chosen]
                lines.append(Line.of(group.name, each.setup, clients, of_server, of_first, is_first=i == 0))
    return lines


def quietest(measured: Sequence[tuple[float, list[LoadResult]]], count: int) -> list[list[LoadResult]]:
    """Of rounds with the share that other programs took, so many with the least, in their own order."""
    places = sorted(range(len(measured)), key=lambda place: measured[place][0])[:count]
    return [measured[place][1] for place in sorted(places)]


def _load(server: RunningServer, group: Group, *, clients: int, seconds: float, salt: str) -> LoadResult:
    return asyncio.run(
        run_load(
            server.url,
            model=server.setup.model,
            clients=clients,
            seconds=seconds,
            workload=replace(group.workload, salt=salt),
            process_id=server.process_id,
        )
    )


def run(options: argparse.Namespace) -> ServingResults:
    """Measure what the command line asks for."""
    absent: list[Absent] = []
    lines = [line for group in groups(options, absent) for line in measure(group, options, absent)]
    for each in absent:
        report(str(each))
    return ServingResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=options.threads,
        versions=harness_versions(),
        is_quick=options.quick,
        rounds=options.rounds,
        seconds=options.seconds,
        absent=absent,
        lines=lines,
    )


PUBLICATION = Publication(ServingResults, FORMAT, "serving", "serving-benchmarks.md", page, is_complete)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    if not options.render:
        return PUBLICATION.store(run(options))
    rendered = replace(PUBLICATION, is_complete=lambda _: True) if options.partial else PUBLICATION
    return rendered.render(options.render)


if __name__ == "__main__":
    sys.exit(main())
