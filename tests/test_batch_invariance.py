"""Logits and completions that do not depend, to the last bit, on what is computed beside or before them."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import open_runtime, random_ids, tiny_architecture, write_checkpoint
from modernbert_decoder import LLM, AsyncLLM, CompletionOutput, SamplingParams
from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.checkpoint import BUNDLED_MODEL
from modernbert_decoder.engine.batch_invariance import CallShape, Pairs, chunk_end, pieces
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import Slot
from modernbert_decoder.engine.prefix_cache import MIN_GAP
from modernbert_decoder.engine.rings import (
    QUERY_BLOCK,
    most_new_tokens,
    ring_capacity,
    ring_length,
    summed_terms,
)
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.quantization import QuantizationScheme

# Matrices of 128 columns and more, as only blocks of 64 values or more are summed in two ways.
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64, as released": {"hidden_size": 128, "intermediate_size": 128},
    "heads of 32": {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256},
    "heads of 128": {"hidden_size": 256},
    "a wide window": {"hidden_size": 128, "intermediate_size": 128, "window": 200},
    "width 192": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 384},
    "full layers only": {"hidden_size": 128, "layer_kinds": (LayerKind.FULL,) * 4},
}
FORMATS = [("float32", None), ("int8", None), ("int4", None), ("int4", "int4"), ("w8a8", None)]
# Prompt and completion: single tokens, blocks of attention and one more, a chunk and more.
LENGTHS = [(1, 9), (2, 5), (65, 3), (127, 8), (193, 2), (259, 6), (40, 12)]
NUM_SLOTS = 5


def invariant_runtime(folder: Path, scheme: QuantizationScheme, **options: Any) -> Runtime:
    runtime = open_runtime(folder, scheme=scheme, num_slots=NUM_SLOTS, pairs=Pairs.of(scheme), **options)
    runtime.is_batch_invariant = True
    return runtime


class Bench:
    """Texts, and what a runtime gives for each when nothing else is computed."""

    def __init__(self, folder: Path, scheme: QuantizationScheme) -> None:
        self.runtime = invariant_runtime(folder, scheme, context_length=300)
        architecture = self.runtime.architecture
        self.texts = [random_ids(architecture, sum(each), seed=i) for i, each in enumerate(LENGTHS)]
        self.alone = [self._alone(i) for i in range(len(LENGTHS))]

    def _alone(self, index: int) -> list[bytes]:
        slot = self.runtime.cache.allocate()
        rows = [self.row(index, slot, LENGTHS[index][0])]
        found = [self.runtime.step(rows)[0][-1].tobytes()]
        while slot.length < len(self.texts[index]):
            found.append(self.runtime.step([self.row(index, slot, 1)])[0][-1].tobytes())
        self.runtime.cache.free(slot)
        return found

    def row(self, index: int, slot: Slot, most: int) -> Row:
        """The next chunk of a prompt, of about `most` tokens, or the next token behind it."""
        start, num_prompt = slot.length, LENGTHS[index][0]
        if start >= num_prompt:
            return Row(slot, self.texts[index][start : start + 1])
        end = chunk_end(start, min(start + most, num_prompt), num_prompt)
        return Row(slot, self.texts[index][start:end], int(end == num_prompt))

    def mixed(self, choice: random.Random) -> Iterator[tuple[bytes, bytes]]:
        """Every text's logits when they come, go and are cut at random, each with what it has alone."""
        cache = self.runtime.cache
        cache.reset()  # of an example that failed half-way
        waiting = choice.sample(range(len(self.texts)), len(self.texts))
        live: dict[int, Slot] = {}
        counts = dict.fromkeys(waiting, 0)
        while waiting or live:
            while waiting and cache.num_free and choice.random() < 0.6:
                live[waiting.pop()] = cache.allocate()
            rows = {i: self.row(i, live[i], choice.randrange(1, 200)) for i in live if choice.random() < 0.7}
            if rows:
                for i, logits in zip(rows, self.runtime.step(list(rows.values())), strict=True):
                    if len(logits):
                        yield logits[-1].tobytes(), self.alone[i][counts[i]]
                        counts[i] += 1
            for i, slot in list(live.items()):
                if slot.length == len(self.texts[i]) or choice.random() < 0.02:  # some are cut short
                    cache.free(live.pop(i))


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[str, str | None]], Bench]:
    """The bench of a shape in a format, opened once."""
    opened: dict[tuple[str, str, str | None], Bench] = {}

    def bench(shape: str, formats: tuple[str, str | None]) -> Bench:
        key = (shape, *formats)
        if key not in opened:
            folder = tmp_path_factory.mktemp("shape")
            write_checkpoint(folder, tiny_architecture(**SHAPES[shape]))
            opened[key] = Bench(folder, QuantizationScheme.named(*formats))
        return opened[key]

    return bench


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_do_not_depend_on_neighbours_or_cuts(
    benches: Callable[[str, tuple[str, str | None]], Bench], shape: str, formats: tuple[str, str | None]
) -> None:
    bench = benches(shape, formats)

    @settings(max_examples=3, deadline=None)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        for mixed, alone in bench.mixed(random.Random(seed)):
            assert mixed == alone

    check()


