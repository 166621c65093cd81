"""Perplexity and bits per byte of files: which windows are read, and how their log-probabilities add up.

Documents come from the readers of jobs, log-probabilities from the engine. What is measured is always said
with the result: the windows decide the number as much as the model does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modernbert_decoder.engine.outputs import Score, TextError
from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import Columns, Inputs
from modernbert_decoder.jobs.rows import Record

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured.

    Attributes:
        stride: windows begin so many tokens after each other; None: a window's length less one, so that no
            token of the text is read twice except as the one context of the next window.
        concatenate: join all documents, each `[CLS] text [SEP]`, and cut that into windows, each token but a
            window's first being predicted; else every document is read by itself, behind `[CLS]` in each of
            its windows, and `[SEP]` is not predicted.
    """

    stride: int | None = None
    concatenate: bool = False

    def sentence(self, window: int) -> str:
        """What the numbers mean, in words."""
        stride = self.stride_of(window)
        before = f"at least {window - stride:,} token{'s' if window - stride > 1 else ''} before it"
        if self.concatenate:
            return (
                f"documents as [CLS] text [SEP], concatenated; windows of {window:,} tokens every "
                f"{stride:,}; each token but the first is predicted once, from its own window, {before}"
            )
        return (
            f"each document by itself behind [CLS], longer ones in windows of {window:,} tokens every "
            f"{stride:,}, each behind [CLS]; each token is predicted once, {before} if the document has them"
        )

    def stride_of(self, window: int) -> int:
        """By how many tokens a window of that length advances."""
        return window - 1 if self.stride is None else self.stride


@dataclass(frozen=True)
class FilePerplexity:
    """The sum over some documents.

    Attributes:
        name: of the file, or "all".
        num_documents: how many.
        num_tokens: tokens that were predicted.
        num_bytes: UTF-8 bytes of the text.
        nats: the negative log-probability of all of them.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    nats: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability of a token."""
        try:
            return math.exp(self.nats / self.num_tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte, which compares models of different tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


def file_perplexities(
    llm: LLM, files: Sequence[str], *, measure: Measure, column: str = "text"
) -> Iterator[FilePerplexity]:
    """The perplexity of each file, and of all together at the end.

    Text files are one document each, rows of `.jsonl`, `.csv`, `.tsv` and `.parquet` files one each.
    Concatenated documents give the last number only: a window may span two files.

    Args:
        llm: a language model; its `max_context` is the length of a window.
        files: names.
        measure: what to measure.
        column: that holds the text.

    Raises:
        InputError: a file cannot be read, a row has no text, or there is nothing to predict.
    """
    inputs = Inputs(files=tuple(files), columns=Columns(text=column), whole_files=_has_text_files(files))
    inputs.check()
    if measure.concatenate:
        yield _of_concatenation(llm, inputs, measure)
        return
    counts: dict[str, _Count] = {}
    with closing(inputs.records()) as records:
        listed = _Noted(records)
        scores = llm.iter_score(listed.texts(), stride=measure.stride_of(llm.max_context))
        for score in scores:
            record = listed.next_record()
            counts.setdefault(record.file or "", _Count()).add(_checked(score, record))
    total = _Count()
    for name, count in counts.items():
        total.merge(count)
        yield count.result(name)
    yield total.result("all")


def _has_text_files(files: Iterable[str]) -> bool:
    return any(name.lower().endswith(".txt") for name in files)


class _Noted:
    """Records whose texts are handed to the engine ahead of their results."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = records
        self._waiting: list[Record] = []

    def texts(self) -> Iterator[str]:
        """The texts, as the engine asks for them."""
        for record in self._records:
            if record.error is not None:
                raise InputError(f"{record.where}: {record.error}")
            self._waiting.append(record)
            yield record.text

    def next_record(self) -> Record:
        """The one whose result has come."""
        return self._waiting.pop(0)


def _checked(score: Score | TextError, record: Record) -> Score:
    if isinstance(score, TextError):
        raise InputError(f"{record.where}: {score.message}")
    return score


class _Count:
    """Sums, exact however many numbers there are."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self.parts: list[float] = []

    def add(self, score: Score) -> None:
        """One document."""
        self.num_documents += 1
        self.num_tokens += score.num_tokens
        self.num_bytes += score.num_bytes
        self.parts.append(-score.total_logprob)

    def merge(self, other: _Count) -> None:
        """All documents of another."""
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_bytes += other.num_bytes
        self.parts += other.parts

    def result(self, name: str) -> FilePerplexity:
        """The sums.

        Raises:
            InputError: there was nothing to predict.
        """
        if not self.num_tokens or not self.num_bytes:
            raise InputError(f"{name}: there is no token to predict")
        return FilePerplexity(
            name, self.num_documents, self.num_tokens, self.num_bytes, math.fsum(self.parts)
        )


def _of_concatenation(llm: LLM, inputs: Inputs, measure: Measure) -> FilePerplexity:
    """All documents as one sequence of tokens."""
    sep_token_id = llm.tokenizer.sep_token_id
    if sep_token_id is None:
        raise InputError("the tokenizer names no token that ends a text ([SEP]); leave --concatenate out")
    count, ids = _Count(), list[int]()
    with closing(inputs.records()) as records:
        for record in records:
            if record.error is not None:
                raise InputError(f"{record.where}: {record.error}")
            ids += [*llm.tokenizer.encode(record.text), sep_token_id]
            count.num_documents += 1
            count.num_bytes += llm.tokenizer.num_bytes(record.text)
    window = llm.max_context
    stride = measure.stride_of(window)
    if not 1 <= stride < window:
        raise InputError(f"stride is {stride}, but must be from 1 to {window - 1}, a window less one")
    spans = list(windows(len(ids), length=window, stride=stride))
    scores = llm.iter_score(ids[begin:end] for begin, end, _ in spans)
    for (_, _, num_new), score in zip(spans, scores, strict=True):
        if isinstance(score, TextError):
            raise InputError(score.message)
        count.num_tokens += num_new
        count.parts.append(-math.fsum(score.logprobs[-num_new:]))
    return count.result("all")


def windows(num_tokens: int, *, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window of a sequence begins and ends, and how many tokens at its end are new.

    The first token of all is never predicted; every other one is, once.

    >>> list(windows(10, length=4, stride=3))
    [(0, 4, 3), (3, 7, 3), (6, 10, 3)]
    >>> list(windows(7, length=4, stride=2))
    [(0, 4, 3), (2, 6, 2), (4, 7, 1)]
    """
    known = 1
    for begin in range(0, max(num_tokens - 1, 0), stride):
        end = min(begin + length, num_tokens)
        if end > known:
            yield begin, end, end - known
            known = end
        if end == num_tokens:
            return
