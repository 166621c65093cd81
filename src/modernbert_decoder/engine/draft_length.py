"""How many tokens to draft: learned from what steps cost and from how many drafts were accepted.

`StepCosts` knows seconds, `Luck` how many drafts were right, of one request or of all, and `DraftLength`
chooses. Nothing that a request gets depends on them, so they may follow the clock.
"""

from __future__ import annotations

from typing import Final

# Of the seconds of a plain step, what one more token in it is taken to cost before that was measured: little,
# so that it is tried.
_ASSUMED_SHARE: Final = 0.1
# Weights of a new measurement. Other programs only ever slow a step down, so lower ones count for more.
_WEIGHT_BELOW: Final = 0.5
_WEIGHT_ABOVE: Final = 0.1
# Before anything is known, that counts as so many drafts of which this share was accepted.
_PRIOR_TRIED: Final = 2.0
_PRIOR_SHARE: Final = 0.8
# Each step, earlier drafts count for this much less: those of a request, and those of all.
_DECAY: Final = 0.9
_DECAY_OF_ALL: Final = 0.98
# Drafting must promise to be so much faster than not drafting.
_MARGIN: Final = 1.02
# Steps without drafts after drafting stopped paying, doubled each time until it has paid for as many steps as
# the first pause is long; then so many tokens are tried. Where drafts cost too much even for a request with
# luck, the pause is that of all requests. Where others had no luck, a new request begins at a quarter of what
# their pauses came to.
_FIRST_PAUSE: Final = 16
_LONGEST_PAUSE: Final = 256
_LONGEST_PAUSE_OF_ALL: Final = 2048
_PROBE_LENGTH: Final = 2
# After so many steps with nothing to draft, only every so many-th looks, until a draft was right.
_MANY_MISSES: Final = 16
_LOOKS_EVERY: Final = 4
# Looks for which a choice holds while nothing is learned: costs change slowly, and to choose costs some, too.
_HOLDS_FOR: Final = 64


