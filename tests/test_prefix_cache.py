"""Prompts that share a beginning: computed once, exactly as if computed again, within the memory given."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from checkpoints import open_runtime, random_ids, relative_error, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import LayerKind
from modernbert_decoder.engine.kv_cache import KVCache, Slot
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.prefix_cache import PrefixCache, PrefixTree, _Node
from modernbert_decoder.engine.request import Request
from modernbert_decoder.engine.rings import ring_length
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.scheduler import Scheduler
from modernbert_decoder.errors import InputError
from modernbert_decoder.tokenizer import Tokenizer

ARCHITECTURE = tiny_architecture(window=16)
SEP = ARCHITECTURE.eos_token_ids[0]
PLENTY = 1 << 30
GAP = 8
# The same keys and values, but chunks of other lengths, whose products add up in another order.
TOLERANCE = 1e-6
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)


def ids(length: int, seed: int) -> list[int]:
    return random_ids(ARCHITECTURE, length, seed=seed)


class Bench:
    """Schedulers with and without a prefix cache on one checkpoint, and what each request gets alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_folder(folder, ARCHITECTURE)
        self._single = open_runtime(folder, num_slots=1, context_length=512)
        self._known: dict[tuple[object, ...], list[int]] = {}
        self._runtimes: dict[int, Runtime] = {}

    def group(self, prompt_ids: Sequence[int], params: SamplingParams = GREEDY) -> list[Request]:
        assert params.max_tokens is not None
        return [
            Request(
                list(prompt_ids), params, tokenizer=self.tokenizer, max_tokens=params.max_tokens, index=index
            )
            for index in range(params.n)
        ]

    def open(self, *, num_slots: int = 4, chunk_size: int = 64, max_bytes: int = PLENTY) -> Engine:
        if num_slots not in self._runtimes:
            self._runtimes[num_slots] = open_runtime(self.folder, num_slots=num_slots, context_length=512)
        runtime = self._runtimes[num_slots]
        runtime.cache.reset()  # whatever a failed test has left
        return Engine(self, runtime, chunk_size=chunk_size, max_bytes=max_bytes)

    def alone(self, request: Request) -> list[int]:
        """The tokens of the same completion as the only one of a scheduler without a prefix cache."""
        key = (tuple(request.prompt_ids), repr(request.params), request.index)
        if key not in self._known:
            copy = self.group(request.prompt_ids, request.params)[request.index]
            run(Scheduler(self._single, eos_token_ids=[SEP], chunk_size=512), [copy])
            self._known[key] = copy.token_ids
        return self._known[key]

    def assert_as_alone(self, requests: Sequence[Request]) -> None:
        for request in requests:
            expected = self.alone(request)
            is_aborted = request.finish_reason == "aborted"
            assert request.token_ids == (expected[: len(request.token_ids)] if is_aborted else expected)


class Engine:
    """A scheduler with a prefix cache."""

    def __init__(self, bench: Bench, runtime: Runtime, *, chunk_size: int, max_bytes: int) -> None:
        self.bench = bench
        self.runtime = runtime
        self.cache = PrefixCache(runtime.cache, max_bytes=max_bytes, min_gap=GAP)
        self.scheduler = Scheduler(
            runtime, eos_token_ids=[SEP], chunk_size=chunk_size, prefix_cache=self.cache
        )

    def complete(self, *prompts: Sequence[int], params: SamplingParams = GREEDY) -> list[Request]:
        """All of them together."""
        groups = [self.bench.group(prompt, params) for prompt in prompts]
        run(self.scheduler, *groups)
        return [request for group in groups for request in group]

    def num_computed(self, *prompts: Sequence[int], params: SamplingParams = GREEDY) -> int:
        """Prompt tokens computed to complete them together, which must give what each gets alone."""
        before = self.scheduler.counts.num_prompt_tokens
        self.bench.assert_as_alone(self.complete(*prompts, params=params))
        return self.scheduler.counts.num_prompt_tokens - before


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(write_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURE))


