"""Batches side by side: each is done once, errors come out, and texts get the answers they have alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modernbert_decoder.architecture import Head
from modernbert_decoder.engine import reading
from modernbert_decoder.engine import runtime as runtime_module
from modernbert_decoder.engine.lanes import Lanes, is_balanced
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import TextError
from modernbert_decoder.engine.piece_reader import PieceReader
from modernbert_decoder.errors import EngineClosedError
from reading_models import TOLERANCE, folder_for, opened, unpadded_ids

# --- the threads ---


def test_every_batch_is_done_once_by_whoever_is_free() -> None:
    done: list[tuple[str, int]] = []
    both_work = threading.Barrier(2)

    def process(name: str, batch: int) -> None:
        if batch < 2:  # the first two wait for each other, so two threads must have them
            both_work.wait(timeout=20)
        done.append((name, batch))

    lanes: Lanes[int] = Lanes([lambda batch: process("a", batch), lambda batch: process("b", batch)])
    lanes.run(range(20))
    assert sorted(batch for _, batch in done) == list(range(20))
    assert {name for name, _ in done} == {"a", "b"}
    lanes.run([7])
    assert len(done) == 21
    lanes.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_ends_all_lanes_and_is_raised(failing: int) -> None:
    both_work = threading.Barrier(2)
    ended: list[int] = []

    def process(lane: int, batch: int) -> None:
        both_work.wait(timeout=20)
        if lane == failing:
            raise ValueError(f"lane {lane}")
        try:
            while True:  # until it is told
                lanes.check()
        finally:
            ended.append(lane)

    lanes: Lanes[int] = Lanes([lambda batch: process(0, batch), lambda batch: process(1, batch)])
    with pytest.raises(ValueError, match=f"lane {failing}"):
        lanes.run(range(100))
    assert ended == [1 - failing]
    lanes.close()


def test_lanes_work_again_after_an_error() -> None:
    done: list[int] = []

    def process(batch: int) -> None:
        if batch < 0:
            raise ValueError("a negative one")
        done.append(batch)

    lanes: Lanes[int] = Lanes([process, process, process])
    with pytest.raises(ValueError, match="a negative one"):
        lanes.run([-1])
    lanes.run(range(5))
    assert sorted(done) == list(range(5))
    lanes.close()


def test_balance_is_of_the_order_in_which_batches_are_taken() -> None:
    assert is_balanced([1, 1, 1, 3], 2) is False
    assert is_balanced([3, 1, 1, 1], 2) is True
    assert is_balanced([5], 2) is False


# --- texts ---


class Counted:
    """How many pieces the sessions of one thread and of all read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: set[str] = set()
        self.num_lane_pieces = 0
        read = PieceReader.read

        def counted(reader: PieceReader, *args: Any, **kwargs: Any) -> Any:
            if reader._session is self.llm._runtime._lane_session:
                self.num_lane_pieces += 1
                self.threads.add(threading.current_thread().name)
            return read(reader, *args, **kwargs)

        monkeypatch.setattr(PieceReader, "read", counted)
        self.llm: LLM


