"""Slots: where keys and values lie, how many bytes they take, and that moving them loses nothing."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import (
    Float32,
    open_runtime,
    random_ids,
    random_tensors,
    tiny_architecture,
    write_checkpoint,
)
from modernbert_decoder.architecture import LayerKind, released_architecture
from modernbert_decoder.checkpoint import BUNDLED_MODEL
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import KEPT_TOKENS, KVCache, Slot, SlotBuffer
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.rings import RING_SLACK, ring_length
from modernbert_decoder.errors import InputError

FULL, SLIDING = LayerKind.FULL, LayerKind.SLIDING
# One float32 projection computed twice, by numpy and by the runtime.
PROJECTION_TOLERANCE = 1e-5
# docs/design.md: key and value bytes at 7,999 tokens against caching every layer in full.
MAX_CACHE_RATIOS = {"17m": 0.45, "32m": 0.42, "68m": 0.39, "150m": 0.39, "400m": 0.39, "1b": 0.39}
# Every head's keys and values take a page at least, and the session and its weights are counted as well.
SHORT_REQUESTS_SHARE = 0.1


# --- the ring's layout ---


def simulated_ring_length(total: int, capacity: int, window: int) -> int:
    """Token by token: a full ring keeps the keys that the next token sees besides itself, then appends."""
    length = 0
    for _ in range(total):
        if length == capacity:
            length = window - 1
        length += 1
    return length


@given(window=st.integers(1, 40), slack=st.integers(0, 40), total=st.integers(0, 400))
@settings(deadline=None)
def test_ring_length_is_that_of_a_ring_filled_token_by_token(window: int, slack: int, total: int) -> None:
    capacity = window + slack
    length = ring_length(total, capacity, window)
    assert length == simulated_ring_length(total, capacity, window)
    assert min(total, window) <= length <= capacity


@pytest.mark.parametrize("window", [1, 4, 64, 65])
@pytest.mark.parametrize("chunk", [1, 50, 97, 300])
def test_the_runtime_leaves_in_a_ring_what_ring_length_says(tmp_path: Path, window: int, chunk: int) -> None:
    """Values of layer 0 depend on nothing but the token, so that numpy can tell which positions lie where."""
    architecture = tiny_architecture(num_hidden_layers=1, layer_kinds=(SLIDING,), window=window)
    tensors = random_tensors(architecture)
    folder = write_checkpoint(tmp_path, architecture, tensors=tensors)
    runtime = open_runtime(folder, context_length=600)
    ids = random_ids(architecture, 600)
    x = tensors["model.embeddings.tok_embeddings.weight"][ids]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + architecture.norm_eps)
    values = x * tensors["model.embeddings.norm.weight"] @ tensors["model.layers.0.attn.v_proj.weight"].T
    by_head = values.reshape(len(ids), architecture.num_attention_heads, -1).swapaxes(0, 1)
    runtime.cache.allocate()  # the ring under test is not the first row of its buffer
    slot = runtime.cache.allocate()
    capacity = window + RING_SLACK
    for start in range(0, len(ids), chunk):
        runtime.step([Row(slot, ids[start : start + chunk], 0)])
        total = slot.length
        assert total == min(start + chunk, len(ids))
        length = ring_length(total, capacity, window)
        stored = runtime.cache.layers[0][1][slot.index, :, :length]
        np.testing.assert_allclose(stored, by_head[:, total - length : total], atol=PROJECTION_TOLERANCE)


# --- slots ---


class Contents:
    """What every slot should hold: an array of its own that the cache's filled rows are compared with."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.held: dict[Slot, list[Float32]] = {}
        self._generator = np.random.default_rng(0)

    def fill(self, slot: Slot, length: int) -> None:
        slot.length = length
        self.held[slot] = []
        for view in self._views(slot):
            view[:] = self._generator.standard_normal(view.shape, np.float32)
            self.held[slot].append(view.copy())

    def check(self) -> None:
        assert sorted(slot.index for slot in self.held) == list(range(len(self.held)))
        assert self.cache.num_free == self.cache.num_slots - len(self.held)
        for slot, arrays in self.held.items():
            for view, array in zip(self._views(slot), arrays, strict=True):
                np.testing.assert_array_equal(view, array)

    def _views(self, slot: Slot) -> Iterator[Float32]:
        architecture = self.cache.architecture
        in_ring = ring_length(slot.length, self.cache.ring_capacity, architecture.window)
        for kind, layer in zip(architecture.layer_kinds, self.cache.layers, strict=True):
            for buffer in layer:
                yield buffer[slot.index, :, : in_ring if kind is SLIDING else slot.length]


