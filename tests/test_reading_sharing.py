"""Reading jobs beside each other, in threads and across `close`, and what is kept from one to the next."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modernbert_decoder.architecture import Head
from modernbert_decoder.engine import ranking, reading
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import ClassificationOutput, TextError
from modernbert_decoder.engine.ranking import Ranking
from modernbert_decoder.engine.sampling import SamplingParams
from reading_models import (
    DEADLOCK_SECONDS,
    LOGPROB_TOLERANCE,
    TOLERANCE,
    folder_for,
    naive_total,
    opened,
)

TEXTS = ["x" * 130, "", "The old king sat by the fire.", "word " * 90, "a", "\N{FOX FACE}"] * 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Head, Path]:
    tmp = tmp_path_factory.mktemp("models")
    return {head: folder_for(tmp, head) for head in (Head.CAUSAL_LM, Head.SEQUENCE_CLASSIFICATION)}


@pytest.fixture
def model(folders: dict[Head, Path]) -> Iterator[LLM]:
    with opened(folders[Head.CAUSAL_LM], max_batch_tokens=100) as llm:
        yield llm


@pytest.fixture
def classifier(folders: dict[Head, Path]) -> Iterator[LLM]:
    with opened(folders[Head.SEQUENCE_CLASSIFICATION], max_batch_tokens=100) as llm:
        yield llm


def within_reason(run: Callable[[], Any]) -> Any:
    """The result of `run` on a thread of its own; fails instead of waiting for ever."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()), daemon=True)
    thread.start()
    thread.join(DEADLOCK_SECONDS)
    assert not thread.is_alive(), "deadlock"
    assert results, "the thread failed"
    return results[0]


# --- threads ---


def test_threads_that_classify_and_embed_get_what_each_gets_alone(classifier: LLM) -> None:
    def classify(i: int) -> Any:
        return np.array([output.logits for output in classifier.classify(TEXTS[i:])])

    def embed(i: int) -> Any:
        return classifier.embed(TEXTS[i:], pooling="mean" if i % 2 else "last", normalize=False)

    calls = [(job, i) for i in range(3) for job in (classify, embed)]
    expected = [job(i) for job, i in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(lambda call: call[0](call[1]), calls, timeout=DEADLOCK_SECONDS))
    for result, each in zip(results, expected, strict=True):
        assert np.abs(result - each).max() < TOLERANCE


