"""Streams, threads and their ends: pieces add up to the whole, and nobody's slot is lost."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from checkpoints import CLS, tiny_architecture, write_checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import StreamChunk
from modernbert_decoder.engine.sampling import SamplingParams

PROMPT = "Once upon a time there was a little girl who lived by the sea. "
# Only a deadlock takes this long; nothing is measured.
DEADLOCK_SECONDS = 20

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 3},
    "three completions": {"temperature": 1.0, "seed": 3, "n": 3},
    "log-probabilities": {"temperature": 0.8, "seed": 4, "logprobs": 2},
    "a stop string": {"temperature": 0.0, "stop": ["ound", "the"]},
    "a stop string kept": {"temperature": 0.0, "stop": ["ound", "the"], "include_stop_str_in_output": True},
    "special tokens shown": {"temperature": 1.0, "seed": 5, "skip_special_tokens": False, "ignore_eos": True},
    "an early end": {"temperature": 1.0, "seed": 6, "max_tokens": 1},
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("storyteller", dtype="float32", threads=1, max_slots=6) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_architecture())


@pytest.fixture
def tiny(tiny_folder: Path) -> Iterator[LLM]:
    """A random model of bytes, whose text is full of half characters."""
    with LLM(tiny_folder, dtype="float32", threads=1, max_context=200, max_slots=4) as opened:
        yield opened


def joined(chunks: Iterable[StreamChunk]) -> dict[int, tuple[str, tuple[int, ...], Any, Any, Any]]:
    """Index -> text, ids, log-probabilities, finish reason and stop reason of a whole stream."""
    texts: defaultdict[int, str] = defaultdict(str)
    ids: defaultdict[int, list[int]] = defaultdict(list)
    tables: defaultdict[int, list[Any]] = defaultdict(list)
    ends: dict[int, tuple[Any, Any]] = {}
    for chunk in chunks:
        assert chunk.index not in ends, "a completion went on after its end"
        assert chunk.token_ids
        texts[chunk.index] += chunk.text
        ids[chunk.index] += chunk.token_ids
        tables[chunk.index] += chunk.logprobs or ()
        if chunk.finish_reason is not None:
            ends[chunk.index] = chunk.finish_reason, chunk.stop_reason
    return {i: (texts[i], tuple(ids[i]), tuple(tables[i]) or None, *ends[i]) for i in sorted(ends)}


def generated(llm: LLM, prompt: Any, params: SamplingParams) -> dict[int, Any]:
    outputs = llm.generate(prompt, params)[0].outputs
    return {o.index: (o.text, o.token_ids, o.logprobs, o.finish_reason, o.stop_reason) for o in outputs}


def assert_all_free(llm: LLM) -> None:
    assert llm.cache.num_free == llm.cache.num_slots
    assert llm.cache.used_bytes() == 0


# --- streams ---


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_pieces_of_a_stream_are_what_generate_returns(llm: LLM, tiny: LLM, name: str) -> None:
    params = SamplingParams(**{"max_tokens": 60, **SETTINGS[name]})
    for each, prompt in ((llm, PROMPT), (tiny, [CLS, 72, 105])):
        assert joined(each.stream(prompt, params)) == generated(each, prompt, params)
        assert_all_free(each)


def test_half_characters_are_never_shown(tiny: LLM) -> None:
    """Every piece is whole characters; U+FFFD stands only where the bytes are no UTF-8 at all."""
    bias = dict.fromkeys((*b"\xe2\x82\xac\xc3\xa9",), 30.0)
    params = SamplingParams(temperature=2.0, seed=1, max_tokens=150, logit_bias=bias, ignore_eos=True)
    chunks = list(tiny.stream([CLS], params))
    ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == tiny.tokenizer.decode(ids)
    assert any(not chunk.text for chunk in chunks), "no character was ever incomplete"
    assert any("é" in chunk.text or "€" in chunk.text for chunk in chunks)


def test_a_stream_shows_its_first_token_before_the_last_is_made(tiny: LLM) -> None:
    stream = tiny.stream([CLS], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    calls = tiny._runtime.num_calls
    assert len(next(stream).token_ids) == 1
    assert tiny._runtime.num_calls == calls + 1
    stream.close()


def test_closing_a_stream_frees_its_slots(tiny: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=100, ignore_eos=True)
    stream = tiny.stream([CLS, 1, 2], params)
    for _ in range(5):
        next(stream)
    assert tiny.cache.num_free == 1
    stream.close()
    assert_all_free(tiny)


def test_a_stream_that_is_never_advanced_takes_nothing(tiny: LLM) -> None:
    stream = tiny.stream([CLS], SamplingParams(max_tokens=5))
    assert_all_free(tiny)
    del stream
    assert_all_free(tiny)


def test_a_stream_whose_reader_fails_frees_its_slot(tiny: LLM) -> None:
    def read() -> None:
        for _ in tiny.stream([CLS], SamplingParams(max_tokens=50, ignore_eos=True)):
            raise RuntimeError("the reader is gone")

    with pytest.raises(RuntimeError, match="the reader is gone"):
        read()
    gc.collect()
    assert_all_free(tiny)


@pytest.mark.parametrize("turns", [(1, 1), (1, 5), (7, 2)])
def test_open_streams_interleave_without_touching_each_other(llm: LLM, turns: tuple[int, int]) -> None:
    asked = [
        (PROMPT, SamplingParams(temperature=1.0, seed=1, max_tokens=40)),
        ("The dog", SamplingParams(temperature=0.0, max_tokens=25)),
    ]
    streams = [llm.stream(prompt, params) for prompt, params in asked]
    chunks: list[list[StreamChunk]] = [[], []]
    open_ones = {0, 1}
    while open_ones:
        for i in sorted(open_ones):
            for _ in range(turns[i]):
                chunk = next(streams[i], None)
                if chunk is None:
                    open_ones.discard(i)
                    break
                chunks[i].append(chunk)
    for (prompt, params), received in zip(asked, chunks, strict=True):
        assert joined(received) == generated(llm, prompt, params)
    assert_all_free(llm)


def test_a_stream_left_open_does_not_hold_up_or_change_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=50, ignore_eos=True)
    expected = generated(llm, PROMPT, params)
    stream = llm.stream(PROMPT, params)
    first = [next(stream) for _ in range(3)]
    assert generated(llm, PROMPT, params) == expected
    assert joined([*first, *stream]) == expected
    assert_all_free(llm)


def test_more_streams_than_slots_take_turns(tiny: LLM) -> None:
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=20, ignore_eos=True) for i in range(9)]
    streams = [tiny.stream([CLS, i], each) for i, each in enumerate(params)]
    received = [[next(stream)] for stream in streams[:4]]  # all four slots
    received += [list(stream) for stream in streams[4:]]  # these wait for the first four to end
    for i in range(4):
        received[i] += streams[i]
    for i, (each, chunks) in enumerate(zip(params, received, strict=True)):
        assert joined(chunks) == generated(tiny, [CLS, i], each)


# --- threads ---


def within_reason(run: Callable[[], Any]) -> Any:
    """The result of `run` on a thread of its own; fails instead of waiting for ever."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()), daemon=True)
    thread.start()
    thread.join(DEADLOCK_SECONDS)
    assert not thread.is_alive(), "deadlock"
    assert results, "the thread failed"
    return results[0]


