"""Scoring: the log-probability of every token of a text given the tokens before it, at any length.

This job knows tokenizer and windows; how texts are put into batches is the reader's business.

Legend: V vocabulary, n tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.outputs import Score, TextError
from modernbert_decoder.engine.probabilities import not_finite
from modernbert_decoder.engine.prompts import Prompt, checked_ids, checked_integer
from modernbert_decoder.engine.reading import Passage, Run
from modernbert_decoder.engine.selection import log_sum_exp, top_k_ids
from modernbert_decoder.errors import ArgumentError, InputError
from modernbert_decoder.tokenizer import Tokenizer


class LogProbabilities:
    """Reads off rows of logits what probability they give to certain tokens.

    Attributes:
        num_top: how many of the most likely tokens are wanted as well.
    """

    def __init__(self, vocab_size: int, *, num_top: int = 0) -> None:
        self.num_top = num_top
        self._scratch = np.empty(vocab_size, np.float32)

    def normalizer(self, logits: Float32) -> float:
        """log(sum(exp(logits))) of one row (V,).

        Raises:
            CheckpointError: the logits are not finite.
        """
        peak = logits.max()
        if not math.isfinite(peak):
            raise not_finite()
        return log_sum_exp(logits, peak, scratch=self._scratch)

    def top(self, logits: Float32, normalizer: float) -> tuple[tuple[int, float], ...]:
        """The `num_top` most likely tokens of one row (V,) and their log-probabilities, in order."""
        ids = top_k_ids(logits, self.num_top)
        return tuple(
            (token_id, value - normalizer)
            for token_id, value in zip(ids.tolist(), logits[ids].tolist(), strict=True)
        )


class Scored(Passage):
    """A passage whose wanted rows predict `targets`.

    Attributes:
        targets: the tokens behind the wanted positions.
        logprobs: theirs, as far as they are known.
        tops: for each, the most likely tokens there, where they are wanted.
    """

    __slots__ = ("logprobs", "targets", "tops")

    def __init__(
        self,
        source: Sequence[int],
        targets: Sequence[int],
        *,
        part: tuple[int, int] | None = None,
        lead: Sequence[int] = (),
    ) -> None:
        """The last positions of the passage are wanted, as many as there are targets."""
        length = len(lead) + (len(source) if part is None else part[1] - part[0])
        super().__init__(source, wanted=(length - len(targets), length), part=part, lead=lead)
        self.targets = targets
        self.logprobs: list[float] = []
        self.tops: list[tuple[tuple[int, float], ...]] = []

    def accept(self, logits: Float32, reader: LogProbabilities) -> None:
        """Takes the next rows of logits."""
        known = len(self.logprobs)
        for target, row in zip(self.targets[known : known + len(logits)], logits, strict=True):
            normalizer = reader.normalizer(row)
            self.logprobs.append(float(row[target]) - normalizer)
            if reader.num_top:
                self.tops.append(reader.top(row, normalizer))


class Scoring:
    """Every token of each text.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
        context: most tokens of one window.
        stride: by how many tokens a window advances; None refuses texts longer than the context.
        num_top: how many of the most likely tokens to report at each place.

    Raises:
        InputError: a stride that is not from 1 to the context less 1, or `num_top` beyond the vocabulary.
    """

    wants_logits = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context: int,
        stride: int | None,
        num_top: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context = context
        self._stride = None if stride is None else checked_integer("stride", stride, 1, context - 1)
        self._logprobs = LogProbabilities(
            vocab_size, num_top=checked_integer("top_logprobs", num_top, 0, vocab_size)
        )

    def prepare(self, texts: Sequence[Prompt]) -> list[ScoredText | TextError]:
        """The windows of each text, or what is wrong with it."""
        strings = [text for text in texts if isinstance(text, str) and text]
        encoded = iter(self._tokenizer.encode_batch(strings) if strings else ())
        items: list[ScoredText | TextError] = []
        for text in texts:
            try:
                ids = next(encoded) if isinstance(text, str) and text else self._given_ids(text)
                num_bytes = self._tokenizer.num_bytes(text if isinstance(text, str) else ids[1:])
                items.append(ScoredText(ids, num_bytes, self._windows(ids)))
            except InputError as error:
                items.append(TextError.of(error))
        return items

    def _given_ids(self, text: Prompt) -> list[int]:
        if isinstance(text, str):
            raise InputError("the text is empty: there is no token to score")
        return checked_ids(text, self._vocab_size)

    def _windows(self, ids: Sequence[int]) -> list[Scored]:
        """Passages that together score every token after the first.

        The first window is the text's beginning; each next one starts with [CLS], begins `stride` tokens
        after the one before, and scores the tokens beyond its end. Last tokens of windows are not fed.
        """
        count, context = len(ids), self._context
        if count < 2:
            return []
        if count <= context:
            return [Scored(ids, ids[1:], part=(0, count - 1))]
        if self._stride is None:
            raise ArgumentError(
                f"the text has {count} tokens and the context holds {context}; score it in windows with ",
                f"stride={max(1, context // 2)}",
            )
        windows = [Scored(ids, ids[1:context], part=(0, context - 1))]
        begin, known = 1, context
        lead = (self._tokenizer.cls_token_id,)
        while known < count:
            begin += self._stride
            end = min(begin + context - 1, count)
            windows.append(Scored(ids, ids[known:end], part=(begin, end - 1), lead=lead))
            known = end
        return windows

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""
        run.read(passages, self._accept)

    def _accept(self, passage: Passage, position: int, logits: Float32) -> None:
        assert isinstance(passage, Scored)
        passage.accept(logits, self._logprobs)

    def finish(self, items: Sequence[ScoredText]) -> list[Score]:
        """The log-probabilities of all windows, put together."""
        is_top_wanted = self._logprobs.num_top > 0
        return [
            Score(
                tuple(item.ids),
                tuple(logprob for passage in item.passages for logprob in passage.logprobs),
                item.num_bytes,
                tuple(top for passage in item.passages for top in passage.tops) if is_top_wanted else None,
            )
            for item in items
        ]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """One text: its tokens, its bytes, and the windows it is read in."""

    ids: Sequence[int]
    num_bytes: int
    passages: Sequence[Scored]
