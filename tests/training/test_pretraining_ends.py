"""Where phases end: lengthened, killed between a checkpoint and its model, asked for when they are over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import assert_same_weights, phase, tiny_recipe, write_texts
from watched_runs import StruckError, run, strike_at

from modernbert_decoder.training.checkpoints import all_checkpoints, step_of
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.pretraining import PretrainingRun
from modernbert_decoder.training.recipe import Recipe

DECAY = phase("decay", tokens=256, decay_tokens=256, final_rate=0.1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


def recipe_of(files: list[str], *phases: dict[str, Any]) -> Recipe:
    held_out = {"files": [files[0]], "window": 16, "max_windows": 5}
    return tiny_recipe(files, phases=list(phases), evaluation=held_out)


def run_killed_before_its_model(recipe: Recipe, out: Path) -> None:
    """A run that dies between the last checkpoint of a phase and the writing of its model."""

    def strike(self: PretrainingRun, phase: int, checkpoint: Path) -> None:
        raise StruckError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingRun, "finish_phase", strike)
        with pytest.raises(StruckError):
            run(recipe, out)


def count_models(patch: pytest.MonkeyPatch) -> list[int]:
    """The list fills with the phases whose models are written."""
    phases: list[int] = []
    original = PretrainingRun._write_model

    def counted(self: PretrainingRun, phase: int, *arguments: Any) -> None:
        phases.append(phase)
        original(self, phase, *arguments)

    patch.setattr(PretrainingRun, "_write_model", counted)
    return phases


def last_row_of_curve(folder: Path) -> int:
    return int((folder / "curve.csv").read_text(encoding="utf-8").splitlines()[-1].split(",")[0])


@pytest.mark.parametrize("later", [[], [DECAY]], ids=["the model", "the model of a phase"])
def test_a_model_of_an_earlier_end_is_not_taken_for_that_of_a_lengthened_phase(
    files: list[str], tmp_path: Path, later: list[dict[str, Any]]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    short, long = (recipe_of(files, phase("stable", tokens=tokens), *later) for tokens in (512, 1024))
    first = run(short, out, stop_after="stable")
    assert (first.steps, first.tokens, last_row_of_curve(first.folder)) == (4, 512, 4)
    run_killed_before_its_model(long, out)
    assert step_of(all_checkpoints(out)[-1]) == 8
    assert last_row_of_curve(first.folder) == 4
    second = run(long, out, stop_after="stable")
    expected = run(long, whole, stop_after="stable")
    assert (second.folder, second.steps, last_row_of_curve(second.folder)) == (first.folder, 8, 8)
    assert second.evaluations == expected.evaluations != first.evaluations
    assert_same_weights(second.folder, expected.folder)


def test_a_phase_that_ended_with_part_of_a_batch_is_lengthened_from_the_checkpoint_before(
    files: list[str], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    short, long = (recipe_of(files, phase("stable", tokens=tokens)) for tokens in (704, 1024))
    run(short, out, stop_after="stable")
    *_, before, newest = all_checkpoints(out)
    assert (step_of(before), step_of(newest)) == (5, 6)
    with pytest.raises(TrainingError, match=f"part of a batch, are the same: remove {newest} to go on"):
        run(long, out)
    shutil.rmtree(newest)
    assert_same_weights(run(long, out).folder, run(long, whole).folder)


def test_a_model_from_before_a_phase_was_added_is_not_taken_for_that_of_the_new_end(
    files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = run(recipe_of(files, phase(tokens=512)), out)
    longer = recipe_of(files, phase(tokens=512), DECAY)
    run_killed_before_its_model(longer, out)
    second = run(longer, out)
    assert (second.folder, second.steps) == (first.folder, 6)
    assert last_row_of_curve(second.folder) == 6
    assert last_row_of_curve(out / "phases" / "1-pretrain") == 4
    assert second.evaluations != first.evaluations


def test_a_model_that_is_written_is_not_written_again(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(files, phase(tokens=256))
    written = count_models(monkeypatch)
    first = run(recipe, tmp_path / "run")
    assert run(recipe, tmp_path / "run") == first
    assert written == [0]


@pytest.fixture(scope="module")
def under_way(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run in the midst of its second phase."""
    out = tmp_path_factory.mktemp("under-way") / "run"
    recipe = recipe_of(files, phase("stable", tokens=256), phase("more", tokens=1280), DECAY)
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, 6)
        with pytest.raises(StruckError):
            run(recipe, out)
    assert step_of(all_checkpoints(out)[-1]) == 5
    return recipe, out


def test_stopping_behind_a_phase_that_is_over_gives_its_model_and_trains_nothing(
    under_way: tuple[Recipe, Path],
) -> None:
    recipe, out = under_way
    lines: list[str] = []
    result = run(recipe, out, stop_after="stable", write=lines.append)
    assert result.folder == out / "phases" / "1-stable"
    assert (result.steps, result.tokens) == (2, 256)
    stored = json.loads((result.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert [entry.bits_per_byte for entry in result.evaluations] == [stored[0]["bits_per_byte"]]
    assert "phase stable ended with step 2, and the run is at step 5: nothing to do" in lines
    assert step_of(all_checkpoints(out)[-1]) == 5


def test_stopping_behind_a_phase_whose_model_was_removed_says_so(
    under_way: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = under_way
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "phases" / "1-stable")
    with pytest.raises(TrainingError, match=r"phases/1-stable is gone\. Go on without --stop-after"):
        run(recipe, tmp_path / "run", stop_after="stable")


def test_a_phase_that_has_begun_may_be_shortened_to_where_it_stands(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        strike_at(patch, 7)
        with pytest.raises(StruckError):
            run(tiny_recipe(files, phases=[phase("stable"), DECAY]), tmp_path / "run")
    early = tiny_recipe(files, phases=[phase("stable", tokens=512), DECAY])
    with pytest.raises(TrainingError, match=r"phases\.0\.tokens differ"):
        run(early, tmp_path / "run")  # four steps, and five have been taken
    other = tiny_recipe(files, phases=[phase("stable", tokens=1024, warmup_tokens=64), DECAY])
    with pytest.raises(TrainingError, match="differ"):
        run(other, tmp_path / "run")
    here = tiny_recipe(files, phases=[phase("stable", tokens=640), DECAY])
    with monkeypatch.context() as patch:
        written = count_models(patch)
        for _ in range(2):
            assert run(here, tmp_path / "run", stop_after="stable").steps == 5
    assert written == [0]
    assert run(here, tmp_path / "run").tokens == 640 + 256
    run(here, tmp_path / "whole")
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_a_phase_that_has_begun_may_be_lengthened_and_ends_as_if_it_had_been_so_long_from_the_start(
    files: list[str], tmp_path: Path
) -> None:
    short, long = (
        tiny_recipe(files, phases=[phase("stable", tokens=tokens, warmup_tokens=256), DECAY])
        for tokens in (512, 1024)
    )
    run(short, tmp_path / "run", stop_after="stable")
    result = run(long, tmp_path / "run")
    assert result.tokens == 1024 + 256
    run(long, tmp_path / "whole")
    assert_same_weights(result.folder, tmp_path / "whole" / "model")
