"""Continuous batching: whoever comes and goes, every request gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import open_runtime, random_ids, tiny_architecture, write_checkpoint
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.tokenizer import Tokenizer

ARCHITECTURE = tiny_architecture(window=16)
SEP = ARCHITECTURE.eos_token_ids[0]

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "ignore_eos": True},
    {"temperature": 0.9, "top_k": 20, "seed": 3},
    {"temperature": 1.0, "seed": 4, "logprobs": 2},
    {"temperature": 1.2, "top_p": 0.8, "seed": 5, "presence_penalty": 0.5, "ignore_eos": True},
]


class Bench:
    """Makes requests, runtimes and schedulers for one checkpoint, and knows what each request gets alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_folder(folder, ARCHITECTURE)
        self._single = open_runtime(folder, num_slots=1, context_length=512)
        self._known: dict[tuple[object, ...], list[int]] = {}

    def group(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Request]:
        assert params.max_tokens is not None
        return [
            Request(prompt_ids, params, tokenizer=self.tokenizer, max_tokens=params.max_tokens, index=index)
            for index in range(params.n)
        ]

    def scheduler(self, *, num_slots: int, chunk_size: int) -> tuple[Scheduler, Runtime]:
        runtime = open_runtime(self.folder, num_slots=num_slots, context_length=512)
        return Scheduler(runtime, eos_token_ids=[SEP], chunk_size=chunk_size), runtime

    def alone(self, request: Request) -> list[int]:
        """The tokens of the same completion as the only one of a scheduler with one slot."""
        key = (tuple(request.prompt_ids), repr(request.params), request.index)
        if key not in self._known:
            assert request.params is not None
            scheduler = Scheduler(self._single, eos_token_ids=[SEP], chunk_size=512)
            copy = self.group(request.prompt_ids, request.params)[request.index]
            scheduler.submit([copy])
            run(scheduler)
            assert copy.error is None
            self._known[key] = copy.token_ids
        return self._known[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(write_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURE))


def run(scheduler: Scheduler, *, most_steps: int = 5000) -> int:
    """Steps until nothing is left to do; the number of steps."""
    num_steps = 0
    while scheduler.has_work:
        scheduler.step()
        num_steps += 1
        assert num_steps < most_steps, "requests are never finished"
    return num_steps


def assert_idle(scheduler: Scheduler, runtime: Runtime) -> None:
    assert not scheduler.has_work
    assert scheduler.num_running == 0
    assert runtime.cache.num_free == runtime.cache.num_slots


# --- anything may happen, in any order ---


def random_params(choose: random.Random, num_slots: int) -> SamplingParams:
    settings = dict(choose.choice(SETTINGS))
    if settings["temperature"]:
        settings["n"] = choose.choice([1, 1, 2, 3, num_slots + 2])
    return SamplingParams(**settings, max_tokens=choose.choice([1, 2, 10, 40]))


@pytest.mark.parametrize("seed", range(12))
def test_every_request_gets_the_tokens_it_gets_alone(bench: Bench, seed: int) -> None:
    choose = random.Random(seed)
    num_slots = choose.choice([1, 2, 3, 5])
    scheduler, runtime = bench.scheduler(num_slots=num_slots, chunk_size=choose.choice([1, 5, 17, 64, 300]))
    requests: list[Request] = []
    for _ in range(200):
        if choose.random() < 0.12:
            prompt = random_ids(ARCHITECTURE, choose.choice([1, 2, 15, 16, 17, 60, 150]), seed=seed)
            group = bench.group(prompt, random_params(choose, num_slots))
            scheduler.submit(group)
            requests += group
        if requests and choose.random() < 0.1:
            scheduler.abort(choose.choice(requests[-6:]))
        scheduler.step()
    run(scheduler)
    assert_idle(scheduler, runtime)
    reasons = {request.finish_reason for request in requests}
    assert reasons >= {"length", "aborted"}, "the scenario shows too little"
    for request in requests:
        expected = bench.alone(request)
        if request.finish_reason == "aborted":
            assert request.token_ids == expected[: len(request.token_ids)]
        else:
            assert request.token_ids == expected


@pytest.mark.parametrize("num_requests", [7, 20])
def test_more_requests_than_slots_wait_and_are_served_in_order(bench: Bench, num_requests: int) -> None:
    scheduler, runtime = bench.scheduler(num_slots=3, chunk_size=64)
    requests = [bench.group(random_ids(ARCHITECTURE, 20, seed=i), GREEDY)[0] for i in range(num_requests)]
    for request in requests:
        scheduler.submit([request])
    scheduler.step()
    assert scheduler.num_running == 3
    run(scheduler)
    assert_idle(scheduler, runtime)
    assert [request.token_ids for request in requests] == [bench.alone(request) for request in requests]
    admitted = [request.admitted_at for request in requests]
    assert admitted == sorted(admitted)


# --- completions of one prompt ---


