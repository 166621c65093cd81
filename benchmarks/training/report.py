"""docs/training-benchmarks.md: method, numbers to hold, every comparison, every way.

Pure functions from results to text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.claims import Claim
from benchmarks.summary import Spread
from benchmarks.tables import number, setting, spread_text, table
from benchmarks.training.cases import FULL, SIZE, Way, available_precisions
from benchmarks.training.measure import TOLERANCE, Comparison, LossPair, Row

FORMAT = 1
LEAST_SPEED = 1.5
MOST_MEMORY = 0.6


@dataclass(frozen=True)
class TrainingResults:
    """One run; the fields that it shares with `Results` mean the same there."""

    format: int
    date: str
    machine: dict[str, Any]
    threads: int
    versions: dict[str, str]
    bandwidth: Spread | None
    others_share: Spread | None
    is_quick: bool
    rows: list[Row]
    comparisons: list[Comparison]
    losses: list[LossPair]


_METHOD = """\
A model of the {size} shape with the real vocabulary of 50,368 and random weights, the same ones on both
sides and in every round. Documents are synthetic: lengths drawn uniformly from {shortest} to {longest}
tokens, ids as frequent as words are. Both sides are Hugging Face's Trainer with torch-optimi's StableAdamW
in the same groups and settings, a constant rate and no clipping of gradients. Upstream's side trains
transformers' `ModernBertDecoderForCausalLM` on padded batches of the library's collator, in the ways that
its users have without writing code: in random order, grouped by length
(`train_sampling_strategy="group_by_length"`), and, as single documents, without any padding. A step is
{documents} documents, in one batch or accumulated; the first of the length groups holds the longest, as the
library wants it. Ours is `mbd train pretrain`: documents packed into sequences of {sequence_length} tokens,
{sequences} a step (as many tokens in the mean), one at a time. A round is {steps} steps. Numbers are held
against the better of upstream's two kinds of batches; those against single documents, which suit a
processor and starve an accelerator, are reported.

