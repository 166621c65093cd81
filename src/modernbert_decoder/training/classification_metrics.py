"""How well a classifier's logits fit the labels: the metrics of each problem, and who is taken for whom.

Pure functions of arrays; knows neither models nor files.

Shapes: N rows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.training.classification_data import MULTI, REGRESSION, LabelSet, Problem, Target

Float = NDArray[np.floating[Any]]

# problem -> its metrics, the default first
METRICS: Final[Mapping[Problem, tuple[str, ...]]] = {
    "single_label_classification": ("accuracy", "macro_f1", "loss"),
    "multi_label_classification": ("macro_f1", "accuracy", "loss"),
    "regression": ("mse", "loss"),
}
_FALLS: Final = frozenset({"mse", "loss"})


def is_greater_better(metric: str) -> bool:
    """Whether a larger value is the better one."""
    return metric not in _FALLS


def metrics(logits: Float, targets: Sequence[Target], problem: Problem) -> dict[str, float]:
    """The metrics of a problem but the loss, from logits (N, L).

    With several labels, accuracy is the share of rows all of whose labels are right. A label that neither
    occurs nor is predicted has no part in macro-F1.
    """
    if problem == REGRESSION:
        values = np.array(targets, np.float64).reshape(logits.shape)
        return {"mse": float(np.mean((logits.astype(np.float64) - values) ** 2))}
    if problem == MULTI:
        expected, predicted = np.array(targets) > 0.5, logits > 0
        right = (expected == predicted).all(axis=1)
    else:
        labels = np.arange(logits.shape[1])
        expected = np.array(targets)[:, None] == labels
        predicted = logits.argmax(axis=1)[:, None] == labels
        right = (expected & predicted).any(axis=1)
    return {"accuracy": float(right.mean()), "macro_f1": macro_f1(expected, predicted)}


def macro_f1(expected: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float:
    """The mean F1 over labels, from what is and what was predicted, (N, L).

    >>> expected = np.array([[True, False], [True, False], [False, True]])
    >>> round(macro_f1(expected, np.array([[True, False], [False, True], [False, True]])), 4)
    0.6667
    """
    hits = (expected & predicted).sum(0)
    total = expected.sum(0) + predicted.sum(0)
    occurs = total > 0
    return float(np.mean(2 * hits[occurs] / total[occurs])) if occurs.any() else 0.0


def confusion(logits: Float, targets: Sequence[Target], labels: LabelSet) -> NDArray[np.int64]:
    """counts[i, j]: rows of label i that are given label j, (L, L); one label each."""
    counts = np.zeros((len(labels.names), len(labels.names)), np.int64)
    np.add.at(counts, (np.array(targets, np.int64), logits.argmax(axis=1)), 1)
    return counts


def per_label(logits: Float, targets: Sequence[Target], labels: LabelSet) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label, and in how many rows it is."""
    if labels.problem == MULTI:
        expected, predicted = np.array(targets) > 0.5, logits > 0
    else:
        places = np.arange(logits.shape[1])
        expected = np.array(targets)[:, None] == places
        predicted = logits.argmax(axis=1)[:, None] == places
    hits, there, given = (expected & predicted).sum(0), expected.sum(0), predicted.sum(0)
    return [
        {
            "label": name,
            "rows": int(there[i]),
            "precision": float(hits[i] / given[i]) if given[i] else 0.0,
            "recall": float(hits[i] / there[i]) if there[i] else 0.0,
            "f1": float(2 * hits[i] / (there[i] + given[i])) if there[i] + given[i] else 0.0,
        }
        for i, name in enumerate(labels.names)
    ]


def most_confused(counts: NDArray[np.int64], labels: LabelSet, *, most: int = 10) -> list[dict[str, Any]]:
    """The pairs of labels that were confused most often."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    return [
        {"label": labels.names[i], "taken_for": labels.names[j], "rows": int(wrong[i, j])}
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
