"""Watches a training run of either side: seconds, useful tokens, padding, losses and memory.

A callback of the library's Trainer, which both sides use. Knows neither side's data.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from benchmarks.protocol import peak_memory_bytes, reset_peak_memory
from benchmarks.wing.torch_worker import give_memory_back, resident_bytes

_IGNORED = -100


class TrainingClock(TrainerCallback):
    """From where training begins to the end of the last step; what is written afterwards does not count."""

    def __init__(self) -> None:
        self.num_targets = 0
        self.num_positions = 0
        self.num_padding = 0
        self._begin = self._end = 0.0
        self._peak = 0

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer that is about to train."""
        trainer.add_callback(self)
        assert isinstance(trainer.model, nn.Module)
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the clock and the peak."""
        self._end = time.perf_counter()
        self._peak = peak_memory_bytes()

    def answer(self, trainer: Trainer, *, before: int) -> dict[str, Any]:
        """What the harness is told; `before` is what the process held before there was a model."""
        return {
            "seconds": self._end - self._begin,
            "targets": self.num_targets,
            "positions": self.num_positions,
            "padding": self.num_padding,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "peak_bytes": self._peak,
            "growth_bytes": max(0, self._peak - before),
        }

    def _count(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        targets = options.get("shift_labels")
        if targets is None:
            targets = options["labels"][:, 1:]
        self.num_targets += int((targets != _IGNORED).sum())
        self.num_positions += options["input_ids"].numel()
        if (mask := options.get("attention_mask")) is not None:
            self.num_padding += int((mask == 0).sum())


def from_nothing(train: Callable[[TrainingClock], Trainer]) -> dict[str, Any]:
    """Runs `train`, which makes a model and trains it, in a process that has given its free memory back."""
    _release()
    reset_peak_memory()
    before = resident_bytes()
    clock = TrainingClock()
    answer = clock.answer(train(clock), before=before)
    _release()  # for the other processes, which are measured next
    return answer


def _release() -> None:
    gc.collect()
    give_memory_back()
