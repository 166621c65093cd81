"""RequestSampler: every processor and path against a slow dense reference, and the random streams."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modernbert_decoder.engine.sampling import (
    RequestSampler,
    SampledToken,
    SamplingParams,
    TokenCounts,
    Workspace,
)
from modernbert_decoder.errors import CheckpointError, InputError

EOS = 2
# float32 exponentials and sums against float64
LOGPROB_TOLERANCE = 5e-6


class Uniforms:
    """Stands in for a random generator: hands out the numbers it was given."""

    def __init__(self, numbers: NDArray[np.float64]) -> None:
        self._numbers = iter(numbers.tolist())

    def random(self) -> float:
        return next(self._numbers)


def make_logits(size: int, seed: int, *, scale: float = 2.0) -> NDArray[np.float32]:
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    logits.flags.writeable = False
    return logits


def make_sampler(
    params: SamplingParams, size: int, *, prompt_ids: list[int] | None = None, index: int = 0
) -> Any:
    return RequestSampler(
        params, prompt_ids or [], eos_token_ids=[EOS], workspace=Workspace(size), index=index
    )


def processed(
    logits: NDArray[np.float32], params: SamplingParams, prompt_ids: list[int], output_ids: list[int]
) -> NDArray[np.float64]:
    """Logit bias, ban and penalties, token by token."""
    row = logits.astype(np.float64)
    for token_id in range(len(row)):
        row[token_id] += (params.logit_bias or {}).get(token_id, 0.0)
        if len(output_ids) < params.min_tokens and token_id in {*(params.stop_token_ids or ()), EOS}:
            row[token_id] = -math.inf
        if token_id in prompt_ids or token_id in output_ids:
            factor = params.repetition_penalty
            row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
        row[token_id] -= params.frequency_penalty * output_ids.count(token_id)
        row[token_id] -= params.presence_penalty * (token_id in output_ids)
    return row


def probabilities(row: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Temperature, min-p, top-k and top-p by full sorts, each on the renormalized rest of the one before."""
    p = softmax(row / params.temperature)
    p = np.where(p >= params.min_p * p.max(), p, 0.0)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if params.top_k:
        p[order[params.top_k :]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    if params.top_p < 1.0:
        p[np.array(order)[before >= params.top_p]] = 0.0
    return np.asarray(p / p.sum())


def softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(row - row.max())
    return np.asarray(weights / weights.sum())


def drawn_shares(logits: NDArray[np.float32], params: SamplingParams, num_draws: int) -> NDArray[np.float64]:
    """Each token's share of an even grid of uniforms: its probability to within 1 / num_draws."""
    sampler = make_sampler(params, len(logits))
    sampler._generator = Uniforms((np.arange(num_draws) + 0.5) / num_draws)
    counts = Counter(sampler.sample(logits).token_id for _ in range(num_draws))
    return np.array([counts[i] / num_draws for i in range(len(logits))])


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7, "temperature": 0.7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 0.8},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_p": 0.8, "temperature": 1.5},
    {"min_p": 0.05, "top_k": 9},
    {"min_p": 1.0, "top_k": 9},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.1, "temperature": 1.3},
    {"top_k": 300, "top_p": 0.99, "temperature": 4.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [5, 130, 1000])
