"""Pretraining runs that a test strikes down, or looks into step by step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import phase

from modernbert_decoder.training.batches import StepBatch
from modernbert_decoder.training.pretraining import RunResult, pretrain
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.trainer import PretrainingTrainer

# The published recipe in small: warm-ups of rate and batch, then longer sequences, another base, two decays.
PHASES = [
    phase("pretrain", warmup_tokens=256, batch_warmup_start=2, batch_warmup_tokens=500),
    phase("extend", tokens=640, sequence_length=64, batch_sequences=2, rope_base=160_000.0)
    | {"decay_tokens": 640, "final_rate": 0.5},
    phase("decay", tokens=640, sequence_length=64, batch_sequences=2, rope_base=160_000.0)
    | {"decay_tokens": 640, "final_rate": 0.02},
]


def run(recipe: Recipe, out: Path, **options: Any) -> RunResult:
    """A run that says nothing, unless `write` is among the options."""
    return pretrain(recipe, out, **{"write": lambda line: None, **options})


class StruckError(Exception):
    """The end of a run that a test interrupts."""


def strike_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Runs end before that step."""
    original = PretrainingTrainer.training_step

    def strike(self: PretrainingTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise StruckError
        return original(self, *arguments, **options)

    patch.setattr(PretrainingTrainer, "training_step", strike)


@dataclass(frozen=True)
class SeenStep:
    """What a step was taken with.

    Attributes:
        index: of the step, from 0.
        rate: that the optimizer has when it goes.
        bases: RoPE bases, computed back from the frequencies of the model.
        documents: tokens of each sequence of the batch.
    """

    index: int
    rate: float
    bases: frozenset[int]
    documents: tuple[int, ...]


def watch_steps(patch: pytest.MonkeyPatch) -> list[SeenStep]:
    """The list fills with the steps of runs that follow."""
    seen: list[SeenStep] = []
    original = PretrainingTrainer.training_step

    def watch(self: PretrainingTrainer, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        loss = original(self, model, inputs, *rest)
        rates = {group["lr"] for group in self.optimizer.param_groups}
        assert len(rates) == 1
        tables = list(self.decoder.model.rotary_emb.buffers())
        bases = frozenset(round(float(table[1]) ** -len(table)) for table in tables)
        seen.append(SeenStep(self.state.global_step, rates.pop(), bases, _documents(inputs["batch"])))
        return loss

    patch.setattr(PretrainingTrainer, "training_step", watch)
    return seen


def _documents(batch: StepBatch) -> tuple[int, ...]:
    rows: list[int] = []
    for part in batch.micro_batches:
        mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
        rows += mask.sum(dim=1).tolist()
    return tuple(rows)
