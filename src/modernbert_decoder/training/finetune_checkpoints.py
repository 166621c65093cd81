"""Checkpoints of a fine-tuning run: which of them are whole, which are kept, and what they tell.

The library writes them under their own names; one counts from the moment when all of it is on the disk and
marked so. Knows neither models nor data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.atomic_files import new_file, sync_folder
from modernbert_decoder.training.errors import TrainingError

CHECKPOINTS: Final = "checkpoints"
_PREFIX: Final = "checkpoint-"
_MARK: Final = "whole.json"
_STATE: Final = "trainer_state.json"
_REMOVED: Final = ".removed-"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the library writes the checkpoint behind so many steps."""
    return folder / f"{_PREFIX}{step}"


def mark_whole(checkpoint: Path) -> None:
    """Say of a checkpoint that it was written to its end; only after this is it gone on from."""
    sync_folder(checkpoint)
    with new_file(checkpoint / _MARK) as file:
        file.write(json.dumps({"step": step_of(checkpoint)}).encode())


def whole_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, the newest last."""
    return [path for path in _all_checkpoints(out / CHECKPOINTS) if (path / _MARK).is_file()]


def last_whole(out: Path) -> Path | None:
    """The newest whole checkpoint, if there is one; what a killed process half wrote or removed goes."""
    for path in (out / CHECKPOINTS).glob(f"{_REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    whole = whole_checkpoints(out)
    keep_only(out / CHECKPOINTS, steps={step_of(path) for path in whole})
    return whole[-1] if whole else None


def keep_only(folder: Path, *, steps: Collection[int | None]) -> None:
    """Remove all checkpoints but those of these steps."""
    for path in _all_checkpoints(folder):
        if step_of(path) not in steps:
            doomed = path.with_name(_REMOVED + path.name)
            os.rename(path, doomed)  # one that is half removed must not look like a checkpoint
            shutil.rmtree(doomed)


def check_processes(checkpoint: Path, *, number: int, is_sharded: bool) -> None:
    """Refuses processes other than those that wrote a checkpoint: rows, random states and shards are theirs.

    Raises:
        TrainingError: says how many they were.
    """
    then = len(list(checkpoint.glob("rng_state*.pth"))), not (checkpoint / "optimizer.pt").is_file()
    if then != (number, is_sharded):
        written, here = _processes_text(*then), _processes_text(number, is_sharded)
        raise TrainingError(
            f"{checkpoint} was written by {written}, and this is {here}; start it with the same launcher "
            "settings, or choose another folder"
        )


def finished_epochs(checkpoint: Path) -> int | None:
    """How many epochs a run took, if it had come to its end when this checkpoint was written.

    A run ends before its last epoch when its metric no longer improves. The library forgets that when it goes
    on from the checkpoint.
    """
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    control: Any = state["stateful_callbacks"]["TrainerControl"]
    return round(state["epoch"]) if control["args"]["should_training_stop"] else None


def _processes_text(number: int, is_sharded: bool) -> str:
    several = "1 process" if number == 1 else f"{number} processes"
    return f"{several}, sharded (FSDP)" if is_sharded else several


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _all_checkpoints(folder: Path) -> list[Path]:
    """Whole or not, the newest last."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    return sorted(found, key=step_of)