def test_every_filter_gives_the_distribution_of_the_dense_reference(
    filters: dict[str, Any], size: int
) -> None:
    logits = make_logits(size, seed=size)
    params = SamplingParams(**filters)
    num_draws = 4000
    shares = drawn_shares(logits, params, num_draws)
    expected = probabilities(logits.astype(np.float64), params)
    assert np.abs(shares - expected).max() <= 1 / num_draws + 1e-9
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("filters", [f for f in FILTERS if f.get("top_k", 0) < 10_000], ids=str)
def test_filters_agree_with_transformers(filters: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = make_logits(300, seed=9)
    params = SamplingParams(**filters)
    warpers = [
        process.TemperatureLogitsWarper(params.temperature),
        process.MinPLogitsWarper(params.min_p),
        *([process.TopKLogitsWarper(params.top_k)] if params.top_k else []),
        *([process.TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []),
    ]
    scores = torch.tensor(logits.copy())[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 0, dtype=torch.long), scores)
    expected = torch.softmax(scores[0].double(), -1).numpy()
    num_draws = 4000
    shares = drawn_shares(logits, params, num_draws)
    # float32 in the reference moves the interval's ends by a few 1e-7
    assert np.abs(shares - expected).max() <= 1 / num_draws + 1e-6
    assert not shares[expected == 0].any()


def test_repetition_penalty_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    penalty = process.RepetitionPenaltyLogitsProcessor(1.7)
    sampler = make_sampler(SamplingParams(temperature=0, repetition_penalty=1.7), 50, prompt_ids=[3, 3, 7])
    ids = [3, 3, 7]
    for step in range(30):
        logits = make_logits(50, seed=step)
        expected = int(penalty(torch.tensor([ids]), torch.tensor(logits.copy())[None]).argmax())
        assert sampler.sample(logits).token_id == expected
        ids.append(expected)


PROCESSORS = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"logit_bias": {4: 6.0, 5: -100.0, 6: -math.inf}},
    {"min_tokens": 9},
    {"min_tokens": 9, "stop_token_ids": [0, 1, 3], "ignore_eos": True},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {2: 8.0, 7: 5.0},
        "min_tokens": 5,
    },
]


@pytest.mark.parametrize("settings", PROCESSORS, ids=str)
@pytest.mark.parametrize(
    "filters", [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}], ids=str
)
def test_processors_equal_the_dense_reference_over_many_steps(
    settings: dict[str, Any], filters: dict[str, Any]
) -> None:
    params = SamplingParams(**settings, **filters, seed=1, max_tokens=None)
    prompt_ids, output_ids = [1, 1, 5, 9], []
    sampler = make_sampler(params, 12, prompt_ids=prompt_ids)
    for step in range(20):
        logits = make_logits(12, seed=100 + step)
        token_id = sampler.sample(logits).token_id
        row = processed(logits, params, prompt_ids, output_ids)
        if params.is_greedy:
            assert token_id == int(row.argmax())
        else:
            assert probabilities(row, params)[token_id] > 0
        output_ids.append(token_id)
    assert sampler.num_output_tokens == 20


def test_token_counts_grow_past_their_first_capacity() -> None:
    counts = TokenCounts([5, 5, 1])
    for token_id in [*range(300), 5, 5]:
        counts.add(token_id)
    by_id = dict(zip(counts.ids.tolist(), counts.output_counts.tolist(), strict=True))
    assert by_id == {token_id: 3.0 if token_id == 5 else 1.0 for token_id in range(300)}


def test_end_of_text_is_banned_until_enough_tokens_are_out() -> None:
    logits = np.zeros(6, np.float32)
    logits[[EOS, 4]] = 9.0, 5.0
    sampler = make_sampler(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True), 6)
    assert [sampler.sample(logits).token_id for _ in range(4)] == [4, 4, EOS, EOS]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(6, np.float32)
    logits[[3, 5]] = 1.0
    assert make_sampler(SamplingParams(temperature=0), 6).sample(logits).token_id == 3
    assert make_sampler(SamplingParams(temperature=9e-6, logprobs=2), 6).sample(logits).token_id == 3


def test_top_k_keeps_the_lowest_ids_of_a_tie() -> None:
    shares = drawn_shares(np.zeros(200, np.float32), SamplingParams(top_k=4), 400)
    assert np.flatnonzero(shares).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [0.01, 2.0])