NUM_STEPWISE = 10


@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_a_row_with_many_logits_equal_single_ones(
    tmp_path: Path, shape: str, formats: tuple[str, str | None]
) -> None:
    """Also when wrong ones were fed and taken back, at every place of a ring and beside others."""
    architecture = tiny_architecture(**SHAPES[shape])
    runtime = invariant_runtime(
        write_checkpoint(tmp_path, architecture),
        QuantizationScheme.named(*formats),
        context_length=331,  # at whose end there is no room to pad a row
        num_stepwise=NUM_STEPWISE,
        threads=2,
    )
    cache, choice = runtime.cache, random.Random(0)
    texts = [random_ids(architecture, 330, seed=seed) for seed in range(3)]
    num_prompts = [2, 75, 40]

    def begun(index: int) -> Slot:
        slot = cache.allocate()
        runtime.step([Row(slot, texts[index][: num_prompts[index]], 0)])
        return slot

    alone: list[list[bytes]] = []
    for index, text in enumerate(texts):
        slot = begun(index)
        alone.append([runtime.step([Row(slot, [each])])[0][0].tobytes() for each in text[slot.length :]])
        cache.free(slot)

    def coming(index: int, slot: Slot) -> Row:
        """A few tokens, of which the last may be wrong ones."""
        right = choice.randrange(1, NUM_STEPWISE)
        wrong = choice.choice([0, 0, 1, 4])
        room = cache.num_reversible(slot.length + 1)
        tokens = texts[index][slot.length :][:right]
        tokens += [int(each) for each in random_ids(architecture, wrong, seed=slot.length)] if wrong else []
        tokens = tokens[: max(1, min(NUM_STEPWISE - 1, 1 + room, cache.capacity - slot.length))]
        return Row(slot, tokens, len(tokens))

    slots = {index: begun(index) for index in range(len(texts))}
    num_several = 0
    while slots:
        rows = {i: coming(i, slot) for i, slot in slots.items() if choice.random() < 0.8}
        before = {i: slots[i].length for i in rows}
        if not rows:
            continue
        for (i, row), logits in zip(rows.items(), runtime.step(list(rows.values())), strict=True):
            start, text = before[i], texts[i]
            num_right = 0
            for place, token_id in enumerate(row.token_ids):
                if start + place == len(text) or token_id != text[start + place]:
                    break
                assert logits[place].tobytes() == alone[i][start + place - num_prompts[i]], (i, start, place)
                num_right += 1
            num_several += num_right > 1
            cache.truncate(row.slot, start + num_right)
        for i, slot in list(slots.items()):
            if slot.length >= len(texts[i]):
                cache.free(slots.pop(i))
    assert num_several > 30
    runtime.close()


def has_vnni() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return sys.platform == "linux" and "avx512_vnni" in cpuinfo.read_text(encoding="utf-8")


@pytest.mark.skipif(not has_vnni(), reason="other processors' kernels may sum a single token like a pair")
@pytest.mark.parametrize("formats", [("int8", None), ("int4", None), ("int4", "int4")], ids=str)
def test_without_the_option_a_neighbour_changes_last_bits(
    benches: Callable[[str, tuple[str, str | None]], Bench], formats: tuple[str, str | None]
) -> None:
    bench = benches("heads of 64, as released", formats)
    bench.runtime.is_batch_invariant = False
    try:
        pairs = list(bench.mixed(random.Random(0)))
    finally:
        bench.runtime.is_batch_invariant = True
    assert any(mixed != alone for mixed, alone in pairs)