def test_threads_share_one_model_and_get_what_each_gets_alone(llm: LLM) -> None:
    prompts = [PROMPT, "The dog", "It was a dark night", "A", PROMPT * 5, "Then", "Two", "By the sea"]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=10 + 5 * i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    expected = [generated(llm, *asked) for asked in zip(prompts, params, strict=True)]
    scores = [llm.score(prompt) for prompt in prompts]

    def one(i: int) -> Any:
        if i % 3 == 0:
            return joined(llm.stream(prompts[i], params[i])), llm.score(prompts[i])
        return generated(llm, prompts[i], params[i]), llm.score(prompts[i])

    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(one, range(len(prompts)), timeout=DEADLOCK_SECONDS))
    for i, (output, (score,)) in enumerate(results):
        assert {k: v[:2] for k, v in output.items()} == {k: v[:2] for k, v in expected[i].items()}
        assert score.logprobs == pytest.approx(scores[i][0].logprobs, abs=1e-4)
    assert_all_free(llm)


def test_an_abandoned_stream_collected_in_the_midst_of_a_step_does_no_harm(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may run anywhere, and closes forgotten streams where it runs."""
    llm = LLM(tiny_folder, dtype="float32", threads=1, max_context=50, max_slots=4)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = generated(llm, [CLS, 5], params)
    gc.freeze()  # what other tests left in memory would make every collection long
    forgotten: list[Any] = [llm.stream([CLS, 7], params)]
    next(forgotten[0])
    forgotten.append(forgotten)  # a cycle: only the collector frees it
    del forgotten
    step = llm._runtime.step

    def collecting(rows: Any) -> Any:
        results = step(rows)
        gc.collect()
        return results

    monkeypatch.setattr(llm._runtime, "step", collecting)
    try:
        assert within_reason(lambda: generated(llm, [CLS, 5], params)) == expected
    finally:
        gc.unfreeze()
    assert_all_free(llm)
    llm.close()  # only here: after a deadlock it would wait for the lock as well


def test_closing_a_stream_after_its_model_is_harmless(tiny_folder: Path) -> None:
    with LLM(tiny_folder, dtype="float32", threads=1, max_context=50) as llm:
        stream = llm.stream([CLS], SamplingParams(max_tokens=20, ignore_eos=True))
        next(stream)
    stream.close()


def test_a_stream_whose_model_is_closed_says_so(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, dtype="float32", threads=1, max_context=50)
    stream = llm.stream([CLS], SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    unstarted = llm.stream([CLS], SamplingParams(max_tokens=20, ignore_eos=True))
    llm.close()
    for open_stream in (stream, unstarted):
        with pytest.raises(RuntimeError, match="closed"):
            list(open_stream)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([CLS])


def test_closing_beside_a_running_generate_ends_it_with_an_error(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny_folder, dtype="float32", threads=1)
    started, errors = threading.Event(), []
    step = llm._runtime.step

    def announced(rows: Any) -> Any:
        started.set()
        return step(rows)

    def generate() -> None:
        try:
            llm.generate([[CLS, i] for i in range(40)], SamplingParams(max_tokens=150, ignore_eos=True))
        except RuntimeError as error:
            errors.append(error)

    monkeypatch.setattr(llm._runtime, "step", announced)
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    assert started.wait(30)
    llm.close()
    thread.join(30)
    assert not thread.is_alive()
    assert ["closed" in str(error) for error in errors] == [True]


def test_an_interrupted_generate_leaves_nothing_behind(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = generated(tiny, [CLS, 5], params)
    step = tiny._driver.scheduler.step
    num_steps = 0

    def interrupted() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(tiny._driver.scheduler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate([[CLS, i] for i in range(9)], params)
    monkeypatch.undo()
    assert_all_free(tiny)
    assert generated(tiny, [CLS, 5], params) == expected