Useful tokens are those that are predicted; padding and the first token of a document are none. The time
runs from the beginning of training to the end of the last step, with the making of batches, without
checkpoints. Memory is the peak of the process, meanwhile, above what it held before: documents, tokenizer,
weights, gradients, optimizer and everything computed. Every way is a process of its own; one waits while
another is timed. Rounds are interleaved and the first is dropped. A ratio is taken within each round; then
the median (least to greatest)."""

_LOSSES = """\
Before the rounds both sides train in float32 on the same documents in the same order, from the same weights:
upstream padded, ours packed (pairs of documents that fill a sequence, so that none is cut)."""


def page(results: TrainingResults) -> str:
    """The page, from the results alone."""
    claims = [[each.what, each.bound, each.measured, each.verdict] for each in check_claims(results)]
    method = _METHOD.format(
        size=SIZE,
        shortest=FULL.shortest,
        longest=f"{FULL.longest:,}",
        documents=FULL.documents_per_step,
        sequence_length=f"{FULL.sequence_length:,}",
        sequences=FULL.sequences_per_step,
        steps=FULL.steps,
    )
    sections = [
        "# Benchmarks of training",
        "Written by `python -m benchmarks.training` from one run.",
        _partial(results),
        setting(results),  # type: ignore[arg-type]
        method,
        _meanwhile(results.others_share),
        "## Numbers to hold",
        table(["what", "at least, or at most", "measured", ""], claims),
        "## Against upstream",
        _comparison_table(results.comparisons),
        "## Every way",
        _row_table(results.rows),
        "## The same losses",
        _LOSSES,
        _loss_table(results.losses),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def missing_ways(results: TrainingResults) -> list[Way]:
    """The ways of a full run on this machine that were not measured."""
    measured = {(row.runtime, row.way, row.precision) for row in results.rows}
    expected = FULL.with_precisions(available_precisions(results.machine["flags"]))
    return [way for way in expected.ways if way.key not in measured]


def check_claims(results: TrainingResults) -> list[Claim]:
    """Every number to hold, in float32: each against the better of upstream's batches.

    Against single documents, which are no batches, they are reported.
    """
    chosen = [each for each in results.comparisons if each.precision == "float32"]
    batches = [each for each in chosen if each.peer_at_once > 1]
    fastest = min(batches, key=lambda each: each.speed.median, default=None)
    smallest = max(batches, key=lambda each: each.memory.median, default=None)
    single = next((each for each in chosen if each.peer_at_once == 1), None)
    speed, memory = f"useful tokens/s, {SIZE}, against upstream's", f"peak memory, {SIZE}, against upstream's"
    return [
        _speed_claim(f"{speed} faster batches", f"{LEAST_SPEED}x", fastest),
        _memory_claim(f"{memory} smaller batches", f"{MOST_MEMORY}x", smallest),
        _speed_claim(f"{speed} single documents", "", single),
        _memory_claim(f"{memory} single documents", "", single),
        _loss_claim(results.losses),
    ]


def _speed_claim(what: str, bound: str, comparison: Comparison | None) -> Claim:
    if comparison is None:
        return Claim(what, bound, "", None)
    is_held = comparison.speed.median >= LEAST_SPEED
    return Claim(what, bound, _measured(comparison, comparison.speed), is_held if bound else None)


def _memory_claim(what: str, bound: str, comparison: Comparison | None) -> Claim:
    if comparison is None:
        return Claim(what, bound, "", None)
    is_held = comparison.memory.median <= MOST_MEMORY
    return Claim(what, bound, _measured(comparison, comparison.memory), is_held if bound else None)


def _measured(comparison: Comparison, spread: Spread) -> str:
    return f"{spread_text(spread)} ({comparison.peer_way})"


def _loss_claim(losses: Sequence[LossPair]) -> Claim:
    what, bound = "losses on the same documents, relative difference", f"{TOLERANCE:.0e}"
    if not losses:
        return Claim(what, bound, "", None)
    largest = max(pair.difference for pair in losses)
    is_held = all(pair.difference <= TOLERANCE for pair in losses)  # of what is no number, false
    return Claim(what, bound, f"{largest:.1e} in {len(losses)} steps", is_held)


def _partial(results: TrainingResults) -> str:
    if results.is_quick:
        return "**A quick run**: tiny documents, one step; its numbers say nothing."
    missing = missing_ways(results)
    listed = "; ".join(f"{way.runtime} {way.name}, {way.precision}" for way in missing)
    return f"**A partial run**: not measured were {listed}." if missing else ""


def _meanwhile(share: Spread | None) -> str:
    if share is None:
        return ""
    return (
        f"Other programs took {share.median:.1%} of the processors meanwhile (median of the rounds, "
        f"{share.high:.1%} at most)."
    )


def _comparison_table(comparisons: Iterable[Comparison]) -> str:
    header = ["upstream's way", "precision", "ours, times as many useful tokens/s", "ours, times the memory"]
    lines = [
        [each.peer_way, each.precision, spread_text(each.speed), spread_text(each.memory)]
        for each in comparisons
    ]
    return table(header, lines)


def _row_table(rows: Iterable[Row]) -> str:
    header = ["side", "way", "precision", "at once", "steps", "useful tokens", "padding", "rounds", "s"]
    header += ["useful tok/s", "memory above the start, MB", "peak of the process, MB", "last loss"]
    lines = [
        [
            row.runtime,
            row.way,
            row.precision,
            str(row.at_once),
            str(row.steps),
            f"{row.targets:,}",
            f"{row.padding:.0%}",
            str(row.rounds),
            spread_text(row.seconds),
            spread_text(row.tokens_per_second),
            number(row.growth_bytes / 1e6),
            number(row.peak_memory_bytes / 1e6),
            f"{row.last_loss:.3f}",
        ]
        for row in rows
    ]
    return table(header, lines)


def _loss_table(losses: Iterable[LossPair]) -> str:
    lines = [
        [str(pair.step), f"{pair.ours:.4f}", f"{pair.upstream:.4f}", f"{pair.difference:.1e}"]
        for pair in losses
    ]
    return table(["step", "ours", "upstream", "relative difference"], lines)
