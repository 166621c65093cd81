"""What fine-tuning says while it goes on: a bar on a terminal, a line for each epoch elsewhere.

Knows the library's log; where text goes is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


class FinetuneProgress(TrainerCallback):
    """Steps, loss, speed and metrics.

    Args:
        write: takes one line, without its end.
        shows_bar: draw a bar on standard error, with the expected end, instead of lines.
    """

    def __init__(self, *, write: Callable[[str], None], shows_bar: bool) -> None:
        self._write = write
        self._shows_bar = shows_bar
        self._bar: Any = None
        self._notes: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the bar."""
        if state.is_world_process_zero and self._shows_bar:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps")
        elif state.is_world_process_zero and state.global_step:
            self._write(f"going on behind step {state.global_step:,} of {state.max_steps:,}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows losses and metrics."""
        if not state.is_world_process_zero or not logs:
            return
        self._notes |= shown(logs)
        is_last_number = any(name.startswith("eval_") for name in logs) or (
            args.eval_strategy == "no" and "loss" in logs
        )
        if self._bar is not None:
            self._bar.set_postfix(self._notes)
        elif is_last_number:
            parts = [f"{name} {text}" for name, text in self._notes.items()]
            self._write("  ".join([f"epoch {state.epoch:.2f}  step {state.global_step:,}", *parts]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def silence_libraries() -> None:
    """Turns transformers' own bars and reports off, which would be drawn into ours; for the whole process."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def shown(logs: Mapping[str, float]) -> dict[str, str]:
    """The numbers that people follow.

    >>> shown({"loss": 0.51234, "learning_rate": 1e-4, "eval_macro_f1": 0.75, "epoch": 1.0})
    {'loss': '0.5123', 'macro_f1': '0.7500'}
    >>> shown({"tokens_per_second": 12345.6, "mfu": 0.41, "eval_loss": 0.5})
    {'tok/s': '12,346', 'MFU': '41 %', 'validation loss': '0.5000'}
    """
    names = {"eval_loss": "validation loss", "tokens_per_second": "tok/s", "mfu": "MFU"}
    forms = {"tokens_per_second": "{:,.0f}", "mfu": "{:.0%}"}
    return {
        names.get(name, name.removeprefix("eval_")): forms.get(name, "{:.4f}")
        .format(value)
        .replace("%", " %")
        for name, value in logs.items()
        if name in ("loss", *forms) or name.startswith("eval_")
    }
