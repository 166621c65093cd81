"""Classifying and embedding: texts in the tokenizer's template, one row of logits or states for each.

These jobs know tokenizer, labels and pooling; how texts are put into batches is the reader's business.

Legend: T tokens of a text, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.engine.choices import POOLINGS
from modernbert_decoder.engine.kv_cache import Float32
from modernbert_decoder.engine.outputs import ClassificationOutput, EmbeddingOutput, TextError
from modernbert_decoder.engine.probabilities import Floats, require_finite, sigmoid, softmax
from modernbert_decoder.engine.prompts import Text, checked_ids, checked_integer, is_pair
from modernbert_decoder.engine.reading import Passage, Run
from modernbert_decoder.errors import ArgumentError, InputError
from modernbert_decoder.templates import TextTooLongError
from modernbert_decoder.tokenizer import Tokenizer

_MULTI_LABEL: Final = "multi_label_classification"
_REGRESSION: Final = "regression"


class TemplateEncoder:
    """Turns texts, pairs and token ids into what the model is fed, within a length.

    Args:
        tokenizer: of the model.
        architecture: for the vocabulary and the padding id.
        context: most tokens the engine takes.
        truncate: cut what is too long; otherwise it is an error.
        max_length: most tokens of a text; by default the context.

    Raises:
        InputError: `max_length` is not from 1 to the context.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: DecoderArchitecture,
        *,
        context: int,
        truncate: bool,
        max_length: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = architecture.vocab_size
        self._padding = {architecture.pad_token_id, tokenizer.pad_token_id}
        self._truncate = truncate
        self._max_length = (
            context if max_length is None else checked_integer("max_length", max_length, 1, context)
        )

    def encode(self, texts: Sequence[Text]) -> list[list[int] | TextError]:
        """The ids of each text, or what is wrong with it."""
        encoded = iter(
            self._tokenizer.encode_template_batch(
                [text for text in texts if isinstance(text, str) or is_pair(text)],
                max_length=self._max_length,
                truncation="longest_first" if self._truncate else None,
            )
        )
        results: list[list[int] | TextError] = []
        for text in texts:
            try:
                ids = next(encoded) if isinstance(text, str) or is_pair(text) else self._given_ids(text)
                if isinstance(ids, InputError):
                    raise ids
                results.append(ids)
            except TextTooLongError as error:
                results.append(TextError.of(_with_advice(error)))
            except InputError as error:
                results.append(TextError.of(error))
        return results

    def _given_ids(self, text: Any) -> list[int]:
        if isinstance(text, list) and len(text) == 2 and is_pair(tuple(text)):
            raise InputError(
                f"a pair of texts is a tuple, not a list: pass ({text[0]!r:.30}, {text[1]!r:.30})"
            )
        ids = self._without_padding(checked_ids(text, self._vocab_size))
        if len(ids) <= self._max_length:
            return ids
        if not self._truncate:
            raise TextTooLongError(len(ids), self._max_length)
        return self._without_padding(ids[: self._max_length])

    def _without_padding(self, ids: list[int]) -> list[int]:
        """The ids up to the last one that is no padding, which says that the text has ended."""
        num_tokens = len(ids)
        while num_tokens and ids[num_tokens - 1] in self._padding:
            num_tokens -= 1
        if not num_tokens:
            raise InputError("the token ids are all padding; give at least one other token")
        return ids[:num_tokens]


def _with_advice(error: TextTooLongError) -> ArgumentError:
    return ArgumentError(f"{error}; shorten it, or cut it with ", "truncate=True")


