"""Trains again and again, killed at given points with SIGKILL, until it ends: a program for tests.

Arguments: a recipe to pretrain, or (`.json`) a `Job` of forked_jobs.py; a folder for the runs; a JSON list of
points `[function, nth call, when]`. PyTorch is imported once; every run is a fork of this process, which
itself computes nothing. Prints how each run ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forked_jobs import Job, train
from transformers import TrainerState

from modernbert_decoder.training import finetune_run
from modernbert_decoder.training.finetune_trainer import FinetuneTrainer
from modernbert_decoder.training.pretraining import pretrain
from modernbert_decoder.training.recipe_files import read_recipe
from modernbert_decoder.training.trainer import PretrainingTrainer

PLACES: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "rmtree": (shutil, "rmtree"),
    "save": (torch, "save"),
    "state": (TrainerState, "save_to_json"),
    "step": (PretrainingTrainer, "training_step"),
    "step of fine-tuning": (FinetuneTrainer, "training_step"),
    "result of fine-tuning": (finetune_run, "_leave"),
}


def kill_at(place: str, nth: int, when: str) -> None:
    """The nth call of a function is this process's last: before it has done its work, or after."""
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def training_of(path: Path) -> Callable[[Path], Any]:
    """What trains in a folder, as a recipe or a job says."""
    if path.suffix == ".json":
        job = Job(**json.loads(path.read_text(encoding="utf-8")))
        return lambda out: train(replace(job, out=str(out)))
    return lambda out: pretrain(read_recipe(path), out, write=lambda line: None)


def run_once(training: Callable[[Path], Any], out: Path, point: list[Any] | None) -> str:
    """One run in a process of its own; returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if point is not None:
                kill_at(*point)
            training(out)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def main() -> None:
    training, out, points = training_of(Path(sys.argv[1])), Path(sys.argv[2]), json.loads(sys.argv[3])
    endings = [run_once(training, out / "struck", point) for point in points]
    endings.append(run_once(training, out / "struck", None))
    endings.append(run_once(training, out / "whole", None))
    print(json.dumps(endings))


if __name__ == "__main__":
    main()
