"""Hugging Face's Trainer with the recipe's steps: batches of a plan, rates in tokens, phases, bits per byte.

The loop, processes, sharding, autocast, checkpoints and their restoration are the library's. What is
overridden here is what it documents as overridable. Knows nothing of files.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.pytorch import ModernBertDecoderForCausalLM
from modernbert_decoder.training.batches import StepBatch, StepBatches
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.held_out import HeldOutTexts
from modernbert_decoder.training.optimizer import OptimizerSettings, parameter_groups, stable_adamw
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.sequences import Cursor
from modernbert_decoder.training.sharding import check_sharding, shard_on_cpu


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What the trainer needs beside the library's arguments.

    Attributes:
        optimizer: the recipe's.
        peak_flops: of all devices together, per second.
        held_out: what to evaluate on, if anything.
        max_windows: of it, while training.
        tokens_at_once: in evaluation.
    """

    optimizer: OptimizerSettings
    peak_flops: float
    held_out: HeldOutTexts | None
    max_windows: int | None
    tokens_at_once: int


@dataclass
class _Work:
    """What has been done since a moment, by all processes.

    Attributes:
        since: the moment; evaluations put it off.
        tokens: trained on, padding not counted.
        flops: operations of their forward and backward passes.
    """

    since: float
    tokens: int = 0
    flops: float = 0.0


