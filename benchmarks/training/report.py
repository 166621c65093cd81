"""docs/benchmarks-training.md: method, numbers to hold, every comparison, every way.

Pure functions from results to text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.claims import Claim
from benchmarks.results import Setting
from benchmarks.summary import Spread
from benchmarks.tables import number, setting, spread_text, table
from benchmarks.training.cases import FULL, OURS, SIZE, UPSTREAM, Way, available_precisions
from benchmarks.training.measure import TOLERANCE, Comparison, LossPair, Row

FORMAT = 2
LEAST_SPEED = 1.5
MOST_MEMORY = 0.6
# The library's default batch size on a device.
USUAL_BATCH = 8
# Of a run that is published.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class TrainingResults(Setting):
    """One run; `others_share` and `is_quick` are as in `Results`."""

    others_share: Spread | None
    is_quick: bool
    rows: list[Row]
    comparisons: list[Comparison]
    losses: list[LossPair]


_METHOD = """\
A model of the {size} shape with the real vocabulary of 50,368 and random weights, the same ones on both
sides and in every round. Documents are synthetic: lengths drawn uniformly from {shortest} to {longest}
tokens, ids as frequent as words are. Both sides are Hugging Face's Trainer with torch-optimi's StableAdamW
in the same groups and settings, a constant rate and no clipping of gradients. Ours is `mbd train pretrain`:
documents packed into sequences of {sequence_length} tokens, {sequences} a step.

Upstream's side trains transformers' `ModernBertDecoderForCausalLM` with the library's own means. A step is
{documents} documents, in one batch or accumulated from smaller ones:

- *random order* and *grouped by length* (`train_sampling_strategy="group_by_length"`): padded by
  `DataCollatorForLanguageModeling`;
- *flattened*: documents of a batch in one row by `DataCollatorWithFlattening`, without padding; positions
  that begin anew keep them apart, as Trainer turns the cache off;
- *single documents*: one at a time, which need no padding either.