@pytest.mark.parametrize("size", [6, 1000, 50_368])
def test_a_tiny_top_p_keeps_one_token(scale: float, size: int) -> None:
    logits = make_logits(size, 4, scale=scale)
    shares = drawn_shares(logits, SamplingParams(top_p=1e-9), 20)
    assert shares[logits.argmax()] == 1.0


def test_top_p_of_1_keeps_all_tokens() -> None:
    assert drawn_shares(np.zeros(300, np.float32), SamplingParams(top_p=1.0), 3000).all()


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = np.log(np.float32([0.5, 0.3, 0.15, 0.05]))
    assert np.flatnonzero(drawn_shares(logits, SamplingParams(top_p=0.79), 400)).tolist() == [0, 1]
    assert np.flatnonzero(drawn_shares(logits, SamplingParams(top_p=0.81), 400)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_kept", [10, 64, 65, 5000])
def test_nuclei_of_every_size_are_exact(num_kept: int) -> None:
    """Both ways of finding a nucleus (few candidates, or a histogram of all) are crossed by these sizes."""
    logits = np.full(50_368, -50.0, np.float32)
    chosen = np.random.default_rng(2).permutation(50_368)[:num_kept]
    logits[chosen] = np.linspace(0.0, 0.1, num_kept)
    sampler = make_sampler(SamplingParams(top_p=0.999999), 50_368)
    sampler._generator = Uniforms((np.arange(300) + 0.5) / 300)
    drawn = {sampler.sample(logits).token_id for _ in range(300)}
    assert drawn <= set(chosen.tolist())
    assert len(drawn) >= min(num_kept, 280)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05, "temperature": 2.0}], ids=str
)
def test_seeded_draws_follow_the_distribution(filters: dict[str, Any]) -> None:
    logits = make_logits(12, seed=21, scale=1.0)
    params = SamplingParams(**filters, seed=17)
    sampler = make_sampler(params, 12)
    num_draws = 6000
    counts = Counter(sampler.sample(logits).token_id for _ in range(num_draws))
    expected = probabilities(logits.astype(np.float64), params) * num_draws
    assert set(counts) <= set(np.flatnonzero(expected).tolist())
    statistic = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in np.flatnonzero(expected))
    # The 99.9 % point of chi-square with 11 degrees of freedom, the most there are here; the seed is fixed.
    assert statistic < 31.3


SEEDED = [{}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 2.0, "min_p": 0.01}, {"frequency_penalty": 0.5}]


def tokens_alone(params: SamplingParams, index: int, rows: list[NDArray[np.float32]]) -> list[int]:
    sampler = make_sampler(params, len(rows[0]), index=index)
    return [sampler.sample(row).token_id for row in rows]


@pytest.mark.parametrize("settings", SEEDED, ids=str)
def test_a_seeded_stream_is_the_same_alone_and_among_others(settings: dict[str, Any]) -> None:
    rows = [make_logits(400, seed=step) for step in range(15)]
    workspace = Workspace(400)
    requests = [
        SamplingParams(**settings, seed=5),
        SamplingParams(seed=6),
        SamplingParams(**SEEDED[1], seed=5),
    ]
    samplers = [
        RequestSampler(params, [], eos_token_ids=[EOS], workspace=workspace, index=index)
        for params in requests
        for index in range(2)
    ]
    together = [[sampler.sample(row).token_id for sampler in samplers] for row in rows]
    for place, tokens in enumerate(zip(*together, strict=True)):
        assert list(tokens) == tokens_alone(requests[place // 2], place % 2, rows)


@pytest.mark.parametrize("settings", SEEDED, ids=str)
def test_every_token_takes_one_number_from_the_stream(settings: dict[str, Any]) -> None:
    logits = make_logits(400, seed=1)
    sampler = make_sampler(SamplingParams(**settings, seed=5, logprobs=3), 400)
    for _ in range(7):
        sampler.sample(logits)
    reference = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5, spawn_key=(0,))))
    assert sampler._generator.random() == reference.random(8)[7]


