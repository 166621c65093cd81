"""The folder of a run: whose it is, with which recipe and tokenizer it began, and what may change later.

Knows recipes and files, and no model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.atomic_files import new_file, remove_unfinished
from modernbert_decoder.errors import InputError
from modernbert_decoder.training.checkpoints import latest_checkpoint, remove_leftovers, step_of
from modernbert_decoder.training.documents import open_source
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.plan import Plan
from modernbert_decoder.training.recipe import Recipe
from modernbert_decoder.training.recipe_files import read_recipe, recipe_text
from modernbert_decoder.training.tokenizer_training import (
    TOKENIZER_FILES,
    TrainingTokenizer,
    read_tokenizer,
    train_tokenizer,
)

RECIPE_FILE: Final = "recipe.yaml"
TOKENIZER_FOLDER: Final = "tokenizer"
# What may stand in the folder before its recipe does: the lock, and what `cross.py` starts from.
_OWN: Final = (".lock", ".start", "cross.json")
# Keys that do not decide what the run computes; whether files are the same, the data's cursor knows.
_FREE: Final = (
    "name",
    "description",
    "evaluation",
    "run.",
    "model.saved_dtype",
    "data.files",
    "data.exclude",
)
_FIXED: Final = ("run.seed", "run.precision", "run.sequence_multiple")
# Keys of a phase that decide nothing but its steps, which are compared themselves.
_SCHEDULE: Final = (
    *("tokens", "batch_sequences", "batch_warmup_tokens", "batch_warmup_start"),
    *("warmup_tokens", "decay_tokens", "final_rate"),
)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from training in the same folder, as long as this one lives.

    Raises:
        InputError: one does.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is training in {out}; wait for it, or choose another --out"
            ) from error
        yield


def prepare(recipe: Recipe, plan: Plan, out: Path) -> None:
    """Make the folder ready: the recipe and the tokenizer are in it, and nothing half written is.

    Raises:
        InputError: a run with another recipe has begun there.
    """
    remove_leftovers(out)
    path = out / RECIPE_FILE
    remove_unfinished(path)
    is_same = False
    if path.is_file():
        before = read_recipe(path)
        is_same = before.to_dict() == recipe.to_dict()
        checkpoint = latest_checkpoint(out)
        if checkpoint is not None:
            _check_changes(before, recipe, num_steps=step_of(checkpoint), out=out)
        elif not is_same:
            shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
    elif any(entry.name not in _OWN for entry in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no {RECIPE_FILE}; choose an empty folder")
    if not is_same:
        with new_file(path) as file:
            file.write(recipe_text(recipe).encode())
    if not (out / TOKENIZER_FOLDER).is_dir():
        _make_tokenizer(recipe, out)


def run_tokenizer(out: Path) -> TrainingTokenizer:
    """The tokenizer of the run."""
    return read_tokenizer(str(out / TOKENIZER_FOLDER))


def write_extras(out: Path, folder: Path) -> None:
    """Put the run's tokenizer and recipe into a checkpoint or model folder."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(out / TOKENIZER_FOLDER / name, folder / name)
    shutil.copyfile(out / RECIPE_FILE, folder / RECIPE_FILE)


def _make_tokenizer(recipe: Recipe, out: Path) -> None:
    if recipe.tokenizer.train is not None:
        source = open_source(recipe.data_of(0))
        tokenizer = train_tokenizer(source, recipe.tokenizer.train, seed=recipe.run.seed)
    else:
        assert recipe.tokenizer.source is not None
        tokenizer = read_tokenizer(recipe.tokenizer.source)
    temporary = out / f".{TOKENIZER_FOLDER}.partial"
    temporary.mkdir()
    tokenizer.write(temporary, max_length=recipe.max_position_embeddings)
    os.rename(temporary, out / TOKENIZER_FOLDER)


def _check_changes(before: Recipe, now: Recipe, *, num_steps: int, out: Path) -> None:
    """Refuse a recipe that would have led elsewhere by now."""
    plan = Plan(before)
    begun = plan.step(min(num_steps, plan.num_steps) - 1).phase
    new_plan = Plan(now)
    is_same_so_far = _agree(plan, new_plan, num_steps)
    changed = [
        key
        for key in changed_keys(before.to_dict(), now.to_dict())
        if not _may_change(key, begun_phase=begun, is_same_so_far=is_same_so_far)
    ]
    if changed or not is_same_so_far:
        listed = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise TrainingError(
            f"the run in {out} has taken {num_steps:,} steps with another recipe: {listed or 'phases'} "
            f"differ. Start it with its own ({out / RECIPE_FILE}), or choose another --out"
            f"{_way_back(out, plan, new_plan, num_steps)}"
        )


def _way_back(out: Path, before: Plan, now: Plan, num_steps: int) -> str:
    """What helps where a phase ended with part of a batch, which would be a whole one if it went on."""
    checkpoint = latest_checkpoint(out)
    if checkpoint is None or num_steps < 2 or not _agree(before, now, num_steps - 1):
        return ""
    return (
        ". All steps but the last, which ended a phase with part of a batch, are the same: remove "
        f"{checkpoint} to go on from the one before"
    )


def _agree(before: Plan, now: Plan, num_steps: int) -> bool:
    """Whether two plans have the same first steps; a phase may end with the last of them in one plan only."""
    if num_steps > now.num_steps:
        return False
    last = num_steps - 1
    is_end = now.step(last).is_last_of_phase
    return replace(before.step(last), is_last_of_phase=is_end) == now.step(last) and all(
        before.step(i) == now.step(i) for i in range(last)
    )


def _may_change(key: str, *, begun_phase: int, is_same_so_far: bool) -> bool:
    """Whether a run that has begun may go on with another value of a key."""
    if key.startswith("phases."):
        _, phase, name = [*key.split(".", 2), ""][:3]
        return int(phase) > begun_phase or name.startswith(_FREE) or (is_same_so_far and name in _SCHEDULE)
    return key.startswith(_FREE) and not key.startswith(_FIXED)


def changed_keys(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two recipes differ.

    >>> changed_keys({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}], "c": 3})
    ['a.1.b']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys([*before, *now])
        pairs = [(str(name), before.get(name), now.get(name)) for name in names]
    elif isinstance(before, list) and isinstance(now, list):
        pairs = [(str(i), old, new) for i, (old, new) in enumerate(zip_longest(before, now))]
    else:
        return [] if before == now else [prefix]
    return [
        key
        for name, old, new in pairs
        for key in changed_keys(old, new, f"{prefix}.{name}" if prefix else name)
    ]
