"""`Runtime.step`: chunks, batches, forks and reused slots, against one row fed whole into a fresh slot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    Float32,
    open_runtime,
    random_ids,
    relative_error,
    tiny_architecture,
    whole_logits,
    write_checkpoint,
)
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.engine.calls import Row
from modernbert_decoder.engine.kv_cache import Slot
from modernbert_decoder.engine.runtime import Runtime
from modernbert_decoder.errors import InputError

# Matrix kernels for one row and for many add up in another order: float32 rounding through a few layers.
ROUNDING_TOLERANCE = 1e-5
# Activations are rounded to 8 bits before every product: a last bit of float32 that another order of adding
# changes can move one of them by a whole level. Relative to the logits, in the root mean square.
QUANTIZED_TOLERANCE = 0.05
LENGTH = 450
NUM_SLOTS = 8
CONTEXT_LENGTH = 640

ARCHITECTURES = {
    "window 64": tiny_architecture(),
    "window 4": tiny_architecture(window=4),
    "window 65": tiny_architecture(window=65, full_every=2, num_attention_heads=4),
}


class Texts:
    """A runtime, and the logits of any text fed whole to another runtime of a single slot."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        folder: Path,
        *,
        scheme: str = "float32",
        is_for_pieces: bool = False,
    ) -> None:
        self.architecture = architecture
        options: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "scheme": scheme}
        self.runtime = open_runtime(folder, num_slots=NUM_SLOTS, is_for_pieces=is_for_pieces, **options)
        self._reference = open_runtime(folder, num_slots=1, **options)
        self._known: dict[tuple[int, ...], Float32] = {}

    def ids(self, length: int, seed: int = 0) -> list[int]:
        return random_ids(self.architecture, length, seed=seed)

    def whole(self, ids: list[int]) -> Float32:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = whole_logits(self._reference, ids)
        return self._known[key]

    def feed(self, ids: list[int]) -> Slot:
        slot = self.runtime.cache.allocate()
        self.runtime.step([Row(slot, ids)])
        return slot

    def assert_next(self, slot: Slot, ids: list[int], logits: Float32) -> None:
        """`logits` are those of the last of `ids`, which are all that `slot` has been fed."""
        assert slot.length == len(ids)
        assert relative_error(logits[-1], self.whole(ids)[-1]) < ROUNDING_TOLERANCE


@pytest.fixture(
    scope="module",
    params=[(name, is_for_pieces) for name in ARCHITECTURES for is_for_pieces in (False, True)],
    ids=lambda param: f"{param[0]}{', for pieces' if param[1] else ''}",
)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """The graph for pieces too is held to the other one, and fed single tokens as well."""
    name, is_for_pieces = request.param
    architecture = ARCHITECTURES[name]
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), architecture)
    return Texts(architecture, folder, is_for_pieces=is_for_pieces)


