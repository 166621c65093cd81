"""Ranking: how likely each of some continuations is after a text, which is read once for all of them.

This job knows tokenizer and normalizations; how texts are put into batches is the reader's business.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from modernbert_decoder.engine.choices import NORMALIZATIONS
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.outputs import RankedCandidate, TextError
from modernbert_decoder.engine.reading import Passage, Run, batches
from modernbert_decoder.engine.scoring import LogProbabilities, Scored
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer

Question = tuple[str, Sequence[str]]
# Continuations whose unconditional probability is remembered; labels repeat from text to text.
_MAX_REMEMBERED: Final = 10_000


class Continuation(Scored):
    """A candidate's tokens after the prefix that all candidates of a text share."""

    __slots__ = ("num_past", "prefix")

    def __init__(self, fed: Sequence[int], targets: Sequence[int], *, prefix: Prefix) -> None:
        """`fed` are its tokens behind the prefix, the last one left out; the first target may follow the
        prefix itself.
        """
        num_wanted = min(len(targets), len(fed))
        super().__init__(fed, targets[len(targets) - num_wanted :])
        self.prefix = prefix


class Prefix(Passage):
    """The tokens that a text's candidates share, and those candidates.

    Attributes:
        continuations: one per candidate.
        num_tokens_of: per candidate, the tokens that are scored.
    """

    __slots__ = ("_first_logprobs", "_first_targets", "continuations", "num_tokens_of")

    def __init__(self, wholes: Sequence[Sequence[int]], *, num_text: int) -> None:
        """`wholes` are the tokens of text and candidate together, `num_text` those of the text alone.

        What follows the first `num_text` is scored. Where the candidate only makes the text's last token
        longer, that is the last token.
        """
        splits = [min(num_text, len(whole) - 1) for whole in wholes]
        shared = _common_length(wholes, min(splits))
        super().__init__(wholes[0], part=(0, shared), wanted=(shared - 1, shared))
        self.num_tokens_of = [len(whole) - split for whole, split in zip(wholes, splits, strict=True)]
        self.continuations = [
            self._continuation(whole[shared:-1], whole[split:])
            for whole, split in zip(wholes, splits, strict=True)
        ]
        # The first scored token of a candidate may follow the prefix itself.
        self._first_targets = [
            whole[split] if split == shared else None for whole, split in zip(wholes, splits, strict=True)
        ]
        self._first_logprobs = [0.0] * len(wholes)

    def _continuation(self, fed: Sequence[int], targets: Sequence[int]) -> Continuation:
        return Continuation(fed, targets, prefix=self)

    def total(self, index: int) -> float:
        """The log-probability of one candidate's tokens."""
        return self._first_logprobs[index] + math.fsum(self.continuations[index].logprobs)

    def first_target(self, index: int) -> int | None:
        """The token of one candidate that the prefix itself predicts, if it scores that one."""
        return self._first_targets[index]

    def accept(self, logits: Float32, reader: LogProbabilities) -> None:
        """Takes the logits behind the prefix, (1, V)."""
        row = logits[0]
        normalizer = reader.normalizer(row)
        self._first_logprobs = [
            0.0 if target is None else float(row[target]) - normalizer for target in self._first_targets
        ]


class Ranked:
    """One text with its candidates."""

    __slots__ = ("candidates", "keys", "passages")

    def __init__(self, candidates: Sequence[str], keys: Sequence[str], prefix: Prefix) -> None:
        """`keys` are the candidates with the spaces that they take over from the text."""
        self.candidates = candidates
        self.keys = keys
        self.passages: list[Prefix] = [prefix]


