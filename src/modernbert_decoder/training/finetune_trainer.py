"""Hugging Face's Trainer as fine-tuning uses it: order by length and seed, exact losses, own evaluation.

The loop, devices, checkpoints and their restoration are the library's. Knows neither files nor labels.

Shapes: B rows, T tokens, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from modernbert_decoder.pytorch.losses import IGNORED, NumItems, ProblemType, classification_loss
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.sharding import check_sharding, shard_on_cpu

# Rows that are sorted by length at a time, in batches: more save padding, fewer keep the order more random.
_BATCHES_SORTED: Final = 50

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch, NumItems], Tensor]
"""The loss of a batch, averaged over `num_items` (None: over the batch's own)."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is learned, and how it is judged.

    Attributes:
        rows: examples, whatever `collate` takes.
        lengths: tokens of each.
        collate: rows to the arguments of the model, and `labels`.
        objective: the loss.
        evaluate: the metrics of a model in evaluation mode, by name; None: there is nothing to judge by.
    """

    rows: Sequence[Any]
    lengths: Sequence[int]
    collate: Callable[[Sequence[Any]], Batch]
    objective: Objective
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None


class LengthSampler(Sampler[int]):
    """Rows in an order that seed and epoch decide, with rows of like length in one batch."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        order = random.permutation(len(self._lengths))
        size = self._batch_size
        span = size * _BATCHES_SORTED
        batches: list[list[int]] = []
        for begin in range(0, len(order), span):
            part = order[begin : begin + span]
            part = part[np.argsort(-self._lengths[part], kind="stable")]
            batches += [part[i : i + size].tolist() for i in range(0, len(part), size)]
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        for index in random.permutation(len(whole)):
            yield from whole[index]
        for batch in rest:
            yield from batch


class FinetuneTrainer(Trainer):
    """Trains what a `Learning` says.

    Attributes:
        saving_step: the step whose checkpoint is being written; None in between.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        learning: Learning,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=learning.rows,
            eval_dataset=learning.rows[:1],  # evaluation is our own; there must be some
            data_collator=learning.collate,
            callbacks=callbacks,
        )
        self.saving_step: int | None = None
        self._learning = learning

    def create_accelerator_and_postprocess(self) -> None:
        """The library's, and FSDP2 on CPUs where the launcher asks for it."""
        check_sharding(self.args.device.type)
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator):
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.saving_step = self.state.global_step
        # The library looks for it before shards are written, and processes that found it or not would part.
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
        self.saving_step = None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the file that makes a checkpoint whole comes after everybody's

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(self._learning.lengths, batch_size=size, seed=self.args.seed)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The library's step.

        Raises:
            TrainingError: the loss is no number; the weights are those of the step before.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; the step was not taken. "
                "Lower the learning rate and start again in another folder, or look at the data"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; with `num_items_in_batch`, so scaled that processes add up."""
        assert not return_outputs
        loss = self._learning.objective(model, inputs, num_items_in_batch)
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The learning's own metrics; the arguments are the library's and change nothing else."""
        assert self._learning.evaluate is not None
        found = self.judged(self._learning.evaluate)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def judged(self, judge: Callable[[nn.Module], Any]) -> Any:
        """What a function says of the model in evaluation mode, without gradients."""
        model = self.model
        assert isinstance(model, nn.Module)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                return judge(model)
        finally:
            model.train(was_training)


def padded(rows: Sequence[Sequence[int]], *, value: int) -> Tensor:
    """Rows of ids as one tensor (B, T), padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def padding_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, T), 1 where there is a token."""
    return padded([[1] * len(row) for row in rows], value=0)


def weighted_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    problem_type: ProblemType,
    num_items: NumItems,
    weights: Tensor | None,
) -> Tensor:
    """A classifier's loss with a weight for each label, (L,), in float32.

    With one label each, a row's loss is multiplied by the weight of its label; with several, what is lost
    where a label is there is multiplied by its weight. Weights do not change what the sum is divided by.
    """
    if weights is None:
        return classification_loss(logits, labels, problem_type=problem_type, num_items=num_items)
    wide, weights = logits.float(), weights.to(logits.device)
    if problem_type == "single_label_classification":
        total = F.cross_entropy(wide, labels, weight=weights, ignore_index=IGNORED, reduction="sum")
        return total / (len(labels) if num_items is None else num_items)
    assert problem_type == "multi_label_classification", problem_type
    total = F.binary_cross_entropy_with_logits(wide, labels, pos_weight=weights, reduction="sum")
    return total / (labels.numel() if num_items is None else num_items)