@pytest.fixture
def int8(tmp_path: Path) -> Runtime:
    write_checkpoint(tmp_path, tiny_architecture())
    return invariant_runtime(tmp_path, QuantizationScheme.named("int8"), context_length=101)


def recorded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that a runtime makes from now on."""
    calls: list[Any] = []
    execute = runtime._meter.execute

    def record(call: Any) -> None:
        calls.append(call)
        execute(call)

    monkeypatch.setattr(runtime._meter, "execute", record)
    return calls


@pytest.mark.parametrize("num_slots", range(1, NUM_SLOTS + 1))
def test_a_place_that_a_call_takes_along_is_not_touched(int8: Runtime, num_slots: int) -> None:
    slots = [int8.cache.allocate() for _ in range(NUM_SLOTS)]
    ids = random_ids(int8.architecture, 99)
    for slot in slots:
        int8.step([Row(slot, ids[: 90 + slot.index], 0)])
    layers = int8.cache.layers
    behind = [each[num_slots:].copy() for pair in layers for each in pair]
    for _ in range(2):
        results = int8.step([Row(slot, [7]) for slot in slots[:num_slots]])
        assert [logits.shape for logits in results] == [(1, int8.architecture.vocab_size)] * num_slots
    now = [each[num_slots:] for pair in layers for each in pair]
    for before, after in zip(behind, now, strict=True):
        np.testing.assert_array_equal(before, after)


def test_at_the_end_of_the_context_a_call_takes_a_place_along_and_changes_nothing(
    int8: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(int8.architecture, 101)
    first, second = int8.cache.allocate(), int8.cache.allocate()
    int8.step([Row(second, ids[:50], 0)])
    int8.step([Row(first, ids[:92], 0)])
    behind = [each[1:2].copy() for pair in int8.cache.layers for each in pair]
    calls = recorded(int8, monkeypatch)
    (found,) = int8.step([Row(first, ids[92:])])
    assert [call.input_ids.shape for call in calls] == [(2, 9)]  # no room for a tenth token
    now = [each[1:2] for pair in int8.cache.layers for each in pair]
    for before, after in zip(behind, now, strict=True):
        np.testing.assert_array_equal(before, after)
    found = found.copy()
    int8.cache.reset()
    whole = int8.cache.allocate()
    int8.step([Row(whole, ids[:95], 0)])
    np.testing.assert_array_equal(int8.step([Row(whole, ids[95:])])[0], found)


def test_rows_that_only_look_like_decoding_get_their_own_logits(int8: Runtime) -> None:
    ids = random_ids(int8.architecture, 40)

    def begun() -> list[Slot]:
        int8.cache.reset()
        slots = [int8.cache.allocate(), int8.cache.allocate()]
        for slot in slots:
            int8.step([Row(slot, ids[: 20 + slot.index], 0)])
        return slots

    def last(slots: Sequence[Slot]) -> bytes:
        return int8.step([Row(slots[0], [7], 0), Row(slots[1], [8], 1)])[1].tobytes()

    expected = last(begun())
    slots = begun()
    int8.step([Row(slot, [9]) for slot in slots])  # a call of the same size, which is kept
    assert last(begun()) == expected


@pytest.mark.parametrize(
    ("formats", "pairs"),
    [
        (("float32", None), Pairs()),
        (("float32", "int8"), Pairs(positions=True)),
        (("w8a8", None), Pairs(positions=True)),
        (("int8", "float32"), Pairs(tokens=True, positions=True)),
        (("int4", None), Pairs(tokens=True, positions=True)),
    ],
)
def test_formats_of_blocks_want_pairs(formats: tuple[str, str | None], pairs: Pairs) -> None:
    assert Pairs.of(QuantizationScheme.named(*formats)) == pairs


def test_every_call_of_int8_has_even_numbers(int8: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(int8, monkeypatch)
    slots = [int8.cache.allocate() for _ in range(NUM_SLOTS)]
    ids = random_ids(int8.architecture, 101)
    int8.step([Row(slots[0], ids[:92], 0)])
    int8.step([Row(slots[0], ids[92:])])  # to the end of the context: there is no room for padding
    for count in (3, 9, 9):
        int8.step([Row(slots[1], ids[:count], 0), Row(slots[2], ids[:9], 1), Row(slots[4], ids[:1])])
        int8.step([Row(slot, [7]) for slot in slots[1:4]])
    assert len(calls) > 6
    for call in calls:
        assert call.input_ids.size % 2 == 0
        assert len(call.logit_positions) % 2 == 0


@pytest.mark.parametrize("dtype", ["float32", "int8", "w8a8"])
def test_without_the_option_calls_are_no_larger_than_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    write_checkpoint(tmp_path, tiny_architecture())
    runtime = invariant_runtime(tmp_path, QuantizationScheme.named(dtype))
    runtime.is_batch_invariant = False
    calls = recorded(runtime, monkeypatch)
    slots = [runtime.cache.allocate() for _ in range(3)]
    ids = random_ids(runtime.architecture, 601)
    runtime.step([Row(slots[0], ids)])
    runtime.step([Row(slots[1], ids[:9]), Row(slots[2], ids[:9])])
    runtime.step([Row(slot, [7]) for slot in slots])
    shapes = [(call.input_ids.shape, len(call.logit_positions)) for call in calls]
    assert shapes == [((1, 601), 1), ((2, 9), 2), ((3, 1), 3)]


@settings(deadline=None)
@given(
    st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 300), st.integers(0, 40), st.booleans()
)
def test_padding_adds_no_more_than_a_token_to_each_row_or_a_row(
    tokens: bool, positions: bool, places: int, width: int, num_logits: int, has_room: bool
) -> None:
    shape = CallShape(places, width, num_logits)
    padded = Pairs(tokens, positions).padded(shape, has_room=has_room)
    assert not tokens or padded.places * padded.width % 2 == 0
    assert not positions or padded.positions % 2 == 0
    added = (padded.places - places, padded.width - width, padded.positions - num_logits)
    assert added in {(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)}
    assert width == padded.width or (width > 1 and has_room)
    assert num_logits or not padded.positions


@settings(deadline=None)
@given(st.integers(1, 2000), st.sampled_from([None, 64, 92, 128]))
def test_pieces_are_even_and_leave_attention_no_single_token(count: int, most: int | None) -> None:
    cut = list(pieces(range(count), most))
    assert [token for piece in cut for token in piece] == list(range(count))
    assert all(len(piece) % 2 == 0 for piece in cut[:-1])
    assert count == 1 or all(len(piece) % QUERY_BLOCK != 1 for piece in cut)
    assert most is None or max(map(len, cut)) <= most


@settings(deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(1, 60)))
def test_chunks_of_a_prompt_are_never_a_single_token(total: int, budgets: list[int]) -> None:
    start = 0
    for budget in [*budgets, total]:
        wanted = min(start + budget, total)
        end = chunk_end(start, wanted, total)
        assert abs(end - wanted) <= 2
        assert end - start >= min(2, total)
        start = end
        if start == total:
            break
    assert start == total


@settings(deadline=None)
@given(st.sampled_from([16, 32, 48, 64, 96, 128, 256]), st.integers(1, 600), st.integers(0, 5000))
def test_a_ring_is_summed_in_one_go_or_moves_by_whole_sums(width: int, window: int, total: int) -> None:
    architecture = tiny_architecture(hidden_size=2 * width, window=window)
    capacity, most, terms = ring_capacity(architecture), most_new_tokens(architecture), summed_terms(width)
    assert most is not None
    assert most >= QUERY_BLOCK
    assert most % 2 == 0
    first = total - ring_length(total, capacity, window)
    assert first % 16 == 0
    assert capacity + most <= terms or (first % terms == 0 and most <= QUERY_BLOCK)


# completions

GREEDY_ONE = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(seed=11, max_tokens=20, ignore_eos=True, logprobs=1)
SEVERAL = SamplingParams(n=3, seed=5, top_p=0.9, max_tokens=9, ignore_eos=True, logprobs=0)
Request = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Prompts of many lengths, some with a common beginning."""
    ids = np.random.default_rng(0).integers(10, 4000, 400).tolist()
    prompts = [ids[:1], ids[:2], ids[:64], ids[:65], ids[:128], [*ids[:100], *ids[200:233]], ids[:331]]
    return [(prompt, params) for prompt in prompts for params in (GREEDY, SEEDED, SEVERAL)]


