"""Selection and drawing on one row: each fast routine against an obvious dense one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modernbert_decoder.engine.sampling import RequestSampler, SamplingParams
from modernbert_decoder.engine.selection import (
    Workspace,
    draw,
    exponential_weights,
    keep_nucleus,
    log_sum_exp,
    rank_of,
    top_k_ids,
)

VOCAB_SIZE = 50_368
# float32 exponentials and sums of chunks of 64: about 64 roundings of 6e-8 at the very worst.
MASS_TOLERANCE = 4e-6
LOG_SUM_TOLERANCE = 2e-6

KINDS = ["normal", "ties", "constant", "few finite", "infinities", "all -inf", "sorted"]


def make_row(kind: str, size: int, seed: int) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    row = generator.standard_normal(size) * 3
    if kind == "ties":
        row = np.round(row)
    elif kind == "constant":
        row[:] = 1.5
    elif kind == "few finite":
        row[generator.random(size) < 0.98] = -np.inf
    elif kind == "infinities":
        row[generator.random(size) < 0.05] = np.inf
        row[generator.random(size) < 0.3] = -np.inf
    elif kind == "all -inf":
        row[:] = -np.inf
    elif kind == "sorted":
        row = np.sort(row)
    row = row.astype(np.float32)
    row.flags.writeable = False
    return row


def sorted_ids(row: NDArray[np.floating]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 5000),
    k=st.one_of(st.integers(0, 100), st.integers(0, 6000)),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_equals_a_full_sort(kind: str, size: int, k: int, seed: int) -> None:
    row = make_row(kind, size, seed)
    assert top_k_ids(row, k).tolist() == sorted_ids(row)[:k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 64, 512, 4096])
def test_top_k_equals_a_full_sort_at_the_size_of_the_vocabulary(kind: str, k: int) -> None:
    row = make_row(kind, VOCAB_SIZE, 3)
    assert top_k_ids(row, k).tolist() == np.argsort(-row, kind="stable")[:k].tolist()


@pytest.mark.parametrize("size", [1, 63, 5000, VOCAB_SIZE])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_log_sum_exp_equals_float64(size: int, offset: float) -> None:
    row = (make_row("normal", size, 5) + np.float32(offset)).astype(np.float32)
    exact = row.astype(np.float64)
    expected = float(row.max()) + math.log(np.exp(exact - exact.max()).sum())
    assert abs(log_sum_exp(row, row.max(), scratch=np.empty_like(row)) - expected) < LOG_SUM_TOLERANCE


@pytest.mark.parametrize("kind", ["normal", "ties", "few finite", "constant"])
def test_rank_is_the_place_in_the_top_k_order(kind: str) -> None:
    row = make_row(kind, 500, 8)
    assert [rank_of(row, i) for i in sorted_ids(row)] == list(range(1, 501))


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4133, VOCAB_SIZE, VOCAB_SIZE + 37])
def test_draw_gives_each_position_its_probability(size: int) -> None:
    row = make_row("normal", size, 11)
    weights = exponential_weights(row, row.max(), 1.0, out=np.empty_like(row))
    probabilities = weights / weights.sum(dtype=np.float64)
    # A position owns one interval of the unit line: bisect for its upper end from a point inside it.
    for start in np.linspace(0.0, 0.999, 7):
        position = draw(weights, start)
        low = _end_of(weights, position, start, -1.0)
        high = _end_of(weights, position, start, 2.0)
        assert high - low == pytest.approx(
            probabilities[position], abs=MASS_TOLERANCE * 1e-2, rel=MASS_TOLERANCE
        )


def _end_of(weights: NDArray[np.float32], position: int, inside: float, outside: float) -> float:
    for _ in range(60):
        middle = (inside + outside) / 2
        if 0.0 <= middle < 1.0 and draw(weights, middle) == position:
            inside = middle
        else:
            outside = middle
    return inside


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 9000), num_positive=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_draw_never_returns_a_position_without_weight(size: int, num_positive: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = np.zeros(size, np.float32)
    weights[generator.integers(0, size, num_positive)] = generator.random(num_positive) + 0.01
    for uniform in (0.0, 1e-300, generator.random(), 0.5, np.nextafter(1.0, 0.0)):
        assert weights[draw(weights, uniform)] > 0


def test_draw_reaches_every_position_of_a_long_row() -> None:
    size = 64 * 64 + 5
    weights = np.ones(size, np.float32)
    assert {draw(weights, (i + 0.5) / size) for i in range(size)} == set(range(size))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["normal", "ties", "constant", "few finite"]),
    size=st.integers(1, 3000),
    p=st.one_of(st.floats(1e-9, 1.0), st.floats(0.99, 1.0)),
    seed=st.integers(0, 2**32 - 1),
)
def test_nucleus_equals_a_full_sort(kind: str, size: int, p: float, seed: int) -> None:
    workspace = Workspace(size)
    row = make_row(kind, size, seed)
    if not np.isfinite(row.max()):
        return
    before = exponential_weights(row, row.max(), 1.0, out=workspace.weights).copy()
    order = sorted_ids(before)
    # Weights are multiples of 2**-23 of themselves: sums in another order differ in the last bits of float64.
    cumulative = np.cumsum(before[order], dtype=np.float64)
    mass = p * float(cumulative[-1])
    if np.abs(cumulative - mass).min() < 1e-9 * cumulative[-1]:
        return
    keep_nucleus(workspace, mass)
    num_kept = int((cumulative < mass).sum()) + 1
    expected = np.zeros_like(before)
    expected[order[:num_kept]] = before[order[:num_kept]]
    assert np.array_equal(workspace.weights, expected)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "nearly constant"])
@pytest.mark.parametrize("p", [0.001, 0.3, 0.5, 0.95])
def test_nucleus_equals_a_full_sort_at_the_size_of_the_vocabulary(kind: str, p: float) -> None:
    workspace = Workspace(VOCAB_SIZE)
    row = make_row("normal" if kind == "nearly constant" else kind, VOCAB_SIZE, 17)
    temperature = 1e6 if kind == "nearly constant" else 1.0  # all weights in one or two coarse bins
    before = exponential_weights(row, row.max(), temperature, out=workspace.weights).copy()
    order = np.argsort(-before, kind="stable")
    cumulative = np.cumsum(before[order], dtype=np.float64)
    mass = p * float(cumulative[-1])
    keep_nucleus(workspace, mass)
    num_kept = int((cumulative < mass).sum()) + 1
    # The sum of the leading weights crosses the mass at one of two neighbours, as it is rounded.
    assert int(np.count_nonzero(workspace.weights)) == pytest.approx(num_kept, abs=1)
    expected = np.zeros_like(before)
    leading = order[: int(np.count_nonzero(workspace.weights))]
    expected[leading] = before[leading]
    assert np.array_equal(workspace.weights, expected)


class SortedLengths(list[int]):
    """The lengths of what is sorted, by numpy's functions and by the methods of `Watched` arrays."""


