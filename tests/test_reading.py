"""Classifying, embedding, scoring and ranking: the same answers in any company, order and division."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import CLS, PAD, SEP, random_ids
from hostile_texts import HOSTILE
from modernbert_decoder.architecture import Head
from modernbert_decoder.checkpoint import Checkpoint
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.outputs import ClassificationOutput, Score, TextError
from modernbert_decoder.engine.sampling import SamplingParams
from modernbert_decoder.engine.weights import quantize_checkpoint
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.quantization import QuantizationScheme
from pipeline_checkpoints import write_with_tokenizer
from reading_models import (
    CONTEXT,
    LABELS,
    LOGPROB_TOLERANCE,
    TOLERANCE,
    folder_for,
    naive_total,
    opened,
    unpadded_ids,
)

TEXTS = [
    "",
    "a",
    "The old king sat by the fire.",
    "x" * 130,
    "\N{GRINNING FACE} \N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}",
    "word " * 120,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Head, Path]:
    tmp = tmp_path_factory.mktemp("models")
    return {head: folder_for(tmp, head) for head in Head}


@pytest.fixture(scope="module")
def classifiers(folders: dict[Head, Path]) -> list[LLM]:
    """One engine that reads nearly everything in one call, and two that have to divide."""
    return [opened(folders[Head.SEQUENCE_CLASSIFICATION], max_batch_tokens=n) for n in (2048, 100, 9)]


@pytest.fixture(scope="module")
def models(folders: dict[Head, Path]) -> list[LLM]:
    return [opened(folders[Head.CAUSAL_LM], max_batch_tokens=n) for n in (2048, 100, 9)]


def logits_of(outputs: Iterable[ClassificationOutput | TextError]) -> list[tuple[float, ...]]:
    return [output.logits for output in outputs if isinstance(output, ClassificationOutput)]


# --- batches ---


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 320), min_size=1, max_size=24), which=st.integers(0, 2))
def test_any_mix_of_lengths_in_any_order_gives_the_answers_each_text_has_alone(
    lengths: list[int], which: int, classifiers: list[LLM]
) -> None:
    llm = classifiers[which]
    texts = [unpadded_ids(llm, length, seed=i % 3) for i, length in enumerate(lengths)]
    together = llm.classify(texts)
    assert [output.num_tokens for output in together] == lengths
    expected = [alone(classifiers[0], tuple(ids)) for ids in texts]
    assert np.abs(np.array(logits_of(together)) - expected).max() < TOLERANCE


_KNOWN: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = {}


def alone(llm: LLM, ids: tuple[int, ...]) -> tuple[float, ...]:
    key = (id(llm), ids)
    if key not in _KNOWN:
        _KNOWN[key] = llm.classify([ids])[0].logits
    return _KNOWN[key]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=16), which=st.integers(0, 2))
def test_scores_and_vectors_do_not_depend_on_the_company(
    lengths: list[int], which: int, models: list[LLM]
) -> None:
    texts = [unpadded_ids(models[0], length, seed=i % 3) for i, length in enumerate(lengths)]
    scores = models[which].score(texts)
    vectors = models[which].embed(texts, pooling="mean", normalize=False)
    for ids, score, vector in zip(texts, scores, vectors, strict=True):
        (single,) = models[0].score([ids])
        assert score.token_ids == tuple(ids)
        assert score.logprobs == pytest.approx(single.logprobs, abs=LOGPROB_TOLERANCE)
        assert np.abs(vector - models[0].embed([ids], pooling="mean", normalize=False)[0]).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["int8", "w8a8"])
def test_answers_of_rounded_activations_do_not_depend_on_the_company(
    folders: dict[Head, Path], dtype: str
) -> None:
    llm = opened(folders[Head.SEQUENCE_CLASSIFICATION], dtype=dtype)
    lengths = [3, 3, 4, 17, 40, 41, 42, 300, 3, *range(5, 40)]
    texts = [unpadded_ids(llm, length, seed=length) for length in lengths]
    together = np.array(logits_of(llm.classify(texts)))
    single = np.array([llm.classify([ids])[0].logits for ids in texts])
    errors = np.abs(together - single).max(axis=1) / np.abs(single).max()
    # Scales of a batch instead of a row would change every text, by some percent. A difference in the last
    # bit before rounding to 8 bits may move a value by one level, in few texts.
    assert np.median(errors) < 1e-6
    assert errors.max() < 0.03


@pytest.mark.parametrize(("which", "budget", "longest"), [(0, 2048, 320), (1, 100, 320), (2, 9, 80)])
def test_batches_keep_the_token_budget_and_hold_texts_of_like_length(
    models: list[LLM], which: int, budget: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = models[which]
    assert llm._reader.max_batch_tokens == budget
    calls: list[list[int]] = []
    read = llm._runtime.read

    def recorded(piece: Any, *, logits: Any = None) -> Any:
        calls.append([len(ids) for ids in piece.token_ids])
        return read(piece, logits=logits)

    monkeypatch.setattr(llm._runtime, "read", recorded)
    lengths = np.random.default_rng(1).permutation(np.arange(1, longest + 1)).tolist()
    vectors = llm.embed([unpadded_ids(llm, length, seed=length) for length in lengths])
    assert len(vectors) == len(lengths)
    assert sum(map(sum, calls)) == sum(lengths), "every token is fed once"
    padded = [len(call) * max(call) for call in calls]
    assert max(padded) <= budget
    assert sum(padded) <= 1.1 * sum(lengths) + 24 * len(calls)


def test_results_come_in_the_order_of_the_texts_from_any_iterable(classifiers: list[LLM]) -> None:
    llm = classifiers[1]
    outputs = llm.iter_classify("ab" * i for i in range(200))
    num_tokens = [output.num_tokens for output in outputs if isinstance(output, ClassificationOutput)]
    assert num_tokens == [2 + 2 * i for i in range(200)]


def test_texts_are_not_taken_far_ahead(classifiers: list[LLM]) -> None:
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield "a text of some thirty-odd bytes"

    outputs = classifiers[1].iter_classify(counted())
    next(outputs)
    assert taken < 16 * 100
    for _ in range(1000):
        next(outputs)
    assert taken < 1001 + 16 * 100
    outputs.close()  # type: ignore[attr-defined]


def test_questions_are_not_taken_far_ahead_either(models: list[LLM]) -> None:
    taken = 0

    def counted() -> Iterator[tuple[str, list[str]]]:
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield "a short text", [f"candidate {i}" for i in range(50)]

    results = models[0].iter_rank(counted())
    next(results)
    assert taken < 100
    results.close()  # type: ignore[attr-defined]


def test_another_callers_failing_step_does_not_end_a_reading_job(
    classifiers: list[LLM], models: list[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = models[0]
    stream = llm.stream([CLS, 1, 2])
    next(stream)

    def fail() -> None:
        llm._driver.scheduler.fail_all(RuntimeError("a kernel failed"))
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(llm._driver.scheduler, "step", fail)
    assert len(llm.score("some text")) == 1
    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(stream)


def test_an_exception_of_the_iterable_comes_behind_the_results_of_its_texts(classifiers: list[LLM]) -> None:
    def texts() -> Iterator[str]:
        yield from ("one", "two")
        raise ValueError("no more")

    outputs = classifiers[1].iter_classify(texts())
    assert len([next(outputs), next(outputs)]) == 2
    with pytest.raises(ValueError, match="no more"):
        next(outputs)


def test_a_huge_text_is_read_ahead_alone(models: list[LLM]) -> None:
    taken: list[int] = []

    def texts() -> Iterator[str]:
        for i in range(5):
            taken.append(i)
            yield "x" * 1_000_000

    outputs = models[1].iter_embed(texts(), truncate=True, max_length=20)
    next(outputs)
    assert taken == [0]


def test_nothing_is_computed_before_the_first_result_is_asked_for(classifiers: list[LLM]) -> None:
    taken: list[int] = []
    outputs = classifiers[0].iter_classify(f"{taken.append(i)}" for i in range(3))
    assert not taken
    assert len(list(outputs)) == 3


def test_a_job_that_is_closed_early_leaves_everything_usable(models: list[LLM]) -> None:
    llm = models[1]
    outputs = llm.iter_score(itertools.repeat("the same text again"))
    first = next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert llm.score("the same text again") == [first]
    assert llm.cache.num_free == llm.cache.num_slots


def test_jobs_and_streams_share_one_engine(models: list[LLM]) -> None:
    llm = models[1]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = llm.generate("Once upon", params)[0].outputs[0].text
    embedded = llm.embed(TEXTS)
    stream = llm.stream("Once upon", params)
    pieces = [next(stream).text]
    interleaved = [llm.iter_embed(iter(TEXTS)), llm.iter_embed(iter(TEXTS))]
    for one, other, vector in zip(*interleaved, embedded, strict=True):
        for output in (one, other):
            assert not isinstance(output, TextError)
            assert np.abs(output.embedding - vector).max() < TOLERANCE
        pieces.append(next(stream, None).text if (chunk := next(stream, None)) is None else chunk.text)
    pieces += [chunk.text for chunk in stream]
    assert "".join(pieces) == expected


def test_no_head_is_computed_for_vectors_and_only_the_last_row_for_labels(
    models: list[LLM], classifiers: list[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    for llm in (models[1], classifiers[1]):
        read = llm._runtime.read

        def recorded(piece: Any, *, logits: Any = None, read: Any = read) -> Any:
            result = read(piece, logits=logits)
            shapes.append((len(result[0]), len(result[1])))
            return result

        monkeypatch.setattr(llm._runtime, "read", recorded)
    models[1].embed(["x" * 250])
    assert shapes == [(0, 0), (0, 0), (0, 1)]
    shapes.clear()
    classifiers[1].classify(["x" * 250])
    assert shapes == [(0, 0), (0, 0), (1, 0)]


# --- classifying ---


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (LABELS, None),
        (LABELS, "single_label_classification"),
        (LABELS, "multi_label_classification"),
        (LABELS, "regression"),
        ({0: "grade"}, None),
    ],
)
def test_probabilities_follow_the_problem_type(
    tmp_path: Path, labels: dict[int, str], problem_type: str | None
) -> None:
    folder = folder_for(tmp_path, Head.SEQUENCE_CLASSIFICATION, id2label=labels, problem_type=problem_type)
    with opened(folder) as llm:
        for output in llm.classify(TEXTS):
            logits = np.array(output.logits)
            if problem_type == "regression" or len(labels) == 1:
                expected = logits
            elif problem_type == "multi_label_classification":
                expected = 1 / (1 + np.exp(-logits))
            else:
                expected = np.exp(logits) / np.exp(logits).sum()
            assert output.probabilities == pytest.approx(expected.tolist())
            assert output.label == labels[int(logits.argmax())]


def test_extreme_logits_give_probabilities_without_overflow(tmp_path: Path) -> None:
    folder = folder_for(tmp_path, Head.SEQUENCE_CLASSIFICATION, problem_type="multi_label_classification")
    with opened(folder) as llm:
        from modernbert_decoder.engine.reading_jobs import Classification

        job = Classification(llm._template_encoder(truncate=False, max_length=None), llm.architecture)
        assert job._probabilities(np.array([[1e4, -1e4, 0.0]])).tolist() == [[1.0, 0.0, 0.5]]


def test_pairs_and_padding_ids_are_what_their_tokens_say(classifiers: list[LLM]) -> None:
    llm = classifiers[0]
    pair, ids, padded = llm.classify(
        [("ab", "c"), [CLS, 97, 98, SEP, 99, SEP], [CLS, 97, 98, SEP, 99, SEP, PAD, PAD]]
    )
    assert pair == ids == padded
    assert llm.classify(("ab", "c")) == [pair], "a tuple of two strings is one pair"
    assert len(llm.classify(["ab", "c"])) == 2


@pytest.mark.parametrize("pair", [False, True])
def test_truncated_texts_are_their_first_tokens(classifiers: list[LLM], pair: bool) -> None:
    text: Any = ("a" * 90, "b" * 50) if pair else "a" * 90
    (cut,) = classifiers[0].classify([text], truncate=True, max_length=40)
    kept: Any = ("a" * 19, "b" * 18) if pair else "a" * 38
    assert cut == classifiers[0].classify([kept])[0]
    assert cut.num_tokens == 40
    (cut_ids,) = classifiers[0].classify([[CLS] + [97] * 90], truncate=True, max_length=40)
    assert cut_ids.num_tokens == 40


def test_padding_that_a_cut_uncovers_is_padding_too(classifiers: list[LLM]) -> None:
    llm = classifiers[0]
    cut, expected = llm.classify([[CLS, 97, PAD, PAD, 98], [CLS, 97]], truncate=True, max_length=4)
    assert cut == expected
    whole, _ = llm.classify([[CLS, 97, PAD, PAD, 98], [CLS]])
    assert whole.num_tokens == 5
    (nothing,) = llm.iter_classify([[PAD, PAD, 97]], truncate=True, max_length=2)
    assert isinstance(nothing, TextError)
    assert "all padding" in nothing.message


@pytest.mark.parametrize("dtype", ["int8", "int4", "w8a8"])
def test_a_packed_classifier_folder_gives_the_labels_of_the_original(
    folders: dict[Head, Path], tmp_path: Path, dtype: str
) -> None:
    source = Checkpoint.open(folders[Head.SEQUENCE_CLASSIFICATION])
    scheme = QuantizationScheme.named(dtype)
    quantize_checkpoint(source, scheme, tmp_path / "packed", threads=1)
    packed = Checkpoint.open(tmp_path / "packed")
    assert packed.raw("classifier.weight").dtype == np.float32
    with opened(source.folder, dtype=dtype) as first, opened(packed.folder, dtype=None) as second:
        assert first.classify(TEXTS) == second.classify(TEXTS)
        assert second.architecture.id2label == LABELS


# --- embedding ---


@pytest.mark.parametrize("head", Head)
def test_every_head_embeds_and_gives_states(folders: dict[Head, Path], head: Head) -> None:
    with opened(folders[head], max_batch_tokens=100) as llm:
        states = llm.hidden_states(TEXTS)
        assert [len(each) for each in states] == [len(llm.tokenizer.encode_template(text)) for text in TEXTS]
        last = llm.embed(TEXTS, normalize=False)
        mean = llm.embed(TEXTS, pooling="mean", normalize=False)
        unit = llm.embed(TEXTS)
        unit_mean = llm.embed(TEXTS, pooling="mean")
    assert last.dtype == np.float32
    for i, each in enumerate(states):
        assert np.abs(last[i] - each[-1]).max() < TOLERANCE
        assert np.abs(mean[i] - each.mean(axis=0)).max() < TOLERANCE
        assert np.abs(unit[i] - each[-1] / np.linalg.norm(each[-1])).max() < TOLERANCE
        assert np.abs(unit_mean[i] - mean[i] / np.linalg.norm(mean[i])).max() < TOLERANCE


def test_no_texts_give_no_vectors(models: list[LLM]) -> None:
    assert models[0].embed([]).shape == (0, models[0].architecture.hidden_size)
    assert list(models[0].iter_embed(iter(()))) == []


# --- scoring ---


def naive_windows(llm: LLM, ids: Sequence[int], stride: int) -> list[float]:
    """The stated rule, token by token of windows that are each scored on their own."""
    logprobs = list(llm.score([ids[:CONTEXT]])[0].logprobs)
    begin = 1
    while len(logprobs) < len(ids) - 1:
        begin += stride
        window = [CLS, *ids[begin : begin + CONTEXT - 1]]
        new = min(begin + CONTEXT - 1, len(ids)) - (len(logprobs) + 1)
        assert len(window) - new >= CONTEXT - stride or len(window) < CONTEXT
        logprobs += llm.score([window])[0].logprobs[-new:]
    return logprobs


@pytest.mark.parametrize("length", [CONTEXT + 1, 1500, 2100])
@pytest.mark.parametrize("stride", [1, 350, CONTEXT - 1])
def test_scores_of_long_texts_equal_those_of_their_windows(
    models: list[LLM], length: int, stride: int
) -> None:
    if stride == 1 and length > CONTEXT + 1:
        length = CONTEXT + 5
    ids = [CLS, *random_ids(models[0].architecture, length - 1)]
    (score,) = models[0].score([ids], stride=stride)
    assert score.num_tokens == length - 1
    assert score.logprobs == pytest.approx(naive_windows(models[1], ids, stride), abs=LOGPROB_TOLERANCE)


def test_a_stride_changes_nothing_in_texts_that_fit(models: list[LLM]) -> None:
    texts = [text for text in TEXTS if text]
    assert models[0].score(texts, stride=100) == models[0].score(texts)


def test_bits_per_byte_count_the_bytes_of_the_text(models: list[LLM]) -> None:
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"
    (score,) = models[0].score(text)
    assert score.num_bytes == len(text.encode()) == 10
    assert score.bits_per_byte == pytest.approx(-sum(score.logprobs) / math.log(2) / 10)
    assert score.perplexity == pytest.approx(math.exp(-sum(score.logprobs) / score.num_tokens))
    (of_ids,) = models[0].score([[CLS, *text.encode(), SEP]])
    assert of_ids.num_bytes == 10
    (nothing,) = models[0].score([[CLS]])
    assert nothing == Score((CLS,), (), 0)
    assert math.isnan(nothing.perplexity)
    assert math.isnan(nothing.bits_per_byte)


# --- ranking ---


@pytest.mark.parametrize("normalization", ["sum", "token", "byte", "unconditional"])
@pytest.mark.parametrize("text", ["", "The weather is ", "word " * 60])
def test_ranks_equal_those_of_whole_texts(models: list[LLM], text: str, normalization: str) -> None:
    candidates = ["fine", "b", "\N{GRINNING FACE}", "a rather long continuation " * 5, "b"]
    for llm in models:
        ranked = llm.rank(text, candidates, normalization=normalization)
        assert [each.score for each in ranked] == sorted((each.score for each in ranked), reverse=True)
        for each in ranked:
            assert candidates[each.index] == each.candidate
            total = naive_total(models[0], text.rstrip(), text[len(text.rstrip()) :] + each.candidate)
            assert each.total_logprob == pytest.approx(total, abs=LOGPROB_TOLERANCE)
            spaces = text[len(text.rstrip()) :]
            expected = {
                "sum": total,
                "token": total / each.num_tokens,
                "byte": total / len((spaces + each.candidate).encode()),
                "unconditional": total - naive_total(models[0], "", spaces + each.candidate),
            }[normalization]
            assert each.score == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_the_unconditional_text_stands_before_the_same_continuation(models: list[LLM]) -> None:
    ranked = models[0].rank(
        "Sky? ", ["blue", "green"], normalization="unconditional", unconditional_text="Answer: "
    )
    for each in ranked:
        difference = naive_total(models[0], "Sky?", " " + each.candidate) - naive_total(
            models[0], "Answer:", " " + each.candidate
        )
        assert each.score == pytest.approx(difference, abs=LOGPROB_TOLERANCE)


def test_many_questions_rank_as_each_does_alone(models: list[LLM]) -> None:
    questions = [("ab " * i, [f"{j} " * (j + 1) for j in range(1 + i % 4)]) for i in range(30)]
    for llm, normalization in itertools.product(models, ("sum", "unconditional")):
        for question, ranked in zip(
            questions, llm.iter_rank(iter(questions), normalization=normalization), strict=True
        ):
            assert not isinstance(ranked, TextError)
            single = models[0].rank(*question, normalization=normalization)
            by_index = {each.index: each for each in single}
            for each in ranked:
                assert each.score == pytest.approx(by_index[each.index].score, abs=LOGPROB_TOLERANCE)


def test_tokens_that_merge_across_the_border_are_split_at_the_texts_own_length() -> None:
    with LLM("storyteller", dtype="float32", threads=1) as llm:
        for text, candidate in (("The old ki", "ng sat"), ("un", "happy"), ("He said no", "thing")):
            for ranked in llm.rank(text, [candidate, "!", " and so on"]):
                expected = naive_total(llm, text, ranked.candidate)
                assert ranked.total_logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_labels_share_one_reading_of_the_text(models: list[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    read = models[0]._runtime.read

    def recorded(piece: Any, *, logits: Any = None) -> Any:
        fed.extend(map(len, piece.token_ids))
        return read(piece, logits=logits)

    monkeypatch.setattr(models[0]._runtime, "read", recorded)
    models[0].rank("x" * 150, ["a", "b", "cd"])
    assert sorted(fed) == [1, 151], "of three candidates one has a second token to feed"


# --- texts nobody expects ---


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """A language model and a classifier with the tokenizer of the bundled model, which merges bytes."""
    tmp = tmp_path_factory.mktemp("bundled")
    classifier = write_with_tokenizer(tmp / "cls", head=Head.SEQUENCE_CLASSIFICATION, id2label=LABELS)
    return opened(write_with_tokenizer(tmp / "lm")), opened(classifier)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("tokens", ["bytes", "bundled"])
def test_hostile_texts_are_texts(
    models: list[LLM], classifiers: list[LLM], bundled: tuple[LLM, LLM], text: str, tokens: str
) -> None:
    model, classifier = bundled if tokens == "bundled" else (models[0], classifiers[0])
    batch = ["before", text, "after"]
    for output in (*classifier.classify(batch), *classifier.classify([(text, "after"), ("before", text)])):
        assert sum(output.probabilities) == pytest.approx(1)
    assert np.isfinite(model.embed(batch)).all()
    assert all(math.isfinite(score.perplexity) for score in model.score(batch))
    ranked = model.rank(text, ["a", text + "b"], normalization="unconditional")
    assert all(math.isfinite(each.score) for each in ranked)


def test_a_megabyte_without_a_space_is_truncated_or_refused(models: list[LLM]) -> None:
    text = "x" * 1_000_000
    short = "y"
    refused, fine = models[0].iter_embed([text, short])
    assert isinstance(refused, TextError)
    assert "1000002 tokens and at most 700" in refused.message
    assert not isinstance(fine, TextError)
    cut = models[0].embed([text], truncate=True)
    assert np.abs(cut - models[0].embed(["x" * (CONTEXT - 2)])).max() < TOLERANCE
    (too_long,) = models[0].iter_score([text])
    assert isinstance(too_long, TextError)
    assert "stride" in too_long.message


def test_a_megabyte_without_a_space_is_classified_cut_or_refused(classifiers: list[LLM]) -> None:
    text, short = "x" * 1_000_000, "y"
    refused, fine = classifiers[0].iter_classify([text, short])
    assert isinstance(refused, TextError)
    assert "1000002 tokens and at most 700" in refused.message
    expected = logits_of(classifiers[0].classify([short]))
    assert np.abs(np.subtract(logits_of([fine]), expected)).max() < TOLERANCE
    cut, whole = classifiers[0].classify([text, "x" * (CONTEXT - 2)], truncate=True)
    assert cut.num_tokens == whole.num_tokens == CONTEXT
    assert np.abs(np.subtract(cut.logits, whole.logits)).max() < TOLERANCE
    pair = classifiers[0].classify([(short, text)], truncate=True)
    assert pair[0].num_tokens == CONTEXT


def test_a_megabyte_without_a_space_ranks_nothing_and_stops_nothing(models: list[LLM]) -> None:
    text = "x" * 1_000_000
    good = ("The sky is", [" blue", " green"])
    first, long_text, long_candidate, last = models[0].iter_rank(
        [good, (text, [" blue"]), ("The sky is", [text]), good]
    )
    for refused in (long_text, long_candidate):
        assert isinstance(refused, TextError)
        assert "the context holds 700" in refused.message
    for fine in (first, last):
        assert not isinstance(fine, TextError)
        assert len(fine) == 2


def test_nothing_at_all_cannot_be_scored_and_stops_nothing(models: list[LLM]) -> None:
    first, nothing, last = models[0].iter_score(["a", "", "b"])
    assert isinstance(nothing, TextError)
    assert "text is empty" in nothing.message
    for text, score in (("a", first), ("b", last)):
        assert isinstance(score, Score)
        assert score.num_bytes == len(text)


def test_a_megabyte_without_a_space_is_scored(bundled: tuple[LLM, LLM]) -> None:
    model, _ = bundled
    text = "assepartout" * 90_910  # its longest token
    (score,) = model.score([text], stride=CONTEXT - 1)
    assert score.num_bytes == len(text) > 1_000_000
    assert score.token_ids == tuple(model.tokenizer.encode(text))
    assert len(score.logprobs) == len(score.token_ids) - 1
    first = model.score([score.token_ids[:CONTEXT]])[0].logprobs
    assert score.logprobs[: CONTEXT - 1] == pytest.approx(first, abs=LOGPROB_TOLERANCE)
    assert math.isfinite(score.perplexity)


def test_what_would_have_helped_is_named_as_each_interface_calls_it(
    models: list[LLM], classifiers: list[LLM]
) -> None:
    (cut,) = classifiers[0].iter_classify(["x" * 1000])
    (scored,) = models[0].iter_score(["x" * 1000])
    assert isinstance(cut, TextError)
    assert isinstance(scored, TextError)
    assert cut.message.endswith("at most 700 are taken; shorten it, or cut it with truncate=True")
    assert cut.on_command_line is not None
    assert cut.on_command_line.endswith("at most 700 are taken; shorten it, or cut it with --truncate")
    assert scored.message.endswith("score it in windows with stride=350")
    assert scored.on_command_line is not None
    assert scored.on_command_line.endswith("score it in windows with --stride 350")


def test_a_pair_given_as_a_list_is_told_what_a_pair_is(classifiers: list[LLM]) -> None:
    with pytest.raises(InputError, match=r"a pair of texts is a tuple, not a list: pass \('a', 'b'\)"):
        classifiers[0].classify([["a", "b"]])  # type: ignore[list-item]


BAD_TEXTS: list[Any] = [
    None,
    7,
    1.5,
    float("nan"),
    b"bytes",
    [],
    [-1],
    [320],
    [True, False],
    [1.0],
    ("a", None),
    ("a", "b", "c"),
    {"a": 1},
    [["a"]],
]


@pytest.mark.parametrize("bad", BAD_TEXTS, ids=repr)
def test_a_bad_text_is_an_error_in_its_place_and_stops_nothing(
    models: list[LLM], classifiers: list[LLM], bad: Any
) -> None:
    texts = ["good", bad, "also good"]
    results: list[list[Any]] = [
        list(classifiers[0].iter_classify(texts)),
        list(models[0].iter_embed(texts)),
        list(models[0].iter_hidden_states(texts)),
        list(models[0].iter_score(texts)),
        list(models[0].iter_rank([("text", ["a"]), bad, ("text", ["b"])])),
    ]
    for outputs in results:
        assert [isinstance(output, TextError) for output in outputs] == [False, True, False]
        assert outputs[1].message


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        "ab",
        ("ab", "c"),
        ([1],),
        ([1], None),
        ([1], 2),
        ([1], []),
        ([1], [[]]),
        ([1], [None]),
        ([1], "a"),
    ],
    ids=repr,
)
def test_bad_likelihoods_are_errors_in_their_place(models: list[LLM], bad: Any) -> None:
    good = ([CLS, 97], [[98], [99, 100]])
    first, error, last = models[0].iter_likelihoods([good, bad, good])
    assert isinstance(error, TextError)
    assert error.message
    assert not isinstance(first, TextError)
    assert not isinstance(last, TextError)
    assert [each.logprob for each in first] == pytest.approx([each.logprob for each in last])


@pytest.mark.parametrize(
    "question",
    [
        ("a", []),
        ("a", "bc"),
        ("a", [""]),
        ("a", ["b", 1]),
        ("a",),
        (1, ["b"]),
        ("a", None),
        ("a" * 800, ["b"]),
    ],
    ids=lambda question: repr(question)[:40],
)
def test_bad_questions_are_errors_in_their_place(models: list[LLM], question: Any) -> None:
    bad, good = models[0].iter_rank([question, ("a", ["b"])], normalization="unconditional")
    assert isinstance(bad, TextError)
    assert not isinstance(good, TextError)


def test_lists_name_the_first_bad_text(classifiers: list[LLM]) -> None:
    with pytest.raises(InputError, match=r"^text 1: .*None"):
        classifiers[0].classify(["a", None, 5])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"^the text has 800 tokens and at most 700"):
        classifiers[0].classify([[CLS] * 800])


# --- arguments ---


def test_each_job_needs_its_head(folders: dict[Head, Path]) -> None:
    heads = {
        Head.CAUSAL_LM: ("a language-model head", {"generate", "score", "rank"}),
        Head.SEQUENCE_CLASSIFICATION: ("a classification head", {"classify"}),
        Head.NONE: ("no head", set()),
    }
    for head, (name, possible) in heads.items():
        with opened(folders[head]) as llm:
            for job in ("generate", "score", "rank", "classify"):
                arguments: tuple[Any, ...] = ("a", ["b"]) if job == "rank" else ("a",)
                if job in possible:
                    getattr(llm, job)(*arguments)
                    continue
                with pytest.raises(InputError, match=f"has {name} and cannot {job}.*load a Modern"):
                    getattr(llm, job)(*arguments)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("iter_embed", {"pooling": "max"}, "pooling is 'max'; choose one of last, mean"),
        ("iter_embed", {"max_length": 0}, "max_length must be an integer from 1 to 700, got 0"),
        ("iter_embed", {"max_length": 701}, "max_length must be an integer from 1 to 700, got 701"),
        ("iter_score", {"stride": 0}, "stride must be an integer from 1 to 699, got 0"),
        ("iter_score", {"stride": 700}, "stride must be an integer from 1 to 699, got 700"),
        ("iter_score", {"stride": 1.0}, "got 1.0"),
        ("iter_rank", {"normalization": "mean"}, "choose one of sum, token, byte, unconditional"),
        ("iter_rank", {"unconditional_text": "a"}, "normalization 'unconditional' only"),
        ("iter_rank", {"unconditional_text": None}, "unconditional_text must be text"),
    ],
)
def test_arguments_are_checked_when_the_job_is_asked_for(
    models: list[LLM], call: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        getattr(models[0], call)([], **arguments)


def test_a_template_that_does_not_fit_is_an_error_of_that_text(models: list[LLM]) -> None:
    (error,) = models[0].iter_embed(["abc"], truncate=True, max_length=1)
    assert isinstance(error, TextError)
    assert "template" in error.message


def test_after_close_every_job_says_so(folders: dict[Head, Path]) -> None:
    llm = opened(folders[Head.CAUSAL_LM], max_batch_tokens=20)
    running = llm.iter_score(itertools.repeat("a text"))
    next(running)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(running)
    for call in (llm.score, llm.embed, llm.hidden_states):
        with pytest.raises(RuntimeError, match="closed"):
            call(["a"])  # type: ignore[operator]


def test_weights_that_are_not_finite_are_not_called_labels(tmp_path: Path) -> None:
    folder = folder_for(tmp_path, Head.SEQUENCE_CLASSIFICATION)
    with opened(folder) as llm:
        llm._runtime.read = lambda piece, logits=None: (  # type: ignore[method-assign]
            np.full((len(piece.logit_positions), 3), np.nan, np.float32),
            np.full((len(piece.state_positions), 64), np.inf, np.float32),
        )
        with pytest.raises(CheckpointError, match="not finite"):
            llm.classify(["a"])
        with pytest.raises(CheckpointError, match="not finite"):
            llm.embed(["a"])
        with pytest.raises(CheckpointError, match="not finite"):
            llm.hidden_states(["a"])


def test_progress_is_drawn_on_request(models: list[LLM], capsys: pytest.CaptureFixture[str]) -> None:
    models[0].embed(["a", "b"], use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
