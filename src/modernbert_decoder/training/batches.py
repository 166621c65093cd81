"""Sequences to the tensors of every step, for one of several processes, with the cursor that follows it.

All processes read the same sequences and each takes its share, so that a run does not depend on how many they
are. Knows the plan, and no model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from modernbert_decoder.training.documents import Source
from modernbert_decoder.training.encoding import DocumentEncoder
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.recipe import DataRecipe, Recipe
from modernbert_decoder.training.sequences import Cursor, SequenceSettings, SequenceStream, TokenSequence
from modernbert_decoder.training.tokenizer_training import TrainingTokenizer

IGNORED: Final = -100

MicroBatch = dict[str, Tensor]
"""Arguments of the model: `input_ids`, `shift_labels`, and `position_ids` or `attention_mask`."""


@dataclass(frozen=True)
class StepBatch:
    """What one process needs for one step.

    Attributes:
        micro_batches: its share, in rounds.
        num_targets: tokens that are predicted in the whole batch, over all processes.
        num_tokens: tokens of the whole batch, padding not counted.
        mean_length: of the sequence that a token of it is in; that of all sequences where they are full.
        cursor: where the data stands afterwards.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    num_tokens: int
    mean_length: int
    cursor: Cursor


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a batch a process computes, and in which form.

    Attributes:
        process: its number.
        num_processes: how many there are.
        micro_batch_tokens: at most so many at once.
        pad_token_id: fills unpacked sequences.
        is_flat: one row for all packed sequences, as FlashAttention wants them.
    """

    process: int = 0
    num_processes: int = 1
    micro_batch_tokens: int
    pad_token_id: int
    is_flat: bool = False

    def micro_batches(
        self, sequences: Sequence[TokenSequence], *, length: int, is_packed: bool
    ) -> tuple[MicroBatch, ...]:
        """This process's sequences in rounds of nearly equal size, the same number in every process."""
        own = sequences[self.process :: self.num_processes]
        at_once = max(self.micro_batch_tokens // length, 1)
        num_rounds = -(-len(own) // at_once)
        bounds = np.linspace(0, len(own), num_rounds + 1).round().astype(int).tolist()
        parts = [own[a:b] for a, b in pairwise(bounds)]
        return tuple(self._packed(part) if is_packed else self._padded(part) for part in parts)

    def _packed(self, sequences: Sequence[TokenSequence]) -> MicroBatch:
        batch = {
            "input_ids": np.stack([sequence.ids for sequence in sequences]).astype(np.int64),
            "position_ids": np.stack([sequence.position_ids() for sequence in sequences]),
            "shift_labels": np.stack([sequence.targets(ignored=IGNORED) for sequence in sequences]),
        }
        if self.is_flat:
            batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        elif all(sequence.starts == (0,) for sequence in sequences):
            del batch["position_ids"]  # one document in every row needs no mask at all
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _padded(self, sequences: Sequence[TokenSequence]) -> MicroBatch:
        shape = (len(sequences), max(len(sequence.ids) for sequence in sequences))
        ids = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, sequence in enumerate(sequences):
            size = len(sequence.ids)
            ids[row, :size], mask[row, :size] = sequence.ids, 1
            labels[row, :size] = sequence.targets(ignored=IGNORED)
        arrays = {"input_ids": ids, "attention_mask": mask, "shift_labels": labels}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


class StepBatches(IterableDataset[StepBatch]):
    """The batches of all steps from one on, prepared by a thread beside the training."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        tokenizer: TrainingTokenizer,
        share: Share,
        *,
        open_source: Callable[[DataRecipe], Source],
        first_step: int = 0,
        cursor: Cursor | None = None,
    ) -> None:
        """Begins at a step; the cursor is the one that the step before left."""
        self._recipe = recipe
        self._plan = plan
        self._tokenizer = tokenizer
        self._share = share
        self._open_source = open_source
        self._first_step = first_step
        self._cursor = cursor

    def __iter__(self) -> Iterator[StepBatch]:
        """Batch after batch, to the end of the plan."""
        return _prefetched(self._batches(), size=self._recipe.run.prefetch_steps)

    def prepared(self, sequences: Sequence[TokenSequence], step: int) -> Sequence[TokenSequence]:
        """What is learned of the sequences of a step, over all processes: here, the next tokens."""
        return sequences

    def _batches(self) -> Iterator[StepBatch]:
        plan, cursor = self._plan, self._cursor
        stream: SequenceStream | None = None
        try:
            for index in range(self._first_step, plan.num_steps):
                step = plan.step(index)
                if step.phase > 0 and index == plan.first_step_of(step.phase):
                    if stream is not None:
                        stream.close()
                    stream = self._stream(step.phase, self._cursor_of_phase(step.phase, cursor))
                elif stream is None:
                    stream = self._stream(step.phase, cursor)
                sequences = self.prepared(stream.take(step.num_sequences), index)
                cursor = stream.cursor()
                is_packed = self._recipe.data_of(step.phase).form == "packed"
                lengths = [len(sequence.ids) for sequence in sequences]
                yield StepBatch(
                    self._share.micro_batches(sequences, length=step.sequence_length, is_packed=is_packed),
                    num_targets=sum(sequence.num_targets for sequence in sequences),
                    num_tokens=sum(lengths),
                    mean_length=sum(length * length for length in lengths) // sum(lengths),
                    cursor=cursor,
                )
        finally:
            if stream is not None:
                stream.close()

    def _cursor_of_phase(self, phase: int, cursor: Cursor | None) -> Cursor | None:
        """Where a phase begins to read, given where the one before stopped.

        The same data goes on: with sequences of the same form right there, else with the next block.
        """
        recipe, before = self._recipe, phase - 1
        if recipe.data_of(phase) != recipe.data_of(before):
            return None
        if recipe.phases[phase].sequence_length == recipe.phases[before].sequence_length:
            return cursor
        stream = self._stream(before, cursor)
        next_cursor = stream.cursor_of_next_block()
        stream.close()
        return next_cursor

    def _stream(self, phase: int, cursor: Cursor | None) -> SequenceStream:
        recipe, tokenizer = self._recipe, self._tokenizer
        data = recipe.data_of(phase)
        settings = SequenceSettings(
            length=recipe.phases[phase].sequence_length,
            is_packed=data.form == "packed",
            restart_with_cls=data.restart_with_cls,
            shuffle_documents=data.shuffle_documents,
            seed=recipe.run.seed,
            cls_token_id=tokenizer.cls_token_id,
        )
        encoder = DocumentEncoder(
            tokenizer.tokenizer, cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id
        )
        return SequenceStream(self._open_source(data), encoder, settings, cursor=cursor)


def _prefetched(batches: Iterator[StepBatch], *, size: int) -> Iterator[StepBatch]:
    """The same batches, up to `size` of them made ready by a thread."""
    ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=size)
    is_stopped = threading.Event()

    def put(item: StepBatch | BaseException | None) -> None:
        while not is_stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if is_stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            batches.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_stopped.set()
        thread.join()