class Ranking:
    """Candidates of each text, the likeliest first.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
        context: most tokens of text and candidate together.
        normalization: what the score is: the log-probability ("sum"), per token or per UTF-8 byte of the
            candidate and the spaces it takes over, or less the log-probability after `unconditional_text`.
        unconditional_text: "" stands for `[CLS]` alone.

    Raises:
        InputError: another normalization.
    """

    wants_logits = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context: int,
        normalization: str,
        unconditional_text: str,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise InputError(f"normalization is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}")
        if not isinstance(unconditional_text, str):
            raise InputError(f"unconditional_text must be text, got {unconditional_text!r}")
        if unconditional_text and normalization != "unconditional":
            raise InputError(
                f"unconditional_text is used with normalization 'unconditional' only, not {normalization!r}"
            )
        self._tokenizer = tokenizer
        self._context = context
        self._normalization = normalization
        self._unconditional_text = unconditional_text.rstrip()
        self._unconditional: dict[str, float] = {}
        self._asked: dict[str, tuple[Prefix, int]] = {}
        self._logprobs = LogProbabilities(vocab_size)

    def prepare(self, texts: Sequence[Question]) -> list[Ranked | TextError]:
        """The shared prefix of each text and its candidates, or what is wrong with them."""
        if len(self._unconditional) > _MAX_REMEMBERED:
            self._unconditional.clear()
        items: list[Ranked | TextError] = []
        for question in texts:
            try:
                items.append(self._item(question))
            except InputError as error:
                items.append(TextError.of(error))
        return items

    def _item(self, question: Any) -> Ranked:
        text, candidates = _checked(question)
        stripped = text.rstrip()
        # Spaces at the end of the text belong to the candidates: that is how words are tokenized.
        keys = [text[len(stripped) :] + candidate for candidate in candidates]
        item = Ranked(candidates, keys, self._prefix(stripped, keys))
        if self._normalization == "unconditional":
            new = [
                key
                for key in dict.fromkeys(keys)
                if key not in self._unconditional and key not in self._asked
            ]
            if new:
                bare = self._prefix(self._unconditional_text, new)
                item.passages.append(bare)
                self._asked.update((key, (bare, i)) for i, key in enumerate(new))
        return item

    def _prefix(self, text: str, continuations: Sequence[str]) -> Prefix:
        """The tokens of a text with each continuation."""
        ids = self._tokenizer.encode_continuations(text, continuations)
        for tail, continuation in zip(ids.tails, continuations, strict=True):
            if tail == ids.own:
                raise InputError(f"candidates: {continuation!r:.60} adds nothing to the text's tokens")
            num_tokens = len(ids.head) + len(tail)
            if num_tokens > self._context:
                raise InputError(
                    f"text and candidate {continuation!r:.60} have {num_tokens} tokens together and the "
                    f"context holds {self._context}; shorten the text"
                )
        return Prefix([ids.head + tail for tail in ids.tails], num_text=len(ids.head) + len(ids.own))

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch of prefixes, and then their continuations."""
        read_branching(passages, run, self._accept)

    def _accept(self, passage: Passage, position: int, logits: Float32) -> None:
        assert isinstance(passage, Prefix | Scored)
        passage.accept(logits, self._logprobs)

    def finish(self, items: Sequence[Ranked]) -> list[list[RankedCandidate]]:
        """The candidates of each text, the greatest score first, equal ones in their order."""
        self._unconditional.update((key, prefix.total(i)) for key, (prefix, i) in self._asked.items())
        self._asked.clear()
        return [self._ranked(item) for item in items]

    def _ranked(self, item: Ranked) -> list[RankedCandidate]:
        prefix = item.passages[0]
        ranked = []
        for i, candidate in enumerate(item.candidates):
            total = prefix.total(i)
            num_tokens = prefix.num_tokens_of[i]
            score = self._normalized(total, num_tokens, item.keys[i])
            ranked.append(RankedCandidate(i, candidate, num_tokens, total, score))
        return sorted(ranked, key=lambda each: -each.score)

    def _normalized(self, total: float, num_tokens: int, key: str) -> float:
        if self._normalization == "token":
            return total / num_tokens
        if self._normalization == "byte":
            return total / self._tokenizer.num_bytes(key)
        if self._normalization == "unconditional":
            return total - self._unconditional[key]
        return total


def read_branching(
    passages: Sequence[Passage], run: Run, accept: Callable[[Passage, int, Float32], None]
) -> None:
    """Reads one batch of passages, and then the continuations of those that are prefixes.

    Keys and values of a prefix are copied into a row for each of its continuations.
    """
    layers = run.read(passages, accept, keeps=True)
    rows = {id(passage): row for row, passage in enumerate(passages)}
    fed = [
        continuation
        for prefix in passages
        if isinstance(prefix, Prefix)
        for continuation in prefix.continuations
        if continuation.num_tokens
    ]
    if not fed:
        return
    branches = run.branches()
    most_past = max(passage.num_tokens for passage in passages)
    for batch in batches(fed, branches, max_batch_tokens=run.max_batch_tokens, num_past=most_past):
        num_past = [each.prefix.num_tokens for each in batch]
        target = branches.layers(len(batch), max(num_past) + batch[0].num_tokens)
        for i, each in enumerate(batch):
            branches.copy_row(layers, rows[id(each.prefix)], each.prefix.num_tokens, target, slice(i, i + 1))
        run.read(batch, accept, layers=target, num_past=num_past)


def _checked(question: Any) -> Question:
    is_question = isinstance(question, tuple | list) and len(question) == 2
    if not is_question or not isinstance(question[0], str):
        raise InputError(f"to rank, give text and a list of candidates, got {question!r:.60}")
    text, candidates = question
    if (
        isinstance(candidates, str)
        or not isinstance(candidates, Sequence)
        or not all(isinstance(candidate, str) for candidate in candidates)
    ):
        raise InputError(f"candidates must be a list of texts, got {candidates!r:.60}")
    if not candidates:
        raise InputError("there are no candidates to rank; give at least one")
    if "" in candidates:
        raise InputError("candidates: one is empty; there is nothing to rank it by")
    return text, candidates


def _common_length(wholes: Sequence[Sequence[int]], limit: int) -> int:
    """How many of the first `limit` tokens all of `wholes` share."""
    first, *others = wholes
    for whole in others:
        if whole[:limit] != first[:limit]:
            limit = next(i for i in range(limit) if first[i] != whole[i])
    return limit
