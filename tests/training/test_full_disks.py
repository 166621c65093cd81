"""A disk that fills up while a model is fine-tuned or crossed: said clearly, nothing lost, gone on from."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_rows import labelled, write_rows
from tiny_runs import assert_same_weights, recipe_table, tiny_recipe, weights, write_texts

from modernbert_decoder.errors import CheckpointError
from modernbert_decoder.training import finetune_run
from modernbert_decoder.training.checkpoints import CheckpointWriter, all_checkpoints, step_of
from modernbert_decoder.training.classification_data import LabelledFiles
from modernbert_decoder.training.cross import cross
from modernbert_decoder.training.disk_errors import disk_errors_explained
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.finetune import finetune_classifier
from modernbert_decoder.training.finetune_run import FinetuneSettings
from modernbert_decoder.training.finetune_trainer import FinetuneTrainer
from modernbert_decoder.training.pretraining import pretrain

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = FinetuneSettings(epochs=2, batch_size=8, learning_rate=3e-3, max_length=32, precision="float32")
STEPS_PER_EPOCH = 5
FIRST, SECOND = STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH


def silent(line: str) -> None:
    """Takes lines of progress."""


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_torch(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def decoder(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tiny_recipe(files), tmp_path_factory.mktemp("decoder") / "run", write=silent).folder


@pytest.fixture(scope="module")
def finetune(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """Trains a classifier in a folder."""
    folder = tmp_path_factory.mktemp("rows")
    rows = write_rows(folder / "rows.jsonl", labelled(8 * STEPS_PER_EPOCH, seed=0))
    held_out = write_rows(folder / "held-out.jsonl", labelled(8, seed=1))
    data, validation = LabelledFiles(files=(rows,)), LabelledFiles(files=(held_out,))
    return lambda out: finetune_classifier(decoder, data, out, validation=validation, settings=SETTINGS)


@pytest.fixture(scope="module")
def whole(finetune: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finetune(out)
    return out


@pytest.fixture
def limit_files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets no file of this process grow beyond so many bytes, as if the disk were full; None: undone."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if size is None else size, limits[1]))

    yield limit
    limit(None)


PLACES: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "weights": (transformers.PreTrainedModel, "save_pretrained", full),
    "optimizer": (torch, "save", full_for_torch),
    "state": (transformers.TrainerState, "save_to_json", full),
}


@pytest.mark.parametrize("place", ["any file", *PLACES])
def test_a_disk_that_is_full_at_a_checkpoint_of_fine_tuning_leaves_the_one_before(
    finetune: Callable[[Path], Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_files: Callable[[int | None], None],
    place: str,
) -> None:
    original = FinetuneTrainer._save_checkpoint

    def save(self: FinetuneTrainer, model: Any, trial: Any) -> None:
        if self.state.global_step == SECOND:
            if place == "any file":
                limit_files(10_000)
            else:
                patch.setattr(*PLACES[place])
        original(self, model, trial)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_save_checkpoint", save)
        with pytest.raises(
            TrainingError, match=f"cannot write the checkpoint of step {SECOND} in "
        ) as caught:
            finetune(out)
    limit_files(None)
    assert f"the last whole checkpoint is {out / 'checkpoints' / f'checkpoint-{FIRST}'}" in str(caught.value)
    assert "MB free" in str(caught.value)
    assert not (out / "config.json").exists()
    finetune(out)
    assert_same_weights(out, whole)


def test_a_disk_that_is_full_before_the_first_checkpoint_says_that_there_is_none(
    finetune: Callable[[Path], Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES["weights"])
        with pytest.raises(TrainingError, match=f"step {FIRST} in .*there is no earlier checkpoint"):
            finetune(tmp_path / "run")
    finetune(tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole)


def test_a_disk_that_is_full_when_the_result_is_written_keeps_the_last_checkpoint(
    finetune: Callable[[Path], Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_files: Callable[[int | None], None],
) -> None:
    original, out = finetune_run._leave, tmp_path / "run"

    def leave(*arguments: Any) -> None:
        limit_files(10_000)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "_leave", leave)
        with pytest.raises(TrainingError, match=f"cannot write a file of the run.*checkpoint-{SECOND}"):
            finetune(out)
    limit_files(None)
    assert not (out / "config.json").exists()  # what would make it look like a model
    steps: list[int] = []
    with monkeypatch.context() as patch:
        step = FinetuneTrainer.training_step
        patch.setattr(
            FinetuneTrainer, "training_step", lambda self, *rest: steps.append(1) or step(self, *rest)
        )
        finetune(out)
    assert not steps  # all had been taken
    assert_same_weights(out, whole)


def test_a_folder_that_could_not_be_claimed_can_be_used_later(
    finetune: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            finetune(tmp_path / "run")
    finetune(tmp_path / "run")


def test_a_program_error_in_training_is_not_taken_for_a_full_disk(
    finetune: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
        finetune(tmp_path / "run")
    assert not isinstance(caught.value, TrainingError)


class Saving:
    """A writer in the midst of a checkpoint."""

    saving_step = 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        RuntimeError("shapes do not fit"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_process_that_is_lost_while_saving_is_not_taken_for_a_full_disk(
    error: Exception, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as caught, disk_errors_explained(Saving(), tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("write(): fd 3 failed with No space left on device"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=str,
)
def test_what_a_writer_of_files_says_while_saving_is_of_the_disk(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(TrainingError, match="cannot write the checkpoint of step 3 in "),
        disk_errors_explained(Saving(), tmp_path),
    ):
        raise error


# Crossing


@pytest.fixture
def recipe(files: list[str], tmp_path: Path) -> str:
    phase = {"name": "cross", "tokens": 1024, "sequence_length": 32, "batch_sequences": 4, "rope_base": None}
    table = recipe_table(files, phases=[phase], run={"checkpoint_every_steps": 4})
    table |= {"model": {"checkpoint": "replaced"}, "tokenizer": {"source": "replaced"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(table))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize("place", ["any file", "weights", "result"])
def test_a_disk_that_is_full_while_crossing_leaves_the_last_checkpoint(
    decoder: Path,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_files: Callable[[int | None], None],
    place: str,
) -> None:
    original = CheckpointWriter.on_step_end
    finish = CheckpointWriter.on_save

    def step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        original(self, args, state, control, **options)
        if state.global_step == 8 and place == "any file":
            limit_files(10_000)
        elif state.global_step == 8 and place == "weights":
            patch.setattr(*PLACES["weights"])

    def save(self: Any, *arguments: Any, **options: Any) -> None:
        if arguments[1].global_step == 8 and place == "result":
            patch.setattr(*PLACES["weights"])  # the library has written the checkpoint's
        finish(self, *arguments, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "on_step_end", step_end)
        patch.setattr(CheckpointWriter, "on_save", save)
        with pytest.raises(TrainingError, match=r"cannot write .*the last whole checkpoint is"):
            cross(decoder, out, to="encoder", recipe=recipe, write=silent)
    limit_files(None)
    assert [step_of(path) for path in all_checkpoints(out)] == ([4, 8] if place == "result" else [4])
    assert not (out / "model").exists()
    cross(decoder, out, to="encoder", recipe=recipe, write=silent)
    cross(decoder, tmp_path / "whole", to="encoder", recipe=recipe, write=silent)
    left, right = weights(out / "model"), weights(tmp_path / "whole" / "model")
    for name in right:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_disk_that_is_full_while_converting_leaves_a_folder_that_can_be_used_later(
    decoder: Path, recipe: str, tmp_path: Path, limit_files: Callable[[int | None], None]
) -> None:
    out = tmp_path / "run"
    limit_files(10_000)
    with pytest.raises(CheckpointError, match="File too large"):
        cross(decoder, out, to="encoder", recipe=recipe, write=silent)
    limit_files(None)
    cross(decoder, out, to="encoder", recipe=recipe, write=silent)
    assert (out / "model" / "config.json").is_file()
