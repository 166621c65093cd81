"""`python -m benchmarks.serving`: our server against llama.cpp's and transformers' under 1, 8 and 32 clients.

A full run writes benchmarks/results/<date>-<cpu>-serving.json and docs/serving-benchmarks.md; `--quick` and
partial ones write JSON and print the page. llama-server is found by the variable MBD_LLAMA_SERVER.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.contention import MOST_REPEATS, ContentionMeter, is_quiet
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import Absent
from benchmarks.publishing import Publication
from benchmarks.serving.load import LoadResult, Workload, run_load
from benchmarks.serving.report import FORMAT, Group, Line, ServingResults, page
from benchmarks.serving.servers import (
    LLAMA_VARIABLE,
    RunningServer,
    Setup,
    llama,
    ours,
    transformers,
)
from benchmarks.session import report
from modernbert_decoder.machine import usable_threads

SIZES = ("17m", "150m")
CLIENTS = (1, 8, 32)
_PAIRS = (("int8", "Q8_0"), ("int4", "Q4_0"))
_PREFIX_WORDS = 600
_WARM_UP_SECONDS = 2.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, 1 round of 5 seconds: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    return parser.parse_args(arguments)


def groups(options: argparse.Namespace, absent: list[Absent]) -> list[Group]:
    """What is measured side by side, each with its setups and workload."""
    found: list[Group] = []
    threads = options.threads
    for size in options.sizes:
        for dtype, gguf_type in _PAIRS:
            peer = llama(size, gguf_type, threads=threads)
            setups: list[Setup] = [ours(size, dtype, threads=threads)]
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
    rounds = 1 if options.quick else options.rounds
    seconds = 5.0 if options.quick else options.seconds
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
            kept = sorted(kept, key=lambda item: item[0])[:rounds]
            for i, each in enumerate(running):
                of_server = [results[i] for _, results in kept]
                of_first = [results[0] for _, results in kept]
                lines.append(Line.of(group.name, each.setup, clients, of_server, of_first, is_first=i == 0))
    return lines


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
    if options.quick:
        options.sizes = ["17m"]
    absent: list[Absent] = []
    lines = [line for group in groups(options, absent) for line in measure(group, options, absent)]
    for each in absent:
        report(f"{each}; llama-server is named in {LLAMA_VARIABLE}")
    return ServingResults(
        format=FORMAT,
        date=datetime.date.today().isoformat(),
        machine=describe_machine(),
        threads=options.threads,
        versions=harness_versions(),
        is_quick=options.quick,
        absent=absent,
        lines=lines,
    )


def is_complete(results: ServingResults) -> bool:
    """Whether every size was loaded by every number of clients, at full length."""
    measured = {(line.size, line.clients) for line in results.lines}
    return not results.is_quick and measured >= {(size, clients) for size in SIZES for clients in CLIENTS}


PUBLICATION = Publication(ServingResults, FORMAT, "serving", "serving-benchmarks.md", page, is_complete)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    options = parse(arguments)
    return PUBLICATION.render(options.render) if options.render else PUBLICATION.store(run(options))


if __name__ == "__main__":
    sys.exit(main())
