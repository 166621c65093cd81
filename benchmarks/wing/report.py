"""docs/benchmarks-pytorch.md: method, numbers to hold, every comparison, every row.

Pure functions from results to text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.claims import Claim
from benchmarks.results import Setting
from benchmarks.summary import Spread
from benchmarks.tables import number, setting, spread_text, table
from benchmarks.wing.cases import LOSS, LOSS_TOKENS, NEW_TOKENS, TRAINING, lengths
from benchmarks.wing.measure import Comparison, Row

FORMAT = 1

_LEAST_TRAINING = 1.3
_MOST_LOSS_MEMORY = 0.5
_LEAST_ANY = 0.97


@dataclass(frozen=True)
class WingResults(Setting):
    """One run; `others_share`, `is_quick` and `notes` are as in `Results`."""

    others_share: Spread | None
    is_quick: bool
    rows: list[Row]
    comparisons: list[Comparison]
    notes: list[str]


_METHOD = """\
Ours is `modernbert_decoder.pytorch`, upstream's the classes of the same names in transformers. Both get the
same random weights of the released shapes, in float32 with SDPA, and run as processes of their own; one
waits while the other is timed. Rounds are interleaved and the first is dropped. Losses, logits and numbers of
tokens are compared in every round: a row in which they differ ends the run.

A training step is forward, loss, backward and AdamW (its learning rate is zero, so that the loss stays the
same; the work is that of any other). Padded: one row per text, padded on the right, with an
`attention_mask`, padding without labels. Packed: the texts one after the other in a single row,
`position_ids` starting anew in each. Tokens per second count real tokens. `skip_logits` is the argument of
`forward` that returns the loss without logits; without it ours returns what upstream returns. The loss alone
is head, projection on the vocabulary, loss and backward on {loss_tokens:,} tokens. Classification takes the
same padded texts, without gradients. Prefill returns the last position's logits and a cache; `generate` adds
{new_tokens} greedy tokens.

Texts of a batch, in tokens: {texts}."""

_LEGEND = """\
How many times faster ours is: the ratio of times within each round, then the median (least to greatest).
Memory: what came and went with the row, ours over upstream's, where that is 32 MB or more."""

_ROWS_LEGEND = """\
Peak: of the process, with weights, gradients and AdamW's state. Growth: the part of the peak that came and
went with the row. In brackets: least and greatest round."""


def page(results: WingResults) -> str:
    """The page, from the results alone."""
    sizes = list(dict.fromkeys(row.size for row in results.rows))
    texts = "; ".join(f"{size} {', '.join(map(str, lengths(size)))}" for size in sizes)
    claims = [[each.what, each.bound, each.measured, each.verdict] for each in check_claims(results)]
    share = results.others_share
    meanwhile = (
        f"Other programs took {share.median:.1%} of the processors meanwhile (median of the rounds, "
        f"{share.high:.1%} at most)."
    )
    sections = [
        "# Benchmarks of the PyTorch classes",
        "Written by `make bench-pytorch` (`python -m benchmarks.wing`) from one run.",
        setting(results),
        _METHOD.format(loss_tokens=LOSS_TOKENS, new_tokens=NEW_TOKENS, texts=texts),
        meanwhile if share else "",
        *results.notes,
        "## Numbers to hold",
        table(["what", "at least, or at most", "measured", ""], claims),
        "## Against upstream",
        _LEGEND,
        _comparison_table(results.comparisons),
        "## Every row",
        _ROWS_LEGEND,
        _row_table(results.rows),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def check_claims(results: WingResults) -> list[Claim]:
    """Every number to hold; those of training and the loss with and without the logits."""
    training = [
        each
        for each in results.comparisons
        if (each.task, each.size) == (TRAINING, "17m") and each.way.split(",")[0] == each.peer_way
    ]
    loss = [each for each in results.comparisons if each.task == LOSS]
    claims = []
    for name, skips in (("skip_logits", True), ("logits returned", False)):
        chosen = [each for each in training if ("skip_logits" in each.way) == skips]
        claims.append(_training_claim(f"training tokens/s at equal batches, 17m, {name}", chosen))
    for name, skips in (("skip_logits", True), ("logits held for the caller", False)):
        chosen = [each for each in loss if ("skip_logits" in each.way) == skips]
        claims.append(_memory_claim(f"peak memory of the loss, vocabulary of 50,368, {name}", chosen))
    return [*claims, _any_claim(results.comparisons)]


def _training_claim(what: str, chosen: list[Comparison]) -> Claim:
    bound = f"{_LEAST_TRAINING}x"
    if not chosen:
        return Claim(what, bound, "", None)
    measured = "; ".join(f"{each.peer_way} {each.ratio.median:.2f}x" for each in chosen)
    return Claim(what, bound, measured, min(each.ratio.median for each in chosen) >= _LEAST_TRAINING)


def _memory_claim(what: str, chosen: list[Comparison]) -> Claim:
    bound = f"{_MOST_LOSS_MEMORY}x"
    memories = {each.size: each.memory for each in chosen if each.memory is not None}
    if not memories:
        return Claim(what, bound, "", None)
    measured = "; ".join(f"{size} {memory:.2f}x" for size, memory in memories.items())
    return Claim(what, bound, measured, max(memories.values()) <= _MOST_LOSS_MEMORY)


def _any_claim(comparisons: list[Comparison]) -> Claim:
    what, bound = "paired median of every row", f"{_LEAST_ANY}x"
    if not comparisons:
        return Claim(what, bound, "", None)
    least = min(comparisons, key=lambda each: each.ratio.median)
    num_lost = sum(each.ratio.median < _LEAST_ANY for each in comparisons)
    name = ", ".join(part for part in (least.size, least.task, least.way) if part)
    measured = f"{num_lost} of {len(comparisons)} below; least {least.ratio.median:.2f}x ({name})"
    return Claim(what, bound, measured, num_lost == 0)


def _comparison_table(comparisons: Iterable[Comparison]) -> str:
    lines = [
        [
            each.size,
            each.task,
            each.way,
            each.peer_way,
            spread_text(each.ratio),
            "" if each.memory is None else f"{each.memory:.2f}",
        ]
        for each in comparisons
    ]
    return table(["size", "task", "ours", "upstream", "times as fast", "memory"], lines)


def _row_table(rows: Iterable[Row]) -> str:
    lines = [
        [
            row.size,
            row.task,
            row.runtime,
            row.way,
            str(row.tokens),
            str(row.rounds),
            spread_text(row.seconds, scale=1e3),
            number(row.tokens_per_second),
            number(row.peak_memory_bytes / 1e6),
            number(row.growth_bytes / 1e6),
        ]
        for row in rows
    ]
    header = ["size", "task", "classes", "way", "tokens", "rounds", "ms", "tok/s", "peak MB", "growth MB"]
    return table(header, lines)
