"""From raw samples to what is published: medians and spreads, pairwise ratios, rows and comparisons.

Pure functions on numbers; nothing here starts a process, reads a clock or a file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ENGINE = "modernbert-decoder"
TRANSFORMERS = "transformers"
LLAMA = "llama.cpp"

# our variant, peer, its variant, whether the two have equal bits throughout
PAIRS: tuple[tuple[str, str, str, bool], ...] = (
    ("float32", LLAMA, "F32", True),
    ("int8", LLAMA, "Q8_0", True),
    ("int4-pure", LLAMA, "Q4_0", True),
    ("int4", LLAMA, "Q4_0", False),
    ("float32", TRANSFORMERS, "float32", True),
    ("int8", TRANSFORMERS, "float32", False),
    ("int4", TRANSFORMERS, "float32", False),
)
_VARIANT_NAMES: Mapping[str, str] = {
    "int4": "int4, 8-bit vocabulary",
    "int4-pure": "int4, 4-bit vocabulary",
}
MEASURES = ("decode", "prefill")


def variant_name(variant: str) -> str:
    """A variant as readers see it."""
    return _VARIANT_NAMES.get(variant, variant)


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one number.

        >>> Spread.of([3, 1, 2])
        Spread(median=2, low=1, high=3)
        """
        listed = list(values)
        if not listed:
            raise ValueError("a spread needs at least one value; run at least one round")
        return cls(statistics.median(listed), min(listed), max(listed))


def case_label(case: Case | Row | Comparison) -> str:
    """The case of a row or comparison in words; a note that begins with it says why it was left out."""
    return f"{case.size}, {case.sequences} x {case.prompt_tokens} tokens"


@dataclass(frozen=True)
class Case:
    """What is measured: a size, a number of sequences and a prompt length."""

    size: str
    sequences: int
    prompt_tokens: int


@dataclass
class Samples:
    """One worker's measurements of one case, one entry per round."""

    peer: str
    variant: str
    case: Case
    new_tokens: int
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # mean over the steps of a round
    bandwidths: list[float] = field(default_factory=list)  # bytes per second, measured in the same round
    others_shares: list[float] = field(default_factory=list)  # of the processors, taken by other programs
    peak_memory_bytes: int = 0
    step_bytes: int | None = None

    def add(self, answer: Mapping[str, Any], *, bandwidth: float, others_share: float | None) -> None:
        """Append a worker's answer to `decode`."""
        self.prefill_seconds.append(answer["prefill_seconds"])
        self.step_seconds.append(statistics.fmean(answer["step_seconds"]))
        self.bandwidths.append(bandwidth)
        if others_share is not None:
            self.others_shares.append(others_share)
        self.peak_memory_bytes = max(self.peak_memory_bytes, answer["peak_memory_bytes"])

    def seconds(self, measure: str) -> list[float]:
        """The samples of a measure."""
        return {"decode": self.step_seconds, "prefill": self.prefill_seconds}[measure]


@dataclass(frozen=True)
class Row:
    """One line of the full table; times are per round, steps averaged within a round."""

    peer: str
    variant: str
    size: str
    sequences: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    prefill_seconds: Spread
    step_seconds: Spread
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    step_bytes: int | None
    achieved_bytes_per_second: float | None
    bandwidth_share: Spread | None


def make_row(samples: Samples, *, threads: int) -> Row:
    """Medians, rates and the share of the read bandwidth, the latter round by round."""
    case = samples.case
    step, prefill = Spread.of(samples.step_seconds), Spread.of(samples.prefill_seconds)
    achieved = share = None
    if samples.step_bytes is not None:
        achieved = samples.step_bytes / step.median
        rounds = zip(samples.step_seconds, samples.bandwidths, strict=True)
        share = Spread.of(samples.step_bytes / seconds / bandwidth for seconds, bandwidth in rounds)
    return Row(
        peer=samples.peer,
        variant=samples.variant,
        size=case.size,
        sequences=case.sequences,
        prompt_tokens=case.prompt_tokens,
        new_tokens=samples.new_tokens,
        rounds=len(samples.step_seconds),
        threads=threads,
        prefill_seconds=prefill,
        step_seconds=step,
        prefill_tokens_per_second=case.sequences * case.prompt_tokens / prefill.median,
        decode_tokens_per_second=case.sequences / step.median,
        peak_memory_bytes=samples.peak_memory_bytes,
        step_bytes=samples.step_bytes,
        achieved_bytes_per_second=achieved,
        bandwidth_share=share,
    )


@dataclass(frozen=True)
class Comparison:
    """How many times faster ours is; above 1 we win."""

    variant: str
    peer: str
    peer_variant: str
    has_equal_bits: bool
    size: str
    sequences: int
    prompt_tokens: int
    measure: str
    ratio: Spread

    @property
    def is_won(self) -> bool:
        """Whether the median is at least 1."""
        return self.ratio.median >= 1.0


def pairwise_ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Ratios of times within each round, then their median: drift between rounds cancels.

    >>> pairwise_ratio([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])
    Spread(median=2.0, low=2.0, high=3.0)
    """
    return Spread.of(a / b for a, b in zip(theirs, ours, strict=True))


def compare(samples: Iterable[Samples]) -> list[Comparison]:
    """Every pair of `PAIRS` that was measured, for every case and measure."""
    by_key = {(each.peer, each.variant, each.case): each for each in samples}
    comparisons = []
    for case in dict.fromkeys(key[2] for key in by_key):
        for variant, peer, peer_variant, has_equal_bits in PAIRS:
            ours, theirs = by_key.get((ENGINE, variant, case)), by_key.get((peer, peer_variant, case))
            if ours is None or theirs is None:
                continue
            for measure in MEASURES:
                ratio = pairwise_ratio(theirs.seconds(measure), ours.seconds(measure))
                comparisons.append(
                    Comparison(
                        variant,
                        peer,
                        peer_variant,
                        has_equal_bits,
                        **asdict(case),
                        measure=measure,
                        ratio=ratio,
                    )
                )
    return comparisons


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: 2 and 0.5 average to 1.

    >>> geometric_mean([2.0, 0.5])
    1.0
    """
    return statistics.geometric_mean(values)
