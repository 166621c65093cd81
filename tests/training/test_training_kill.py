"""SIGKILL at any point of a run, and the same command again: the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import assert_same_weights, phase, recipe_table, write_texts

from modernbert_decoder.training.checkpoints import all_checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
PROGRAM = Path(__file__).with_name("killed_runs.py")

PHASES = [
    phase(tokens=1024, warmup_tokens=256),
    phase("decay", tokens=768, sequence_length=64, batch_sequences=2, rope_base=160_000)
    | {"decay_tokens": 768, "final_rate": 0.1},
]


def run_and_kill(tmp_path: Path, points: list[list[Any]]) -> list[str]:
    """How the runs ended: one per point, then one to the end, then one that nobody disturbed."""
    table = recipe_table(
        write_texts(tmp_path / "texts"),
        phases=PHASES,
        model={"attention_output_dropout": 0.1},
        run={"checkpoint_every_steps": 3, "keep_checkpoints": 2},
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(table), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(recipe), str(tmp_path), json.dumps(points)],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    endings: list[str] = json.loads(done.stdout)
    assert endings[-2:] == ["exit 0", "exit 0"], done.stderr.decode()
    return endings[:-2]


def check(tmp_path: Path) -> None:
    assert_same_weights(tmp_path / "whole" / "model", tmp_path / "struck" / "model")
    for name in ("whole", "struck"):
        left = [path.name for path in (tmp_path / name).iterdir() if path.name.startswith(".")]
        assert set(left) <= {".lock", ".partial"}
    kept = [[path.name for path in all_checkpoints(tmp_path / name)] for name in ("whole", "struck")]
    assert kept[0] == kept[1]


def test_killed_at_random_steps_and_while_checkpoints_are_written_renamed_and_removed(tmp_path: Path) -> None:
    chosen = random.Random(0)
    points = [
        ["rename", 1, "before"],  # the tokenizer's folder
        ["step", chosen.randint(1, 3), "before"],
        ["save", 1, "after"],  # half of the first checkpoint
        ["step", chosen.randint(4, 5), "after"],
        ["fsync", chosen.randint(8, 14), "before"],
        ["rename", chosen.randint(3, 8), "after"],
        ["rmtree", 2, "before"],
    ]
    endings = run_and_kill(tmp_path, points)
    assert endings.count("killed") >= 6
    check(tmp_path)