def test_threads_that_score_rank_and_generate_get_what_each_gets_alone(model: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    texts = [text for text in TEXTS if text]
    calls: list[Callable[[], Any]] = [
        lambda: [score.total_logprob for score in model.score(texts)],
        lambda: [each.score for each in model.rank("The king ", ["a", "bc", "def"] * 9)],
        lambda: [model.generate(text, params)[0].outputs[0].token_ids for text in texts[:3]],
        lambda: [token for chunk in model.stream("Once", params) for token in chunk.token_ids],
    ]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(2 * len(calls)) as pool:
        results = list(pool.map(lambda call: call(), calls * 2, timeout=DEADLOCK_SECONDS))
    for result, each in zip(results, expected * 2, strict=True):
        if isinstance(each[0], float):
            assert result == pytest.approx(each, abs=LOGPROB_TOLERANCE)
        else:
            assert result == each
    assert model.cache.num_free == model.cache.num_slots


def test_closing_beside_a_running_classification_ends_it_with_an_error(folders: dict[Head, Path]) -> None:
    llm = opened(folders[Head.SEQUENCE_CLASSIFICATION], max_batch_tokens=50)
    started, errors = threading.Event(), []

    def classify() -> None:
        try:
            for output in llm.iter_classify(itertools.repeat("The old king sat by the fire.")):
                assert isinstance(output, ClassificationOutput)
                started.set()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=classify, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(DEADLOCK_SECONDS)
    within_reason(lambda: llm.close() or True)
    for thread in threads:
        thread.join(DEADLOCK_SECONDS)
        assert not thread.is_alive()
    assert ["closed" in str(error) for error in errors] == [True, True]


# --- memory kept from one job to the next ---


@pytest.fixture
def made(classifier: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The caches that the classifier's reader makes."""
    caches: list[Any] = []
    new_cache = classifier._reader.new_cache

    def counted() -> Any:
        caches.append(new_cache())
        return caches[-1]

    monkeypatch.setattr(classifier._reader, "new_cache", counted)
    return caches


def test_jobs_one_after_another_share_a_cache(classifier: LLM, made: list[Any]) -> None:
    for _ in range(3):
        classifier.classify(TEXTS)
    assert len(made) == 1
    assert classifier._reader._idle == [made[0]]


def test_jobs_beside_each_other_have_caches_of_their_own_and_one_is_kept(
    classifier: LLM, made: list[Any]
) -> None:
    jobs = [classifier.iter_classify(iter(TEXTS * 9)) for _ in range(3)]
    for job in jobs:
        next(job)
    assert len(made) == 3
    for job in jobs:
        job.close()  # type: ignore[attr-defined]
    (idle,) = classifier._reader._idle
    assert idle in made
    classifier.classify(TEXTS)
    assert len(made) == 3


def test_a_cache_that_has_grown_large_is_given_back(
    classifier: LLM, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_KEPT_POSITIONS", 400)
    classifier.classify("x" * 398)
    assert classifier._reader._idle == [made[0]]
    classifier.classify("x" * 399)
    assert not classifier._reader._idle


def test_no_memory_is_kept_after_closing_whatever_is_closed_first(folders: dict[Head, Path]) -> None:
    for closes_job_first in (True, False):
        llm = opened(folders[Head.SEQUENCE_CLASSIFICATION], max_batch_tokens=50)
        job: Any = llm.iter_classify(iter(TEXTS * 9))
        next(job)
        for close in (job.close, llm.close) if closes_job_first else (llm.close, job.close):
            close()
        assert not llm._reader._idle


def test_a_forgotten_job_may_be_collected_wherever_the_reader_is(folders: dict[Head, Path]) -> None:
    llm = opened(folders[Head.SEQUENCE_CLASSIFICATION], max_batch_tokens=50)
    forgotten: list[Any] = [llm.iter_classify(iter(TEXTS * 9))]
    next(forgotten[0])
    forgotten.append(forgotten)  # a cycle: only the collector frees it
    del forgotten

    def collect() -> bool:
        with llm._reader._idle_lock:
            gc.collect()
        return True

    assert within_reason(collect)
    assert len(llm._reader._idle) == 1
    llm.close()  # only here: after a deadlock it would wait for the lock as well


# --- what ranking remembers ---


def ranking_of(model: LLM) -> Ranking:
    return Ranking(
        model.tokenizer,
        vocab_size=model.architecture.vocab_size,
        context=model.max_context,
        normalization="unconditional",
        unconditional_text="",
    )


def test_unconditional_scores_are_computed_once_for_each_candidate(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["blue", "green", "a rather long label"]
    job = ranking_of(model)
    prefixes: list[int] = []
    process = job.process

    def recorded(passages: Any, run: Any) -> None:
        prefixes.extend(passage.num_tokens for passage in passages)
        process(passages, run)

    monkeypatch.setattr(job, "process", recorded)
    questions = [("The sky is " + "very " * i, labels) for i in range(60)]
    assert len(list(model._reader.read(iter(questions), job))) == 60
    assert prefixes.count(1) == 1, "[CLS] alone is the prefix of all labels without a text"
    assert len(prefixes) == 61


def test_few_unconditional_scores_are_remembered_and_none_is_wrong(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_MAX_REMEMBERED", 20)
    job = ranking_of(model)
    questions = [("word " * (i % 7), [f"new {i}", f"{i} other", "same"]) for i in range(400)]
    most = 0
    for (text, candidates), ranked in zip(questions, model._reader.read(iter(questions), job), strict=True):
        assert not isinstance(ranked, TextError)
        most = max(most, len(job._unconditional))
        if len(text) < 6:
            for each in ranked:
                key = text[len(text.rstrip()) :] + candidates[each.index]
                expected = naive_total(model, text.rstrip(), key) - naive_total(model, "", key)
                assert each.score == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    assert 20 < most < 400, "all but those of a window or two were forgotten"


def test_the_text_is_tokenized_once_and_not_with_every_candidate(
    model: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    encodings = model.tokenizer._pieces._encodings

    def recorded(texts: Any) -> Any:
        tokenized.extend(texts)
        return encodings(texts)

    monkeypatch.setattr(model.tokenizer._pieces, "_encodings", recorded)
    model.rank("word " * 100, [f"candidate {i}" for i in range(77)])
    assert sum(map(len, tokenized)) < 500 + 78 * len(" word candidate 77")