def opened(dtype: str, **options: Any) -> LLM:
    return LLM(BUNDLED_MODEL, dtype=dtype, **{"max_context": 400, "batch_invariant": True, **options})


def outputs_of(llm: LLM, requests: Sequence[Request]) -> list[tuple[CompletionOutput, ...]]:
    prompts, params = zip(*requests, strict=True)
    return [output.outputs for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module", params=["float32", "int8", "int4", "w8a8"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(dtype: str, requests: list[Request]) -> list[tuple[CompletionOutput, ...]]:
    """What every request gets while nothing else is computed."""
    with opened(dtype) as llm:
        return [outputs_of(llm, [request])[0] for request in requests]


@pytest.mark.parametrize(
    "options", [{}, {"max_slots": 3, "chunk_size": 1}, {"max_slots": 7, "chunk_size": 50, "threads": 1}]
)
def test_completions_are_the_same_together_as_alone(
    dtype: str,
    requests: list[Request],
    alone: list[tuple[CompletionOutput, ...]],
    options: dict[str, Any],
) -> None:
    with opened(dtype, **options) as llm:
        assert outputs_of(llm, requests) == alone


def test_completions_are_the_same_behind_known_beginnings(
    dtype: str, requests: list[Request], alone: list[tuple[CompletionOutput, ...]]
) -> None:
    with opened(dtype, prefix_cache_bytes=1 << 26) as llm:
        prefix_cache = llm._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        assert outputs_of(llm, requests) == alone
        for request, expected in zip(requests, alone, strict=True):
            hits = prefix_cache.num_hit_tokens
            assert outputs_of(llm, [request]) == [expected]
            assert prefix_cache.num_hit_tokens - hits > len(request[0]) - 2 - MIN_GAP


def test_a_conversation_goes_on_as_if_nothing_of_it_were_known(dtype: str) -> None:
    first = (list(range(10, 70)), SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))

    def second(llm: LLM) -> list[tuple[CompletionOutput, ...]]:
        ((answer,),) = outputs_of(llm, [first])
        return outputs_of(llm, [([*first[0], *answer.token_ids, 5, 6, 7], GREEDY)])

    with opened(dtype) as llm:
        expected = second(llm)
    with opened(dtype, prefix_cache_bytes=1 << 26) as llm:
        prefix_cache = llm._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        assert second(llm) == expected
        assert prefix_cache.num_hit_tokens == len(first[0]) - 2