class Watched(np.ndarray[Any, Any]):
    """An array whose derivatives, comparisons and copies included, tell when they are sorted."""

    lengths: SortedLengths | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.lengths = getattr(parent, "lengths", None)

    def __array_function__(self, *arguments: Any) -> Any:
        """Joined arrays are derivatives, too."""
        result = super().__array_function__(*arguments)
        is_plain = type(result) is np.ndarray and self.lengths is not None
        return watched(result, self.lengths) if is_plain else result

    def argsort(self, *arguments: Any, **options: Any) -> Any:
        if self.lengths is not None:
            self.lengths.append(self.size)
        return super().argsort(*arguments, **options)

    def sort(self, *arguments: Any, **options: Any) -> None:
        if self.lengths is not None:
            self.lengths.append(self.size)
        super().sort(*arguments, **options)


def watched(array: NDArray[Any], lengths: SortedLengths) -> Watched:
    view = array.view(Watched)
    view.lengths = lengths
    return view


@pytest.fixture
def sorted_lengths(monkeypatch: pytest.MonkeyPatch) -> SortedLengths:
    lengths = SortedLengths()

    def watch(name: str) -> None:
        function: Callable[..., Any] = getattr(np, name)

        def sort(array: Any, *arguments: Any, **options: Any) -> Any:
            lengths.append(np.size(array))
            return function(array, *arguments, **options)

        monkeypatch.setattr(np, name, sort)

    for name in ("sort", "argsort", "lexsort", "unique"):
        watch(name)
    return lengths


@pytest.mark.parametrize("kind", ["normal", "ties", "constant"])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 64, "logprobs": 5},
        {"top_k": 64, "top_p": 0.9, "min_p": 0.01},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "top_p": 0.5, "temperature": 1e6, "logprobs": 20},
        {"top_k": 0, "min_p": 0.02, "top_p": 0.99},
        {"top_k": 0},
        {"temperature": 0, "logprobs": 20},
    ],
    ids=str,
)
def test_sampling_never_sorts_a_large_part_of_the_vocabulary(
    params: dict[str, Any], kind: str, sorted_lengths: SortedLengths
) -> None:
    workspace = Workspace(VOCAB_SIZE)
    for name in ("processed", "weights"):
        setattr(workspace, name, watched(getattr(workspace, name), sorted_lengths))
    sampler = RequestSampler(
        SamplingParams(**{"temperature": 1.0, "seed": 1, **params}), [], eos_token_ids=(), workspace=workspace
    )
    for seed in range(3):
        sampler.sample(watched(make_row(kind, VOCAB_SIZE, seed), sorted_lengths))
    assert max(sorted_lengths, default=0) < 5_000
    if "logprobs" in params:
        assert sorted_lengths, "the sorting of the leading logits was not seen"