def run(scheduler: Scheduler, *groups: list[Request]) -> None:
    for group in groups:
        scheduler.submit(group)
    for _ in range(5000):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("requests are never finished")


class Recorder:
    """The logits that every request chose its tokens from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[Request, list[NDArray[np.float32]]] = {}
        accept = Request.accept

        def recorded(request: Request, logits: NDArray[np.float32]) -> int:
            self.logits.setdefault(request, []).append(logits.copy())
            return accept(request, logits)

        monkeypatch.setattr(Request, "accept", recorded)


# --- the same, and less work ---


@pytest.mark.parametrize("num_shared", [9, 15, 16, 17, 79, 80, 81, 96, 150, 200])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_resumed_prompt_gives_the_logits_and_tokens_of_one_that_is_computed(
    bench: Bench, num_shared: int, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window 16, rings of 80, chunks of 64: before, at and behind every border."""
    beginning = ids(num_shared, 1)
    engine = bench.open()
    recorder = Recorder(monkeypatch)
    for seed in range(2, 6):
        prompt = beginning + ids(30, seed)
        hits = engine.cache.num_hit_tokens
        (resumed,) = engine.complete(prompt, params=params)
        computed = bench.group(prompt, params)[0]
        run(Scheduler(bench._single, eos_token_ids=[SEP], chunk_size=64), [computed])
        assert resumed.token_ids == computed.token_ids
        for ours, theirs in zip(recorder.logits[resumed], recorder.logits[computed], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE
        if seed > 3:  # the second prompt showed where the two part, and paused there
            assert engine.cache.num_hit_tokens - hits == num_shared


def test_the_second_prompt_resumes_where_a_chunk_ended_and_later_ones_where_they_part(bench: Bench) -> None:
    engine = bench.open()
    beginning = ids(150, 1)
    assert engine.num_computed(beginning + ids(30, 2)) == 180
    assert engine.num_computed(beginning + ids(30, 3)) == 180 - 128
    assert engine.num_computed(beginning + ids(30, 4)) == 30
    assert engine.num_computed(beginning + ids(70, 5)) == 70


def test_a_prompt_that_is_wholly_known_is_computed_from_its_last_token(bench: Bench) -> None:
    engine = bench.open()
    for length in (GAP + 1, 80, 81, 145, 201):
        prompt = ids(length, length)
        assert engine.num_computed(prompt) == length
        assert engine.num_computed(prompt) == 1
        # A beginning of it, too, but only from a mark on.
        assert engine.num_computed(prompt[:-4]) >= 1


@pytest.mark.parametrize("length", [2, GAP, 64, 129])
def test_a_prompt_that_goes_on_behind_a_known_one_is_computed_from_there(bench: Bench, length: int) -> None:
    engine = bench.open()
    engine.num_computed(ids(length, 1))
    known = length - 1 if length > GAP else 0
    assert engine.num_computed(ids(length, 1) + ids(40, 2)) == length + 40 - known


@pytest.mark.parametrize("max_tokens", [GAP, 12, 66, 67, 68, 100])
def test_a_conversation_goes_on_behind_its_last_completion(bench: Bench, max_tokens: int) -> None:
    """Completions that end around a compaction of the rings."""
    engine = bench.open()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    text = ids(60, 1)
    (request,) = engine.complete(text, params=params)
    known = 60 + max_tokens - 1  # the last token was not fed
    text = [*text, *request.token_ids, *ids(20, 2)]
    assert engine.num_computed(text, params=params) == len(text) - known


def test_a_mark_at_the_very_end_of_a_prompt_is_of_no_use_to_it(bench: Bench) -> None:
    engine = bench.open()
    (request,) = engine.complete(ids(60, 1))
    prompt = [*ids(60, 1), *request.token_ids[:-1]]  # what was fed
    assert engine.num_computed(prompt) == len(prompt) - 59
    assert engine.num_computed([*prompt, 5]) == 1


def test_completions_of_one_prompt_leave_no_marks_at_their_ends(bench: Bench) -> None:
    engine = bench.open()
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=30, ignore_eos=True)
    assert engine.num_computed(ids(60, 1), params=params) == 60
    assert engine.cache.num_entries == 1
    assert engine.num_computed(ids(60, 1), params=params) == 1


