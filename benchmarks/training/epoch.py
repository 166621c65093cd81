"""Which batches of an epoch are trained: some that stand for all of them, and the largest, for memory.

Indices and lengths only; knows neither files nor models.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.training.cases import Way

Batch = list[int]


def batches_of(order: Sequence[int], size: int) -> list[Batch]:
    """The complete batches of an epoch in which the documents come in this order.

    >>> batches_of([4, 2, 0, 1, 3], 2)
    [[4, 2], [0, 1]]
    """
    return [list(order[start : start + size]) for start in range(0, len(order) - size + 1, size)]


def typical(batches: Sequence[Batch], lengths: Sequence[int], count: int) -> list[Batch]:
    """Batches spaced evenly over all of them by the tokens they hold, the smallest first.

    An epoch of length groups runs from long ones to short ones, again and again: its first batches, or every
    hundredth, may all be long.

    >>> typical([[0], [1], [2], [3]], [40, 10, 30, 20], 2)
    [[3], [0]]
    """
    ranked = sorted(batches, key=lambda batch: sum(lengths[i] for i in batch))
    return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]


def extremes(way: Way, batches: Sequence[Batch], lengths: Sequence[int]) -> list[Batch]:
    """The batches whose micro-batches compute fewest and most positions at once."""
    ranked = sorted(batches, key=lambda batch: positions_at_once(way, [lengths[i] for i in batch]))
    return [ranked[0], ranked[-1]]


def positions_at_once(way: Way, lengths: Sequence[int]) -> int:
    """Of the largest micro-batch of a batch of upstream's, with its padding.

    Args:
        way: how many documents at once, and whether they stand in one row.
        lengths: of the batch's documents, in order.
    """
    micro_batches = [lengths[i : i + way.at_once] for i in range(0, len(lengths), way.at_once)]
    if way.is_flattened:
        return max(map(sum, micro_batches))
    return max(len(each) * max(each) for each in micro_batches)