@pytest.mark.parametrize("num_slots", [1, 2, 4, 9])
def test_n_completions_differ_and_equal_those_made_alone(bench: Bench, num_slots: int) -> None:
    scheduler, runtime = bench.scheduler(num_slots=num_slots, chunk_size=50)
    params = SamplingParams(n=6, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    group = bench.group(random_ids(ARCHITECTURE, 120), params)
    scheduler.submit(group)
    run(scheduler)
    assert_idle(scheduler, runtime)
    assert [request.token_ids for request in group] == [bench.alone(request) for request in group]
    assert len({tuple(request.token_ids) for request in group}) == 6


def test_n_completions_cost_one_prefill(bench: Bench) -> None:
    scheduler, runtime = bench.scheduler(num_slots=6, chunk_size=50)
    params = SamplingParams(n=6, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    scheduler.submit(bench.group(random_ids(ARCHITECTURE, 120), params))
    run(scheduler)
    assert runtime.num_calls == 3 + 19  # three chunks give the first token, and every other takes a call


@pytest.mark.parametrize(("num_prompts", "num_slots"), [(8, 8), (4, 4), (5, 6), (3, 3)])
def test_every_prompt_is_prefilled_once_whatever_else_waits(
    bench: Bench, num_prompts: int, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, runtime = bench.scheduler(num_slots=num_slots, chunk_size=50)
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    groups = [bench.group(random_ids(ARCHITECTURE, 40 + i), params) for i in range(num_prompts)]
    fed: list[int] = []
    step = runtime.step

    def counting(rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        fed.extend(len(row.token_ids) for row in rows)
        return step(rows)

    monkeypatch.setattr(runtime, "step", counting)
    for group in groups:
        scheduler.submit(group)
    run(scheduler)
    num_decoded = sum(len(request.token_ids) - 1 for group in groups for request in group)
    assert sum(fed) == sum(40 + i for i in range(num_prompts)) + num_decoded
    for group in groups:
        assert [request.token_ids for request in group] == [bench.alone(request) for request in group]


# --- failing steps ---


@pytest.mark.parametrize("broken", ["allocate", "fork", "swap", "free"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_step_that_breaks_anywhere_ends_every_request_and_leaves_the_scheduler_usable(
    bench: Bench, broken: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, runtime = bench.scheduler(num_slots=4, chunk_size=30)
    params = SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=6, ignore_eos=True)
    groups = [bench.group(random_ids(ARCHITECTURE, 40), params) for _ in range(3)]
    for group in groups:
        scheduler.submit(group)

    def breaks(*arguments: object) -> object:
        raise error

    monkeypatch.setattr(runtime.cache, broken, breaks)
    with pytest.raises(error):
        run(scheduler)
    monkeypatch.undo()
    requests = [request for group in groups for request in group]
    assert all(request.is_finished for request in requests)
    assert any(isinstance(request.error, RuntimeError) for request in requests)
    assert_idle(scheduler, runtime)
    again = bench.group(random_ids(ARCHITECTURE, 40), params)
    scheduler.submit(again)
    run(scheduler)
    assert [request.token_ids for request in again] == [bench.alone(request) for request in again]


# --- aborting ---


@pytest.fixture
def busy(bench: Bench) -> tuple[Scheduler, Runtime, list[Request]]:
    """Four slots: one decodes, one prefills a long prompt and keeps two; a request and its siblings wait."""
    scheduler, runtime = bench.scheduler(num_slots=4, chunk_size=10)
    sampled = SamplingParams(n=3, temperature=1.0, seed=9, max_tokens=15, ignore_eos=True)
    decoding = bench.group(random_ids(ARCHITECTURE, 5), SamplingParams(temperature=0, max_tokens=40))
    prefilling = bench.group(random_ids(ARCHITECTURE, 100), sampled)
    waiting = bench.group(random_ids(ARCHITECTURE, 30), sampled)
    for group in (decoding, prefilling, waiting):
        scheduler.submit(group)
    for _ in range(3):
        scheduler.step()
    assert len(decoding[0].token_ids) > 0
    assert 0 < prefilling[0].num_prefilled < 100
    assert waiting[0].row is None
    return scheduler, runtime, [*decoding, *prefilling, *waiting]


@pytest.mark.parametrize("aborted", [(i,) for i in range(7)] + [(1, 2), (2, 3), (1, 4), (4, 5), (0, 1, 2, 4)])
def test_aborting_requests_leaves_the_others_as_they_were(
    bench: Bench, busy: tuple[Scheduler, Runtime, list[Request]], aborted: tuple[int, ...]
) -> None:
    """0 decodes; 1 prefills for its siblings 2 and 3; 4 waits with its siblings 5 and 6."""
    scheduler, runtime, requests = busy
    for index in aborted:
        scheduler.abort(requests[index])
        assert requests[index].is_finished
    run(scheduler)
    assert_idle(scheduler, runtime)
    for index, request in enumerate(requests):
        if index in aborted:
            assert request.finish_reason == "aborted"
        else:
            assert request.finish_reason == "length"
            assert request.token_ids == bench.alone(request)


def test_aborting_everything_frees_every_slot_at_once(
    busy: tuple[Scheduler, Runtime, list[Request]],
) -> None:
    scheduler, runtime, requests = busy
    for request in requests:
        scheduler.abort(request)
    assert_idle(scheduler, runtime)


def test_aborting_a_finished_request_changes_nothing(bench: Bench) -> None:
    scheduler, runtime = bench.scheduler(num_slots=1, chunk_size=64)
    request = bench.group([1, 2, 3], GREEDY)[0]
    scheduler.submit([request])
    run(scheduler)
    scheduler.abort(request)
    assert request.finish_reason != "aborted"
    assert_idle(scheduler, runtime)


# --- what a step costs, in calls and tokens ---


class Calls:
    """Records the rows of every `Runtime.step`."""

    def __init__(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        step = runtime.step

        def recorded(rows: Sequence[Row]) -> object:
            self.rows.append([len(row.token_ids) for row in rows])
            return step(rows)

        monkeypatch.setattr(runtime, "step", recorded)


@pytest.mark.parametrize("chunk_size", [8, 50])
def test_a_long_prompt_delays_running_requests_by_no_more_than_a_chunk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    scheduler, runtime = bench.scheduler(num_slots=6, chunk_size=chunk_size)
    endless = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    running = [bench.group(random_ids(ARCHITECTURE, 4, seed=i), endless)[0] for i in range(2)]
    for request in running:
        scheduler.submit([request])
    scheduler.step()
    calls = Calls(runtime, monkeypatch)
    prompts = [bench.group(random_ids(ARCHITECTURE, 150, seed=i), GREEDY)[0] for i in range(4)]
    for request in prompts:  # together far more than a chunk
        scheduler.submit([request])
    num_steps = 0
    while not all(request.token_ids for request in prompts):
        before = [len(request.token_ids) for request in running]
        calls.rows.clear()
        scheduler.step()
        num_steps += 1
        assert [len(request.token_ids) for request in running] == [count + 1 for count in before]
        decoded, *prefilled = calls.rows
        assert set(decoded) == {1}
        assert sum(map(sum, prefilled)) <= chunk_size
    assert num_steps == -(-4 * 150 // chunk_size)  # and no step is spent on less than a chunk


def test_decoding_requests_share_one_call_per_step(bench: Bench) -> None:
    scheduler, runtime = bench.scheduler(num_slots=5, chunk_size=300)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for i in range(5):
        scheduler.submit(bench.group(random_ids(ARCHITECTURE, 10 + i, seed=i), params))
    while scheduler.num_running < 5 or scheduler._prefilling:
        scheduler.step()
    before = runtime.num_calls
    for _ in range(10):
        scheduler.step()
    assert runtime.num_calls == before + 10


@pytest.mark.parametrize("leaving", [(0,), (1,), (1, 3), (0, 1, 2)], ids=str)
def test_decoding_requests_share_a_call_whoever_leaves_while_a_prompt_is_prefilled(
    bench: Bench, leaving: tuple[int, ...]
) -> None:
    scheduler, runtime = bench.scheduler(num_slots=6, chunk_size=20)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    groups = [bench.group(random_ids(ARCHITECTURE, 4, seed=i), params) for i in range(5)]
    for group in groups:
        scheduler.submit(group)
    scheduler.step()
    long = bench.group(random_ids(ARCHITECTURE, 200), GREEDY)
    scheduler.submit(long)
    scheduler.step()
    for index in leaving:
        scheduler.abort(groups[index][0])
    before = runtime.num_calls
    for _ in range(5):
        scheduler.step()
    assert not long[0].token_ids
    assert runtime.num_calls == before + 5 * 2  # one call for all that decode, one for the chunk


def test_an_idle_step_calls_nothing(bench: Bench) -> None:
    scheduler, runtime = bench.scheduler(num_slots=2, chunk_size=10)
    scheduler.step()
    assert runtime.num_calls == 0


# --- errors of one request ---


def test_a_request_that_can_choose_no_token_fails_alone(bench: Bench) -> None:
    scheduler, runtime = bench.scheduler(num_slots=3, chunk_size=64)
    bans = dict.fromkeys(range(ARCHITECTURE.vocab_size), -np.inf)
    failing = bench.group([5, 6], SamplingParams(temperature=0, logit_bias=bans))[0]
    others = [bench.group(random_ids(ARCHITECTURE, 10, seed=i), GREEDY)[0] for i in range(3)]
    for request in (others[0], failing, *others[1:]):
        scheduler.submit([request])
    run(scheduler)
    assert_idle(scheduler, runtime)
    assert failing.error is not None
    assert "no token is left" in str(failing.error)
    assert [request.token_ids for request in others] == [bench.alone(request) for request in others]