def test_siblings_that_find_no_slot_resume(bench: Bench) -> None:
    engine = bench.open(num_slots=2)
    params = SamplingParams(n=5, temperature=1.0, seed=1, max_tokens=10, ignore_eos=True)
    assert engine.num_computed(ids(60, 1), params=params) == 60 + 2  # five completions, two at a time


def test_short_prompts_are_not_kept(bench: Bench) -> None:
    engine = bench.open()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for _ in range(2):
        for length in range(1, GAP):
            assert engine.num_computed(ids(length, 1), params=params) == length
    assert engine.cache.num_entries == 0
    assert engine.cache.num_bytes == 0


# --- together ---


def test_the_same_prompt_many_times_at_once_is_computed_once(bench: Bench) -> None:
    engine = bench.open(num_slots=6)
    assert engine.num_computed(*[ids(150, 1)] * 10) == 150 + 9


@pytest.mark.parametrize("chunk_size", [10, 50, 64, 300])
def test_prompts_at_once_compute_what_they_share_once(bench: Bench, chunk_size: int) -> None:
    engine = bench.open(num_slots=6, chunk_size=chunk_size)
    beginning = ids(100, 1)
    prompts = [beginning + ids(20 + 3 * seed, seed) for seed in range(2, 8)]
    assert engine.num_computed(*prompts) == 100 + sum(20 + 3 * seed for seed in range(2, 8))
    assert engine.cache.num_hit_tokens == 5 * 100


def test_a_prompt_that_comes_while_another_computes_what_they_share_waits_for_it(bench: Bench) -> None:
    engine = bench.open(chunk_size=20)
    beginning = ids(100, 1)
    first, second = bench.group(beginning + ids(90, 2)), bench.group(beginning + ids(80, 3))
    engine.scheduler.submit(first)
    for _ in range(2):
        engine.scheduler.step()
    run(engine.scheduler, second)
    bench.assert_as_alone([*first, *second])
    assert engine.scheduler.counts.num_prompt_tokens == 100 + 90 + 80


def test_prompts_that_share_too_little_do_not_wait(bench: Bench) -> None:
    engine = bench.open(chunk_size=300)
    beginning = ids(GAP - 1, 1)
    for seed in (2, 3):
        engine.scheduler.submit(bench.group(beginning + ids(40, seed)))
    engine.scheduler.step()
    assert engine.scheduler.counts.num_prompt_tokens == 2 * (GAP - 1 + 40)


def test_prompts_do_not_wait_for_what_cannot_be_kept(bench: Bench) -> None:
    engine = bench.open(chunk_size=300, max_bytes=1000)
    prompts = [ids(50, 1) + ids(20, seed) for seed in (2, 3)]
    groups = [bench.group(prompt) for prompt in prompts]
    for group in groups:
        engine.scheduler.submit(group)
    engine.scheduler.step()
    assert engine.scheduler.counts.num_prompt_tokens == 2 * 70
    run(engine.scheduler)
    bench.assert_as_alone([request for group in groups for request in group])


def test_those_that_wait_go_on_when_the_one_they_wait_for_is_aborted(bench: Bench) -> None:
    engine = bench.open(chunk_size=20)
    beginning = ids(100, 1)
    first, *others = [bench.group(beginning + ids(30, seed)) for seed in range(2, 5)]
    for group in (first, *others):
        engine.scheduler.submit(group)
    for _ in range(3):
        engine.scheduler.step()
    begun = [group for group in (first, *others) if group[0].num_prefilled]
    assert len(begun) == 1
    engine.scheduler.abort(begun[0][0])
    run(engine.scheduler)
    bench.assert_as_alone([request for group in (first, *others) for request in group])
    assert sum(group[0].finish_reason == "length" for group in (first, *others)) == 2


# --- anything may happen, in any order ---

PARAMS = [
    GREEDY,
    SAMPLED,
    SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.2),
]


