"""`python -m benchmarks.attention`: one attention node in its forms, and docs/attention.md.

A full run writes benchmarks/results/<date>-<cpu>-attention.json and docs/attention.md; a quick one, or one of
fewer rounds, only writes JSON and prints the page.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.attention.forms import FORMS, Attention, Node, Shape
from benchmarks.experiments.measure import Ratio
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.publishing import Publication
from benchmarks.results import Setting
from benchmarks.session import report
from benchmarks.tables import number, setting, table
from modernbert_decoder.architecture import LayerKind, released_architecture
from modernbert_decoder.machine import usable_threads

FORMAT = 2
SIZES = ("17m", "150m")
CALLS = {
    "1 token behind 300": Shape(1, 1, 300, 512),
    "8 x 1 token behind 300": Shape(8, 1, 300, 512),
    "32 x 1 token behind 300": Shape(32, 1, 300, 512),
    "a prompt of 170 tokens": Shape(1, 170, 0, 512),
    "32 texts of 16 tokens": Shape(32, 16, 0, 64),
    "4 pieces of 128 behind 1,024": Shape(4, 128, 1024, 2048),
    "a piece of 256 behind 7,700": Shape(1, 256, 7700, 8192),
}
_ROUNDS = 60
_WARM_UPS = 2
# A turn lasts about so long, and holds so many calls at most.
_TURN_SECONDS = 0.01
_MOST_CALLS = 20
# Idle threads of the other sessions spin for a millisecond.
_SETTLE_SECONDS = 0.002

_SETTING = (
    "One `GroupQueryAttention` node of ONNX Runtime as the package builds it, with the heads of a "
    "released size, on random numbers: rotary embedding, the new keys and values put into the cache, "
    "attention. A ratio is the time of the first form over that of another in the same turn: above 1, the "
    "other is faster. Medians, with the quartiles in brackets; the forms take turns. *Blocks of keys* is "
    "what the package has in every graph that writes tokens, *whole scores* in those that only read: they "
    "have sinks that add nothing to softmax, and ONNX Runtime then writes the scores of all keys before "
    "it sums. They take memory for B x H x S x capacity scores. *Keys and values in 8 bits* have scales "
    "per channel that are given to the node; the package does not have them."
)
_FINDINGS = (
    "Whole scores are faster for prompts and pieces of 128 tokens and more, most of all in sliding "
    "layers, alike or slower for texts of 16 tokens, and slower for 32 rows of one token at 150m. "
    "Graphs have them that write no tokens. Keys and values in 8 bits gain for 32 rows of one token at "
    "150m, nothing for one and eight rows, and attend to prompts at a third to half of the speed, in "
    "tokens that a server has more of; besides, their scales must be known before the text is. Calls "
    "are repeated on the same arrays, so that what fits into a cache is found there."
)


@dataclass(frozen=True)
class Row:
    """One form of one call.

    Attributes:
        seconds: of a call, the median over the turns.
        ratio: how many times as fast as the first form, turn by turn.
    """

    size: str
    layer: str
    call: str
    form: str
    seconds: float
    ratio: Ratio


@dataclass(frozen=True)
class AttentionResults(Setting):
    """One run."""

    is_quick: bool
    rows: list[Row]


def measure(size: str, call: str, kind: LayerKind, *, rounds: int, threads: int) -> Iterator[Row]:
    """Every form of one call, in turns."""
    architecture = released_architecture(size)
    nodes = [Attention(form, architecture, kind, CALLS[call], threads=threads) for form in FORMS]
    seconds: list[list[float]] = [[] for _ in nodes]
    for _ in range(rounds):
        for node, found in zip(nodes, seconds, strict=True):
            found.append(_turn(node))
    for form, found in zip(FORMS, seconds, strict=True):
        ratio = Ratio.of(seconds[0], found)
        yield Row(size, kind.name.lower(), call, form.name, statistics.median(found), ratio)


def _turn(node: Attention) -> float:
    """Seconds of a call, of a few in a row."""
    time.sleep(_SETTLE_SECONDS)
    for _ in range(_WARM_UPS):
        start = time.perf_counter()
        node.run()
        once = time.perf_counter() - start
    count = max(1, min(_MOST_CALLS, int(_TURN_SECONDS / once)))
    start = time.perf_counter()
    for _ in range(count):
        node.run()
    return (time.perf_counter() - start) / count


def page(results: AttentionResults) -> str:
    """docs/attention.md."""
    others = [form.name for form in FORMS[1:]]
    header = ["call", "layer", "size", f"{Node.name}, us", *others]
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.rows:
        groups.setdefault((row.call, row.layer, row.size), {})[row.form] = row
    cells = [
        [*key, number(1e6 * forms[Node.name].seconds), *(_text(forms[name].ratio) for name in others)]
        for key, forms in groups.items()
    ]
    parts = [
        "# Attention by itself",
        "Written by `python -m benchmarks.attention` from one run.",
        setting(results),
        _SETTING,
        _FINDINGS,
        table(header, cells),
    ]
    return "\n\n".join(parts) + "\n"


def _text(ratio: Ratio) -> str:
    return f"{number(ratio.median)} ({number(ratio.lower)} to {number(ratio.upper)})"


def is_complete(results: AttentionResults) -> bool:
    """Whether every form of every call was measured in both layers at every size, often enough."""
    measured = {(row.size, row.call, row.layer, row.form) for row in results.rows}
    layers = [kind.name.lower() for kind in LayerKind]
    forms = [form.name for form in FORMS]
    return not results.is_quick and measured == set(product(SIZES, CALLS, layers, forms))


PUBLICATION = Publication(AttentionResults, FORMAT, "attention", "attention.md", page, is_complete)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--quick", action="store_true", help="17m, 2 rounds: does it work")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="publish these results, measuring nothing"
    )
    options = parser.parse_args(arguments)
    if options.render:
        return PUBLICATION.render(options.render)
    rows: list[Row] = []
    rounds = 2 if options.quick else options.rounds
    for call in CALLS:
        for kind in (LayerKind.FULL, LayerKind.SLIDING):
            for size in SIZES[:1] if options.quick else SIZES:
                rows += measure(size, call, kind, rounds=rounds, threads=options.threads)
                report(f"{call}, {kind.name.lower()}, {size}")
    return PUBLICATION.store(
        AttentionResults(
            format=FORMAT,
            date=datetime.date.today().isoformat(),
            machine=describe_machine(),
            threads=options.threads,
            versions=harness_versions(),
            is_quick=rounds < _ROUNDS,
            rows=rows,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