class PretrainingTrainer(Trainer):
    """A step of this trainer is a step of the plan, however many rounds its batch takes.

    Attributes:
        plan: all steps.
        cursor: where the data stands after the last step.
    """

    def __init__(
        self,
        model: ModernBertDecoderForCausalLM,
        args: TrainingArguments,
        *,
        plan: Plan,
        batches: StepBatches,
        settings: TrainerSettings,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=batches, callbacks=callbacks)
        self.plan = plan
        self.cursor: Cursor | None = None
        self._settings = settings
        self._phase = -1
        self._mean_length = 0  # of the sequences of the last step
        self._work: _Work | None = None  # since the last entry of the log; None: no step has begun

    def create_accelerator_and_postprocess(self) -> None:
        """The library's, and FSDP2 on CPUs where the launcher asks for it."""
        check_sharding(self.args.device.type)
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator):
            self.is_fsdp_enabled = True

    @property
    def decoder(self) -> ModernBertDecoderForCausalLM:
        """The model itself, without what processes wrap around it."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, ModernBertDecoderForCausalLM)
        return model

    @property
    def skips_logits(self) -> bool:
        """Whether the loss is computed without holding all logits.

        It reads the weight of `decoder` without calling it, for which sharding gathers nothing.
        """
        return not self.is_fsdp_enabled

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of the plan; every process has its own already."""
        dataset: Any = self.train_dataset
        collate: Any = _as_inputs  # without a batch size the loader hands it what the data set yields
        # A generator of its own: the loader draws a seed, which would shift dropout after a restart.
        return DataLoader(dataset, batch_size=None, collate_fn=collate, generator=torch.Generator())

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """StableAdamW with the recipe's groups."""
        if self.optimizer is None:
            settings = self._settings.optimizer
            trained = self.model if model is None else model
            assert trained is not None
            groups = parameter_groups(trained, weight_decay=settings.weight_decay)
            is_fused = self.args.device.type != "cpu" and not self.is_fsdp_enabled
            self.optimizer = stable_adamw(groups, settings, is_fused=is_fused)
        optimizer: Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The plan's rates; `num_training_steps` is its own number of steps."""
        if self.lr_scheduler is None:
            driven = self.optimizer if optimizer is None else optimizer
            assert driven is not None
            self.lr_scheduler = LambdaLR(driven, self.plan.rate)
        scheduler: LRScheduler = self.lr_scheduler
        return scheduler

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of this process's part of a step, in rounds; returns the loss (times the
        number of processes, of which the library takes the mean).

        Raises:
            TrainingError: the loss is no number; the weights are those of the step before.
        """
        batch: StepBatch = inputs["batch"]
        if self._work is None:
            self._work = _Work(time.perf_counter())
            self._set_rates()
        self._enter_phase(self.plan.step(self.state.global_step).phase)
        model.train()
        num_items = torch.tensor(batch.num_targets / self.accelerator.num_processes, device=self.args.device)
        total = torch.zeros((), device=self.args.device)
        for i, micro_batch in enumerate(batch.micro_batches):
            is_last = i == len(batch.micro_batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                arguments = {name: tensor.to(self.args.device) for name, tensor in micro_batch.items()}
                with self.compute_loss_context_manager():
                    loss = model(
                        **arguments,
                        num_items_in_batch=num_items,
                        skip_logits=self.skips_logits,
                        use_cache=False,
                    ).loss
                self.accelerator.backward(loss)
                total += loss.detach()
        if not math.isfinite(total.item()):
            raise TrainingError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}; the step was not taken. "
                "Lower optimizer.learning_rate or look at the data of this step, and start the same command "
                "again: it goes on from the last checkpoint"
            )
        self.cursor = batch.cursor
        self._mean_length = batch.mean_length
        self._work.tokens += batch.num_tokens
        self._work.flops += batch.num_tokens * self._training_flops()
        return total

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Bits per byte of the held-out texts; the arguments are the library's and change nothing else."""
        assert self._settings.held_out is not None
        assert self.model is not None
        started = time.perf_counter()
        result = self._settings.held_out.measure(
            self.model,
            tokens_at_once=self._settings.tokens_at_once,
            skips_logits=self.skips_logits,
            max_windows=self._settings.max_windows,
        )
        metrics = {
            f"{metric_key_prefix}_loss": result.loss,
            f"{metric_key_prefix}_bits_per_byte": result.bits_per_byte,
        }
        self.log(metrics)
        if self._work is not None:  # evaluating is no training
            self._work.since += time.perf_counter() - started
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log, with tokens and speed beside the loss.

        `tokens` are the schedules', to which a padded sequence counts as a full one; speed is that of tokens
        which are no padding.
        """
        logs["tokens"] = self.plan.tokens_after(self.state.global_step)
        if "loss" in logs and self._work is not None:
            now = time.perf_counter()
            seconds = now - self._work.since
            logs["tokens_per_second"] = self._work.tokens / seconds
            logs["mfu"] = self._work.flops / seconds / self._settings.peak_flops
            self._work = _Work(now)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Of this process's part of the step that was just taken, forward and backward."""
        batch: StepBatch = inputs["batch"]
        num_processes: int = self.accelerator.num_processes
        return int(batch.num_tokens * self._training_flops()) // num_processes

    def _training_flops(self) -> float:
        """Per token of the last step."""
        return training_flops_per_token(self.decoder.config.to_architecture(), self._mean_length)

    def _set_rates(self) -> None:
        """The plan's rate for the first step: a checkpoint holds that of the plan it was written with."""
        assert self.optimizer is not None
        rate = self.plan.rate(self.state.global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.optimizer.learning_rate * rate

    def _enter_phase(self, phase: int) -> None:
        if phase != self._phase:
            self._phase = phase
            base = self.plan.phases[phase].rope_base
            if base is not None:
                set_rope_base(self.decoder, base)


def training_flops_per_token(architecture: DecoderArchitecture, sequence_length: int) -> float:
    """Operations of a forward and a backward pass, three times the forward pass, for the mean position."""
    return 3.0 * architecture.flops_per_token((sequence_length + 1) // 2)


def set_rope_base(model: ModernBertDecoderForCausalLM, base: float) -> None:
    """Give all layers of a model another RoPE base; the window stays."""
    config = model.config
    config.global_rope_theta = config.local_rope_theta = base
    config.rope_parameters = {
        kind: {**parameters, "rope_theta": base} for kind, parameters in config.rope_parameters.items()
    }
    architecture = config.to_architecture(Head.NONE)
    model.model.architecture = architecture
    rotary = model.model.rotary_emb
    rotary.parameters_of = {kind: architecture.rotary[kind] for kind in rotary.parameters_of}
    rotary.reset_frequencies()


def set_output_dropout(model: ModernBertDecoderForCausalLM, probability: float) -> None:
    """Dropout behind attention's output projection, and nowhere else; the configuration does not state it."""
    for layer in model.model.layers:
        layer.attn.out_drop.p = probability


def _as_inputs(batch: StepBatch) -> dict[str, StepBatch]:
    return {"batch": batch}