@pytest.mark.parametrize("seed", range(10))
def test_every_request_gets_the_tokens_it_gets_alone(bench: Bench, seed: int) -> None:
    choose = random.Random(seed)
    one_mark = bench.open().runtime.cache.saved_bytes(150, 150)
    engine = bench.open(
        num_slots=choose.choice([1, 2, 5]),
        chunk_size=choose.choice([5, 17, 64, 300]),
        max_bytes=choose.choice([PLENTY, 3 * one_mark, 8 * one_mark, 1000]),
    )
    texts = [ids(choose.choice([20, 75, 110]), 100 + i) for i in range(3)]
    requests: list[Request] = []
    for step in range(150):
        if choose.random() < 0.15:
            beginning = choose.choice(texts)
            cut = min(250, choose.choice([len(beginning), choose.randrange(1, len(beginning) + 1)]))
            prompt = beginning[:cut] + ids(choose.choice([1, 5, 40, 60]), 7 * seed + step)
            group = bench.group(prompt, choose.choice(PARAMS))
            if choose.random() < 0.3:
                texts.append(prompt)
            engine.scheduler.submit(group)
            requests += group
        if requests and choose.random() < 0.1:
            engine.scheduler.abort(choose.choice(requests[-6:]))
        engine.scheduler.step()
        check_tree(engine.cache._tree)
    run(engine.scheduler)
    bench.assert_as_alone(requests)
    check_tree(engine.cache._tree)
    assert engine.runtime.cache.num_free == engine.runtime.cache.num_slots
    assert engine.cache._tree._max_bytes == 1000 or engine.cache.num_hit_tokens > 0


# --- failures ---


@pytest.mark.parametrize("broken", ["save_full", "save_window", "restore"])
def test_a_step_that_breaks_leaves_a_cache_that_is_right(
    bench: Bench, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = bench.open()
    engine.complete(ids(100, 1) + ids(20, 2))

    def breaks(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.runtime.cache, broken, breaks)
    with pytest.raises(MemoryError):
        engine.complete(ids(100, 1) + ids(20, 3))
    monkeypatch.undo()
    check_tree(engine.cache._tree)
    assert engine.num_computed(ids(100, 1) + ids(20, 4)) == 120
    assert engine.num_computed(ids(100, 1) + ids(20, 5)) < 120


# --- memory ---


def nodes_below(node: _Node) -> Iterator[_Node]:
    for child in node.children.values():
        yield child
        yield from nodes_below(child)


def check_tree(tree: PrefixTree) -> None:
    """Bytes are counted right and within the limit; nothing is kept that leads to no mark."""
    nodes = list(nodes_below(tree._root))
    held = 0
    for node in nodes:
        assert node.full is not None
        assert node.full.base is None, "a view keeps more memory than is counted"
        assert node.full.shape[2] == len(node.ids) > 0
        assert node.parent is not None
        assert node.parent.children[node.ids[0]] is node
        assert node.children or node.window is not None
        held += node.full.nbytes + 4 * len(node.ids) + (0 if node.window is None else node.window.nbytes)
    assert tree.num_bytes == held <= tree._max_bytes
    assert set(tree._marks) == {node for node in nodes if node.window is not None}


def fill(cache: KVCache, slot: Slot, text: Sequence[int]) -> None:
    """Writes what stands for keys and values: numbers that depend on all tokens up to each position."""
    slot.length = len(text)
    for kind, number, buffer in numbered_buffers(cache):
        values = codes(text, number)
        rows = ring_length(len(text), cache.ring_capacity, cache.architecture.window)
        held = values[len(values) - rows :] if kind is LayerKind.SLIDING else values
        buffer[slot.index, :, : len(held)] = held[:, None]


def numbered_buffers(cache: KVCache) -> Iterator[tuple[LayerKind, int, NDArray[np.float32]]]:
    for number, (kind, layer) in enumerate(zip(cache.architecture.layer_kinds, cache.layers, strict=True)):
        for place, buffer in enumerate(layer):
            yield kind, 2 * number + place, buffer


def codes(text: Sequence[int], salt: int) -> NDArray[np.float32]:
    """(T,) integers that differ wherever a text does."""
    values, code = [], salt
    for token_id in text:
        code = (code * 31 + token_id + 1) % 1_000_003
        values.append(code)
    return np.array(values, np.float32)


def check_slot(cache: KVCache, slot: Slot, text: Sequence[int]) -> None:
    """The slot holds what the tokens behind `text` see."""
    assert slot.length == len(text)
    for kind, number, buffer in numbered_buffers(cache):
        held = codes(text, number)
        first, end = 0, len(text)
        if kind is LayerKind.SLIDING:
            end = ring_length(len(text), cache.ring_capacity, cache.architecture.window)
            first = max(0, end - cache.architecture.window + 1)
            held = held[len(text) - (end - first) :]
            assert not buffer[slot.index, :, :first].any()
        rows = buffer[slot.index, :, first:end]
        np.testing.assert_array_equal(rows, np.broadcast_to(held[:, None], rows.shape))


# Texts of three tokens, so that most share something; (text, how far it is stored, restore?).
TEXTS = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=60)


