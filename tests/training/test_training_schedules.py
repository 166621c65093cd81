"""Learning rates, batch sizes and the plan that is made of them, against the published formula."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache

import pytest
from published_recipes import PUBLISHED, B
from tiny_runs import phase, tiny_recipe

from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.recipe import rate_schedule
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.schedules import batch_sequences, one_minus_sqrt


def published(n: float, *, total: float, decay: float, floor: float) -> float:
    """The formula as it is written: the scale over the last D of T."""
    return floor + (1 - floor) * (1 - math.sqrt((n - (total - decay)) / decay))


@pytest.mark.parametrize("n", [100, 101, 150, 199, 200])
def test_decay_is_the_published_formula(n: int) -> None:
    ours = one_minus_sqrt(n, total=200, decay=100, end=0.3)
    assert ours == pytest.approx(published(n, total=200, decay=100, floor=0.3), rel=1e-12)


def test_decay_from_another_level_is_the_formula_times_that_level() -> None:
    ours = one_minus_sqrt(30, total=50, decay=50, start=0.5, end=0.02)
    assert ours == pytest.approx(0.5 * published(30, total=50, decay=50, floor=0.04), rel=1e-12)


@pytest.mark.parametrize("size", PUBLISHED)
def test_rates_at_every_boundary_of_a_released_size(size: str) -> None:
    recipe = read_recipe(f"ettin-{size}")
    warmup = PUBLISHED[size][2] * B
    pretrain, extend, decay = (rate_schedule(recipe, i) for i in range(3))
    assert pretrain.at(0) == 0.0
    assert pretrain.at(1) == 1 / warmup
    assert pretrain.at(warmup // 2) == 0.5
    assert 1 - 1e-9 < pretrain.at(warmup - 1) < 1.0
    assert pretrain.at(warmup) == pretrain.at(1000 * B) == pretrain.at(1700 * B) == 1.0
    assert extend.at(0) == 1.0
    assert extend.at(125 * B) == pytest.approx(published(125, total=250, decay=250, floor=0.5))
    assert extend.at(250 * B) == pytest.approx(0.5)
    assert decay.at(0) == 0.5
    assert decay.at(25 * B) == pytest.approx(0.5 * published(25, total=50, decay=50, floor=0.04))
    assert decay.at(50 * B) == decay.at(60 * B) == pytest.approx(0.02)


@pytest.mark.parametrize("size", PUBLISHED)
def test_rate_never_jumps_between_phases(size: str) -> None:
    recipe = read_recipe(f"ettin-{size}")
    for i in (1, 2):
        before = rate_schedule(recipe, i - 1)
        assert rate_schedule(recipe, i).at(0) == before.at(before.tokens)


def test_batch_grows_to_its_size_over_its_warm_up_and_stays() -> None:
    sizes = [
        batch_sequences(n * B, first=768, full=4608, warmup_tokens=125 * B, multiple=256) for n in range(200)
    ]
    assert sizes[0] == 768
    assert sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)
    assert sizes[124] < 4608
    assert set(sizes[125:]) == {4608}
    assert sizes[60] == (768 + (4608 - 768) * 60 // 125) // 256 * 256


@cache
def plan_of(size: str) -> Plan:
    """A plan counts half a million steps, once."""
    return Plan(read_recipe(f"ettin-{size}"))


@pytest.mark.parametrize("size", PUBLISHED)
def test_batch_of_a_released_size_grows_to_4608_over_its_warm_up_in_the_plan(size: str) -> None:
    plan, warmup = plan_of(size), PUBLISHED[size][3] * B
    steps = range(plan.first_step_of(1))
    full = bisect_left(steps, warmup, key=lambda i: plan.step(i).tokens_before)
    assert plan.step(0).num_sequences == 768
    assert plan.step(full - 1).tokens_before < warmup <= plan.step(full).tokens_before
    # In steps of 256, and of the warm-up tokens one 15th each: 768, 1024, ..., 4352.
    counts = [plan.step(i).num_sequences for i in range(full)]
    assert sorted(set(counts)) == list(range(768, 4608, 256))
    assert counts == sorted(counts)
    for i in (full // 3, full // 2, full - 1):
        grown = 768 + (4608 - 768) * plan.step(i).tokens_before / warmup
        assert 0 <= grown - counts[i] < 256
    later = (full, full + 1, plan.first_step_of(1) - 2, plan.first_step_of(1), plan.first_step_of(2))
    assert {plan.step(i).num_sequences for i in later} == {4608}


@pytest.mark.parametrize("size", PUBLISHED)
def test_plan_of_a_released_size_has_its_tokens_and_ends_at_a_fiftieth(size: str) -> None:
    plan = plan_of(size)
    assert plan.total_tokens == pytest.approx(2000 * B, rel=1e-4)
    assert plan.tokens_after(plan.first_step_of(1)) == pytest.approx(1700 * B, rel=1e-5)
    assert plan.rate(plan.num_steps) == pytest.approx(0.02)
    assert plan.step(plan.first_step_of(1)).sequence_length == 7999
    assert plan.step(plan.first_step_of(1) - 1).is_last_of_phase


def test_plan_counts_every_token_of_every_step() -> None:
    phases = [
        phase("a", tokens=1000, batch_sequences=8, batch_warmup_start=2, batch_warmup_tokens=500),
        phase("b", tokens=500, sequence_length=16, batch_sequences=2, decay_tokens=300, final_rate=0.1),
    ]
    plan = Plan(tiny_recipe(["x.txt"], phases=phases))
    seen = 0
    for i in range(plan.num_steps):
        step = plan.step(i)
        assert plan.tokens_after(i) == seen
        assert step.num_sequences % 2 == 0
        seen += step.num_sequences * step.sequence_length
    assert plan.total_tokens == seen
    lasts = [i for i in range(plan.num_steps) if plan.step(i).is_last_of_phase]
    assert lasts == [plan.first_step_of(1) - 1, plan.num_steps - 1]
    assert 1000 <= plan.tokens_after(plan.first_step_of(1)) < 1000 + 2 * 32


def test_first_step_of_a_warm_up_has_rate_0_and_the_step_after_it_the_peak() -> None:
    plan = Plan(tiny_recipe(["x.txt"], phases=[phase(warmup_tokens=512)]))
    assert [plan.rate(i) for i in (0, 1, 2, 3, 4, 5)] == [0, 0.25, 0.5, 0.75, 1, 1]
