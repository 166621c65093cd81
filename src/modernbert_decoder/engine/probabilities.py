"""Logits as probabilities, and what is said where they are no numbers. These functions know numbers only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_decoder.errors import CheckpointError

Floats = NDArray[np.floating[Any]]


def sigmoid(logits: Floats) -> Floats:
    """Elementwise, without overflow.

    >>> sigmoid(np.float32([-200.0, 0.0])).tolist()
    [0.0, 0.5]
    """
    weights = np.exp(-np.abs(logits))
    values: Floats = np.where(logits >= 0, 1, weights) / (1 + weights)
    return values


def softmax(logits: Floats) -> Floats:
    """Over the last axis.

    >>> softmax(np.float32([1000.0, 1000.0])).tolist()
    [0.5, 0.5]
    """
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    values: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return values


def require_finite(values: Floats) -> None:
    """Checks what the network gave.

    Raises:
        CheckpointError: NaN or infinities.
    """
    if not np.isfinite(values).all():
        raise not_finite()


def not_finite() -> CheckpointError:
    """What is wrong with a model whose logits or states are not finite."""
    return CheckpointError(
        "the model produced values that are not finite; its weights are damaged: fetch or convert them again"
    )