@pytest.mark.parametrize("num_tokens", [126, 127, 128, 129, 192])
def test_a_prompt_is_known_but_for_two_tokens_wherever_its_rings_are_compacted(num_tokens: int) -> None:
    ids = list(range(10, 10 + num_tokens))
    with opened("int8", prefix_cache_bytes=1 << 26) as llm:
        prefix_cache = llm._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        first = outputs_of(llm, [(ids, GREEDY)])
        assert prefix_cache.num_hit_tokens == 0
        assert outputs_of(llm, [(ids, GREEDY)]) == first
        assert prefix_cache.num_hit_tokens == num_tokens - 2


def test_completions_behind_an_event_loop_are_those_of_the_model_alone(
    dtype: str, requests: list[Request], alone: list[tuple[CompletionOutput, ...]]
) -> None:
    async def answers(engine: AsyncLLM) -> list[tuple[CompletionOutput, ...]]:
        async def answer(request: Request, delay: int) -> tuple[CompletionOutput, ...]:
            for _ in range(delay):
                await asyncio.sleep(0)
            return (await engine.generate(*request)).outputs

        async def begun() -> None:
            async for _ in engine.stream(*requests[-1]):
                return  # the stream is dropped, and its slot free

        gone = [asyncio.ensure_future(begun()) for _ in range(4)]
        mixed = random.Random(3).sample(range(len(requests)), len(requests))
        found = await asyncio.gather(*(answer(requests[i], 5 * i) for i in mixed))
        await asyncio.gather(*gone)
        by_index = dict(zip(mixed, found, strict=True))
        return [by_index[i] for i in range(len(requests))]

    async def main() -> list[tuple[CompletionOutput, ...]]:
        with opened(dtype, batch_invariant=False, prefix_cache_bytes=1 << 26) as llm:
            async with AsyncLLM(llm) as engine:
                return await answers(engine)

    assert asyncio.run(main()) == alone


