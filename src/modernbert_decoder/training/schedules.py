"""Learning rates and batch sizes as pure functions of the tokens seen. Knows no optimizer and no model.

Everything is relative: rates are fractions of the peak, and tokens count from the beginning of a phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Warm-up, plateau and 1-sqrt decay of one phase, in tokens.

    The rate rises linearly from 0 to 1 over `warmup_tokens`, stays at `plateau` and falls over the last
    `decay_tokens` of `tokens` to `final`. Without a warm-up it begins at `plateau`, which is where the phase
    before left it; with one, `plateau` is 1.

    >>> phase = RateSchedule(tokens=1000, warmup_tokens=100, decay_tokens=400, plateau=1.0, final=0.5)
    >>> [phase.at(n) for n in (0, 50, 100, 600, 700, 1000)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.5]
    """

    tokens: int
    warmup_tokens: int = 0
    decay_tokens: int = 0
    plateau: float = 1.0
    final: float = 1.0

    def at(self, tokens_seen: int) -> float:
        """The rate of a step before which the phase had seen so many tokens."""
        if tokens_seen < self.warmup_tokens:
            return self.plateau * tokens_seen / self.warmup_tokens
        return one_minus_sqrt(
            tokens_seen, total=self.tokens, decay=self.decay_tokens, start=self.plateau, end=self.final
        )


def one_minus_sqrt(n: float, *, total: float, decay: float, start: float = 1.0, end: float = 0.0) -> float:
    """The rate after n of `total`, which falls over the last `decay` of them from `start` to `end`.

    With a = end / start that is `start * (a + (1 - a) * (1 - sqrt((n - (total - decay)) / decay)))`. Beyond
    the total it stays at the end.

    >>> one_minus_sqrt(75, total=100, decay=100)
    0.1339745962155614
    >>> one_minus_sqrt(30, total=100, decay=50)  # the decay has not begun
    1.0
    """
    if decay <= 0 or n <= total - decay:
        return start
    progress = min((n - (total - decay)) / decay, 1.0)
    return end + (start - end) * (1.0 - math.sqrt(progress))


def batch_sequences(tokens_seen: int, *, first: int, full: int, warmup_tokens: int, multiple: int = 1) -> int:
    """The sequences of a step before which the phase had seen so many tokens.

    They grow linearly from `first` to `full` over `warmup_tokens`, in whole multiples of `multiple` (rounded
    down, but never below `first`).

    >>> [batch_sequences(n, first=4, full=16, warmup_tokens=1000, multiple=4) for n in (0, 300, 400, 1000)]
    [4, 4, 8, 16]
    """
    if tokens_seen >= warmup_tokens:
        return full
    grown = first + (full - first) * tokens_seen // warmup_tokens
    return max(first, grown // multiple * multiple)
