"""What is computed for each record, and its result: classify, score, embed, rank, rerank.

A task is a value: its fields are the options that change results, and make up the identity of a job. It calls
the engine's `iter_*` methods and knows neither files nor formats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.errors import ArgumentError, InputError
from modernbert_decoder.jobs.rows import Record

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM
    from modernbert_decoder.engine.outputs import EmbeddingOutput, RankedCandidate, Score

FILE: Final = "file"
ROW: Final = "row"
ERROR: Final = "error"
RANK: Final = "rank"
SORT_BY: Final = "score"
LIKELIHOOD: Final = "likelihood"
RERANKINGS: Final = (LIKELIHOOD, "classifier")
_SEPARATOR: Final = "\n"

Values = Mapping[str, Any]


class Task(Protocol):
    """What every task is to a job: a dataclass with these."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    is_sorted: ClassVar[bool]  # the results come with the greatest score first, not in the order of the rows

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns of a result: name -> kind of its values, as `write_parquet` lists them."""

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""


def reserved_names(task: Task) -> frozenset[str]:
    """The names that the results of a task take."""
    return frozenset((FILE, ROW, RANK, ERROR, *task.columns))


def result_columns(task: Task, kept: Mapping[str, str], *, has_files: bool) -> dict[str, str]:
    """All columns of the results, name -> kind, in the order of CSV and Parquet."""
    rank = {RANK: "integer"} if task.is_sorted else {}
    file = {FILE: "text"} if has_files else {}
    return {**rank, **file, ROW: "integer", **kept, **task.columns, ERROR: "text"}


def rows_of(
    task: Task, llm: LLM, records: Sequence[Record], *, on_command_line: bool
) -> Iterator[dict[str, Any]]:
    """One result for each record, in their order: the task's values, or nulls and what was wrong.

    Args:
        task: what to compute.
        llm: the engine.
        records: the rows.
        on_command_line: arguments that would have helped are called as the command line calls them.
    """
    usable = [record for record in records if record.error is None]
    outcomes = iter(task.results(llm, usable)) if usable else iter(())
    nothing = dict.fromkeys(task.columns)
    for record in records:
        outcome = TextError(record.error) if record.error is not None else next(outcomes, None)
        assert outcome is not None, "the engine answers every text"
        row: dict[str, Any] = {} if record.file is None else {FILE: record.file}
        row |= {ROW: record.row, **record.kept}
        if isinstance(outcome, TextError):
            message = (on_command_line and outcome.on_command_line) or outcome.message
            yield {**row, **nothing, ERROR: message}
        else:
            yield {**row, **outcome, ERROR: None}


@dataclass(frozen=True, kw_only=True)
class Classify:
    """The best label of each text, or of each pair of texts.

    Attributes:
        truncate: cut texts that are too long; otherwise they are errors.
        max_length: most tokens of a text; by default the context.
        all_labels: the probability of every label as well.
    """

    name: ClassVar[str] = "classify"
    is_sorted: ClassVar[bool] = False
    truncate: bool = False
    max_length: int | None = None
    all_labels: bool = False

    @property
    def columns(self) -> Mapping[str, str]:
        """`label`, its `score` and perhaps all `scores`."""
        every = {"scores": "probabilities"} if self.all_labels else {}
        return {"label": "text", "score": "number", **every, "num_tokens": "integer"}

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""
        texts = (record.text if record.pair is None else (record.text, record.pair) for record in records)
        outputs = llm.iter_classify(texts, truncate=self.truncate, max_length=self.max_length)
        labels = _labels(llm)
        for output in outputs:
            if isinstance(output, TextError):
                yield output
                continue
            probabilities = output.probabilities
            score = probabilities[labels.index(output.label)]
            every = {"scores": dict(zip(labels, probabilities, strict=True))} if self.all_labels else {}
            yield {"label": output.label, "score": score, **every, "num_tokens": output.num_tokens}


@dataclass(frozen=True, kw_only=True)
class ScoreTexts:
    """How likely each text is.

    Attributes:
        stride: texts longer than the context are scored in windows that advance by so many tokens; without it
            they are errors.
        tokens: ids and log-probabilities of every token as well.
    """

    name: ClassVar[str] = "score"
    is_sorted: ClassVar[bool] = False
    stride: int | None = None
    tokens: bool = False

    @property
    def columns(self) -> Mapping[str, str]:
        """`logprob` of the text, `perplexity` of its tokens, `bits_per_byte`, its lengths."""
        numbers = {"logprob": "number", "perplexity": "number", "bits_per_byte": "number"}
        lengths = {"num_tokens": "integer", "num_bytes": "integer"}
        every = {"token_ids": "integers", "token_logprobs": "numbers"} if self.tokens else {}
        return {**numbers, **lengths, **every}

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""
        for output in llm.iter_score((record.text for record in records), stride=self.stride):
            yield output if isinstance(output, TextError) else self._values(output)

    def _values(self, score: Score) -> Values:
        values: dict[str, Any] = {
            "logprob": score.total_logprob,
            "perplexity": _finite(score.perplexity),
            "bits_per_byte": _finite(score.bits_per_byte),
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
        }
        if self.tokens:
            values |= {"token_ids": list(score.token_ids[1:]), "token_logprobs": list(score.logprobs)}
        return values


@dataclass(frozen=True, kw_only=True)
class Embed:
    """A vector for each text.

    Attributes:
        pooling: "last" token or "mean" of all.
        normalize: scale to length 1.
        truncate: cut texts that are too long; otherwise they are errors.
        max_length: most tokens of a text; by default the context.
    """

    name: ClassVar[str] = "embed"
    is_sorted: ClassVar[bool] = False
    pooling: str = "last"
    normalize: bool = True
    truncate: bool = False
    max_length: int | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """`embedding` and the text's `num_tokens`."""
        return {"embedding": "numbers", "num_tokens": "integer"}

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""
        outputs = llm.iter_embed(
            (record.text for record in records),
            pooling=self.pooling,
            normalize=self.normalize,
            truncate=self.truncate,
            max_length=self.max_length,
        )
        for output in outputs:
            if isinstance(output, TextError):
                yield output
            else:
                yield {"embedding": _float32_values(output), "num_tokens": output.num_tokens}


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The candidates of each text, the likeliest continuation first.

    Attributes:
        candidates: for all texts; empty where each row brings its own.
        normalization: "sum", "token", "byte" or "unconditional".
        unconditional_text: what stands in for the text in the unconditional probability.
    """

    name: ClassVar[str] = "rank"
    is_sorted: ClassVar[bool] = False
    candidates: tuple[str, ...] = ()
    normalization: str = "sum"
    unconditional_text: str = ""

    @property
    def columns(self) -> Mapping[str, str]:
        """The `best` candidate, its `score`, and the whole `ranking`."""
        return {"best": "text", "score": "number", "ranking": "ranking"}

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""
        items = ((record.text, record.candidates or self.candidates) for record in records)
        outputs = llm.iter_rank(
            items, normalization=self.normalization, unconditional_text=self.unconditional_text
        )
        for output in outputs:
            yield output if isinstance(output, TextError) else _ranking(output)


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """How well each document fits a query; the results are sorted by it.

    Attributes:
        query: the query.
        by: "likelihood" of the query after the document, whose white space at the end is left out, or
            "classifier": the probability of `label` for the pair of query and document.
        label: of the classifier; needed unless it has one label only.
        separator: between document and query, for "likelihood".
        truncate: cut pairs that are too long for the classifier; otherwise they are errors.
        max_length: most tokens of a pair; by default the context.

    Raises:
        ArgumentError: another `by`, or an attribute that is of no use with it.
    """

    name: ClassVar[str] = "rerank"
    is_sorted: ClassVar[bool] = True
    query: str
    by: str = LIKELIHOOD
    label: str | None = None
    separator: str = _SEPARATOR
    truncate: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Refuses another `by`, and what it has no use for."""
        if self.by not in RERANKINGS:
            raise ArgumentError("", "by", f" is {self.by!r}; choose one of {', '.join(RERANKINGS)}")
        unused: dict[str, Any] = {"separator": _SEPARATOR}
        if self.by == LIKELIHOOD:
            unused = {"label": None, "truncate": False, "max_length": None}
        for name, default in unused.items():
            if getattr(self, name) != default:
                raise ArgumentError("", name, f" does not go with by={self.by!r}; leave it out")

    @property
    def columns(self) -> Mapping[str, str]:
        """The `score` to sort by."""
        return {"score": "number"}

    def results(self, llm: LLM, records: Iterable[Record]) -> Iterator[Values | TextError]:
        """The results of usable records, in their order."""
        if self.by == LIKELIHOOD:
            # White space at a document's end would be scored with the query, which it makes improbable.
            items = ((record.text.rstrip() + self.separator, (self.query,)) for record in records)
            for ranked in llm.iter_rank(items):
                yield ranked if isinstance(ranked, TextError) else {"score": ranked[0].score}
            return
        index = self._label_index(_labels(llm))
        pairs = ((self.query, record.text) for record in records)
        for output in llm.iter_classify(pairs, truncate=self.truncate, max_length=self.max_length):
            if isinstance(output, TextError):
                yield output
            else:
                yield {"score": output.probabilities[index]}

    def _label_index(self, labels: Sequence[str]) -> int:
        if self.label is None and len(labels) == 1:
            return 0
        if self.label is None or self.label not in labels:
            problem = "is missing" if self.label is None else f"is {self.label!r}, which there is not"
            raise ArgumentError(
                "", "label", f" {problem}; give one of the classifier's: {', '.join(labels[:20])}"
            )
        return labels.index(self.label)


