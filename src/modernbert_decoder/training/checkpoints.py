"""Checkpoints of a run: written whole or not at all, the newest kept, and found again.

The Trainer writes its state into a folder that nobody reads; from there it is moved, flushed to the disk and
renamed. Knows neither data nor models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert_decoder.atomic_files import write_folder
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.sequences import Cursor

STAGING: Final = ".partial"
_CURSOR_FILE: Final = "data_cursor.json"
_NAME: Final = re.compile(r"step-(\d{8,})")
_REMOVED: Final = ".removed-"


class Run(Protocol):
    """What a checkpoint is written of."""

    @property
    def cursor(self) -> Cursor | None:
        """Where the data stands."""

    def wait_for_everyone(self) -> None:
        """Returns when all processes have come here."""

    def finish_phase(self, phase: int, checkpoint: Path) -> None:
        """Writes what a finished phase leaves behind."""


class CheckpointWriter(TrainerCallback):
    """Writes a checkpoint every so many steps and at the end of each phase.

    Attributes:
        saving_step: the step whose checkpoint is being written; None in between.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        *,
        every_steps: int,
        keep: int,
        stop_after_phase: int,
        write_extras: Callable[[Path], None],
    ) -> None:
        """Checkpoints of the run in the folder `out`; `write_extras` adds files to each."""
        self.saving_step: int | None = None
        self.run: Run | None = None
        self._out = out
        self._plan = plan
        self._every_steps = every_steps
        self._keep = keep
        self._stop_after_phase = stop_after_phase
        self._write_extras = write_extras

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decides whether to save, and to stop."""
        step = self._plan.step(state.global_step - 1)
        if step.is_last_of_phase:
            control.should_log = True
        if not step.is_last_of_phase and state.global_step % self._every_steps:
            return
        _check_finite(kwargs["model"], step=state.global_step)
        self.saving_step = state.global_step
        control.should_save = True
        if step.is_last_of_phase and step.phase >= self._stop_after_phase:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the checkpoint that the Trainer has written its name, and removes old ones."""
        assert self.run is not None
        cursor = self.run.cursor
        assert cursor is not None
        staged = self._out / STAGING / f"checkpoint-{state.global_step}"
        checkpoint = checkpoint_path(self._out, state.global_step)
        self.run.wait_for_everyone()
        if state.is_world_process_zero:

            def fill(folder: Path) -> None:
                for path in staged.iterdir():
                    path.rename(folder / path.name)
                (folder / _CURSOR_FILE).write_text(json.dumps(cursor.to_dict()), encoding="utf-8")
                self._write_extras(folder)

            write_folder(checkpoint, fill)
            staged.rmdir()
            remove_old(self._out, keep=self._keep)
        self.run.wait_for_everyone()
        self.saving_step = None
        step = self._plan.step(state.global_step - 1)
        if step.is_last_of_phase:
            self.run.finish_phase(step.phase, checkpoint)


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint behind so many steps stands."""
    return out / "checkpoints" / f"step-{step:08}"


def all_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    found = all_checkpoints(out)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def cursor_of(checkpoint: Path) -> Cursor:
    """Where the data stood.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    try:
        return Cursor.from_dict(json.loads((checkpoint / _CURSOR_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{checkpoint} is damaged ({_CURSOR_FILE}: {error}); remove it to go on from the one before"
        ) from error


def log_history_of(checkpoint: Path) -> list[dict[str, float]]:
    """The entries that had been logged."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    history: list[dict[str, float]] = state["log_history"]
    return history


def remove_leftovers(out: Path) -> None:
    """Remove what a process that was killed had begun to write or to remove."""
    shutil.rmtree(out / STAGING, ignore_errors=True)
    for folder in (out, out / "checkpoints", out / "phases"):
        for path in folder.glob(".*") if folder.is_dir() else ():
            is_own = path.name.endswith(".partial") or path.name.startswith(_REMOVED)
            if is_own and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def remove_old(out: Path, *, keep: int) -> None:
    """Remove all but the newest checkpoints, each of them whole."""
    for path in all_checkpoints(out)[:-keep]:
        doomed = path.with_name(_REMOVED + path.name)
        os.rename(path, doomed)  # a checkpoint that is half removed must not look like one
        shutil.rmtree(doomed)


def _check_finite(model: nn.Module, *, step: int) -> None:
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not bool(torch.isfinite(own).all()):
            raise TrainingError(
                f"{name} is no longer finite after step {step}; no checkpoint was written of it. Lower "
                "optimizer.learning_rate and start the same command again: it goes on from the last "
                "checkpoint"
            )