def test_completions_seeds_and_unseeded_requests_have_streams_of_their_own() -> None:
    rows = [make_logits(400, seed=step) for step in range(8)]
    streams = [
        tokens_alone(SamplingParams(seed=seed), index, rows)
        for seed, index in [(0, 0), (0, 1), (1, 0), (2**32, 0), (None, 0), (None, 0)]
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_logprobs_do_not_change_the_tokens() -> None:
    rows = [make_logits(3000, seed=step) for step in range(10)]
    for settings in FILTERS:
        plain = SamplingParams(**settings, seed=3)
        with_logprobs = SamplingParams(**settings, seed=3, logprobs=100)
        assert tokens_alone(plain, 0, rows) == tokens_alone(with_logprobs, 0, rows)


@pytest.mark.parametrize("num_top", [0, 1, 5, 100, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        *FILTERS,
        {"temperature": 0},
        {"temperature": 0, "logit_bias": {7: 90.0}},
        {"repetition_penalty": 2.0, "top_k": 3},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_raw_distribution(settings: dict[str, Any], num_top: int) -> None:
    logits = make_logits(1000, seed=30)
    expected = np.log(softmax(logits.astype(np.float64)))
    order = sorted(range(1000), key=lambda i: (-logits[i], i))
    sampler = make_sampler(SamplingParams(**settings, seed=0, logprobs=num_top), 1000, prompt_ids=[order[0]])
    for _ in range(3):
        token = sampler.sample(logits)
        assert token.logprob == pytest.approx(expected[token.token_id], abs=LOGPROB_TOLERANCE)
        assert token.rank == order.index(token.token_id) + 1
        assert token.top is not None
        assert [token_id for token_id, _ in token.top] == order[:num_top]
        assert [logprob for _, logprob in token.top] == pytest.approx(
            expected[order[:num_top]].tolist(), abs=LOGPROB_TOLERANCE
        )


def test_nothing_but_the_token_is_reported_unless_asked_for() -> None:
    logits = make_logits(50, seed=1)
    assert make_sampler(SamplingParams(temperature=0), 50).sample(logits) == SampledToken(
        int(logits.argmax())
    )


PATHS = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "frequency_penalty": 1.0},
    {"top_k": 3},
    {"top_p": 0.5},
    {"min_p": 0.5},
    {},
]


@pytest.mark.parametrize("settings", PATHS, ids=str)
@pytest.mark.parametrize("where", [0, 77, 129])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_damaged_checkpoint(
    settings: dict[str, Any], where: int, value: float
) -> None:
    logits = make_logits(130, seed=1).copy()
    logits[where] = value
    message = "NaN logits" if math.isnan(value) else "infinite logits"
    with pytest.raises(CheckpointError, match=message):
        make_sampler(SamplingParams(**settings), 130).sample(logits)


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_logits_that_are_all_minus_infinity_are_a_damaged_checkpoint(settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="infinite logits"):
        make_sampler(SamplingParams(**settings), 8).sample(np.full(8, -np.inf, np.float32))


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_tokens_of_minus_infinity_are_never_drawn(settings: dict[str, Any]) -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[70, 4900]] = 0.0, 0.1
    sampler = make_sampler(SamplingParams(**settings, seed=0), 5000)
    assert {sampler.sample(logits).token_id for _ in range(40)} <= {70, 4900}


@pytest.mark.parametrize("settings", PATHS, ids=str)
def test_forbidding_every_token_is_an_error_that_says_so(settings: dict[str, Any]) -> None:
    bans = {token_id: -math.inf for token_id in range(4) if token_id not in (EOS, 1)}
    params = SamplingParams(**settings, logit_bias=bans, min_tokens=1, stop_token_ids=[1])
    with pytest.raises(InputError, match="no token is left to choose from: logit_bias and min_tokens"):
        make_sampler(params, 4).sample(make_logits(4, seed=0))
