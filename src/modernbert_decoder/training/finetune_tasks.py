"""What fine-tuning learns and how it is judged: a classifier's labels, a language model's next tokens.

Responsible for batches, losses, metrics and what a report says. Knows neither files nor folders.

Shapes: N rows of a data set, L labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.pytorch.losses import IGNORED, NumItems
from modernbert_decoder.training import classification_metrics as metrics_of
from modernbert_decoder.training.classification_data import SINGLE, LabelSet, Target
from modernbert_decoder.training.finetune_run import FinetuneSettings
from modernbert_decoder.training.finetune_trainer import (
    Batch,
    FinetuneTrainer,
    padded,
    padding_mask,
    weighted_loss,
)
from modernbert_decoder.training.sharding import is_sharded
from modernbert_decoder.training.text_data import Example

# A confusion matrix of more labels than this is left to the list of most confused pairs.
_MAX_CONFUSION_LABELS: Final = 500


@dataclass(frozen=True)
class Encoded:
    """A text as ids, with what the loss is given."""

    ids: tuple[int, ...]
    target: Target


class ClassificationTask:
    """Loss and metrics of a classifier."""

    def __init__(
        self,
        labels: LabelSet,
        weights: np.ndarray[Any, np.dtype[np.float32]] | None,
        judge: Sequence[Encoded],
        architecture: DecoderArchitecture,
        settings: FinetuneSettings,
    ) -> None:
        self._labels = labels
        self._weights = None if weights is None else torch.from_numpy(weights)
        self._judge = judge
        self._pad = architecture.pad_token_id or 0
        self._batch_size = settings.batch_size

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Rows to tensors."""
        kind = torch.long if self._labels.problem == SINGLE else torch.float32
        ids = [row.ids for row in rows]
        return {
            "input_ids": padded(ids, value=self._pad),
            "attention_mask": padding_mask(ids),
            "labels": torch.tensor([row.target for row in rows], dtype=kind),
        }

    def loss(self, model: nn.Module, batch: Batch, num_items: NumItems) -> Tensor:
        """The weighted loss of a batch."""
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return weighted_loss(
            logits,
            labels,
            problem_type=self._labels.problem,
            num_items=num_items,
            weights=self._weights,
        )

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Of the validation rows; the loss is the one without weights."""
        logits = self._logits(model)
        problem, targets = self._labels.problem, [row.target for row in self._judge]
        kind = torch.long if problem == SINGLE else torch.float32
        loss = weighted_loss(
            torch.from_numpy(logits),
            torch.tensor(targets, dtype=kind),
            problem_type=problem,
            num_items=None,
            weights=None,
        )
        return {"loss": loss.item(), **metrics_of.metrics(logits, targets, problem)}

    def report(self, trainer: FinetuneTrainer) -> dict[str, Any]:
        """What became of it: metrics by label, and who is taken for whom."""
        found: dict[str, Any] = {"labels": list(self._labels.names), "history": history_of(trainer)}
        if not self._judge:
            return found
        found["metrics"] = trainer.judged(self.metrics)
        logits = trainer.judged(self._logits)
        targets = [row.target for row in self._judge]
        if self._labels.problem != "regression":
            found["per_label"] = metrics_of.per_label(logits, targets, self._labels)
        if self._labels.problem == SINGLE:
            counts = metrics_of.confusion(logits, targets, self._labels)
            found["most_confused"] = metrics_of.most_confused(counts, self._labels)
            if len(self._labels.names) <= _MAX_CONFUSION_LABELS:
                found["confusion"] = counts.tolist()
        return found

    def _logits(self, model: nn.Module) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(N, L), of all validation rows."""
        device = next(model.parameters()).device
        logits = np.empty((len(self._judge), len(self._labels.names)), np.float32)
        for places in _batches_by_length([row.ids for row in self._judge], self._batch_size):
            batch = self.collate([self._judge[i] for i in places])
            found = model(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).logits
            logits[places] = found.float().cpu().numpy()
        return logits


class TextTask:
    """Loss and perplexity of a language model."""

    def __init__(
        self, judge: Sequence[Example], architecture: DecoderArchitecture, settings: FinetuneSettings
    ) -> None:
        self._judge = judge
        self._pad = architecture.pad_token_id or 0
        self._batch_size = settings.batch_size

    def collate(self, rows: Sequence[Example]) -> Batch:
        """Examples to tensors."""
        return {
            "input_ids": padded([row.ids for row in rows], value=self._pad),
            "attention_mask": padding_mask([row.ids for row in rows]),
            "labels": padded([row.labels for row in rows], value=IGNORED),
        }

    def loss(self, model: nn.Module, batch: Batch, num_items: NumItems) -> Tensor:
        """The loss of a batch, computed without holding its logits.

        That reads a weight without calling its layer, for which sharding gathers nothing; there they are
        held.
        """
        loss: Tensor = model(
            **batch, num_items_in_batch=num_items, skip_logits=not is_sharded(model), use_cache=False
        ).loss
        return loss

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Nats per learned token of the validation examples, and their exponential."""
        device = next(model.parameters()).device
        total = 0.0
        for places in _batches_by_length([row.ids for row in self._judge], self._batch_size):
            batch = self.collate([self._judge[i] for i in places])
            total += self.loss(model, {name: each.to(device) for name, each in batch.items()}, 1).item()
        loss = total / sum(example.num_targets for example in self._judge)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def report(self, trainer: FinetuneTrainer) -> dict[str, Any]:
        """What became of it."""
        found: dict[str, Any] = {"history": history_of(trainer)}
        if self._judge:
            found["metrics"] = trainer.judged(self.metrics)
        return found


def training_flops_per_token(
    architecture: DecoderArchitecture, lengths: Sequence[int], *, head_share: float, has_adapter: bool
) -> float:
    """Operations of a forward and a backward pass, for the mean token of rows of these lengths.

    Three times those of the forward pass; twice with an adapter, whose base has no gradients. `head_share` of
    the tokens go through the language model's head.

    >>> from modernbert_decoder.architecture import released_architecture
    >>> a = released_architecture("17m")
    >>> training_flops_per_token(a, [9, 9], head_share=1.0, has_adapter=False) == 3 * a.flops_per_token(5)
    True
    """
    forward = 0.0
    for length, count in Counter(lengths).items():
        middle = (length + 1) // 2  # attention's operations grow with the position
        body = architecture.flops_per_token(middle, with_head=False)
        head = architecture.flops_per_token(middle) - body
        forward += count * length * (body + head_share * head)
    return (2 if has_adapter else 3) * forward / sum(lengths)


def history_of(trainer: FinetuneTrainer) -> list[dict[str, float]]:
    """What was logged, losses and metrics."""
    return [
        {
            key: value
            for key, value in entry.items()
            if key == "step" or "loss" in key or key.startswith("eval_")
        }
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def _batches_by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = np.argsort([-len(row) for row in rows], kind="stable").tolist()
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]
