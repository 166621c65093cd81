"""Drafts: completions are what they are without, in fewer steps where drafts are right."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from checkpoints import (
    CLS,
    open_runtime,
    random_ids,
    random_tensors,
    relative_error,
    tiny_architecture,
    whole_logits,
    write_checkpoint,
)
from modernbert_decoder.architecture import Head, LayerKind
from modernbert_decoder.cli import main
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.draft_length import DraftLength, Experience, Luck, StepCosts
from modernbert_decoder.engine.draft_model import DraftModel
from modernbert_decoder.engine.kv_cache import KVCache
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import CompletionOutput
from modernbert_decoder.engine.prefix_cache import PrefixCache
from modernbert_decoder.engine.prompt_lookup import PromptLookup
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.rings import ring_length
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.engine.speculation import Drafter, Speculation, Speculator
from modernbert_decoder.engine.structured import StructuredOutput
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer

ARCHITECTURE = tiny_architecture(window=16)
SEP = ARCHITECTURE.eos_token_ids[0]
# Log-probabilities of a position from a step of one token and from one of several, in float32.
LOGPROB_TOLERANCE = 3e-5
ROUNDING_TOLERANCE = 1e-5
CONTEXT = 512

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "ignore_eos": True},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "seeded": {"temperature": 0.9, "seed": 3, "ignore_eos": True},
    "seeded, few": {"temperature": 1.0, "top_k": 5, "min_p": 0.01, "seed": 4, "presence_penalty": 0.5},
    "seeded, nucleus": {"temperature": 0.7, "top_p": 0.8, "seed": 5, "min_tokens": 30},
    "biased": {"temperature": 0.8, "seed": 6, "logit_bias": {SEP: 3.0, 65: 4.0}, "min_tokens": 5},
}


class Oracle:
    """Drafts what will come, which it knows, but wrong where `is_right` says so.

    `limits` are the most drafts it gives in each step, in turn.
    """

    def __init__(
        self,
        known: dict[tuple[object, ...], list[int]],
        is_right: Callable[[int], bool],
        limits: Sequence[int] = (64,),
    ) -> None:
        self._known = known
        self._is_right = is_right
        self._limits = limits
        self.num_asked = 0
        self.forgotten: list[Request] = []

    def draft(self, request: Request, count: int) -> list[int]:
        count = min(count, self._limits[self.num_asked % len(self._limits)])
        self.num_asked += 1
        begin = len(request.token_ids)
        coming = self._known[key_of(request)][begin : begin + count]
        coming += [7] * (count - len(coming))
        return [
            token_id if self._is_right(begin + place) else (token_id + 1) % 256
            for place, token_id in enumerate(coming)
        ]

    def forget(self, request: Request) -> None:
        self.forgotten.append(request)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def key_of(request: Request) -> tuple[object, ...]:
    return (tuple(request.prompt_ids), repr(request.params), request.index)


class Bench:
    """Requests and schedulers for one checkpoint, and what each request gets without drafts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_folder(folder, ARCHITECTURE)
        self._single = open_runtime(folder, num_slots=1, context_length=CONTEXT)
        self.known: dict[tuple[object, ...], list[int]] = {}
        self._outputs: dict[tuple[object, ...], CompletionOutput] = {}
        self._runtimes: dict[int, Runtime] = {}

    def group(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Request]:
        max_tokens = params.max_tokens or CONTEXT - len(prompt_ids)
        return [
            Request(list(prompt_ids), params, tokenizer=self.tokenizer, max_tokens=max_tokens, index=index)
            for index in range(params.n)
        ]

    def expected(self, request: Request) -> CompletionOutput:
        """The same completion, without drafts and alone."""
        key = key_of(request)
        if key not in self._outputs:
            copy = self.group(request.prompt_ids, request.params)[request.index]
            run(Scheduler(self._single, eos_token_ids=[SEP], chunk_size=CONTEXT), [copy])
            self._outputs[key] = copy.output()
            self.known[key] = copy.token_ids
        return self._outputs[key]

    def open(
        self,
        drafter: Drafter,
        *,
        num_slots: int = 1,
        max_draft: int = 8,
        max_rows: int = 64,
        prefix_cache: bool = False,
        adaptive: bool = False,
    ) -> tuple[Scheduler, Runtime]:
        if num_slots not in self._runtimes:
            self._runtimes[num_slots] = open_runtime(self.folder, num_slots=num_slots, context_length=CONTEXT)
        runtime = self._runtimes[num_slots]
        runtime.cache.reset()  # whatever a failed test has left
        speculation = Speculation(max_draft=max_draft, max_rows=max_rows, adaptive=adaptive)
        scheduler = Scheduler(
            runtime,
            eos_token_ids=[SEP],
            chunk_size=64,
            speculator=Speculator(speculation, drafter, runtime),
            prefix_cache=PrefixCache(runtime.cache, max_bytes=1 << 30, min_gap=4) if prefix_cache else None,
        )
        return scheduler, runtime

    def draft_model(
        self, folder: Path | None = None, *, chunk_size: int = 64, num_slots: int = 8
    ) -> DraftModel:
        """The same model, or another, as a draft model."""
        runtime = open_runtime(folder or self.folder, num_slots=num_slots, context_length=CONTEXT)
        return DraftModel(runtime, chunk_size=chunk_size)

    def assert_as_expected(self, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.error is None
            expected, given = self.expected(request), request.output()
            if given.finish_reason == "aborted":
                assert given.token_ids == expected.token_ids[: len(given.token_ids)]
                continue
            assert given.token_ids == expected.token_ids
            assert given.text == expected.text
            assert (given.finish_reason, given.stop_reason) == (expected.finish_reason, expected.stop_reason)
            assert_same_logprobs(given, expected)


def assert_same_logprobs(given: CompletionOutput, expected: CompletionOutput) -> None:
    assert (given.logprobs is None) == (expected.logprobs is None)
    for ours, theirs in zip(given.logprobs or (), expected.logprobs or (), strict=True):
        assert ours.keys() == theirs.keys()
        for token_id, entry in ours.items():
            assert entry.rank == theirs[token_id].rank
            assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=LOGPROB_TOLERANCE)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(write_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURE))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with another window, whose drafts are mostly wrong."""
    architecture = tiny_architecture(window=5, num_hidden_layers=2)
    return write_checkpoint(tmp_path_factory.mktemp("draft"), architecture, seed=1)


def run(scheduler: Scheduler, *groups: list[Request]) -> int:
    """Steps until nothing is left to do; the number of steps."""
    for group in groups:
        scheduler.submit(group)
    for num_steps in range(5000):
        if not scheduler.has_work:
            return num_steps
        scheduler.step()
    raise AssertionError("requests are never finished")


def counts(scheduler: Scheduler) -> tuple[int, int]:
    assert scheduler.speculator is not None
    return scheduler.speculator.num_drafted, scheduler.speculator.num_accepted


def ids(length: int, seed: int = 0) -> list[int]:
    return random_ids(ARCHITECTURE, length, seed=seed)


# --- the same completions ---


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("prompt_length", [1, 30, 75, 140])
@pytest.mark.parametrize("wrong_every", [1, 2, 3, 7, 1000])
def test_a_completion_is_the_same_with_drafts_however_many_are_right(
    bench: Bench, name: str, prompt_length: int, wrong_every: int
) -> None:
    """Window 16, rings of 80 that are compacted once in 65 tokens."""
    params = SamplingParams(max_tokens=150, logprobs=3, **SETTINGS[name])
    (request,) = group = bench.group(ids(prompt_length), params)
    bench.expected(request)
    oracle = Oracle(bench.known, lambda place: place % wrong_every != wrong_every - 1, [3, 8, 1, 5, 0, 64])
    scheduler, runtime = bench.open(oracle, max_draft=64)
    run(scheduler, group)
    bench.assert_as_expected(group)
    assert oracle.forgotten == group
    assert runtime.cache.num_free == 1
    num_drafted, num_accepted = counts(scheduler)
    assert num_drafted > 0
    assert (num_accepted == 0) == (wrong_every == 1)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_drafts_are_taken_back_at_every_place_of_a_ring(tmp_path: Path, window: int) -> None:
    """After any number of tokens, as many wrong ones as may be taken back leave no trace."""
    architecture = tiny_architecture(window=window)
    folder = write_checkpoint(tmp_path, architecture)
    runtime = open_runtime(folder, num_slots=1, context_length=CONTEXT)
    text = random_ids(architecture, 260)
    expected = whole_logits(runtime, text)
    slot = runtime.cache.allocate()
    choose = random.Random(0)
    while slot.length < len(text):
        length = slot.length
        most = runtime.cache.num_reversible(length + 1)
        num_wrong = choose.choice([most, min(most, 1), choose.randint(0, most)])
        wrong = random_ids(architecture, num_wrong, seed=length)
        logits = runtime.step([Row(slot, [text[length], *wrong], 1 + num_wrong)])[0]
        assert relative_error(logits[0], expected[length]) < ROUNDING_TOLERANCE
        runtime.cache.truncate(slot, length + 1)


@given(length=st.integers(0, 400), window=st.sampled_from([1, 4, 64]), slack=st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_no_ring_is_compacted_by_what_may_be_taken_back_and_one_is_by_more(
    length: int, window: int, slack: int
) -> None:
    cache = KVCache(tiny_architecture(window=window, num_hidden_layers=2), num_slots=1, capacity=500)
    most = cache.num_reversible(length)
    held = ring_length(length, cache.ring_capacity, window)
    assert ring_length(length + most, cache.ring_capacity, window) == held + most
    assert ring_length(length + most + 1, cache.ring_capacity, window) < held + most + 1
    full = KVCache(tiny_architecture(full_every=1, num_hidden_layers=2), num_slots=1, capacity=500)
    assert full.num_reversible(length) == 500 - length


def test_the_context_is_never_exceeded(bench: Bench) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (request,) = group = bench.group(ids(CONTEXT - 60), params)
    bench.expected(request)
    scheduler, _ = bench.open(Oracle(bench.known, lambda _: True), max_draft=64)
    run(scheduler, group)
    bench.assert_as_expected(group)
    assert len(request.token_ids) == 60


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9, 10, 11])
def test_no_draft_goes_beyond_the_last_token(bench: Bench, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    (request,) = group = bench.group(ids(10), params)
    bench.expected(request)
    scheduler, _ = bench.open(Oracle(bench.known, lambda _: True))
    num_steps = run(scheduler, group)
    bench.assert_as_expected(group)
    num_drafted, num_accepted = counts(scheduler)
    assert num_drafted == num_accepted
    # The first token comes from the prompt, and each further step gives up to nine.
    assert num_steps == 1 + -(-(max_tokens - 1) // 9)


@pytest.mark.parametrize("is_including", [False, True])
def test_stop_strings_end_a_text_in_the_midst_of_right_drafts(bench: Bench, is_including: bool) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    (plain,) = bench.group(ids(20), params)
    text = bench.expected(plain).text
    for begin in range(8, 20):
        stopped = SamplingParams(
            temperature=1.0,
            seed=1,
            max_tokens=60,
            ignore_eos=True,
            stop=text[begin : begin + 2],
            include_stop_str_in_output=is_including,
        )
        (request,) = group = bench.group(ids(20), stopped)
        assert bench.expected(request).finish_reason == "stop"
        scheduler, runtime = bench.open(Oracle(bench.known, lambda _: True))
        run(scheduler, group)
        bench.assert_as_expected(group)
        assert runtime.cache.num_free == 1


def test_end_tokens_end_a_text_in_the_midst_of_right_drafts(bench: Bench) -> None:
    for seed in range(6):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=80, logit_bias={SEP: 6.0})
        (request,) = group = bench.group(ids(20), params)
        bench.expected(request)
        scheduler, _ = bench.open(Oracle(bench.known, lambda _: True))
        run(scheduler, group)
        assert request.finish_reason == "stop"
        bench.assert_as_expected(group)


def test_a_request_that_can_choose_no_token_ends_with_its_error_among_drafts(bench: Bench) -> None:
    def drafts(request: Request, count: int) -> list[int]:
        return [1] * count

    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    failing, other = bench.group(ids(20), params), bench.group(ids(30), params)
    scheduler, runtime = bench.open(_Drafts(drafts), num_slots=2)
    for group in (failing, other):
        scheduler.submit(group)
    while len(other[0].token_ids) < 3:
        scheduler.step()
    failing[0]._sampler = _Refuses()  # type: ignore[assignment]
    run(scheduler)
    assert isinstance(failing[0].error, InputError)
    bench.assert_as_expected(other)
    assert runtime.cache.num_free == 2


class _Refuses:
    def sample(self, logits: NDArray[np.float32]) -> None:
        raise InputError("no token is left to choose from")


class _Drafts:
    """A drafter that is a function."""

    def __init__(self, draft: Callable[[Request, int], list[int]]) -> None:
        self.draft = draft

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


# --- several requests ---


@pytest.mark.parametrize("source", ["oracle", "lookup", "model", "other model"])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_what_it_gets_alone_whoever_comes_and_goes(
    bench: Bench, other_model: Path, source: str, seed: int
) -> None:
    choose = random.Random(seed)
    groups = []
    for i in range(12):
        params = dict(choose.choice(list(SETTINGS.values())))
        if params["temperature"]:
            params["n"] = choose.choice([1, 1, 3])
        repeated = ids(choose.choice([5, 40]), i) * choose.choice([1, 3])
        params["max_tokens"] = max(choose.choice([3, 40, 90]), params.get("min_tokens", 1))
        groups.append(bench.group(repeated, SamplingParams(**params)))
    for group in groups:
        for request in group:
            bench.expected(request)
    drafter: Drafter
    if source == "oracle":
        drafter = Oracle(bench.known, lambda place: place % 5 != 4, [3, 0, 8, 2])
    elif source == "lookup":
        drafter = PromptLookup(min_match=1, max_match=3)
    else:
        drafter = bench.draft_model(None if source == "model" else other_model, chunk_size=50)
    scheduler, runtime = bench.open(
        drafter, num_slots=choose.choice([2, 5]), prefix_cache=choose.random() < 0.5
    )
    requests = []
    for _ in range(60):
        if groups and choose.random() < 0.3:
            group = groups.pop()
            scheduler.submit(group)
            requests += group
        if requests and choose.random() < 0.05:
            scheduler.abort(choose.choice(requests[-4:]))
        scheduler.step()
    run(scheduler, *groups)
    bench.assert_as_expected([*requests, *(request for group in groups for request in group)])
    assert runtime.cache.num_free == runtime.cache.num_slots
    if isinstance(drafter, DraftModel):
        assert drafter._cache.num_free == drafter._cache.num_slots
        assert not drafter._followers
    if isinstance(drafter, PromptLookup):
        assert not drafter._texts
    assert counts(scheduler)[0] > 0


def test_drafts_are_made_only_while_few_requests_decode(bench: Bench) -> None:
    short = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    groups = [bench.group(ids(10, 1), short), bench.group(ids(10, 2), long)]
    for group in groups:
        bench.expected(group[0])
    oracle = Oracle(bench.known, lambda _: True)
    scheduler, _ = bench.open(oracle, num_slots=2, max_rows=1)
    for group in groups:
        scheduler.submit(group)
    while not groups[0][0].is_finished:
        assert counts(scheduler) == (0, 0)
        scheduler.step()
    assert oracle.num_asked == 0
    run(scheduler)
    assert counts(scheduler)[1] > 30
    bench.assert_as_expected([*groups[0], *groups[1]])


def test_a_stream_gives_all_tokens_of_a_step_and_the_same_text(bench: Bench) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=1, ignore_eos=True)
    (request,) = group = bench.group(ids(10), params)
    expected = bench.expected(request)
    scheduler, _ = bench.open(Oracle(bench.known, lambda place: place % 11 != 10))
    scheduler.submit(group)
    chunks = []
    while scheduler.has_work:
        scheduler.step()
        chunk = request.next_chunk()
        if chunk is not None:
            chunks.append(chunk)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(expected.token_ids)
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    assert max(len(chunk.token_ids) for chunk in chunks) == 9
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"


def test_a_step_that_fails_ends_every_request_and_leaves_the_drafter_usable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    drafter = bench.draft_model()
    scheduler, runtime = bench.open(drafter, num_slots=2)
    group = bench.group(ids(20), params)
    scheduler.submit(group)
    for _ in range(3):
        scheduler.step()
    assert drafter._followers

    def breaks(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(drafter._runtime, "step", breaks)
    with pytest.raises(MemoryError):
        scheduler.step()
    monkeypatch.undo()
    assert group[0].error is not None
    assert runtime.cache.num_free == 2
    assert drafter._cache.num_free == drafter._cache.num_slots
    again = bench.group(ids(20), params)
    run(scheduler, again)
    bench.assert_as_expected(again)


# --- where drafts come from ---


def looping_model(folder: Path, **changes: Any) -> Path:
    """Writes one sentence for ever: attention and MLP are silent, and a token's embedding leads to the next.

    Tokens 0..9 follow each other round and round, whatever else of the architecture is changed.
    """
    architecture = tiny_architecture(window=16, **changes)
    tensors = {name: np.zeros_like(value) for name, value in random_tensors(architecture).items()}
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            values[:] = 1
    embeddings = tensors["model.embeddings.tok_embeddings.weight"]
    width = architecture.hidden_size
    embeddings[:] = np.random.default_rng(0).standard_normal(embeddings.shape) * 0.01
    embeddings[:10] = 0
    embeddings[np.arange(10), np.arange(10)] = 4
    # The head turns the direction of a token into that of the next.
    tensors["lm_head.dense.weight"][(np.arange(10) + 1) % 10, np.arange(10)] = 1
    assert tensors["lm_head.dense.weight"].shape == (width, width)
    return write_checkpoint(folder, architecture, tensors=tensors)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(looping_model(tmp_path_factory.mktemp("loop")))


def test_prompt_lookup_makes_a_text_that_repeats_itself_in_a_fraction_of_the_steps(loop: Bench) -> None:
    params = SamplingParams(temperature=0, max_tokens=181, ignore_eos=True)
    group = loop.group([0], params)
    scheduler, _ = loop.open(PromptLookup(min_match=2, max_match=4))
    num_steps = run(scheduler, group)
    assert group[0].token_ids == [(place + 1) % 10 for place in range(181)]
    num_drafted, num_accepted = counts(scheduler)
    assert num_accepted == num_drafted > 140
    assert num_steps < 45
    loop.assert_as_expected(group)


def test_a_model_that_drafts_for_itself_is_always_right(bench: Bench) -> None:
    params = SamplingParams(temperature=0, max_tokens=181, ignore_eos=True)
    group = bench.group(ids(100), params)
    scheduler, _ = bench.open(bench.draft_model(chunk_size=30))
    num_steps = run(scheduler, group)
    bench.assert_as_expected(group)
    num_drafted, num_accepted = counts(scheduler)
    assert num_accepted == num_drafted > 140
    assert num_steps < 45


def test_a_smaller_model_that_is_right_makes_a_text_in_a_fraction_of_the_steps(
    loop: Bench, tmp_path: Path
) -> None:
    small = looping_model(
        tmp_path, num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=1
    )
    params = SamplingParams(temperature=0, max_tokens=181, ignore_eos=True)
    group = loop.group([0], params)
    scheduler, _ = loop.open(loop.draft_model(small))
    num_steps = run(scheduler, group)
    assert group[0].token_ids == [(place + 1) % 10 for place in range(181)]
    num_drafted, num_accepted = counts(scheduler)
    assert num_accepted == num_drafted > 140
    assert num_steps < 45
    loop.assert_as_expected(group)


def test_a_draft_model_reads_a_chunk_of_a_long_text_in_each_step(bench: Bench) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    group = bench.group(ids(300), params)
    drafter = bench.draft_model(chunk_size=20)
    scheduler, _ = bench.open(drafter)
    scheduler.submit(group)
    while not group[0].token_ids:
        scheduler.step()
    read = [0]
    while not counts(scheduler)[0]:
        scheduler.step()
        read.append(drafter._followers[group[0]].slot.length)
    assert max(np.diff(read)) <= 20 + 8
    run(scheduler)
    bench.assert_as_expected(group)


def test_a_draft_model_that_reads_is_asked_in_every_step(bench: Bench) -> None:
    """That it has no drafts yet does not mean that there are none."""
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    group = bench.group(ids(300), params)
    drafter = bench.draft_model(chunk_size=5)
    scheduler, _ = bench.open(drafter, adaptive=True)
    scheduler.submit(group)
    read: list[int] = []
    while not counts(scheduler)[0]:
        scheduler.step()
        if group[0] in drafter._followers:
            read.append(drafter._followers[group[0]].slot.length)
    assert len(read) > 60
    assert np.count_nonzero(np.diff(read[:60]) != 5) <= 1  # a plain step, now and then
    run(scheduler)
    bench.assert_as_expected(group)


def test_a_draft_model_with_a_shorter_context_stops_drafting_at_its_end(bench: Bench) -> None:
    runtime = open_runtime(bench.folder, num_slots=1, context_length=100)
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    group = bench.group(ids(40), params)
    scheduler, _ = bench.open(DraftModel(runtime, chunk_size=64))
    run(scheduler, group)
    bench.assert_as_expected(group)
    assert 0 < counts(scheduler)[1] < 61


class _Text:
    """What `PromptLookup` looks at in a request."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []


