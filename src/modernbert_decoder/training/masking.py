"""The masked next-token objective: some tokens are hidden, each to be told from the state before it.

Responsible for which tokens are hidden and what stands in their place, decided by the seed and the place in
the run. Knows no model.

Shapes: T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.batches import StepBatches
from modernbert_decoder.training.sequences import Ids, TokenSequence

# Of the hidden tokens: so many become [MASK], so many another token; the rest stay what they are.
_MASKED: Final = 0.8
_REPLACED: Final = 0.1
_STREAM: Final = 15  # sets the numbers drawn here apart from those that the data is shuffled with


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What is hidden.

    Attributes:
        share: of the tokens that are not special, at random, and never a sequence's first.
        mask_token_id: stands for most of them.
        num_ids: of the tokenizer; any of them may stand for some.
        special_ids: tokens that are never hidden.
        seed: of the run.
    """

    share: float
    mask_token_id: int
    num_ids: int
    special_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"the share of masked tokens is {self.share}, but must be between 0 and 1")

    def apply(self, sequence: TokenSequence, random: np.random.Generator) -> MaskedSequence:
        """Hides tokens of a sequence; one at least, if there is any that may be hidden."""
        ids = sequence.ids
        may = ~np.isin(ids, self.special_ids)
        may[np.array(sequence.starts, np.int64)] = False  # nothing stands before it
        chosen = may & (random.random(len(ids)) < self.share)
        if not chosen.any() and may.any():
            chosen[random.choice(np.flatnonzero(may))] = True
        kind = random.random(len(ids))
        replaced = chosen & (kind >= _MASKED) & (kind < _MASKED + _REPLACED)
        hidden = np.where(chosen & (kind < _MASKED), self.mask_token_id, ids)
        hidden = np.where(replaced, random.integers(0, self.num_ids, len(ids)), hidden)
        return MaskedSequence(hidden.astype(np.int32), sequence.starts, ids, chosen)


@dataclass(frozen=True)
class MaskedSequence(TokenSequence):
    """A sequence some of whose tokens are hidden.

    Attributes:
        originals: (T,), what they were.
        chosen: (T,), which of them are to be told.
    """

    originals: Ids
    chosen: NDArray[np.bool_]

    def targets(self, *, ignored: int = -100) -> NDArray[np.int64]:
        """(T,), the hidden token that follows each; `ignored` where none does.

        >>> ids, chosen = np.array([1, 9, 4, 2], np.int32), np.array([False, True, False, False])
        >>> MaskedSequence(ids, (0,), np.array([1, 7, 4, 2], np.int32), chosen).targets().tolist()
        [7, -100, -100, -100]
        """
        targets = TokenSequence(self.originals, self.starts).targets(ignored=ignored)
        follows = np.append(self.chosen[1:], False)
        return np.where(follows, targets, ignored)

    @property
    def num_targets(self) -> int:
        """Hidden tokens that are to be told."""
        return int((self.targets() != -100).sum())


class MaskedStepBatches(StepBatches):
    """Batches of sequences with hidden tokens, the same ones in every process and after every restart."""

    def __init__(self, *arguments: Any, masking: Masking, **options: Any) -> None:
        """Arguments of `StepBatches`, and what to hide."""
        super().__init__(*arguments, **options)
        self.masking = masking

    def prepared(self, sequences: Sequence[TokenSequence], step: int) -> Sequence[TokenSequence]:
        """The sequences of a step with hidden tokens."""
        return [
            self.masking.apply(sequence, np.random.default_rng([self.masking.seed, _STREAM, step, row]))
            for row, sequence in enumerate(sequences)
        ]