class Classification:
    """Logits of the last token of each text."""

    wants_logits = True

    def __init__(self, encoder: TemplateEncoder, architecture: DecoderArchitecture) -> None:
        self._encoder = encoder
        self._labels = [architecture.id2label[i] for i in range(architecture.num_labels)]
        self._problem_type = architecture.problem_type
        if self._problem_type is None and len(self._labels) == 1:
            self._problem_type = _REGRESSION

    def prepare(self, texts: Sequence[Text]) -> list[Passage | TextError]:
        """One passage for each text, with its last position wanted."""
        return [
            ids if isinstance(ids, TextError) else Passage(ids, wanted=(len(ids) - 1, len(ids)))
            for ids in self._encoder.encode(texts)
        ]

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""
        run.read(passages, self._accept)

    def _accept(self, passage: Passage, position: int, logits: Float32) -> None:
        passage.rows = logits[0].copy()

    def finish(self, items: Sequence[Passage]) -> list[ClassificationOutput]:
        """Labels and probabilities."""
        if not items:
            return []
        logits = np.stack([item.rows for item in items])  # (texts, labels)
        require_finite(logits)
        best = logits.argmax(axis=1).tolist()
        probabilities = self._probabilities(logits.astype(np.float64)).tolist()
        return [
            ClassificationOutput(item.num_tokens, tuple(row), tuple(probable), self._labels[label])
            for item, row, probable, label in zip(items, logits.tolist(), probabilities, best, strict=True)
        ]

    def _probabilities(self, logits: Floats) -> Floats:
        if self._problem_type == _REGRESSION:
            return logits
        return sigmoid(logits) if self._problem_type == _MULTI_LABEL else softmax(logits)


class Embedding:
    """The final state of the last token of each text, or the mean of all.

    Args:
        encoder: of texts.
        pooling: "last" or "mean".
        normalize: scale each vector to length 1.

    Raises:
        InputError: another pooling.
    """

    wants_logits = False

    def __init__(self, encoder: TemplateEncoder, *, pooling: str, normalize: bool) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}; choose one of {', '.join(POOLINGS)}")
        self._encoder = encoder
        self._is_mean = pooling == "mean"
        self._normalize = normalize

    def prepare(self, texts: Sequence[Text]) -> list[Passage | TextError]:
        """One passage for each text, with its last position wanted, or every one."""
        return [
            ids
            if isinstance(ids, TextError)
            else Passage(ids, wanted=(0 if self._is_mean else len(ids) - 1, len(ids)))
            for ids in self._encoder.encode(texts)
        ]

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""
        run.read(passages, self._accept)

    def _accept(self, passage: Passage, position: int, states: Float32) -> None:
        total = states.sum(axis=0, dtype=np.float64)
        passage.rows = total if passage.rows is None else passage.rows + total

    def finish(self, items: Sequence[Passage]) -> list[EmbeddingOutput]:
        """Vectors (C,)."""
        outputs = []
        for item in items:
            vector = item.rows / item.num_tokens if self._is_mean else item.rows
            require_finite(vector)
            if self._normalize:
                vector = vector / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny)
            outputs.append(EmbeddingOutput(item.num_tokens, vector.astype(np.float32)))
        return outputs


class HiddenStates:
    """The final states of every token of each text."""

    wants_logits = False

    def __init__(self, encoder: TemplateEncoder) -> None:
        self._encoder = encoder

    def prepare(self, texts: Sequence[Text]) -> list[Passage | TextError]:
        """One passage for each text, with every position wanted."""
        return [
            ids if isinstance(ids, TextError) else Passage(ids, wanted=(0, len(ids)))
            for ids in self._encoder.encode(texts)
        ]

    def process(self, passages: Sequence[Passage], run: Run) -> None:
        """Reads one batch."""
        run.read(passages, self._accept)

    def _accept(self, passage: Passage, position: int, states: Float32) -> None:
        if passage.rows is None:
            passage.rows = np.empty((passage.num_tokens, states.shape[1]), np.float32)
        passage.rows[position : position + len(states)] = states

    def finish(self, items: Sequence[Passage]) -> list[Float32]:
        """States (T, C)."""
        for item in items:
            require_finite(item.rows)
        return [item.rows for item in items]