def naive_lookup(text: list[int], count: int, min_match: int, max_match: int) -> list[int]:
    """The longest match with the end of the text, the latest of those, and what follows it."""
    best, best_match = None, min_match - 1
    for place in range(len(text) - 1, 0, -1):
        match = 0
        while match < min(max_match, place) and text[place - 1 - match] == text[-1 - match]:
            match += 1
        if match > best_match:
            best, best_match = place, match
    if best is None:
        return []
    drafts = list(text)
    for place in range(best, best + count):
        drafts.append(drafts[place])
    return drafts[len(text) :]


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=15),
    more=st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5),
    min_match=st.integers(1, 3),
    longer=st.integers(0, 2),
    count=st.integers(1, 9),
)
@settings(deadline=None, max_examples=300)
def test_prompt_lookup_finds_the_longest_and_latest_match(
    text: list[int], more: list[list[int]], min_match: int, longer: int, count: int
) -> None:
    lookup = PromptLookup(min_match=min_match, max_match=min_match + longer)
    request: Any = _Text(text)
    for tokens in ([], *more):
        request.token_ids += tokens
        whole = text + request.token_ids
        if len(whole) <= 16:  # of longer texts, only so many places are compared
            expected = naive_lookup(whole, count, min_match, min_match + longer)
            assert lookup.draft(request, count) == expected
    lookup.forget(request)
    assert not lookup._texts


