"""Sequences: nothing lost, boundaries respected, the order decided by the seed, exact resumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import phase, tiny_recipe, write_texts

from modernbert_decoder.training.batches import Share, StepBatches
from modernbert_decoder.training.documents import Document, open_source
from modernbert_decoder.training.encoding import DocumentEncoder
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.recipe import TokenizerTraining
from modernbert_decoder.training.sequences import (
    Cursor,
    Ids,
    SequenceSettings,
    SequenceStream,
    TokenSequence,
)
from modernbert_decoder.training.tokenizer_training import TrainingTokenizer, train_tokenizer

CLS, SEP = 1, 2


class Given:
    """Documents in memory, as one shard."""

    num_shards = 1
    identity = "given"

    def __init__(self, documents: list[list[int]]) -> None:
        self._documents = documents

    def open(self, shard: int, position: Any) -> _Reader:
        return _Reader(self._documents, position or 0)


class _Reader:
    def __init__(self, documents: list[list[int]], position: int) -> None:
        self._documents, self._position = documents, position

    def read(self) -> Document | None:
        if self._position == len(self._documents):
            return None
        self._position += 1
        return self._documents[self._position - 1]

    def position(self) -> int:
        return self._position

    def close(self) -> None:
        pass


def framed(documents: Sequence[Document]) -> list[Ids]:
    return [np.array([CLS, *map(int, document), SEP], np.int32) for document in documents]


def stream_of(documents: list[list[int]], *, cursor: Cursor | None = None, **changes: Any) -> SequenceStream:
    options = {
        "length": 8,
        "is_packed": True,
        "restart_with_cls": False,
        "shuffle_documents": 3,
        "seed": 0,
        "cls_token_id": CLS,
    }
    return SequenceStream(Given(documents), framed, SequenceSettings(**{**options, **changes}), cursor=cursor)


def documents_of(lengths: Sequence[int]) -> list[list[int]]:
    """Documents whose tokens are all different."""
    ids = iter(range(10, 100_000))
    return [[next(ids) for _ in range(length)] for length in lengths]


def split_at_starts(sequence: TokenSequence) -> list[list[int]]:
    bounds = [*sequence.starts, len(sequence.ids)]
    return [sequence.ids[a:b].tolist() for a, b in pairwise(bounds)]


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths=lengths, restarts=st.booleans())
@settings(max_examples=60, deadline=None)
def test_packed_sequences_are_full_and_hold_each_token_of_an_epoch_once(
    lengths: list[int], restarts: bool
) -> None:
    documents = documents_of(lengths)
    stream = stream_of(documents, restart_with_cls=restarts)
    total = sum(lengths) + 2 * len(lengths)
    sequences: list[TokenSequence] = []
    while stream.cursor().place.epoch == 0 and len(sequences) < total:
        sequences += stream.take(1)
    assert all(len(sequence.ids) == 8 for sequence in sequences)
    seen = [int(i) for sequence in sequences for i in sequence.ids if i >= 10]
    pending = [i for i in stream.cursor().pending_ids if i >= 10]
    own = sorted(i for document in documents for i in document)
    assert sorted({*seen, *pending}) == own
    begins = [part[0] for sequence in sequences for part in split_at_starts(sequence)]
    if restarts:
        assert set(begins) == {CLS}


@given(lengths=lengths, taken=st.integers(0, 40), packed=st.booleans(), restarts=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stream_goes_on_from_every_cursor(
    lengths: list[int], taken: int, packed: bool, restarts: bool
) -> None:
    documents = documents_of(lengths)
    options = {"is_packed": packed, "restart_with_cls": restarts}
    whole = stream_of(documents, **options).take(taken + 20)
    first = stream_of(documents, **options)
    assert_same(first.take(taken), whole[:taken])
    stored = json.loads(json.dumps(first.cursor().to_dict()))
    second = stream_of(documents, cursor=Cursor.from_dict(stored), **options)
    assert second.cursor() == first.cursor()
    assert_same(second.take(20), whole[taken:])
    assert_same(first.take(20), whole[taken:])


def assert_same(left: list[TokenSequence], right: list[TokenSequence]) -> None:
    assert [(s.ids.tolist(), s.starts) for s in left] == [(s.ids.tolist(), s.starts) for s in right]


def test_the_last_token_of_a_document_predicts_nothing_and_positions_begin_anew() -> None:
    sequence = TokenSequence(np.array([CLS, 10, SEP, CLS, 11, 12, SEP, CLS], np.int32), (0, 3, 7))
    assert sequence.targets().tolist() == [10, SEP, -100, 11, 12, SEP, -100, -100]
    assert sequence.position_ids().tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert sequence.num_targets == 5


def test_unpacked_sequences_hold_one_document_each_and_its_rest_begins_with_cls() -> None:
    documents = documents_of([3, 17])
    sequences = stream_of(documents, is_packed=False, restart_with_cls=True).take(4)
    assert all(sequence.starts == (0,) for sequence in sequences)
    assert {int(sequence.ids[0]) for sequence in sequences} == {CLS}
    longest = sorted((s.ids.tolist() for s in sequences), key=lambda ids: ids[1])
    assert longest == [
        [CLS, 10, 11, 12, SEP],
        [CLS, *range(13, 20)],
        [CLS, *range(20, 27)],
        [CLS, *range(27, 30), SEP],
    ]


def test_order_follows_the_seed_and_differs_between_epochs() -> None:
    documents = documents_of([6] * 12)

    def order(seed: int, epochs: int = 1) -> list[list[int]]:
        stream = stream_of(documents, seed=seed, shuffle_documents=100)
        return [sequence.ids.tolist() for sequence in stream.take(12 * epochs)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    first, second = order(1, 2)[:12], order(1, 2)[12:]
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_cursor_of_other_data_is_refused() -> None:
    stream = stream_of(documents_of([5, 5]))
    stream.take(1)
    other = Given(documents_of([5, 5]))
    other.identity = "other"
    settings = SequenceSettings(
        length=8, is_packed=True, restart_with_cls=False, shuffle_documents=3, seed=0, cls_token_id=CLS
    )
    with pytest.raises(TrainingError, match="have changed since the checkpoint"):
        SequenceStream(other, framed, settings, cursor=stream.cursor())


# ---- batches ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(files: list[str]) -> TrainingTokenizer:
    source = open_source(tiny_recipe(files).data)
    return train_tokenizer(source, TokenizerTraining(vocab_size=300), seed=0)


PHASES = [
    phase("a", batch_warmup_start=2, batch_warmup_tokens=600),
    phase("b", tokens=900),
    phase("c", tokens=900, sequence_length=64, batch_sequences=2),
]


def batches(
    files: list[str],
    tokenizer: TrainingTokenizer,
    *,
    share: Share | None = None,
    first_step: int = 0,
    cursor: Cursor | None = None,
    **sections: Any,
) -> list[Any]:
    recipe = tiny_recipe(files, phases=PHASES, **sections)
    share = share or Share(micro_batch_tokens=128, pad_token_id=3)
    plan = Plan(recipe)
    return list(
        StepBatches(
            recipe,
            plan,
            tokenizer,
            share,
            open_source=open_source,
            first_step=first_step,
            cursor=cursor,
        )
    )


def rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (ids.tolist(), labels.tolist())
        for micro in batch.micro_batches
        for ids, labels in zip(micro["input_ids"], micro["shift_labels"], strict=True)
    ]


def test_every_step_has_the_batch_of_the_plan(files: list[str], tokenizer: TrainingTokenizer) -> None:
    plan = Plan(tiny_recipe(files, phases=PHASES))
    made = batches(files, tokenizer)
    assert len(made) == plan.num_steps
    for i, batch in enumerate(made):
        step = plan.step(i)
        assert [len(ids) for ids, _ in rows(batch)] == [step.sequence_length] * step.num_sequences
        assert batch.num_tokens == step.num_sequences * step.sequence_length
        assert batch.num_targets == sum(label != -100 for _, labels in rows(batch) for label in labels)


@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_batches_go_on_from_every_step_also_across_phases(
    files: list[str], tokenizer: TrainingTokenizer, form: str
) -> None:
    data = {"form": form}
    whole = batches(files, tokenizer, data=data)
    for done in range(1, len(whole)):
        rest = batches(files, tokenizer, data=data, first_step=done, cursor=whole[done - 1].cursor)
        assert [rows(batch) for batch in rest] == [rows(batch) for batch in whole[done:]]
        assert [batch.cursor for batch in rest] == [batch.cursor for batch in whole[done:]]


def test_two_processes_share_the_batch_of_one(files: list[str], tokenizer: TrainingTokenizer) -> None:
    alone = batches(files, tokenizer)
    shares = [
        batches(
            files,
            tokenizer,
            share=Share(process=i, num_processes=2, micro_batch_tokens=128, pad_token_id=3),
        )
        for i in range(2)
    ]
    for whole, first, second in zip(alone, *shares, strict=True):
        together = [row for pair in zip(rows(first), rows(second), strict=True) for row in pair]
        assert together == rows(whole)
        assert first.num_targets == second.num_targets == whole.num_targets
        assert len(first.micro_batches) == len(second.micro_batches)
        assert first.cursor == second.cursor == whole.cursor


def test_rounds_hold_no_more_tokens_than_allowed_and_are_even(
    files: list[str], tokenizer: TrainingTokenizer
) -> None:
    share = Share(micro_batch_tokens=100, pad_token_id=3)
    for batch in batches(files, tokenizer, share=share):
        sizes = [micro["input_ids"].numel() for micro in batch.micro_batches]
        assert max(sizes) <= 100
        assert max(sizes) - min(sizes) <= batch.micro_batches[0]["input_ids"].shape[1]


def test_one_flat_row_has_the_same_tokens_and_targets(files: list[str], tokenizer: TrainingTokenizer) -> None:
    flat = batches(files, tokenizer, share=Share(micro_batch_tokens=128, pad_token_id=3, is_flat=True))
    for whole, other in zip(batches(files, tokenizer), flat, strict=True):
        assert all(micro["input_ids"].shape[0] == 1 for micro in other.micro_batches)
        assert [i for ids, _ in rows(other) for i in ids] == [i for ids, _ in rows(whole) for i in ids]
        positions = other.micro_batches[0]["position_ids"][0].tolist()
        assert positions[0] == 0
        assert positions.count(0) > 1


def test_a_failure_of_the_data_reaches_the_training(tmp_path: Path, tokenizer: TrainingTokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 3 + b"\xff\n")
    with pytest.raises(Exception, match="is not UTF-8"):
        batches([str(tmp_path / "a.txt")], tokenizer)


def test_special_tokens_in_a_text_are_plain_text(tokenizer: TrainingTokenizer) -> None:
    encoder = DocumentEncoder(tokenizer.tokenizer, cls_token_id=CLS, sep_token_id=SEP)
    (ids,) = encoder(["a [SEP] b \ud800"])
    assert (ids == SEP).sum() == 1
    assert ids[-1] == SEP
    assert ids[0] == CLS


def test_ids_are_framed_once_and_unknown_ones_refused(tokenizer: TrainingTokenizer) -> None:
    encoder = DocumentEncoder(tokenizer.tokenizer, cls_token_id=CLS, sep_token_id=SEP)
    framed_ids = [ids.tolist() for ids in encoder([[7, 8], [CLS, 7, SEP]])]
    assert framed_ids == [[CLS, 7, 8, SEP], [CLS, 7, SEP]]
    with pytest.raises(Exception, match="has the token id 300"):
        encoder([[300]])
