"""Labelled texts from files: what kind of labels they are, which labels there are, and the numbers of each.

Responsible for telling one label, several labels and numbers apart by their values, for a reproducible split,
and for the weights of rare labels. Knows nothing of models.

Shapes: N rows, L labels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import Columns, Inputs, expand_files

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: Final = "single_label_classification"
MULTI: Final = "multi_label_classification"
REGRESSION: Final = "regression"
PROBLEMS: Final[Mapping[str, Problem]] = {"single": SINGLE, "multi": MULTI, "regression": REGRESSION}

Target = int | float | tuple[float, ...]
"""The number of a label; for several labels 0.0 or 1.0 for each; for regression a number."""

_MAX_LISTED: Final = 10


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """Where labelled texts are.

    Attributes:
        files: .csv, .tsv, .jsonl or .parquet, or patterns.
        text: column of the texts.
        pair: column of the second text of each row.
        labels: column of the label; several: columns of 0 and 1, one for each label.
        separator: what stands between several labels in one field; without it such a field is a JSON list.
    """

    files: tuple[str, ...]
    text: str = "text"
    pair: str | None = None
    labels: tuple[str, ...] = ("label",)
    separator: str | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise InputError("no column of labels is named")
        if self.separator is not None and len(self.labels) > 1:
            raise InputError("a separator is for several labels in one column, and there are several columns")


@dataclass(frozen=True)
class LabelledRow:
    """One text.

    Attributes:
        text: A.
        pair: B, if the rows are pairs.
        value: the label as the file has it; a tuple where there may be several.
        where: file and row.
    """

    text: str
    pair: str | None
    value: Any
    where: str


def read_labelled(source: LabelledFiles) -> list[LabelledRow]:
    """All rows, in the order of the files.

    Raises:
        InputError: a file cannot be read, or a row has no text or no label; names both.
    """
    names = expand_files(source.files)
    columns = Columns(text=source.text, pair=source.pair, keep=source.labels)
    inputs = Inputs(files=names, columns=columns)
    inputs.check()
    rows = []
    with closing(inputs.records()) as records:
        for record in records:
            if record.error is not None:
                raise InputError(f"{record.where}: {record.error}")
            values = [record.kept[name] for name in source.labels]
            for name, value in zip(source.labels, values, strict=True):
                if value is None or (isinstance(value, str) and not value.strip()):
                    raise InputError(
                        f"{record.where}: there is nothing in {name!r}; label the row, or name the column of "
                        "the labels with --label"
                    )
            value = _from_columns(source, values, record.where)
            rows.append(LabelledRow(record.text, record.pair, value, record.where))
    if not rows:
        raise InputError(f"there are no rows in {', '.join(names)}")
    return rows


def _from_columns(source: LabelledFiles, values: Sequence[Any], where: str) -> Any:
    """One field as it is, or split; several columns as the names of those that are 1."""
    if len(values) > 1:
        chosen = []
        for name, value in zip(source.labels, values, strict=True):
            number = _as_number(value)
            if number not in (0.0, 1.0):
                raise InputError(f"{where}: {name!r} is {value!r}, but must be 0 or 1")
            if number:
                chosen.append(name)
        return tuple(chosen)
    (value,) = values
    if source.separator is not None and isinstance(value, str):
        return tuple(part.strip() for part in value.split(source.separator) if part.strip())
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value
    return tuple(_label_text(part) for part in value) if isinstance(value, list) else value


def problem_of(rows: Sequence[LabelledRow]) -> Problem:
    """What the values say: lists are several labels, numbers of which one has a fraction are regression, and
    everything else is one label each.
    """
    if any(isinstance(row.value, tuple) for row in rows):
        return MULTI
    numbers = [_as_number(row.value) for row in rows]
    if all(number is not None for number in numbers) and any(
        number is not None and not number.is_integer() for number in numbers
    ):
        return REGRESSION
    return SINGLE


@dataclass(frozen=True)
class LabelSet:
    """The labels of a classifier.

    Attributes:
        problem: what the labels are to the loss.
        names: one for each output, in its order; of regression one, for show.
    """

    problem: Problem
    names: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[LabelledRow], problem: Problem, *, regression_name: str = "value") -> LabelSet:
        """The labels that occur, numbers by value and others by name.

        Raises:
            InputError: the rows do not have labels of this kind, or all have the same one.
        """
        if problem == REGRESSION:
            labels = cls(problem, (regression_name,))
            labels.targets(rows)
            return labels
        if problem == SINGLE and (several := next((r for r in rows if isinstance(r.value, tuple)), None)):
            raise InputError(f"{several.where}: it has several labels; choose the problem `multi`")
        found = {name for row in rows for name in _names_of(row, problem)}
        if len(found) < 2:
            raise InputError(
                f"all rows have the label {', '.join(found) or 'none'}; a classifier needs two at least"
            )
        numbers = {name: _as_number(name) for name in found}
        if any(number is None for number in numbers.values()):
            return cls(problem, tuple(sorted(found)))
        return cls(problem, tuple(sorted(found, key=lambda name: (numbers[name], name))))

    def targets(self, rows: Sequence[LabelledRow]) -> list[Target]:
        """What the loss is given, for each row.

        Raises:
            InputError: a label that is not among the names, or no number.
        """
        places = {name: i for i, name in enumerate(self.names)}
        return [self._target(row, places) for row in rows]

    def _target(self, row: LabelledRow, places: Mapping[str, int]) -> Target:
        if self.problem == REGRESSION:
            number = _as_number(row.value)
            if number is None:
                raise InputError(f"{row.where}: the value {row.value!r} is no number")
            return number
        names = _names_of(row, self.problem)
        for name in names:
            if name not in places:
                listed = ", ".join(self.names[:_MAX_LISTED]) + (", ..." * (len(places) > _MAX_LISTED))
                raise InputError(f"{row.where}: the label {name!r} is not among those of training: {listed}")
        if self.problem == SINGLE:
            return places[names[0]]
        return tuple(float(name in names) for name in self.names)


def _names_of(row: LabelledRow, problem: Problem) -> tuple[str, ...]:
    if problem == MULTI:
        return row.value if isinstance(row.value, tuple) else (_label_text(row.value),)
    return (_label_text(row.value),)


def _label_text(value: Any) -> str:
    """A label's name: 3.0 in one row and 3 in another are the same.

    >>> _label_text(3.0), _label_text(" spam "), _label_text(True)
    ('3', 'spam', 'true')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def split(
    targets: Sequence[Target], *, share: float, seed: int, is_stratified: bool
) -> tuple[list[int], list[int]]:
    """The numbers of the rows to train on and of those to validate with, both ascending.

    A stratified split takes the share from the rows of each label (of a label's only row: nothing).

    Raises:
        InputError: one of the two would be empty.
    """
    groups: dict[Target, list[int]] = {}
    for index, target in enumerate(targets):
        groups.setdefault(target if is_stratified else 0, []).append(index)
    random = np.random.default_rng([seed, 7])
    chosen: list[int] = []
    for key in sorted(groups, key=str):
        rows = groups[key]
        count = round(share * len(rows)) if len(rows) > 1 else 0
        chosen += [rows[i] for i in random.permutation(len(rows))[: min(count, len(rows) - 1)]]
    held_out = set(chosen)
    train = [index for index in range(len(targets)) if index not in held_out]
    if not train or not chosen:
        purpose = "validate with" if train else "train on"
        raise InputError(
            f"{share:g} of {len(targets)} rows leaves nothing to {purpose}; give more rows, another share, "
            "or a validation file"
        )
    return train, sorted(chosen)


