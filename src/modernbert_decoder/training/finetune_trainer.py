"""Hugging Face's Trainer as fine-tuning uses it: order by length and seed, exact losses, own evaluation.

The loop, devices, checkpoints and their restoration are the library's. Knows neither files nor labels.

Shapes: B rows, T tokens, L labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert_decoder.pytorch.losses import IGNORED, NumItems, ProblemType, classification_loss
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.finetune_checkpoints import checkpoint_path, keep_only, mark_whole
from modernbert_decoder.training.precision import measured_peak_flops
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
        flops_per_token: operations of a forward and a backward pass, for the mean token of the rows.
    """

    rows: Sequence[Any]
    lengths: Sequence[int]
    collate: Callable[[Sequence[Any]], Batch]
    objective: Objective
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    flops_per_token: float


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


class TokenCount:
    """Tokens of the rows that a run has learned from, over all processes.

    >>> count = TokenCount([5, 1, 1, 1], rows_per_step=2, seed=0)
    >>> count.after(2), count.after(4)
    (8, 16)
    """

    def __init__(self, lengths: Sequence[int], *, rows_per_step: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._order = LengthSampler(lengths, batch_size=rows_per_step, seed=seed)
        self._first_rows = np.arange(0, len(lengths), rows_per_step)  # of each step of an epoch
        self._epoch = -1
        self._before = np.zeros(0, np.int64)  # tokens of that epoch before each of its steps

    def after(self, step: int) -> int:
        """The tokens of the first so many steps."""
        epoch, done = divmod(step, len(self._first_rows))
        if epoch != self._epoch:
            self._order.set_epoch(epoch)
            of_steps = np.add.reduceat(self._lengths[list(self._order)], self._first_rows)
            self._before = np.cumsum(of_steps) - of_steps
            self._epoch = epoch
        return epoch * int(self._lengths.sum()) + int(self._before[done])


class EpochEnds(TrainerCallback):
    """Logs at the end of each epoch, and finds the best checkpoint of a run whose folder was moved.

    With that, a run that goes on from a checkpoint logs what it would have logged: no mean goes over an
    epoch's end.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The library has forgotten a best checkpoint that does not stand where it was written."""
        assert args.output_dir is not None
        if state.best_global_step:
            best = checkpoint_path(Path(args.output_dir), state.best_global_step)
            if best.is_dir():
                state.best_model_checkpoint = str(best)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for it; the library logs no step twice."""
        control.should_log = True


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
            callbacks=[EpochEnds(), *callbacks],
        )
        self.saving_step: int | None = None
        self._learning = learning
        self._tokens = TokenCount(learning.lengths, rows_per_step=self._rows_per_step, seed=args.seed)
        self._peak_flops = args.world_size * measured_peak_flops(args.device, is_bfloat16=args.bf16)
        self._last_log: tuple[float, int] | None = None  # when, and the tokens seen by then

    @property
    def _rows_per_step(self) -> int:
        args = self.args
        rows: int = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return rows

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
        folder = checkpoint_path(Path(self.args.output_dir), self.state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            mark_whole(folder)
            keep_only(folder.parent, steps={self.state.global_step, self.state.best_global_step})
        self.saving_step = None

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # a checkpoint is whole when everybody's files are there

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthSampler(self._learning.lengths, batch_size=self._rows_per_step, seed=self.args.seed)

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
        if self._last_log is None:
            self._last_log = (time.perf_counter(), self._tokens.after(self.state.global_step))
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
        started = time.perf_counter()
        found = self.judged(self._learning.evaluate)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        if self._last_log is not None:  # evaluating is no training
            then, tokens = self._last_log
            self._last_log = (then + time.perf_counter() - started, tokens)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log, with tokens and speed beside the loss."""
        tokens = self._tokens.after(self.state.global_step)
        logs["tokens"] = tokens
        if "loss" in logs and self._last_log is not None:
            now, (then, before) = time.perf_counter(), self._last_log
            speed = (tokens - before) / (now - then)
            logs["tokens_per_second"] = speed
            logs["mfu"] = speed * self._learning.flops_per_token / self._peak_flops
            self._last_log = (now, tokens)
        super().log(logs, start_time)

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
