"""What a run says while it goes on: a bar on a terminal, lines elsewhere.

Knows the plan and the numbers of the log; where text goes is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert_decoder.training.plan import Plan

Write = Callable[[str], None]
"""Takes one line of text, without its end."""

# Without a rate of its own: the log's, with loss and MFU, fits into 80 columns instead.
_BAR_FORMAT: Final = "{l_bar}{bar}| {n_fmt} [{elapsed}<{remaining}{postfix}]"


class PlanProgress(TrainerCallback):
    """Progress through a plan, in tokens, from the entries that the trainer logs.

    Args:
        plan: all steps.
        write: where lines go.
        shows_bar: draw a bar on standard error instead of a line per entry.
    """

    def __init__(self, plan: Plan, *, write: Write, shows_bar: bool) -> None:
        self._plan = plan
        self._write = write
        self._shows_bar = shows_bar
        self._bar: Any = None
        self._begin = (0.0, 0)  # when training began, and the tokens seen before
        self._logs: dict[str, float] = {}  # the newest of each number, for the bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, and the bar."""
        tokens = self._plan.tokens_after(state.global_step)
        self._begin = (time.perf_counter(), tokens)
        if state.is_world_process_zero and self._shows_bar:
            self._bar = tqdm(
                total=self._plan.total_tokens,
                initial=tokens,
                unit_scale=True,
                dynamic_ncols=True,
                bar_format=_BAR_FORMAT,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._plan.tokens_after(state.global_step) - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows an entry of the log."""
        if not state.is_world_process_zero or not logs or state.global_step == 0:
            return
        phase = self._plan.phases[self._plan.step(state.global_step - 1).phase].name
        numbers = shown_numbers(logs)
        if not numbers:
            return
        if self._bar is not None:
            self._logs |= logs
            self._bar.set_description(phase, refresh=False)
            self._bar.set_postfix(shown_numbers(self._logs))
            return
        parts = [f"{name} {text}" for name, text in numbers.items()]
        if "loss" in logs and (remaining := self._remaining_seconds(state.global_step)) is not None:
            parts.append(f"ends in {duration_text(remaining)}")
        done = f"step {state.global_step:,}/{self._plan.num_steps:,}"
        tokens = f"{logs['tokens'] / 1e6:,.2f} M tokens"
        self._write("  ".join([phase, done, tokens, *parts]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _remaining_seconds(self, num_steps: int) -> float | None:
        began, before = self._begin
        done = self._plan.tokens_after(num_steps) - before
        if done <= 0:
            return None
        seconds = time.perf_counter() - began
        return seconds / done * (self._plan.total_tokens - before - done)


def shown_numbers(logs: Mapping[str, float]) -> dict[str, str]:
    """The numbers of a log entry that people follow, short.

    >>> shown_numbers({"loss": 3.21, "tokens_per_second": 12345.6, "mfu": 0.41, "epoch": 1.0})
    {'loss': '3.2100', 'tok/s': '12,346', 'MFU': '41 %'}
    """
    forms = {
        "loss": ("loss", "{:.4f}"),
        "tokens_per_second": ("tok/s", "{:,.0f}"),
        "mfu": ("MFU", "{:.0%}"),
        "learning_rate": ("rate", "{:.2e}"),
        "eval_bits_per_byte": ("held-out bits/byte", "{:.4f}"),
    }
    shown = {label: form.format(logs[key]) for key, (label, form) in forms.items() if key in logs}
    return {label: text.replace("%", " %") for label, text in shown.items()}


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration_text(59.6), duration_text(7384)
    ('0:01:00', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
