"""What every step of a run does, known before it begins: its phase, its batch, its learning rate.

A pure function of the recipe, the same in every process. Knows no data and no model.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from modernbert_decoder.training.recipe import PhaseRecipe, Recipe, rate_schedule
from modernbert_decoder.training.schedules import RateSchedule, batch_sequences


@dataclass(frozen=True)
class Step:
    """One step of the optimizer.

    Attributes:
        phase: its number, from 0.
        num_sequences: of the whole batch, over all processes.
        sequence_length: tokens of each.
        tokens_before: that the phase had seen before it.
        rate: the learning rate, as a fraction of the peak.
        is_last_of_phase: whether the phase ends with it.
    """

    phase: int
    num_sequences: int
    sequence_length: int
    tokens_before: int
    rate: float
    is_last_of_phase: bool


class Plan:
    """All steps of a recipe, in order."""

    def __init__(self, recipe: Recipe) -> None:
        """Counts the steps of every phase."""
        multiple = recipe.run.sequence_multiple
        self.phases: tuple[PhaseRecipe, ...] = recipe.phases
        self._schedules: tuple[RateSchedule, ...] = tuple(
            rate_schedule(recipe, i) for i in range(len(recipe.phases))
        )
        # Sequences seen before each step, and at the end: n + 1 numbers for n steps.
        self._seen = tuple(_sequences_seen(phase, multiple=multiple) for phase in recipe.phases)
        self._first_steps = tuple(accumulate((len(seen) - 1 for seen in self._seen), initial=0))

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return self._first_steps[-1]

    @property
    def total_tokens(self) -> int:
        """Tokens of all phases, a little more than the recipe says: steps are whole."""
        return self.tokens_after(self.num_steps)

    def step(self, index: int) -> Step:
        """The step of that number, from 0."""
        phase = bisect_right(self._first_steps, index) - 1
        i = index - self._first_steps[phase]
        seen, length = self._seen[phase], self.phases[phase].sequence_length
        return Step(
            phase=phase,
            num_sequences=seen[i + 1] - seen[i],
            sequence_length=length,
            tokens_before=seen[i] * length,
            rate=self._schedules[phase].at(seen[i] * length),
            is_last_of_phase=i + 2 == len(seen),
        )

    def rate(self, index: int) -> float:
        """The learning rate of a step as a fraction of the peak; past the last step, what it ends at."""
        if index >= self.num_steps:
            return self._schedules[-1].final
        return self.step(index).rate

    def tokens_after(self, num_steps: int) -> int:
        """Tokens seen in the first so many steps."""
        tokens = 0
        for first, seen, phase in zip(self._first_steps, self._seen, self.phases, strict=False):
            done = min(max(num_steps - first, 0), len(seen) - 1)
            tokens += seen[done] * phase.sequence_length
        return tokens

    def first_step_of(self, phase: int) -> int:
        """The number of the first step of a phase; of one past the last phase, the number of steps."""
        return self._first_steps[phase]

    def num_steps_of(self, phase: int) -> int:
        """Steps of a phase."""
        return len(self._seen[phase]) - 1


def _sequences_seen(phase: PhaseRecipe, *, multiple: int) -> array[int]:
    seen, total = array("q", [0]), 0
    while total * phase.sequence_length < phase.tokens:
        full = phase.batch_sequences
        count = batch_sequences(
            total * phase.sequence_length,
            first=full if phase.batch_warmup_start is None else phase.batch_warmup_start,
            full=full,
            warmup_tokens=phase.batch_warmup_tokens,
            multiple=multiple,
        )
        missing = -(-phase.tokens // phase.sequence_length) - total  # sequences, rounded up
        total += min(count, -(-missing // multiple) * multiple)
        seen.append(total)
    return seen