@pytest.mark.parametrize("seed", range(5))
def test_moving_slots_about_keeps_the_contents_of_each(seed: int) -> None:
    cache = KVCache(tiny_architecture(window=8), num_slots=6, capacity=200)
    contents = Contents(cache)
    choose = random.Random(seed)
    for _ in range(150):
        slots = list(contents.held)
        action = choose.choice(["allocate", "fork", "swap", "free"])
        if action == "allocate" and cache.num_free:
            contents.fill(cache.allocate(), choose.randrange(201))
        elif action == "fork" and slots and cache.num_free:
            slot = choose.choice(slots)
            copy = cache.fork(slot)
            assert copy.length == slot.length
            contents.held[copy] = contents.held[slot]
        elif action == "swap" and slots:
            cache.swap(choose.choice(slots), choose.randrange(len(slots)))
        elif action == "free" and slots:
            slot = choose.choice(slots)
            cache.free(slot)
            del contents.held[slot]
            assert slot.index == -1
        contents.check()


def test_a_new_slot_is_empty_whoever_had_its_place_before() -> None:
    cache = KVCache(tiny_architecture(), num_slots=2, capacity=100)
    slot = cache.allocate()
    slot.length = 50
    cache.free(slot)
    assert cache.allocate().length == 0


def test_a_fork_and_its_original_part_ways() -> None:
    cache = KVCache(tiny_architecture(), num_slots=2, capacity=100)
    contents = Contents(cache)
    slot = cache.allocate()
    contents.fill(slot, 30)
    copy = cache.fork(slot)
    contents.held[copy] = contents.held[slot]
    contents.fill(slot, 40)
    contents.check()


# --- bytes ---


@pytest.mark.parametrize("length", [0, 1, 64, 128, 129, 1000])
def test_used_bytes_counts_the_rows_that_hold_something(length: int) -> None:
    architecture = tiny_architecture()
    cache = KVCache(architecture, num_slots=3, capacity=1000)
    assert cache.used_bytes() == 0
    slot, other = cache.allocate(), cache.allocate()
    slot.length, other.length = length, 10
    rows = 2 * length + 2 * ring_length(length, 64 + RING_SLACK, 64)  # two full layers, two sliding ones
    assert cache.used_bytes() == (rows + 4 * 10) * 2 * 4 * architecture.hidden_size
    cache.free(slot)
    assert cache.used_bytes() == 4 * 10 * 2 * 4 * architecture.hidden_size


@pytest.mark.parametrize("size", list(MAX_CACHE_RATIOS))
def test_a_long_text_takes_the_promised_share_of_a_cache_without_windows(size: str) -> None:
    architecture = released_architecture(size)
    cache = KVCache(architecture, num_slots=1, capacity=7999)
    slot = cache.allocate()
    slot.length = 7999
    # What is written, and what it grows to before the ring is next compacted.
    fullest = architecture.num_sliding_layers * 2 * 4 * architecture.hidden_size * cache.ring_capacity
    naive = architecture.naive_kv_cache_bytes(7999)
    assert cache.used_bytes() <= MAX_CACHE_RATIOS[size] * naive
    full = naive * architecture.num_full_layers // architecture.num_hidden_layers
    assert full + fullest <= MAX_CACHE_RATIOS[size] * naive


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("resident memory is read from /proc")
    return int(statm.read_text().split()[1]) * 4096


def test_64_short_requests_do_not_take_the_memory_of_64_contexts(tmp_path: Path) -> None:
    architecture = tiny_architecture(max_position_embeddings=8192)
    folder = write_checkpoint(tmp_path, architecture)
    before = resident_bytes()
    runtime = open_runtime(folder, num_slots=64, context_length=8192)
    slots = [runtime.cache.allocate() for _ in range(64)]
    runtime.step([Row(slot, random_ids(architecture, 20)) for slot in slots])
    for _ in range(10):
        runtime.step([Row(slot, [1]) for slot in slots])
    reserved = sum(buffer.nbytes for layer in runtime.cache.layers for buffer in layer)
    assert reserved > 500e6
    taken = resident_bytes() - before
    assert taken < SHORT_REQUESTS_SHARE * reserved, f"{taken:,} of {reserved:,} bytes"
    assert runtime.cache.used_bytes() == 64 * architecture.naive_kv_cache_bytes(30)


# --- memory given back ---


def long_cache() -> KVCache:
    """Two slots and more, each of whose contexts takes 16 MB in full layers."""
    return KVCache(tiny_architecture(), num_slots=8, capacity=16_384)


def fill(cache: KVCache, slot: Slot, length: int) -> None:
    """Writes what a request of that length writes."""
    for kind, layer in zip(cache.architecture.layer_kinds, cache.layers, strict=True):
        rows = cache.ring_capacity if kind is SLIDING else length
        for buffer in layer:
            buffer[slot.index, :, :rows] = 1
    slot.length = length