class StepCosts:
    """Seconds of a step by the number of drafts in it, for one number of decoding rows.

    >>> costs = StepCosts()
    >>> for _ in range(2):  # the first measurement of each kind includes its preparation and is left out
    ...     costs.add(0, 1.0); costs.add(4, 1.8)
    >>> costs.estimate(2), costs.estimate(8)
    (1.4, 2.6)
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._seen: set[int] = set()

    @property
    def is_known(self) -> bool:
        """Whether a plain step was measured."""
        return 0 in self._seconds

    def add(self, num_drafts: int, seconds: float) -> None:
        """Learns from one step."""
        if num_drafts not in self._seen:
            self._seen.add(num_drafts)
            return
        known = self._seconds.get(num_drafts, seconds)
        weight = _WEIGHT_BELOW if seconds < known else _WEIGHT_ABOVE
        self._seconds[num_drafts] = known + weight * (seconds - known)

    def estimate(self, num_drafts: int) -> float:
        """Seconds of a step with so many drafts: measured, else on the line through its neighbours."""
        if num_drafts in self._seconds:
            return self._seconds[num_drafts]
        plain = self._seconds[0]
        below = max(count for count in self._seconds if count < num_drafts)
        above = min((count for count in self._seconds if count > num_drafts), default=None)
        if above is not None:
            slope = (self._seconds[above] - self._seconds[below]) / (above - below)
        elif below:
            slope = (self._seconds[below] - plain) / below
        else:
            slope = _ASSUMED_SHARE * plain
        return self._seconds[below] + slope * (num_drafts - below)


class Luck:
    """The share of drafts that were right, the latest counting most.

    Args:
        share: what to expect before anything is known.
        decay: what earlier drafts count for after another step.
    """

    def __init__(self, share: float = _PRIOR_SHARE, *, decay: float = _DECAY_OF_ALL) -> None:
        self._decay = decay
        self._tried = _PRIOR_TRIED
        self._accepted = share * _PRIOR_TRIED

    @property
    def share(self) -> float:
        """Accepted of those tried."""
        return self._accepted / self._tried

    def learn(self, *, num_accepted: int, was_rejected: bool) -> None:
        """Learns from one step: so many drafts were right, and whether the next one was wrong."""
        self._accepted = self._decay * self._accepted + num_accepted
        self._tried = self._decay * self._tried + num_accepted + was_rejected


class Pauses:
    """How long to go without drafts, each time twice as long as before.

    >>> pauses = Pauses(longest=40)
    >>> [pauses.next() for _ in range(3)]
    [16, 32, 40]

    Args:
        longest: steps of the longest one.
        first: steps of the first one, if that is more than usual; at most `longest`.
    """

    def __init__(self, longest: int, *, first: int = 0) -> None:
        self._longest = longest
        self._next = max(_FIRST_PAUSE, first)

    def next(self) -> int:
        """Steps of the pause that begins now."""
        pause, self._next = self._next, min(2 * self._next, self._longest)
        return pause

    def reset(self) -> None:
        """Has the next one be short again."""
        self._next = _FIRST_PAUSE


class Experience:
    """What all requests of an engine have shown together.

    Attributes:
        luck: of their drafts.
        pauses: where drafts cost too much for any of them.
        longest_pause: of requests whose drafts were not right often enough; 0 since drafts paid.
        num_misses: steps with nothing to draft since a draft was right, of the request that missed last.
    """

    def __init__(self) -> None:
        self.luck = Luck()
        self.pauses = Pauses(_LONGEST_PAUSE_OF_ALL)
        self.longest_pause = 0
        self.num_misses = 0


class DraftLength:
    """Chooses how many tokens to draft for one request; 0 for a while when it does not pay.

    Args:
        longest: most tokens it may choose.
        general: what a new request starts from; it learns from this one, too.
    """

    def __init__(self, longest: int, general: Experience) -> None:
        self._longest = longest
        self._general = general
        self._pauses = Pauses(_LONGEST_PAUSE, first=general.longest_pause // 4)
        self._pause = 0
        self._num_paying = 0
        self._num_misses = general.num_misses
        self._num_unlooked = 0
        self._start_anew()

    def _start_anew(self) -> None:
        self._own = Luck(self._general.luck.share, decay=_DECAY)
        # Where others had no luck, a few drafts show whether this one has.
        self._is_probing = True
        self._is_paying = False
        # What was chosen, for how many rows, and for how many more steps it holds.
        self._held = (0, 0, 0)

    def choose(self, costs: StepCosts, *, num_rows: int) -> int:
        """How many tokens to draft in the coming step, which `num_rows` requests share."""
        if not costs.is_known:
            return 0
        if self._num_misses >= _MANY_MISSES and self._num_unlooked < _LOOKS_EVERY - 1:
            self._num_unlooked += 1
            return 0
        if self._pause:
            self._pause -= 1
            return 0 if self._pause else min(_PROBE_LENGTH, self._longest)
        count, of_rows, num_left = self._held
        if num_left and of_rows == num_rows:
            self._held = (count, of_rows, num_left - 1)
            return count
        count = self._best(self._own.share, costs, num_rows)
        self._is_paying = count > 0
        if not count:
            may_pay = self._best(_PRIOR_SHARE, costs, num_rows) > 0
            if not (may_pay and self._is_probing):
                self._pause = (self._pauses if may_pay else self._general.pauses).next()
                if may_pay:
                    self._general.longest_pause = max(self._general.longest_pause, self._pause)
                self._num_paying = 0
                self._start_anew()
                return 0
            count = min(_PROBE_LENGTH, self._longest)
        self._held = (count, num_rows, _HOLDS_FOR)
        return count

    def _best(self, probability: float, costs: StepCosts, num_rows: int) -> int:
        """How many drafts give most tokens a second if each is right with this probability; 0 for none."""
        best, best_rate = 0, _MARGIN * num_rows / costs.estimate(0)
        num_expected = float(num_rows)
        for count in range(1, self._longest + 1):
            num_expected += probability**count
            rate = num_expected / costs.estimate(count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def miss(self) -> None:
        """Learns that there was nothing to draft in this step."""
        self._num_misses += 1
        self._general.num_misses = self._num_misses
        self._num_unlooked = 0

    def learn(self, *, num_accepted: int, was_rejected: bool) -> None:
        """Learns from one step: so many drafts were right, and whether the next one was wrong."""
        if num_accepted:
            self._num_misses = self._general.num_misses = 0
        self._num_unlooked = 0
        self._is_probing = False
        self._held = (0, 0, 0)
        if self._is_paying:
            self._num_paying += 1
            if self._num_paying == _FIRST_PAUSE:
                self._pauses.reset()
                self._general.pauses.reset()
                self._general.longest_pause = 0
        for luck in (self._own, self._general.luck):
            luck.learn(num_accepted=num_accepted, was_rejected=was_rejected)