An epoch is {num_documents:,} documents. A round is {steps} steps, on batches spaced evenly over those of the
epoch, ordered by the tokens they hold: so the documents that are measured have the mean length. (The
library's length groups begin with the longest documents: their first batches would stand for no others.) Ours
and the ways in random order get the same documents."""

_HELD = """\
Held against are all of upstream's ways with more than one document at once; single documents, which suit a
processor and starve an accelerator, are reported. Speed and memory are held twice. First with as many tokens
at once on both sides, sequences of {sequence_length} tokens against twice as many documents of {mean_length}
in the mean: speed against upstream's ways with {usual} documents, the library's default, memory against all;
the worst pair decides. Then between each side's fastest ways, however much they hold at once: there upstream
has the sampler and the batch size that suit this processor best."""

_MEASURED = """\
Useful tokens are those that are predicted; padding and the first token of a document are none. The time
runs from the beginning of training to the end of the last step, with the making of batches, without
checkpoints. Memory is the peak of the process, meanwhile, above what it held before: documents, tokenizer,
weights, gradients, optimizer and everything computed. It is that of the timed steps; upstream's batches
differ, so after the rounds every way also trains once on the batch of its epoch that computes most at once:
what a long run needs. Our sequences are all alike. Every way is a process of its own; one waits while another
is timed. Rounds are interleaved, after one short step to warm up. A ratio is taken within each round; then
the median (least to greatest)."""

_LOSSES = """\
Before the rounds both sides train in float32 on the same documents in the same order, from the same weights:
ours packed (pairs of documents that fill a sequence, so that none is cut), upstream padded and flattened."""


def page(results: TrainingResults) -> str:
    """The page, from the results alone."""
    claims = [[each.what, each.bound, each.measured, each.verdict] for each in check_claims(results)]
    sections = [
        "# Benchmarks of training",
        "Written by `python -m benchmarks.training` from one run.",
        _partial(results),
        setting(results),
        *_method(),
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


def _method() -> tuple[str, ...]:
    sequence_length = f"{FULL.sequence_length:,}"
    method = _METHOD.format(
        size=SIZE,
        shortest=FULL.shortest,
        longest=f"{FULL.longest:,}",
        num_documents=FULL.num_documents,
        documents=FULL.documents_per_step,
        sequence_length=sequence_length,
        sequences=FULL.sequences_per_step,
        steps=FULL.steps,
    )
    return (
        method,
        _HELD.format(sequence_length=sequence_length, mean_length=FULL.mean_length, usual=USUAL_BATCH),
        _MEASURED,
    )


def missing_ways(results: TrainingResults) -> list[Way]:
    """The ways of a full run on this machine that were not measured."""
    measured = {(row.runtime, row.way, row.precision) for row in results.rows}
    expected = FULL.with_precisions(available_precisions(results.machine["flags"]))
    return [way for way in expected.ways if way.key not in measured]


def check_claims(results: TrainingResults) -> list[Claim]:
    """Every number to hold, in float32, against upstream's batches; against single documents, reported."""
    chosen = [each for each in results.comparisons if each.precision == "float32"]
    batches = [each for each in chosen if each.peer_at_once > 1]
    alike = [each for each in batches if each.tokens_at_once == each.peer_tokens_at_once]
    usual = [each for each in alike if each.peer_at_once == USUAL_BATCH]
    ours = _fastest(results.rows, OURS, least_at_once=1)
    upstream = _fastest(results.rows, UPSTREAM, least_at_once=2)
    fastest = [each for each in batches if (each.way, each.peer_way) == (ours, upstream)]
    single = [each for each in chosen if each.peer_at_once == 1 and each.way == ours]
    speed, memory = f"useful tokens/s, {SIZE}, ", f"peak memory, {SIZE}, "
    return [
        _ratio_claim(f"{speed}against batches of {USUAL_BATCH}", usual, _speed, least=LEAST_SPEED),
        _ratio_claim(f"{speed}each side at its fastest", fastest, _speed, least=LEAST_SPEED),
        _ratio_claim(f"{memory}as many tokens at once", alike, _memory, most=MOST_MEMORY),
        _ratio_claim(f"{memory}each side at its fastest", fastest, _memory, most=MOST_MEMORY),
        _ratio_claim(f"{speed}against single documents", single, _speed),
        _ratio_claim(f"{memory}against single documents", single, _memory),
        _loss_claim(results.losses),
    ]


def _fastest(rows: Iterable[Row], runtime: str, *, least_at_once: int) -> str | None:
    """The way of a side that learns most tokens per second in float32; None without any."""
    chosen = [
        row
        for row in rows
        if (row.runtime, row.precision) == (runtime, "float32") and row.at_once >= least_at_once
    ]
    return max(chosen, key=lambda row: row.tokens_per_second.median).way if chosen else None


def _speed(comparison: Comparison) -> Spread:
    return comparison.speed


def _memory(comparison: Comparison) -> Spread:
    return comparison.memory


def _ratio_claim(
    what: str,
    comparisons: Sequence[Comparison],
    ratio: Callable[[Comparison], Spread],
    *,
    least: float | None = None,
    most: float | None = None,
) -> Claim:
    """Held, or not, by the comparison that is worst for us; without a bound only reported.

    Args:
        what: is compared.
        comparisons: any of which may be the worst; none where they were not measured.
        ratio: of a comparison.
        least: which the ratio must reach.
        most: which it must not exceed.
    """
    bound = "" if least is None and most is None else f"{least or most}x"
    if not comparisons:
        return Claim(what, bound, "", None)
    worst = max(comparisons, key=lambda each: ratio(each).median * (1 if least is None else -1))
    spread = ratio(worst)
    is_held = (least is None or spread.median >= least) and (most is None or spread.median <= most)
    measured = f"{spread_text(spread)} ({worst.way} against {worst.peer_way})"
    return Claim(what, bound, measured, is_held if bound else None)


def _loss_claim(losses: Sequence[LossPair]) -> Claim:
    what, bound = "losses on the same documents, relative difference", f"{TOLERANCE:.0e}"
    if not losses:
        return Claim(what, bound, "", None)
    largest = max(pair.difference for pair in losses)
    is_held = all(pair.difference <= TOLERANCE for pair in losses)  # of what is no number, false
    return Claim(what, bound, f"{largest:.1e} in {len(losses)} pairs", is_held)


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
    header = ["ours", "upstream's", "precision", "tokens at once, ours", "upstream's, in the mean"]
    header += ["times as many useful tokens/s", "times the memory", "times the memory, largest batches"]
    lines = [
        [
            each.way,
            each.peer_way,
            each.precision,
            f"{each.tokens_at_once:,}",
            f"{each.peer_tokens_at_once:,}",
            spread_text(each.speed),
            spread_text(each.memory),
            number(each.largest_memory),
        ]
        for each in comparisons
    ]
    return table(header, lines)


def _row_table(rows: Iterable[Row]) -> str:
    header = ["side", "way", "precision", "at once", "steps", "useful tokens", "padding", "rounds", "s"]
    header += [
        "useful tok/s",
        "memory above the start, MB",
        "the same, largest batch",
        "peak of the process, MB",
        "last loss",
    ]
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
            number(row.largest_growth_bytes / 1e6),
            number(row.peak_memory_bytes / 1e6),
            f"{row.last_loss:.3f}",
        ]
        for row in rows
    ]
    return table(header, lines)


def _loss_table(losses: Iterable[LossPair]) -> str:
    lines = [
        [pair.peer_way, str(pair.step), f"{pair.ours:.4f}", f"{pair.upstream:.4f}", f"{pair.difference:.1e}"]
        for pair in losses
    ]
    return table(["upstream's way", "step", "ours", "upstream", "relative difference"], lines)
