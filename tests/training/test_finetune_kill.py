"""SIGKILL at any point of fine-tuning or crossing, and the same command again: the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from forked_jobs import Job
from tiny_rows import labelled, write_rows
from tiny_runs import assert_same_weights, recipe_table, tiny_recipe, write_texts

from modernbert_decoder.conversion.convert import convert_checkpoint
from modernbert_decoder.conversion.kinds import CheckpointKind
from modernbert_decoder.training.checkpoints import all_checkpoints
from modernbert_decoder.training.pretraining import pretrain

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
PROGRAM = Path(__file__).with_name("killed_runs.py")
STEPS_PER_EPOCH = 5
EPOCHS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def decoder(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "run"
    return pretrain(tiny_recipe(files), out, write=lambda line: None).folder


def run_and_kill(tmp_path: Path, job: Job, points: list[list[Any]]) -> list[str]:
    """How the runs ended: one per point; then two more ended well, the struck one and one left alone."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(path), str(tmp_path), json.dumps(points)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    endings: list[str] = json.loads(done.stdout)
    assert endings[-2:] == ["exit 0", "exit 0"], done.stderr.decode()[-3000:]
    return endings[:-2]


def test_a_classifier_killed_at_every_point_ends_like_one_left_alone_early_stopping_included(
    decoder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled(8 * STEPS_PER_EPOCH, seed=0))
    held_out = write_rows(tmp_path / "held-out.jsonl", labelled(8, seed=1))
    settings = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, "max_length": 32, "patience": 1}
    options = {"settings": settings, "data": rows, "validation": held_out}
    points = [
        ["fsync", 1, "before"],  # while the folder is claimed
        ["step of fine-tuning", 3, "after"],
        ["save", 1, "before"],  # the first checkpoint has weights only
        ["state", 1, "after"],  # it has all its files, but nobody knows whether they are on the disk
        ["fsync", 4, "before"],
        ["replace", 1, "before"],  # the mark that makes it whole
        ["step of fine-tuning", STEPS_PER_EPOCH + 2, "after"],
        ["rename", 1, "after"],  # an old checkpoint that is about to be removed
        ["result of fine-tuning", 1, "before"],  # stopped early, and no model yet
        ["replace", 3, "before"],  # a part of the result is in its place
        ["rmtree", 4, "before"],  # all of it is, and the checkpoints too
    ]
    job = Job("struck", "classifier", str(decoder), "", options)
    endings = run_and_kill(tmp_path, job, points)
    assert endings == ["killed"] * len(points)
    struck, whole = tmp_path / "struck", tmp_path / "whole"
    assert_same_weights(whole, struck)
    report, other = (json.loads((out / "report.json").read_text()) for out in (whole, struck))
    assert report == other
    num_judged = sum("eval_loss" in entry for entry in report["history"])
    assert 3 <= num_judged < EPOCHS  # or there would be no early stopping to go wrong
    assert {path.name for path in struck.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("to", ["decoder", "encoder"])
def test_a_crossing_run_killed_at_every_point_ends_like_one_left_alone(
    decoder: Path, files: list[str], tmp_path: Path, to: str
) -> None:
    source = decoder
    if to == "decoder":
        source = tmp_path / "encoder"
        convert_checkpoint(decoder, source, to=CheckpointKind.ENCODER)
    phase = {"name": "cross", "tokens": 1024, "sequence_length": 32, "batch_sequences": 4, "rope_base": None}
    table = recipe_table(files, phases=[phase], run={"checkpoint_every_steps": 3, "keep_checkpoints": 2})
    table |= {"model": {"checkpoint": "replaced"}, "tokenizer": {"source": "replaced"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(table))  # JSON is YAML
    changes = ["model.attention_output_dropout=0.1"]
    options = {"to": to, "recipe": str(recipe), "changes": changes}
    points = [
        ["fsync", 2, "before"],  # while the model is converted
        ["replace", 1, "before"],  # the file that says whose the folder is
        ["replace", 2, "before"],  # the recipe
        ["save", 1, "after"],  # half of the first checkpoint
        ["step", 5, "before"],
    ]
    endings = run_and_kill(tmp_path, Job("struck", "cross", str(source), "", options), points)
    assert endings == ["killed"] * len(points)
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "struck" / "model")
    kept = [[path.name for path in all_checkpoints(tmp_path / name)] for name in ("whole", "struck")]
    assert kept[0] == kept[1]
    left = {path.name for path in (tmp_path / "struck").iterdir() if path.name.startswith(".")}
    assert left == {path.name for path in (tmp_path / "whole").iterdir() if path.name.startswith(".")}