@pytest.fixture(scope="module", params=[Head.SEQUENCE_CLASSIFICATION, Head.NONE])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_for(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Two threads, and so small batches that a few texts fill windows."""
    found = Counted(monkeypatch)
    with opened(folder, max_batch_tokens=32, threads=2) as llm:
        found.llm = llm
        yield found


def texts_of(llm: LLM, count: int) -> list[list[int]]:
    lengths = np.random.default_rng(count).integers(1, 150, count)
    return [unpadded_ids(llm, int(length), seed=i % 5) for i, length in enumerate(lengths)]


def answers(llm: LLM, texts: Any) -> list[Any]:
    if llm.architecture.head is Head.NONE:
        found: list[Any] = list(llm.iter_embed(texts, normalize=False))
        return [each if isinstance(each, TextError) else each.embedding for each in found]
    return [
        each if isinstance(each, TextError) else np.array(each.logits) for each in llm.iter_classify(texts)
    ]


def test_texts_side_by_side_have_the_answers_they_have_alone(counted: Counted, folder: Path) -> None:
    texts = texts_of(counted.llm, 80)
    found = answers(counted.llm, iter(texts))
    assert counted.num_lane_pieces > 0
    assert len(counted.threads) == 2
    with opened(folder) as alone:
        for ids, answer in zip(texts, found, strict=True):
            (expected,) = answers(alone, [ids])
            assert np.abs(answer - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "int8", "w8a8"])
def test_answers_do_not_depend_on_who_reads(counted: Counted, folder: Path, dtype: str) -> None:
    """To the last bit: a job that is killed may go on with other threads."""
    texts = texts_of(counted.llm, 80)
    with (
        opened(folder, max_batch_tokens=32, threads=2, dtype=dtype) as both,
        opened(folder, max_batch_tokens=32, threads=1, dtype=dtype) as single,
    ):
        expected = answers(single, texts)
        assert single._runtime._lane_session is None
        found = answers(both, texts)
        assert both._runtime._lane_session is not None
        both._driver.attach(both._driver.compute_alone)
        carried = answers(both, texts)
    for each in (found, carried):
        assert all(np.array_equal(a, b) for a, b in zip(each, expected, strict=True))


def test_who_takes_over_the_driver_in_between_reads_the_rest(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_TURN_TOKENS", 100)
    texts = texts_of(counted.llm, 80)
    expected = answers(counted.llm, texts)
    turns = 0
    compute = counted.llm._driver.compute

    def attached(work: Any) -> Any:
        nonlocal turns
        turns += 1
        if turns == 3:
            counted.llm._driver.attach(counted.llm._driver.compute_alone)
        return compute(work)

    monkeypatch.setattr(counted.llm._driver, "compute", attached)
    before = counted.num_lane_pieces
    found = answers(counted.llm, texts)
    assert counted.num_lane_pieces > before
    assert turns > 10  # one for each piece, once it is carried
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_interruption_ends_the_lanes_before_it_is_passed_on(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(counted.llm, 80)
    expected = answers(counted.llm, texts)
    at_work = 0
    lock = threading.Lock()
    read = PieceReader.read

    def interrupted(reader: PieceReader, *args: Any, **kwargs: Any) -> Any:
        nonlocal at_work
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        with lock:
            at_work += 1
        try:
            return read(reader, *args, **kwargs)
        finally:
            with lock:
                at_work -= 1

    with monkeypatch.context() as patch:
        patch.setattr(PieceReader, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(counted.llm, texts)
        assert at_work == 0
    assert all(np.array_equal(a, b) for a, b in zip(answers(counted.llm, texts), expected, strict=True))


def test_a_job_that_is_given_up_between_windows_leaves_nothing_behind(counted: Counted) -> None:
    job: Any = (
        counted.llm.iter_embed(texts_of(counted.llm, 80))
        if counted.llm.architecture.head is Head.NONE
        else counted.llm.iter_classify(texts_of(counted.llm, 80))
    )
    next(job)
    assert any(each.name.startswith("modernbert-decoder-lane") for each in threading.enumerate())
    job.close()
    assert not any(each.name.startswith("modernbert-decoder-lane") for each in threading.enumerate())
    assert len(counted.llm._reader._idle) == 3  # of the job, and of two lanes


def test_errors_stay_in_their_places(counted: Counted) -> None:
    texts: list[Any] = texts_of(counted.llm, 80)
    texts[3], texts[70] = [], [counted.llm.architecture.vocab_size]
    found = answers(counted.llm, texts)
    assert counted.num_lane_pieces > 0
    assert [i for i, each in enumerate(found) if isinstance(each, TextError)] == [3, 70]


def test_few_texts_are_read_by_all_threads_together(counted: Counted) -> None:
    answers(counted.llm, [unpadded_ids(counted.llm, 60, seed=i) for i in range(4)])
    assert counted.llm._runtime._lane_session is None
    answers(counted.llm, texts_of(counted.llm, 80))
    assert (before := counted.num_lane_pieces) > 0
    answers(counted.llm, texts_of(counted.llm, 1))
    assert counted.num_lane_pieces == before


def test_one_long_text_is_read_by_all_threads_together(counted: Counted) -> None:
    answers(counted.llm, texts_of(counted.llm, 80))
    before = counted.num_lane_pieces
    assert before > 0
    answers(counted.llm, [unpadded_ids(counted.llm, 400, seed=1)])
    assert counted.num_lane_pieces == before


@pytest.mark.parametrize("why", ["one thread", "many threads", "large layers"])
def test_lanes_are_not_for_everyone(folder: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "large layers":
        monkeypatch.setattr(runtime_module, "_MOST_LANE_BYTES", 100)
    threads = {"one thread": 1, "many threads": 5, "large layers": 2}[why]
    with opened(folder, max_batch_tokens=32, threads=threads) as llm:
        assert llm._runtime.num_lanes == 1
        answers(llm, texts_of(llm, 80))
        assert llm._runtime._lane_session is None


def test_a_language_model_keeps_its_threads_together(tmp_path: Path) -> None:
    with opened(folder_for(tmp_path, Head.CAUSAL_LM), max_batch_tokens=32, threads=2) as llm:
        assert llm._runtime.num_lanes == 1


def test_a_failure_in_a_lane_reaches_the_caller_and_the_next_job_works(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(counted.llm, 80)
    expected = answers(counted.llm, texts)
    read = PieceReader.read
    failures = iter([False] * 3 + [True])

    def failing(reader: PieceReader, *args: Any, **kwargs: Any) -> Any:
        if reader._session is counted.llm._runtime._lane_session and next(failures, False):
            raise RuntimeError("a kernel failed")
        return read(reader, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PieceReader, "read", failing)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            answers(counted.llm, texts)
    again = answers(counted.llm, texts)
    assert all(np.abs(a - b).max() < TOLERANCE for a, b in zip(again, expected, strict=True))


def test_closing_ends_lanes_with_an_error(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of(counted.llm, 80)
    answers(counted.llm, texts)
    reading = threading.Event()
    read = PieceReader.read

    def slow(reader: PieceReader, *args: Any, **kwargs: Any) -> Any:
        reading.set()
        assert counted.llm._driver.is_closed or closer_started.wait(20)
        return read(reader, *args, **kwargs)

    closer_started = threading.Event()

    def close() -> None:
        reading.wait(20)
        threading.Timer(0.05, closer_started.set).start()
        counted.llm.close()

    monkeypatch.setattr(PieceReader, "read", slow)
    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(EngineClosedError):
        answers(counted.llm, texts * 20)
    closer.join(20)
    assert not closer.is_alive()


def test_two_threads_may_have_jobs_at_once(counted: Counted) -> None:
    texts = texts_of(counted.llm, 80)
    expected = answers(counted.llm, texts)
    found: list[list[Any]] = []
    callers = [threading.Thread(target=lambda: found.append(answers(counted.llm, texts))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 3
    for each in found:
        assert all(np.abs(a - b).max() < TOLERANCE for a, b in zip(each, expected, strict=True))


def test_memory_of_lanes_goes_with_their_job(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only once the garbage collector comes."""
    monkeypatch.setattr(reading, "_KEPT_POSITIONS", -1)
    new_cache = counted.llm._reader.new_cache
    made: list[weakref.ref[Any]] = []

    def remembered() -> Any:
        cache = new_cache()
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(counted.llm._reader, "new_cache", remembered)
    gc.collect()
    gc.disable()
    try:
        answers(counted.llm, texts_of(counted.llm, 80))
        assert counted.num_lane_pieces > 0
        assert len(made) == 3
        assert [each() for each in made] == [None] * 3
    finally:
        gc.enable()


def test_lanes_take_turns_of_whole_rounds(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts that fill a turn each, none is left to one lane alone."""
    monkeypatch.setattr(reading, "_TURN_TOKENS", 1)
    turns: list[int] = []
    run = Lanes.run

    def recorded(lanes: Any, batches: Any) -> None:
        turns.append(len(batches))
        run(lanes, batches)

    monkeypatch.setattr(Lanes, "run", recorded)
    answers(counted.llm, [unpadded_ids(counted.llm, 200, seed=i) for i in range(4)])
    assert turns == [2, 2]
