"""Likelihoods: how probable given tokens are after given others, and whether each was the likeliest one.

Tokens are taken as they are; what several continuations have in common with their context is read once. This
job knows no tokenizer and no texts.

Legend: n wanted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.engine.prompts import checked_ids
from modernbert_decoder.engine.ranking import Continuation, Prefix, read_branching
from modernbert_decoder.engine.reading import Passage, Run
from modernbert_decoder.engine.scoring import LogProbabilities, Scored
from modernbert_decoder.errors import InputError

Continued = tuple[Sequence[int], Sequence[Sequence[int]]]
"""The ids of a context, and those of each continuation of it."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How probable one continuation is.

    Attributes:
        logprob: natural logarithm, the sum over its tokens.
        is_greedy: whether every token is the likeliest after those before it, of equal ones the lowest id.
    """

    logprob: float
    is_greedy: bool


def _are_likeliest(logits: Float32, targets: Sequence[int]) -> bool:
    """Whether the best of each row (n, V) is its target."""
    best: list[int] = logits.argmax(axis=1).tolist()
    return best == list(targets)


class _Alone(Scored):
    """A context and its only continuation, read in one go."""

    __slots__ = ("is_greedy",)

    def __init__(self, whole: Sequence[int], *, num_context: int) -> None:
        super().__init__(whole, whole[num_context:], part=(0, len(whole) - 1))
        self.is_greedy = True

    def accept(self, logits: Float32, reader: LogProbabilities) -> None:
        """Takes the next rows of logits."""
        known = len(self.logprobs)
        self.is_greedy = self.is_greedy and _are_likeliest(logits, self.targets[known : known + len(logits)])
        super().accept(logits, reader)


class _Branch(Continuation):
    """One of several continuations."""

    __slots__ = ("is_greedy",)

    def __init__(self, fed: Sequence[int], targets: Sequence[int], *, prefix: Prefix) -> None:
        super().__init__(fed, targets, prefix=prefix)
        self.is_greedy = True

    def accept(self, logits: Float32, reader: LogProbabilities) -> None:
        """Takes the next rows of logits."""
        known = len(self.logprobs)
        self.is_greedy = self.is_greedy and _are_likeliest(logits, self.targets[known : known + len(logits)])
        super().accept(logits, reader)


class _Stem(Prefix):
    """A context and several continuations.

    Attributes:
        best: the likeliest token behind the prefix.
    """

    __slots__ = ("best",)

    def __init__(self, wholes: Sequence[Sequence[int]], *, num_context: int) -> None:
        self.best = -1
        super().__init__(wholes, num_text=num_context)

    def _continuation(self, fed: Sequence[int], targets: Sequence[int]) -> Continuation:
        return _Branch(fed, targets, prefix=self)

    def accept(self, logits: Float32, reader: LogProbabilities) -> None:
        """Takes the logits behind the prefix, (1, V)."""
        self.best = int(logits[0].argmax())
        super().accept(logits, reader)

    def likelihood(self, index: int) -> Likelihood:
        """Of one continuation."""
        branch, first = self.continuations[index], self.first_target(index)
        assert isinstance(branch, _Branch)
        is_greedy = branch.is_greedy and (first is None or first == self.best)
        return Likelihood(self.total(index), is_greedy)


class _Judged:
    """One context with what is read for it."""

    __slots__ = ("passages",)

    def __init__(self, passage: _Alone | _Stem) -> None:
        self.passages: list[_Alone | _Stem] = [passage]

    def likelihoods(self) -> list[Likelihood]:
        """Of its continuations, in their order."""
        passage = self.passages[0]
        if isinstance(passage, _Alone):
            return [Likelihood(math.fsum(passage.logprobs), passage.is_greedy)]
        return [passage.likelihood(i) for i in range(len(passage.continuations))]


def _checked(text: Any) -> tuple[Any, list[Any]]:
    """A context and a list of continuations, whatever ids they hold."""
    is_continued = isinstance(text, tuple | list) and len(text) == 2
    if not is_continued or isinstance(text[1], str | bytes) or not isinstance(text[1], Iterable):
        raise InputError(f"give the ids of a context and a list of continuations' ids, got {text!r:.60}")
    return text[0], list(text[1])


class Likelihoods:
    """The likelihood of each continuation of each context.

    Args:
        vocab_size: of the model.
        context: most tokens that are fed: those of a context and a continuation, the last one left out.
    """

    wants_logits = True

    def __init__(self, *, vocab_size: int, context: int) -> None:
        self._vocab_size = vocab_size
        self._context = context
        self._logprobs = LogProbabilities(vocab_size)

    def prepare(self, texts: Sequence[Continued]) -> list[_Judged | TextError]:
        """What to read for each context, or what is wrong with it."""
        items: list[_Judged | TextError] = []
        for text in texts:
            try:
                items.append(self._item(text))
            except InputError as error:
                items.append(TextError.of(error))
        return items

    def _item(self, text: Any) -> _Judged:
        context_ids, continuations = _checked(text)
        context = checked_ids(context_ids, self._vocab_size)
        if not continuations:
            raise InputError("there are no continuations; give at least one")
        wholes = [[*context, *checked_ids(ids, self._vocab_size)] for ids in continuations]
        longest = max(map(len, wholes)) - 1
        if longest > self._context:
            raise InputError(
                f"context and continuation have {longest + 1} tokens together, {self._context} can be fed, "
                "which predict one more; shorten the context"
            )
        if len(wholes) == 1:
            return _Judged(_Alone(wholes[0], num_context=len(context)))
        return _Judged(_Stem(wholes, num_context=len(context)))

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""
        read_branching(passages, run, self._accept)

    def _accept(self, passage: Passage, position: int, logits: Float32) -> None:
        assert isinstance(passage, Prefix | Scored)
        passage.accept(logits, self._logprobs)

    def finish(self, items: Sequence[_Judged]) -> list[list[Likelihood]]:
        """The likelihoods of each context's continuations."""
        return [item.likelihoods() for item in items]