def _labels(llm: LLM) -> list[str]:
    """The classifier's labels in the order of its logits.

    Raises:
        InputError: two labels have the same name, so that results could not be told apart.
    """
    names = llm.architecture.id2label
    labels = [names[index] for index in sorted(names)]
    if len(set(labels)) < len(labels):
        raise InputError("two labels of the classifier have the same name; tell them apart in id2label")
    return labels


def _ranking(ranked: Sequence[RankedCandidate]) -> Values:
    entries = [
        {
            "index": entry.index,
            "candidate": entry.candidate,
            "score": entry.score,
            "logprob": entry.total_logprob,
            "num_tokens": entry.num_tokens,
        }
        for entry in ranked
    ]
    return {"best": entries[0]["candidate"], "score": entries[0]["score"], "ranking": entries}


def _finite(value: float) -> float | None:
    """A number that JSON can hold; None where there is none, as the perplexity of certain nonsense."""
    return value if math.isfinite(value) else None


def _float32_values(output: EmbeddingOutput) -> list[float]:
    """A vector with nine digits, which give every float32 back; as float64 it would take seventeen.

    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> _float32_values(SimpleNamespace(embedding=np.array([0.1, 1 / 3], np.float32)))
    [0.100000001, 0.333333343]
    """
    values = output.embedding.tolist()
    return [float(f"{value:.9g}") for value in values]
