"""Exact selection and drawing on one row of logits, in numpy, without sorting a whole vocabulary.

These functions know numbers only: not requests, not sampling parameters, not tokens' text.

Shape legend: V = vocabulary. Rows are contiguous float32 arrays (V,) without NaN; none is modified unless
the docstring says so. A row is looked at in strided chunks (element i belongs to chunk i mod the number of
chunks), because numpy reduces over the outer axis several times faster than over a short inner one.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]

_CHUNK_LENGTH = 64
# exp of it, times any vocabulary, is still a float32.
_SAFE_EXPONENT = 60.0
# Bits of a float32 that a histogram's bins disregard, one level finer than the other: at the last one a bin
# is one value. The first level has 64 bins per octave, each of the others cuts a bin into 256 or 512.
_BIN_SHIFTS: Final = (17, 8, 0)


class Workspace:
    """Scratch rows of one vocabulary, shared by all samplers of one thread.

    Arrays of this size are fresh pages of the operating system each time they are allocated, which costs
    more than filling them: hence one set, kept.
    """

    __slots__ = ("bins", "masses", "processed", "weights")

    def __init__(self, vocab_size: int) -> None:
        self.processed: Row = np.empty(vocab_size, np.float32)
        self.weights: Row = np.empty(vocab_size, np.float32)
        self.bins: NDArray[np.intp] = np.empty(vocab_size, np.intp)
        self.masses: NDArray[np.float64] = np.empty(vocab_size, np.float64)

    @property
    def vocab_size(self) -> int:
        """The length of each row."""
        return len(self.weights)


def top_k_ids(row: Row, k: int) -> NDArray[np.intp]:
    """The min(k, V) positions with the largest values, by (value descending, position ascending).

    The k-th largest of the chunks' maxima is no larger than the k-th largest value, so whatever reaches it
    includes the answer, and little else. Infinities are allowed.

    >>> top_k_ids(np.float32([1, 3, 3, 0]), 2).tolist()
    [1, 2]
    """
    size = len(row)
    if k <= 0:
        return np.empty(0, np.intp)
    if k >= size:
        return np.argsort(-row, kind="stable")
    # About 16 chunks per wanted value: fewer would let more of the rest through, more would cost time.
    length = min(_CHUNK_LENGTH, max(1, size // (16 * k)))
    num_chunks = size // length
    chunks = row[: length * num_chunks].reshape(length, num_chunks)
    maxima = chunks.max(axis=0)
    threshold = np.partition(maxima, num_chunks - k)[num_chunks - k]
    # Only the chunks that reach the threshold are looked into. After a decode step nothing of this is in the
    # processor's caches, code included: few calls matter more than few elements.
    columns = (maxima >= threshold).nonzero()[0]
    candidates = chunks[:, columns].ravel()
    places = (candidates >= threshold).nonzero()[0]  # ascending, as the positions they stand for
    values = candidates[places]
    positions = places // len(columns) * num_chunks + columns[places % len(columns)]
    if length * num_chunks < size:
        rest = (row[length * num_chunks :] >= threshold).nonzero()[0] + length * num_chunks
        positions, values = np.concatenate([positions, rest]), np.concatenate([values, row[rest]])
    if len(positions) > 2 * k + _CHUNK_LENGTH:
        positions = _without_surplus_ties(positions, values, threshold, k)
        values = row[positions]
    leading: NDArray[np.intp] = positions[(-values).argsort(kind="stable")[:k]]
    return leading


def _without_surplus_ties(
    positions: NDArray[np.intp], values: Row, threshold: np.float32, k: int
) -> NDArray[np.intp]:
    """Drops, of the values equal to the threshold, those that cannot be among the k leading ones.

    What is left is short: values above the threshold lie in fewer than k chunks.
    """
    is_kept = values > threshold
    num_missing = max(0, k - int(np.count_nonzero(is_kept)))
    is_kept[np.flatnonzero(~is_kept)[:num_missing]] = True
    kept: NDArray[np.intp] = positions[is_kept]
    return kept


def log_sum_exp(row: Row, peak: np.float32, *, scratch: Row) -> float:
    """log(sum(exp(row))), `peak` being the row's finite maximum; overwrites `scratch`.

    Exponentials and their pairwise sum are float32: relative error of the sum about 1e-6 at most.
    """
    if abs(peak) < _SAFE_EXPONENT:  # the usual case needs no pass to bring the largest term to 1
        return math.log(np.exp(row, out=scratch).sum())
    np.subtract(row, peak, out=scratch)
    np.exp(scratch, out=scratch)
    return float(peak) + math.log(scratch.sum())


def exponential_weights(row: Row, peak: np.float32, temperature: float, *, out: Row) -> Row:
    """exp((row - peak) / temperature), written to `out`: probabilities times a factor, the largest 1."""
    np.subtract(row, peak, out=out)
    if temperature != 1.0:
        np.divide(out, np.float32(temperature), out=out)
    return np.exp(out, out=out)


def nucleus_size(cumulative: NDArray[np.float64], mass: float) -> int:
    """How many leading entries reach `mass`, the one that crosses it included; all if none does."""
    return min(int(cumulative.searchsorted(mass)) + 1, len(cumulative))


def keep_nucleus(workspace: Workspace, mass: float) -> None:
    """Sets to 0 in `workspace.weights` all but the smallest set of largest weights that sums to `mass`.

    Non-negative float32 numbers are ordered as their bits are, so the leading bits are a histogram's bins
    (64 per octave). The bin in which the sum reaches `mass` is cut into finer ones by the bits behind them,
    twice: what is left are ties, kept from the lowest position on, and nothing was sorted. Sums are float64.
    """
    weights, bins, masses = workspace.weights, workspace.bins, workspace.masses
    bits = weights.view(np.int32)
    np.right_shift(bits, _BIN_SHIFTS[0], out=bins)
    np.copyto(masses, weights)
    edge, above = _edge_bin(bins, masses, mass)
    positions = np.flatnonzero(bins == edge)
    for coarse, fine in pairwise(_BIN_SHIFTS):
        first = edge << (coarse - fine)
        finer = (bits[positions] >> fine) - first
        place, mass_of_larger = _edge_bin(finer, weights[positions], mass - above)
        edge, above = first + place, above + mass_of_larger
        positions = positions[finer == place]
    kept = positions[: nucleus_size(np.cumsum(weights[positions], dtype=np.float64), mass - above)]
    kept_weights = weights[kept]
    np.multiply(weights, bits > edge, out=weights)
    weights[kept] = kept_weights


def _edge_bin(
    bins: NDArray[np.integer[Any]], masses: NDArray[np.floating[Any]], mass: float
) -> tuple[int, float]:
    """The bin in which the sum, from the largest bin down, reaches `mass`, and the sum of those above it."""
    cumulative = np.bincount(bins, weights=masses)[::-1].cumsum()
    num_bins = nucleus_size(cumulative, mass)
    above = float(cumulative[num_bins - 2]) if num_bins > 1 else 0.0
    return len(cumulative) - num_bins, above


def draw(weights: Row | NDArray[np.float64], uniform: float) -> int:
    """The position where the cumulative weight passes `uniform` (in [0, 1)) times the total.

    Long rows are inverted in two levels: chunks first, then the elements of one chunk. A chunk's sum is
    float32, everything else float64, so each position's probability is right to a relative 4e-6 at worst,
    and the total mass to 1e-6. A position of weight 0 is never returned; the total must be positive.
    """
    num_chunks = len(weights) // _CHUNK_LENGTH
    if num_chunks < _CHUNK_LENGTH:
        cumulative = np.cumsum(weights, dtype=np.float64)
        return _position(cumulative, uniform * float(cumulative[-1]))
    end = num_chunks * _CHUNK_LENGTH
    sums = np.empty(num_chunks + 1)  # the last chunk is what is left over
    sums[:-1] = weights[:end].reshape(_CHUNK_LENGTH, num_chunks).sum(axis=0)
    sums[-1] = weights[end:].sum()
    cumulative = sums.cumsum()
    target = uniform * float(cumulative[-1])
    chunk = _position(cumulative, target)
    if chunk > 0:
        target -= float(cumulative[chunk - 1])
    if chunk == num_chunks:
        return end + _position(np.cumsum(weights[end:], dtype=np.float64), target)
    return chunk + num_chunks * _position(np.cumsum(weights[chunk:end:num_chunks], dtype=np.float64), target)


def _position(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative value exceeds `target`, else the last that adds something."""
    index = int(cumulative.searchsorted(target, side="right"))
    return index if index < len(cumulative) else int(cumulative.searchsorted(cumulative[-1]))


def rank_of(row: Row, position: int) -> int:
    """1 + the number of positions before this one in the order of `top_k_ids`."""
    value = row[position]
    return 1 + int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:position] == value))