def full_bytes(cache: KVCache, num_tokens: int) -> int:
    """Bytes of that many tokens in the full layers."""
    architecture = cache.architecture
    return architecture.num_full_layers * 2 * 4 * architecture.hidden_size * num_tokens


def taken_since(before: int, cache: KVCache) -> float:
    """Resident bytes since then, as tokens of the full layers."""
    return (resident_bytes() - before) / full_bytes(cache, 1)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
# Rings, page tables and whatever the interpreter allocates meanwhile.
NOISE_TOKENS = 1500


@on_linux
@pytest.mark.parametrize("order", [1, -1], ids=["first to last", "last to first"])
def test_freed_slots_give_their_memory_back(order: int) -> None:
    cache = long_cache()
    before = resident_bytes()
    slots = [cache.allocate() for _ in range(8)]
    for slot in slots:
        fill(cache, slot, 12_000)
    assert taken_since(before, cache) > 8 * 12_000 - NOISE_TOKENS
    for slot in slots[::order]:
        cache.free(slot)
    assert taken_since(before, cache) < KEPT_TOKENS + NOISE_TOKENS


@on_linux
def test_reset_gives_the_memory_back() -> None:
    cache = long_cache()
    before = resident_bytes()
    for _ in range(4):
        fill(cache, cache.allocate(), 12_000)
    cache.reset()
    assert taken_since(before, cache) < KEPT_TOKENS + NOISE_TOKENS
    assert cache.num_free == 8


@on_linux
@pytest.mark.parametrize("way", ["free", "swap", "empty, swap and free"])
def test_a_short_slot_in_the_place_of_a_long_one_does_not_keep_its_memory(way: str) -> None:
    cache = long_cache()
    before = resident_bytes()
    long, short = cache.allocate(), cache.allocate()
    fill(cache, short, 10)
    fill(cache, long, 16_000)
    if way == "free":
        cache.free(long)
        held = 10
    elif way == "swap":
        cache.swap(long, 1)
        held = 16_010
    else:
        cache.empty(long)
        cache.swap(long, 1)
        cache.free(long)
        held = 10
    assert taken_since(before, cache) < held + KEPT_TOKENS + NOISE_TOKENS
    assert (cache.layers[0][0][short.index, :, :10] == 1).all()


@on_linux
def test_short_requests_keep_their_pages_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving pages back and getting others costs time, which only long requests are worth."""
    released: list[int] = []
    monkeypatch.setattr(SlotBuffer, "release", lambda _, place: released.append(place))
    cache = long_cache()
    for length in (10, 300, KEPT_TOKENS // 8):
        slots = [cache.allocate() for _ in range(8)]
        for slot in slots:
            slot.length = length
        for slot in slots:
            cache.free(slot)
    assert released == []
    slot = cache.allocate()
    slot.length = KEPT_TOKENS + 1
    cache.free(slot)
    assert set(released) >= {7}
    released.clear()
    cache.free(cache.allocate())
    assert released == [], "given back twice"


@pytest.mark.parametrize("shape", [(5, 3, 7, 11), (3, 2, 1000, 16), (2, 1, 2048, 32)])
def test_giving_a_place_back_touches_no_other(shape: tuple[int, ...]) -> None:
    """Places that do not begin and end at pages share some with their neighbours."""
    for place in range(shape[0]):
        array = (buffer := SlotBuffer(shape, slot_bytes=1)).array
        array[:] = 1
        buffer.release(place)
        others = [index for index in range(shape[0]) if index != place]
        assert (array[others] == 1).all()
        array[place] = 2
        assert (array[place] == 2).all()


@pytest.mark.parametrize(("num_slots", "capacity"), [(10**9, 2048), (10**18, 2048), (2, 10**15)])
def test_a_cache_that_the_system_cannot_hold_is_refused_with_its_size(num_slots: int, capacity: int) -> None:
    architecture = tiny_architecture()
    rows = 2 * capacity + 2 * (architecture.window + RING_SLACK)
    wanted = f"{num_slots:,} slots of {rows * 2 * 4 * architecture.hidden_size:,} bytes each"
    with pytest.raises(InputError, match=rf"{wanted} .*lower max_slots or max_context"):
        KVCache(architecture, num_slots=num_slots, capacity=capacity)


def test_an_impossible_number_of_slots_is_refused_by_the_engine() -> None:
    with pytest.raises(InputError, match=r"1,000,000,000 slots of .*lower max_slots or max_context"):
        LLM(BUNDLED_MODEL, max_slots=10**9)