def balanced_weights(targets: Sequence[Target], labels: LabelSet) -> NDArray[np.float32]:
    """A weight for each label, (L,), with which all labels count the same in sum.

    One label each: N / (L * rows of the label), so that the mean over the rows is 1. Several labels: what
    multiplies the loss of a label where it is there, rows without it per row with it.

    Raises:
        InputError: regression, or a label that no row has.
    """
    if labels.problem == REGRESSION:
        raise InputError("class weights are for labels; the values here are numbers")
    if labels.problem == SINGLE:
        counts = np.array([Counter(targets)[i] for i in range(len(labels.names))])
        _require_rows(counts, labels)
        weights: NDArray[np.float32] = (len(targets) / (len(counts) * counts)).astype(np.float32)
        return weights
    counts = np.array(targets).sum(0)
    _require_rows(counts, labels)
    several: NDArray[np.float32] = (np.maximum(len(targets) - counts, 1) / counts).astype(np.float32)
    return several


def stated_weights(
    stated: Mapping[str, float], targets: Sequence[Target], labels: LabelSet
) -> NDArray[np.float32]:
    """Weights by name, 1 for labels that are not named; with one label each scaled to a mean of 1 over rows.

    Raises:
        InputError: regression, a label that is not there, or a weight that is not positive.
    """
    if labels.problem == REGRESSION:
        raise InputError("class weights are for labels; the values here are numbers")
    for name, weight in stated.items():
        if name not in labels.names:
            raise InputError(f"there is a weight for {name!r}, which is not among the labels")
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"the weight of {name!r} is {weight}, but must be positive")
    weights = np.array([stated.get(name, 1.0) for name in labels.names])
    if labels.problem == SINGLE:
        weights /= np.mean([weights[int(target)] for target in targets if not isinstance(target, tuple)])
    return weights.astype(np.float32)


def _require_rows(counts: NDArray[Any], labels: LabelSet) -> None:
    lacking = [name for name, count in zip(labels.names, counts, strict=True) if count == 0]
    if lacking:
        raise InputError(
            f"no row to train on has the label {', '.join(lacking[:_MAX_LISTED])}; leave the balanced "
            "weights out, or give more rows"
        )