@given(
    actions=st.lists(st.tuples(TEXTS, st.integers(0, 3)), min_size=1, max_size=25),
    num_marks=st.sampled_from([0, 1, 3, 10]),
    window=st.sampled_from([1, 4]),
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_stored_and_found_in_any_order_is_what_was_stored(
    actions: list[tuple[list[int], int]], num_marks: int, window: int
) -> None:
    cache = KVCache(tiny_architecture(window=window, num_hidden_layers=3), num_slots=1, capacity=64)
    tree = PrefixTree(cache, max_bytes=num_marks * (cache.saved_bytes(60, 60) + 4 * 60))
    known: list[list[int]] = []
    for text, behind in actions:
        found = tree.find(array("i", text))
        assert found.length <= found.num_shared <= len(text)
        assert [token for node in found.nodes for token in node.ids] == text[: found.length]
        assert not found.length or text[: found.length] in known
        slot = cache.allocate()
        for _, _, buffer in numbered_buffers(cache):
            buffer[:] = np.nan
        if found.length:
            tree.restore(found, slot)
            check_slot(cache, slot, text[: found.length])
            cache.empty(slot)
        fill(cache, slot, text)
        stored = text[: max(1, len(text) - behind)]
        is_kept = cache.has_window(slot, len(stored))
        tree.store(array("i", stored), slot, min_gap=1)
        if is_kept:
            known.append(stored)
            if num_marks:
                assert tree.find(array("i", stored)).length == len(stored), "the newest is given up last"
        check_tree(tree)
        cache.free(slot)


def test_what_was_used_least_recently_is_given_up_first() -> None:
    cache = KVCache(ARCHITECTURE, num_slots=1, capacity=128)
    one = cache.saved_bytes(50, 50) + 4 * 50
    tree = PrefixTree(cache, max_bytes=3 * one)
    texts = [[seed, *ids(49, seed)] for seed in range(4)]
    slot = cache.allocate()

    def store(text: list[int]) -> None:
        fill(cache, slot, text)
        tree.store(array("i", text), slot, min_gap=1)
        cache.empty(slot)

    for text in texts[:3]:
        store(text)
    assert tree.num_bytes == 3 * one
    tree.restore(tree.find(array("i", texts[0])), slot)
    cache.empty(slot)
    store(texts[2])
    store(texts[3])
    assert [tree.find(array("i", text)).length for text in texts] == [50, 0, 50, 50]
    assert (len(tree), tree.num_evictions, tree.num_bytes) == (3, 1, 3 * one)
    store(texts[1])
    assert [tree.find(array("i", text)).length for text in texts] == [0, 50, 50, 50]


def test_shared_tokens_are_held_once() -> None:
    cache = KVCache(ARCHITECTURE, num_slots=1, capacity=512)
    tree = PrefixTree(cache, max_bytes=PLENTY)
    slot = cache.allocate()
    beginning = ids(300, 1)
    for seed in range(5):
        text = [*beginning, seed, *ids(19, 10 + seed)]
        fill(cache, slot, text)
        tree.store(array("i", text), slot, min_gap=1)
        cache.empty(slot)
    assert tree.num_bytes == cache.saved_bytes(300 + 5 * 20, 0) + 4 * 400 + 5 * cache.saved_bytes(0, 15)
    assert len(tree) == 5
    check_tree(tree)


def test_a_text_that_grows_gives_up_its_own_earlier_marks_and_keeps_what_leads_to_the_last() -> None:
    cache = KVCache(ARCHITECTURE, num_slots=1, capacity=128)
    tree = PrefixTree(cache, max_bytes=cache.saved_bytes(60, 60) + 4 * 60)
    slot = cache.allocate()
    text = ids(60, 1)
    for length in (50, 55, 60):
        fill(cache, slot, text[:length])
        tree.store(array("i", text[:length]), slot, min_gap=1)
        cache.empty(slot)
        check_tree(tree)
        assert tree.find(array("i", text)).length == length
    assert (len(tree), tree.num_evictions) == (1, 2)
    tree.restore(tree.find(array("i", text)), slot)
    check_slot(cache, slot, text)


def test_what_is_larger_than_all_the_memory_drives_nothing_out() -> None:
    cache = KVCache(ARCHITECTURE, num_slots=1, capacity=512)
    tree = PrefixTree(cache, max_bytes=cache.saved_bytes(100, 100) + 400)
    slot = cache.allocate()
    for length in (90, 300):
        text = ids(length, length)
        fill(cache, slot, text)
        tree.store(array("i", text), slot, min_gap=1)
        cache.empty(slot)
    assert tree.find(array("i", ids(90, 90))).length == 90
    assert tree.num_evictions == 0


@given(total=st.integers(0, 400), window=st.sampled_from([1, 4, 16, 64]), back=st.integers(0, 120))
@settings(deadline=None, max_examples=200)
def test_a_window_can_be_saved_exactly_as_long_as_the_ring_holds_it(
    total: int, window: int, back: int
) -> None:
    cache = KVCache(tiny_architecture(window=window, num_hidden_layers=2), num_slots=1, capacity=400)
    slot = cache.allocate()
    slot.length = total
    length = max(0, total - back)
    held = range(total - ring_length(total, cache.ring_capacity, window), total)
    needed = range(max(0, length - window + 1), length)
    assert cache.has_window(slot, length) == (not needed or (needed[0] in held and needed[-1] in held))
    # A prompt's last token but one, and the end of a completion, are always among them.
    assert back > 1 or cache.has_window(slot, length)


# --- as an LLM ---


def test_an_llm_has_no_prefix_cache_unless_asked(bench: Bench) -> None:
    with LLM(bench.folder, dtype="float32", threads=1) as llm:
        assert llm._driver.scheduler.prefix_cache is None
    with pytest.raises(InputError, match=r"prefix_cache_bytes must be an integer of at least 0, got -1"):
        LLM(bench.folder, prefix_cache_bytes=-1)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_llm_gives_the_same_with_a_prefix_cache(bench: Bench, dtype: str) -> None:
    """Chunks of 64 and a beginning of 128 tokens: int8 is the same to the last bit where chunks are."""
    prompts = [ids(128, 1) + ids(50, seed) for seed in range(2, 6)]
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=3, ignore_eos=True)
    with (
        LLM(bench.folder, dtype=dtype, threads=1, chunk_size=64) as plain,
        LLM(bench.folder, dtype=dtype, threads=1, chunk_size=64, prefix_cache_bytes=PLENTY) as cached,
    ):
        for prompt in prompts:
            expected, given = plain.generate(prompt, params)[0], cached.generate(prompt, params)[0]
            assert given.outputs == expected.outputs
        prefix_cache = cached._driver.scheduler.prefix_cache
        assert prefix_cache is not None
        assert prefix_cache.num_hit_tokens == 2 * 128