@pytest.fixture
def texts(opened: Texts) -> Iterator[Texts]:
    """Every test finds and leaves all slots free; what earlier ones wrote into them stays there."""
    assert opened.runtime.cache.num_free == NUM_SLOTS
    yield opened
    free_all(opened)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Packed weights and products as `LLM` has them by default, without `batch_invariant`."""
    architecture = tiny_architecture(hidden_size=192, num_attention_heads=3)
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), architecture)
    return Texts(architecture, folder, scheme=request.param)


def free_all(texts: Texts) -> None:
    cache = texts.runtime.cache
    while cache._slots:
        cache.free(cache._slots[-1])


# --- chunks ---


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65, 128, 300])
def test_chunked_prefill_equals_whole_prefill(texts: Texts, chunk: int) -> None:
    ids = texts.ids(LENGTH)
    slot = texts.runtime.cache.allocate()
    pieces = [ids[start : start + chunk] for start in range(0, LENGTH, chunk)]
    logits = [texts.runtime.step([Row(slot, piece, len(piece))])[0].copy() for piece in pieces]
    assert relative_error(np.concatenate(logits), texts.whole(ids)) < ROUNDING_TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_chunks_of_changing_sizes_equal_whole_prefill(texts: Texts, seed: int) -> None:
    ids = texts.ids(LENGTH)
    sizes = np.random.default_rng(seed).integers(1, 150, 40)
    slot = texts.runtime.cache.allocate()
    while slot.length < LENGTH:
        size, sizes = sizes[0], sizes[1:]
        logits = texts.runtime.step([Row(slot, ids[slot.length : slot.length + size])])[0]
        texts.assert_next(slot, ids[: slot.length], logits)


@pytest.mark.parametrize("num_logits", [0, 1, 5, 100])
def test_logits_are_those_of_the_last_positions_asked_for(texts: Texts, num_logits: int) -> None:
    ids = texts.ids(100)
    logits = texts.runtime.step([Row(texts.runtime.cache.allocate(), ids, num_logits)])[0]
    assert logits.shape == (num_logits, texts.architecture.vocab_size)
    expected = texts.whole(ids)[100 - num_logits :]
    if num_logits:
        assert relative_error(logits, expected) < ROUNDING_TOLERANCE


@pytest.mark.parametrize("num_logits", [0, 1])
def test_a_step_without_logits_still_fills_the_cache(texts: Texts, num_logits: int) -> None:
    ids = texts.ids(80)
    slot = texts.runtime.cache.allocate()
    for start in range(0, 79, 20):
        texts.runtime.step([Row(slot, ids[start : min(start + 20, 79)], num_logits)])
    texts.assert_next(slot, ids, texts.runtime.step([Row(slot, ids[79:])])[0])


def test_a_text_may_fill_the_context_to_its_last_position(texts: Texts) -> None:
    ids = texts.ids(CONTEXT_LENGTH)
    slot = texts.feed(ids[: CONTEXT_LENGTH - 1])
    texts.assert_next(slot, ids, texts.runtime.step([Row(slot, ids[-1:])])[0])


# --- batches ---


@pytest.mark.parametrize(
    "lengths",
    [(1, 1, 1), (50, 50, 50), (100, 97, 90), (1, 2, 3), (1, 300, 1, 64), (200, 1, 1, 1, 63, 65, 1, 400)],
    ids=str,
)
def test_batched_prompts_equal_single_ones(texts: Texts, lengths: tuple[int, ...]) -> None:
    prompts = [texts.ids(length, seed) for seed, length in enumerate(lengths)]
    slots = [texts.runtime.cache.allocate() for _ in prompts]
    results = texts.runtime.step([Row(*row) for row in zip(slots, prompts, lengths, strict=True)])
    for slot, prompt, logits in zip(slots, prompts, results, strict=True):
        assert slot.length == len(prompt)
        assert relative_error(logits, texts.whole(prompt)) < ROUNDING_TOLERANCE


@pytest.mark.parametrize("lengths", [(1, 1, 1), (50, 50, 50), (1, 300, 1, 64)], ids=str)
def test_quantized_batched_prompts_equal_single_ones(quantized: Texts, lengths: tuple[int, ...]) -> None:
    prompts = [quantized.ids(length, seed) for seed, length in enumerate(lengths)]
    slots = [quantized.runtime.cache.allocate() for _ in prompts]
    results = quantized.runtime.step([Row(*row) for row in zip(slots, prompts, lengths, strict=True)])
    for prompt, logits in zip(prompts, results, strict=True):
        assert mean_error(logits, quantized.whole(prompt)) < QUANTIZED_TOLERANCE
    free_all(quantized)


@pytest.mark.parametrize("chunk", [1, 64, 100])
def test_quantized_chunks_equal_whole_prefill(quantized: Texts, chunk: int) -> None:
    ids = quantized.ids(200)
    slot = quantized.runtime.cache.allocate()
    pieces = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    logits = [quantized.runtime.step([Row(slot, piece, len(piece))])[0].copy() for piece in pieces]
    assert mean_error(np.concatenate(logits), quantized.whole(ids)) < QUANTIZED_TOLERANCE
    free_all(quantized)


def test_the_tolerance_of_quantized_texts_tells_one_wrong_token(quantized: Texts) -> None:
    ids = quantized.ids(60)
    changed = [*ids[:40], (ids[40] + 1) % 256, *ids[41:]]
    error = mean_error(quantized.whole(changed)[40:], quantized.whole(ids)[40:])
    assert error > 2 * QUANTIZED_TOLERANCE


def mean_error(values: Float32, reference: Float32) -> float:
    """The root mean square of the differences, relative to that of the reference."""
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("seed", range(6))
def test_random_steps_over_random_slots_equal_single_rows(texts: Texts, seed: int) -> None:
    """Prompts, chunks and single tokens in one step, in any order, over any set of slots."""
    generator = np.random.default_rng([seed, 7])
    fed: dict[Slot, list[int]] = {texts.runtime.cache.allocate(): [] for _ in range(NUM_SLOTS)}
    for number in range(12):
        chosen = generator.permutation(NUM_SLOTS)[: generator.integers(1, NUM_SLOTS + 1)]
        rows = []
        for index in chosen:
            slot = list(fed)[index]
            count = int(generator.choice([1, 1, 1, 40, generator.integers(2, 100)]))
            if slot.length + count <= CONTEXT_LENGTH:
                rows.append(Row(slot, texts.ids(count, 100 * number + int(index)), 1))
        for row, logits in zip(rows, texts.runtime.step(rows), strict=True):
            fed[row.slot] += row.token_ids
            texts.assert_next(row.slot, fed[row.slot], logits)


@pytest.mark.parametrize(
    "places", [(0, 2, 4), (7, 3, 5), (6, 5, 4), (1, 0), (0, 1, 2, 3, 4, 5, 6, 7)], ids=str
)
def test_results_come_in_the_order_of_the_rows(texts: Texts, places: tuple[int, ...]) -> None:
    prompts = [texts.ids(20 + 10 * number, number) for number in range(NUM_SLOTS)]
    slots = [texts.feed(prompt[:-1]) for prompt in prompts]
    results = texts.runtime.step([Row(slots[place], prompts[place][-1:]) for place in places])
    for place, logits in zip(places, results, strict=True):
        texts.assert_next(slots[place], prompts[place], logits)


def test_rows_are_not_padded_beyond_the_end_of_the_context(texts: Texts) -> None:
    """Beside a row that is nearly full, prompts of almost equal length cannot share its call."""
    long, short = texts.ids(CONTEXT_LENGTH), texts.ids(25, 1)
    slot = texts.feed(long[:-23])
    other = texts.runtime.cache.allocate()
    results = texts.runtime.step([Row(slot, long[-23:]), Row(other, short)])
    texts.assert_next(slot, long, results[0])
    texts.assert_next(other, short, results[1])


def test_neighbouring_decode_rows_share_one_call(texts: Texts) -> None:
    slots = [texts.feed(texts.ids(10 + seed, seed)) for seed in range(NUM_SLOTS)]
    before = texts.runtime.num_calls
    texts.runtime.step([Row(slot, [1]) for slot in slots])
    assert texts.runtime.num_calls == before + 1


def test_a_decode_row_does_not_pay_for_the_chunk_beside_it(texts: Texts) -> None:
    slots = [texts.feed(texts.ids(10, seed)) for seed in range(3)]
    before = texts.runtime.num_calls
    texts.runtime.step([Row(slots[0], [1]), Row(slots[1], [2]), Row(slots[2], texts.ids(100))])
    assert texts.runtime.num_calls == before + 2


# --- forked, swapped, retired and reused slots ---


def test_a_forked_slot_continues_like_a_fresh_one(texts: Texts) -> None:
    prompt = texts.ids(300)
    slot = texts.feed(prompt)
    copies = [texts.runtime.cache.fork(slot) for _ in range(3)]
    tails = {each: texts.ids(90, seed) for seed, each in enumerate([slot, *copies])}
    for position in range(90):
        rows = [Row(each, [tail[position]]) for each, tail in tails.items()]
        results = texts.runtime.step(rows)
    for (each, tail), logits in zip(tails.items(), results, strict=True):
        texts.assert_next(each, prompt + tail, logits)


@pytest.mark.parametrize("length", [1, 64, 127, 128, 129, 200])
def test_swapped_slots_continue_like_fresh_ones(texts: Texts, length: int) -> None:
    prompts = [texts.ids(length, 1), texts.ids(70, 2), texts.ids(3, 3)]
    slots = [texts.feed(prompt) for prompt in prompts]
    texts.runtime.cache.swap(slots[0], 2)
    texts.runtime.cache.swap(slots[1], 0)
    assert [slot.index for slot in slots] == [2, 0, 1]
    results = texts.runtime.step([Row(slot, [5]) for slot in slots])
    for slot, prompt, logits in zip(slots, prompts, results, strict=True):
        texts.assert_next(slot, [*prompt, 5], logits)


@pytest.mark.parametrize("retired", range(4))
def test_slots_that_move_when_another_retires_continue_like_fresh_ones(texts: Texts, retired: int) -> None:
    prompts = [texts.ids(150 + 10 * seed, seed) for seed in range(4)]
    slots = [texts.feed(prompt) for prompt in prompts]
    texts.runtime.cache.free(slots.pop(retired))
    prompts.pop(retired)
    for slot, prompt, logits in zip(
        slots, prompts, texts.runtime.step([Row(slot, [5]) for slot in slots]), strict=True
    ):
        texts.assert_next(slot, [*prompt, 5], logits)


@pytest.mark.parametrize("length", [1, 10, 64, 200])
def test_a_reused_slot_equals_a_fresh_one_whatever_it_held(texts: Texts, length: int) -> None:
    for layer in texts.runtime.cache.layers:
        for buffer in layer:
            buffer[:] = 1e3  # far larger than any key or value: one read of it would show
    ids = texts.ids(length, 9)
    slot = texts.runtime.cache.allocate()
    logits = texts.runtime.step([Row(slot, ids, length)])[0]
    assert relative_error(logits, texts.whole(ids)) < ROUNDING_TOLERANCE
    texts.assert_next(slot, [*ids, 3], texts.runtime.step([Row(slot, [3])])[0])


# --- the session ---


def test_more_numbers_of_rows_than_kept_bindings_are_served_right(tmp_path: Path) -> None:
    architecture = tiny_architecture(num_hidden_layers=2)
    runtime = open_runtime(write_checkpoint(tmp_path, architecture), num_slots=40, context_length=100)
    fed: dict[Slot, list[int]] = {runtime.cache.allocate(): [] for _ in range(40)}
    for num_rows in (*range(1, 41), 1, 2, 40):
        rows = [Row(slot, [(slot.index + num_rows) % 256]) for slot in list(fed)[:num_rows]]
        results = runtime.step(rows)
        for row in rows:
            fed[row.slot] += row.token_ids
        last = [logits[0].copy() for logits in results]
    reference = open_runtime(tmp_path, num_slots=1, context_length=100)
    for ids, logits in zip(fed.values(), last, strict=True):
        assert relative_error(logits, whole_logits(reference, ids)[-1]) < ROUNDING_TOLERANCE


def test_the_number_of_threads_does_not_change_the_logits(tmp_path: Path) -> None:
    architecture = tiny_architecture()
    folder = write_checkpoint(tmp_path, architecture)
    ids = random_ids(architecture, 200)
    one, two = (whole_logits(open_runtime(folder, threads=threads), ids) for threads in (1, 2))
    assert relative_error(two, one) < ROUNDING_TOLERANCE


def test_an_execution_provider_that_is_not_built_in_is_refused() -> None:
    with pytest.raises(InputError, match=r"NoSuchProvider is not in this build.*CPUExecutionProvider"):
        Runtime(
            ARCHITECTURES["window 64"],
            b"",
            {},
            num_slots=1,
            context_length=10,
            threads=1,
            providers=["NoSuchProvider"],
        )


class FakeSession:
    """Stands for a session on a machine without the device it was asked for."""

    def __init__(self, names: list[str], failure: Exception | None) -> None:
        self._names = names
        self._failure = failure

    def __call__(self, *_: object, **options: object) -> FakeSession:
        assert options["enable_fallback"] == 0, "ONNX Runtime would go on with the processor"
        if self._failure is not None:
            raise self._failure
        return self

    def get_providers(self) -> list[str]:
        return self._names


def open_with(monkeypatch: pytest.MonkeyPatch, session: FakeSession, providers: list[str]) -> Runtime:
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    return Runtime(
        ARCHITECTURES["window 64"],
        b"",
        {},
        num_slots=1,
        context_length=10,
        threads=1,
        providers=providers,
    )


CUDA_FIRST = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_provider_that_does_not_start_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(["CPUExecutionProvider"], None)
    with pytest.raises(InputError, match=r"CUDAExecutionProvider is in this build .* cannot be started"):
        open_with(monkeypatch, session, CUDA_FIRST)
    open_with(monkeypatch, session, ["CPUExecutionProvider"])
    open_with(monkeypatch, FakeSession(CUDA_FIRST, None), CUDA_FIRST)


def test_a_provider_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession([], RuntimeError("CUDA failure 100: no device\nat cuda_call.cc:12"))
    with pytest.raises(InputError, match=r"with the execution providers CUDA.*failure 100: no device; corr"):
        open_with(monkeypatch, session, CUDA_FIRST)
    with pytest.raises(RuntimeError):  # on the processor alone it is a defect of ours
        open_with(monkeypatch, session, ["CPUExecutionProvider"])