# --- how many ---


def costs(plain: float, each: float) -> StepCosts:
    known = StepCosts()
    for count in (0, 1, 8):
        for _ in range(2):
            known.add(count, plain + each * count)
    return known


def test_nothing_is_drafted_before_a_plain_step_was_measured() -> None:
    assert DraftLength(8, Experience()).choose(StepCosts(), num_rows=1) == 0


@pytest.mark.parametrize(("each", "expected"), [(0.0, 8), (0.05, 8), (0.3, 3), (0.9, 0)])
def test_the_dearer_a_draft_the_fewer_are_made(each: float, expected: int) -> None:
    assert DraftLength(8, Experience()).choose(costs(1.0, each), num_rows=1) == expected


def test_more_rows_make_drafts_pay_less() -> None:
    chosen = [DraftLength(8, Experience()).choose(costs(1.0, 0.2), num_rows=rows) for rows in (1, 2, 4, 8)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 0
    assert chosen[-1] == 0


def simulate(length: DraftLength, known: StepCosts, is_right: Callable[[int], bool], steps: int) -> list[int]:
    chosen = []
    place = 0
    for _ in range(steps):
        count = length.choose(known, num_rows=1)
        chosen.append(count)
        right = 0
        while right < count and is_right(place + right):
            right += 1
        if count:
            length.learn(num_accepted=right, was_rejected=right < count)
        place += right + 1
    return chosen


def test_drafts_that_are_never_right_are_soon_given_up_and_retried_seldom() -> None:
    chosen = simulate(DraftLength(8, Experience()), costs(1.0, 0.1), lambda _: False, 2000)
    assert 0 < sum(map(bool, chosen)) < 100
    assert sum(map(bool, chosen[1000:])) < 40
    assert any(chosen[1000:])
    # What they cost, at a tenth of a step for each.
    assert sum(chosen) * 0.1 < 0.02 * len(chosen)


def test_drafts_that_are_always_right_become_as_long_as_allowed() -> None:
    assert set(simulate(DraftLength(8, Experience()), costs(1.0, 0.1), lambda _: True, 50)[5:]) == {8}


def test_drafting_comes_back_when_drafts_become_right_again() -> None:
    length = DraftLength(8, Experience())
    known = costs(1.0, 0.1)
    simulate(length, known, lambda _: False, 500)
    assert 8 in simulate(length, known, lambda _: True, 300)


def test_a_new_request_tries_few_drafts_where_others_had_no_luck() -> None:
    known, general = costs(1.0, 0.1), Experience()
    first = simulate(DraftLength(8, general), known, lambda _: False, 60)
    assert max(first) > 2
    simulate(DraftLength(8, general), known, lambda _: False, 2000)
    later = simulate(DraftLength(8, general), known, lambda _: False, 60)
    assert 0 < sum(later) < 8
    # It goes by what it sees itself as soon as it sees something.
    assert 8 in simulate(DraftLength(8, general), known, lambda _: True, 20)


def test_a_new_request_pauses_for_longer_where_others_had_no_luck() -> None:
    known, general = costs(1.0, 0.1), Experience()
    tried = [sum(map(bool, simulate(DraftLength(8, general), known, lambda _: False, 250))) for _ in range(9)]
    assert tried[0] > 5
    assert all(1 <= count <= 4 for count in tried[2:])
    # Short ones neither forget nor cut short what longer ones have learned.
    tried = [sum(map(bool, simulate(DraftLength(8, general), known, lambda _: False, 60))) for _ in range(9)]
    assert max(tried) <= 2
    # Drafts that become right later in a text are found nevertheless, and then pauses are short again.
    length = DraftLength(8, general)
    simulate(length, known, lambda _: False, 100)
    assert 8 in simulate(length, known, lambda _: True, 200)
    assert general.longest_pause == 0


def test_a_probe_waits_for_something_to_draft() -> None:
    known, general = costs(1.0, 0.1), Experience()
    general.luck = Luck(0.0)
    length = DraftLength(8, general)
    assert [length.choose(known, num_rows=1) for _ in range(50)] == [2] * 50
    length.learn(num_accepted=0, was_rejected=True)
    assert length.choose(known, num_rows=1) == 0


def test_drafts_that_are_right_and_cost_too_much_are_tried_ever_more_seldom() -> None:
    chosen = simulate(DraftLength(8, Experience()), costs(1.0, 1.3), lambda _: True, 2000)
    assert 0 < sum(map(bool, chosen)) < 20


def test_where_drafts_cost_too_much_new_requests_pause_as_long_as_earlier_ones() -> None:
    known, general = costs(1.0, 1.3), Experience()
    tried = [sum(map(bool, simulate(DraftLength(8, general), known, lambda _: True, 200))) for _ in range(20)]
    assert tried[0] > 1
    assert sum(tried[10:]) <= 10
    # Once they cost less, they pay again, and the next pause is short.
    assert 8 in simulate(DraftLength(8, general), costs(1.0, 0.1), lambda _: True, 40)
    assert general.pauses.next() == 16


def test_a_choice_is_made_anew_for_another_number_of_rows() -> None:
    known, length = costs(1.0, 0.2), DraftLength(8, Experience())
    alone = length.choose(known, num_rows=1)
    assert length.choose(known, num_rows=4) < alone


def test_where_there_is_nothing_to_draft_it_is_looked_for_seldom_until_something_is_found() -> None:
    known, general = costs(1.0, 0.1), Experience()
    length = DraftLength(8, general)

    def looks(of: DraftLength, steps: int) -> list[int]:
        looked = []
        for step in range(steps):
            if of.choose(known, num_rows=1):
                looked.append(step)
                of.miss()
        return looked

    assert looks(length, 200) == [*range(16), *range(19, 200, 4)]
    # A new request starts from that, and a draft that is wrong changes nothing.
    later = DraftLength(8, general)
    assert looks(later, 8) == [3, 7]
    later.learn(num_accepted=0, was_rejected=True)
    assert looks(later, 8) == [3, 7]
    length.learn(num_accepted=8, was_rejected=False)
    assert all(length.choose(known, num_rows=1) for _ in range(16))


def test_a_request_with_nothing_to_draft_seldom_asks_for_drafts(bench: Bench) -> None:
    group = bench.group(ids(20), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    bench.expected(group[0])
    oracle = Oracle(bench.known, lambda _: True, limits=(0,))
    scheduler, _ = bench.open(oracle, adaptive=True)
    run(scheduler, group)
    bench.assert_as_expected(group)
    assert 16 < oracle.num_asked < 16 + 400 / 4 + 2


def test_a_request_whose_drafts_are_never_right_soon_makes_plain_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the time that steps take replaced by a count of tokens."""
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    (request,) = group = bench.group(ids(20), params)
    bench.expected(request)
    oracle = Oracle(bench.known, lambda _: False)
    scheduler, runtime = bench.open(oracle, adaptive=True)
    monkeypatch.setattr("modernbert_decoder.engine.speculation.time.perf_counter", lambda: 0.0)
    step = runtime.step

    def timed(rows: list[Row]) -> object:
        before = runtime.network_seconds
        result = step(rows)
        runtime._meter.seconds = before + 1.0 + 0.1 * sum(len(row.token_ids) - 1 for row in rows)
        return result

    monkeypatch.setattr(runtime, "step", timed)
    run(scheduler, group)
    bench.assert_as_expected(group)
    num_drafted, num_accepted = counts(scheduler)
    assert 0 < num_drafted < 100
    assert num_accepted == 0


# --- as an LLM ---

STORY = "The king had a dog. The dog had a king. The king had a dog, and the dog "


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with LLM("storyteller", dtype="float32", threads=2) as llm:
        yield llm


@pytest.mark.parametrize(
    "speculation",
    [
        Speculation(adaptive=False),
        Speculation(),
        Speculation(draft_model="storyteller", dtype="int8", adaptive=False, max_draft=4),
        Speculation(draft_model="storyteller", dtype="int4"),
    ],
    ids=["lookup", "lookup, adaptive", "model", "model, adaptive"],
)
def test_an_llm_gives_the_same_with_speculation(plain: LLM, speculation: Speculation) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=60, repetition_penalty=1.05),
        SamplingParams(temperature=0.8, seed=1, max_tokens=60, logprobs=2),
        SamplingParams(temperature=0.8, seed=2, max_tokens=40, n=3),
    ]
    with LLM("storyteller", dtype="float32", threads=2, speculation=speculation) as llm:
        for each in params:
            expected, given = plain.generate(STORY, each)[0], llm.generate(STORY, each)[0]
            for ours, theirs in zip(given.outputs, expected.outputs, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.text == theirs.text
        speculator = llm._driver.scheduler.speculator
        assert speculator is not None
        if not speculation.adaptive:
            assert 0 < speculator.num_accepted <= speculator.num_drafted
            assert (
                "".join(chunk.text for chunk in llm.stream(STORY, params[1]))
                == plain.generate(STORY, params[1])[0].outputs[0].text
            )


PARTING_PROMPTS = (STORY, "Once upon a time", "The ship sailed on, and the wind ", "In the deep wood")
# Of a token's log-probability, between a step that verifies drafts and steps of single tokens.
PARTING = {"float32": 1e-4, "int8": 0.15, "int4": 0.15, "w8a8": 0.15}
SPECULATIONS = (
    Speculation(adaptive=False),
    Speculation(),
    Speculation(draft_model="storyteller", dtype="int4", adaptive=False, max_draft=4),
)


@pytest.mark.parametrize("dtype", list(PARTING))
def test_a_batch_invariant_llm_gives_the_same_to_the_last_bit_with_speculation(dtype: str) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=100, logprobs=5, ignore_eos=True)
    drawn = SamplingParams(temperature=0.6, seed=1, max_tokens=60, logprobs=2)
    options: dict[str, Any] = {"dtype": dtype, "threads": 1, "batch_invariant": True}
    with LLM("storyteller", **options) as llm:
        expected = [
            [output.outputs for output in llm.generate(PARTING_PROMPTS, each)] for each in (greedy, drawn)
        ]
    for speculation in SPECULATIONS:
        with LLM("storyteller", speculation=speculation, **options) as llm:
            given = [
                [llm.generate(prompt, each)[0].outputs for prompt in PARTING_PROMPTS]
                for each in (greedy, drawn)
            ]
            speculator = llm._driver.scheduler.speculator
            assert speculator is not None
            assert speculator.num_accepted > (0 if speculation.adaptive else 40)
        assert given == expected


def test_rows_as_long_as_a_stepwise_graph_takes_give_the_same_to_the_last_bit() -> None:
    params = SamplingParams(temperature=0, max_tokens=200, logprobs=1, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "int8", "threads": 2, "batch_invariant": True}
    with LLM("storyteller", **options) as llm:
        expected = llm.generate(STORY * 3, params)[0].outputs
    with LLM("storyteller", speculation=Speculation(max_draft=64, adaptive=False), **options) as llm:
        assert llm.generate(STORY * 3, params)[0].outputs == expected
        assert llm._speculator is not None
        assert llm._speculator.num_accepted > 100


@pytest.mark.parametrize("dtype", list(PARTING))
def test_in_other_llms_texts_part_only_where_two_tokens_are_about_as_likely(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, logprobs=5, ignore_eos=True)
    with LLM("storyteller", dtype=dtype, threads=1) as llm:
        expected = [llm.generate(prompt, params)[0].outputs[0] for prompt in PARTING_PROMPTS]
    speculation = Speculation(adaptive=False)
    with LLM("storyteller", dtype=dtype, threads=1, speculation=speculation) as llm:
        given = [llm.generate(prompt, params)[0].outputs[0] for prompt in PARTING_PROMPTS]
        # What drafts change is the same in every run, unless the clock decides how many there are.
        assert llm.generate(PARTING_PROMPTS[0], params)[0].outputs[0].token_ids == given[0].token_ids
        speculator = llm._driver.scheduler.speculator
        assert speculator is not None
        assert speculator.num_accepted > 40
    for ours, theirs in zip(given, expected, strict=True):
        assert_equal_until_a_near_tie(ours, theirs, tolerance=PARTING[dtype])


def assert_equal_until_a_near_tie(
    given: CompletionOutput, expected: CompletionOutput, *, tolerance: float
) -> None:
    assert expected.logprobs is not None
    assert given.logprobs is not None
    for place, (ours, theirs) in enumerate(zip(given.token_ids, expected.token_ids, strict=True)):
        likeliest = expected.logprobs[place]
        assert ours in likeliest, f"at {place}, a token that is not even among the likeliest"
        gap = likeliest[theirs].logprob - likeliest[ours].logprob
        assert gap <= tolerance, f"at {place}"
        assert given.logprobs[place][ours].logprob == pytest.approx(likeliest[ours].logprob, abs=tolerance)
        if ours != theirs:
            return


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(regex="(the dog, ){12}a king"),
        StructuredOutput(json={"type": "array", "items": {"enum": ["dog", "king"]}, "minItems": 12}),
    ],
    ids=["regex", "json"],
)
def test_structured_output_is_the_same_with_drafts(plain: LLM, structured: StructuredOutput) -> None:
    pytest.importorskip("llguidance")
    with LLM("storyteller", dtype="float32", threads=2, speculation=Speculation(adaptive=False)) as llm:
        for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 2}):
            params = SamplingParams(max_tokens=80, structured=structured, **sampling)
            expected, given = plain.generate(STORY, params)[0], llm.generate(STORY, params)[0]
            assert given.outputs == expected.outputs
        speculator = llm._driver.scheduler.speculator
        assert speculator is not None
        assert speculator.num_accepted > 0


def test_the_command_line_gives_the_same_with_speculation(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for options in ([], ["--speculate"]):
        arguments = ["generate", "--dtype", "float32", "--temperature", "0", "--max-tokens", "40", *options]
        assert main([*arguments, STORY]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] > STORY


def test_closing_an_llm_releases_its_draft_model(bench: Bench) -> None:
    llm = LLM(bench.folder, dtype="float32", threads=1, speculation=Speculation(draft_model=bench.folder))
    llm.generate([CLS, 65], SamplingParams(max_tokens=5))
    assert llm._speculator is not None
    drafter = llm._speculator._drafter
    assert isinstance(drafter, DraftModel)
    llm.close()
    assert not drafter._cache.layers


def test_closing_an_llm_releases_all_its_sessions() -> None:
    options: dict[str, Any] = {"dtype": "int8", "prefill_dtype": "w8a8", "batch_invariant": True}
    llm = LLM("storyteller", threads=1, speculation=Speculation(), **options)
    runtime = llm._runtime
    sessions = [runtime._session, runtime._prompt_session, runtime._stepwise_session]
    assert len(set(map(id, sessions))) == 3
    assert None not in sessions
    released = [weakref.ref(each) for each in sessions]
    sessions.clear()
    llm.close()
    gc.collect()
    assert [each() for each in released] == [None] * 3


@pytest.mark.parametrize("head", [Head.SEQUENCE_CLASSIFICATION, Head.NONE])
def test_models_that_complete_nothing_open_with_it_and_do_without(tmp_path: Path, head: Head) -> None:
    folder = write_checkpoint(tmp_path, tiny_architecture(head=head, layer_kinds=(LayerKind.FULL,) * 4))
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "batch_invariant": True}
    with LLM(folder, **options) as plain, LLM(folder, speculation=Speculation(), **options) as llm:
        assert llm._runtime._stepwise_session is None
        assert np.array_equal(llm.embed("abc"), plain.embed("abc"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "medusa"}, r"kind is 'medusa'; choose prompt_lookup or draft_model"),
        ({"kind": "draft_model"}, r"needs draft_model"),
        ({"kind": "prompt_lookup", "draft_model": "x"}, r"draft_model is 'x', which means nothing"),
        ({"dtype": "int8"}, r"dtype is 'int8', which means nothing for speculation by prompt_lookup"),
        ({"draft_model": "x", "max_match": 5}, r"max_match is 5, which means nothing"),
        ({"max_draft": 0}, r"max_draft must be an integer from 1 to 64, got 0"),
        ({"min_match": 3, "max_match": 2}, r"max_match must be an integer of at least 3, got 2"),
        ({"min_match": 0}, r"min_match must be"),
        ({"max_rows": 0}, r"max_rows must be"),
    ],
    ids=str,
)
def test_a_speculation_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Speculation(**arguments)


def test_a_draft_model_with_other_tokens_is_refused(bench: Bench, tmp_path: Path) -> None:
    larger = write_checkpoint(tmp_path / "larger", tiny_architecture(vocab_size=400))
    with pytest.raises(InputError, match=r"another vocabulary .* \(400 ids, not 320\)"):
        LLM(bench.folder, threads=1, speculation=Speculation(draft_model=larger))
    renamed = write_checkpoint(tmp_path / "renamed", ARCHITECTURE)
    path = renamed / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"].update({"A": 66, "B": 65})
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match=r"another vocabulary than the model it is to draft for; choose one"):
        LLM(bench.folder, threads=1, speculation=Speculation(draft_model=renamed))


def test_a_draft_model_that_is_no_language_model_is_refused(bench: Bench, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny_architecture(head=Head.NONE))
    with pytest.raises(InputError, match=r"has no head and cannot draft"):
        LLM(bench.folder, threads=1, speculation=Speculation(draft_model=folder))
