"""Any texts in any mix, order and division: every job gives each the answer it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import relative_error
from modernbert_decoder.architecture import Head
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import TextError
from pipeline_checkpoints import write_with_tokenizer
from reading_models import (
    LABELS,
    LOGPROB_TOLERANCE,
    TOLERANCE,
    folder_for,
    naive_total,
    opened,
    unpadded_ids,
)

ARABIC = "\u0645\u0631\u062d\u0628\u0627"
WORDS = ["king", " the sea", "\n", "  ", "\N{FOX FACE}", ARABIC, "\0", "\ud800", "."]
strings = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=60).map("".join)
pairs = st.tuples(strings, strings)
lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)
BUDGETS = (2048, 100, 9)
# Of 8-bit integers: a level more or less in a few texts, where the last bit before rounding differs.
LEVEL_TOLERANCE = 0.03


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LLM]:
    """Language models with the tokenizer of bytes that read in large, small and tiny batches."""
    folder = folder_for(tmp_path_factory.mktemp("lm"), Head.CAUSAL_LM)
    return [opened(folder, max_batch_tokens=budget) for budget in BUDGETS]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[LLM]:
    """The same with classifiers and a tokenizer that merges bytes."""
    folder = write_with_tokenizer(
        tmp_path_factory.mktemp("cls") / "m", head=Head.SEQUENCE_CLASSIFICATION, id2label=LABELS
    )
    return [opened(folder, max_batch_tokens=budget) for budget in BUDGETS]


def good(outputs: Any) -> list[Any]:
    listed = list(outputs)
    assert not any(isinstance(output, TextError) for output in listed), listed
    return listed


@settings(max_examples=20, deadline=None)
@given(
    batch=st.lists(strings | pairs, min_size=1, max_size=12),
    max_length=st.integers(3, 120),
    which=st.integers(0, 2),
)
def test_strings_and_pairs_have_the_labels_that_each_has_alone(
    classifiers: list[LLM], batch: list[Any], max_length: int, which: int
) -> None:
    llm = classifiers[which]
    options: Any = {"truncate": True, "max_length": max_length}
    together = good(llm.iter_classify(iter(batch), **options))
    for text, output in zip(batch, together, strict=True):
        parts = (text,) if isinstance(text, str) else text
        ids = llm.tokenizer.encode_template(*parts, max_length=max_length)
        (alone,) = classifiers[0].classify([text], **options)
        assert output.num_tokens == len(ids) <= max_length
        assert output.logits == pytest.approx(alone.logits, abs=TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(batch=st.lists(strings, min_size=1, max_size=12), which=st.integers(0, 2), pooling=st.booleans())
def test_strings_have_the_vectors_that_each_has_alone(
    classifiers: list[LLM], batch: list[str], which: int, pooling: bool
) -> None:
    options: Any = {"pooling": "mean" if pooling else "last", "normalize": False}
    together = classifiers[which].embed(batch, **options)
    for text, vector in zip(batch, together, strict=True):
        assert relative_error(vector, classifiers[0].embed([text], **options)[0]) < TOLERANCE


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, which=st.integers(0, 2))
def test_the_last_state_is_that_of_the_last_token_in_any_company(
    models: list[LLM], lengths: list[int], which: int
) -> None:
    texts = [unpadded_ids(models[0], length, seed=i % 3) for i, length in enumerate(lengths)]
    vectors = models[which].embed(texts, pooling="last", normalize=False)
    states = models[which].hidden_states(texts)
    for ids, vector, each in zip(texts, vectors, states, strict=True):
        (alone,) = models[0].hidden_states([ids])
        assert each.shape == (len(ids), models[0].architecture.hidden_size)
        assert relative_error(each, alone) < TOLERANCE
        assert np.abs(vector - alone[-1]).max() < TOLERANCE * np.abs(alone).max()


@settings(max_examples=20, deadline=None)
@given(
    questions=st.lists(
        st.tuples(strings, st.lists(strings.filter(bool), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    which=st.integers(0, 2),
    normalization=st.sampled_from(["sum", "token", "byte", "unconditional"]),
)
def test_rankings_are_those_of_whole_texts_in_any_company(
    models: list[LLM], questions: list[tuple[str, list[str]]], which: int, normalization: str
) -> None:
    outputs = good(models[which].iter_rank(iter(questions), normalization=normalization))
    for (text, candidates), ranked in zip(questions, outputs, strict=True):
        assert sorted(each.index for each in ranked) == list(range(len(candidates)))
        assert [each.score for each in ranked] == sorted((each.score for each in ranked), reverse=True)
        stripped = text.rstrip()
        for each in ranked:
            key = text[len(stripped) :] + candidates[each.index]
            total = naive_total(models[0], stripped, key)
            expected = {
                "sum": total,
                "token": total / each.num_tokens,
                "byte": total / models[0].tokenizer.num_bytes(key),
                "unconditional": total - naive_total(models[0], "", key),
            }[normalization]
            assert each.total_logprob == pytest.approx(total, abs=LOGPROB_TOLERANCE)
            assert each.score == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@pytest.fixture(scope="module", params=["int8", "w8a8"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[LLM]:
    folder = folder_for(tmp_path_factory.mktemp(request.param), Head.CAUSAL_LM)
    return [opened(folder, dtype=request.param, max_batch_tokens=budget) for budget in (2048, 60)]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 120), min_size=6, max_size=12), which=st.integers(0, 1))
def test_answers_of_rounded_activations_are_those_that_each_text_has_alone(
    rounded: list[LLM], lengths: list[int], which: int
) -> None:
    texts = [unpadded_ids(rounded[0], length, seed=i % 3) for i, length in enumerate(lengths)]
    vectors = rounded[which].embed(texts, pooling="mean", normalize=False)
    scores = rounded[which].score(texts)
    errors = []
    for ids, vector, score in zip(texts, vectors, scores, strict=True):
        alone = rounded[0].embed([ids], pooling="mean", normalize=False)[0]
        errors.append(relative(vector, alone))
        errors.append(relative(score.logprobs, rounded[0].score([ids])[0].logprobs))
    assert np.median(errors) < TOLERANCE
    assert max(errors) < LEVEL_TOLERANCE


def relative(values: Sequence[float] | Any, reference: Sequence[float] | Any) -> float:
    return float(np.abs(np.subtract(values, reference)).max() / np.abs(reference).max())


def test_texts_of_every_kind_share_a_batch(models: list[LLM], tmp_path: Path) -> None:
    kinds: list[Any] = ["text", ("a", "pair"), unpadded_ids(models[0], 30), "", ("", ""), (0,) * 5]
    for llm in models:
        for text, state in zip(kinds, llm.hidden_states(kinds), strict=True):
            assert np.abs(state - models[0].hidden_states([text])[0]).max() < TOLERANCE