def test_a_prompt_may_be_as_long_as_the_context_allows() -> None:
    for max_context in (98, 99, 300, 301):
        with opened("int8", max_slots=1) as llm:
            expected = llm.generate([list(range(10, 10 + max_context - 1))], GREEDY_ONE)
        with LLM(
            BUNDLED_MODEL, dtype="int8", max_slots=1, max_context=max_context, batch_invariant=True
        ) as llm:
            found = llm.generate([list(range(10, 10 + max_context - 1))], GREEDY_ONE)
        assert found[0].outputs == expected[0].outputs


def test_an_event_loop_has_it_on_until_it_is_closed_unless_told_otherwise() -> None:
    async def main(llm: LLM) -> list[bool]:
        scheduler = llm._driver.scheduler
        found = [scheduler.is_batch_invariant]
        engine = AsyncLLM(llm)
        found.append(scheduler.is_batch_invariant)
        await engine.close()
        found.append(scheduler.is_batch_invariant)
        other = AsyncLLM(llm, batch_invariant=False)
        found.append(scheduler.is_batch_invariant)
        await engine.close()
        found.append(scheduler.is_batch_invariant)
        await other.close()
        return [*found, scheduler.is_batch_invariant]

    for own in (False, True):
        with opened("float32", batch_invariant=own) as llm:
            assert asyncio.run(main(llm)) == [own, True, own, False, False, own]


def test_what_the_prefix_cache_holds_is_dropped_when_the_option_changes() -> None:
    with opened("int8", batch_invariant=False, prefix_cache_bytes=1 << 26) as llm:
        prefix_cache = llm._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        llm.generate([list(range(10, 110))], GREEDY)
        assert prefix_cache.num_entries
        asyncio.run(AsyncLLM(llm).close())
        assert not prefix_cache.num_entries


def test_a_prompt_that_was_begun_otherwise_is_kept_for_nobody() -> None:
    prompt = list(range(10, 340))
    options = {"batch_invariant": False, "prefix_cache_bytes": 1 << 26, "chunk_size": 63}
    with opened("int8", **options) as llm:
        scheduler = llm._driver.scheduler
        assert scheduler.prefix_cache is not None
        llm._driver.submit([llm._completions.requests(prompt, GREEDY)])
        for _ in range(3):
            llm._driver.step()
        scheduler.is_batch_invariant = True
        while scheduler.has_work:
            llm._driver.step()
        assert not scheduler.prefix_cache.num_entries
        llm.generate([prompt], GREEDY)
        assert not scheduler.prefix_cache.num_hit_tokens
        llm.generate([prompt], GREEDY)
        assert scheduler.prefix_cache.num_hit_tokens == len(prompt) - 2


@pytest.mark.parametrize("num_shared", [64, 65, 66, 129])
def test_a_common_beginning_is_kept_wherever_it_ends_in_a_chunk(num_shared: int) -> None:
    shared = list(range(10, 10 + num_shared))
    prompts = [[*shared, *range(1000 * i, 1000 * i + 30)] for i in range(1, 5)]
    with opened("int8", prefix_cache_bytes=1 << 26, chunk_size=64) as llm:
        prefix_cache = llm._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        hits = []
        for prompt in prompts:
            before = prefix_cache.num_hit_tokens
            llm.generate([prompt], GREEDY_ONE)
            hits.append(prefix_cache.num_hit_tokens - before)
    assert hits[2:] == [num_shared] * 2


def test_a_forgotten_event_loop_does_not_change_the_models_own_choice() -> None:
    async def main(llm: LLM) -> None:
        forgotten = AsyncLLM(llm)
        del forgotten
        gc.collect()
        async with AsyncLLM(llm):
            pass

    with opened("float32", batch_invariant=False) as llm:
        asyncio.run(main(llm))
        assert not llm._driver.scheduler.is_batch_invariant
