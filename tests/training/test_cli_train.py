"""`mbd train pretrain` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import recipe_table, write_texts

from modernbert_decoder.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    table = recipe_table(write_texts(tmp_path / "texts"))
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
    return path


def test_pretrain_prints_the_folder_of_a_model_that_generates(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "pretrain", str(recipe), "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    folder = captured.out.strip()
    assert folder == str(tmp_path / "run" / "model")
    assert "step 16/16" in captured.err
    assert main(["generate", "--model", folder, "--max-tokens", "5", "the fox"]) == 0
    assert "the fox" not in capsys.readouterr().err


def test_json_and_quiet_give_only_what_was_asked_for(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "pretrain", str(recipe), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["steps"], report["tokens"]) == (16, 2048)
    assert main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert main([*arguments, "--quiet", "--json"]) == 2


def test_show_prints_a_recipe_that_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--data", "a.txt", "--data", "b*.jsonl", "--set", "run.seed=7"]
    assert main(["train", "pretrain", "smoke", "--show", *changes]) == 0
    table = yaml.safe_load(capsys.readouterr().out)
    assert table["data"]["files"] == ["a.txt", "b*.jsonl"]
    assert table["run"]["seed"] == 7


def test_mistakes_end_with_2_and_one_message(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    for arguments, message in (
        (["nonesuch", *out], "no recipe 'nonesuch'"),
        (["smoke", *out], "the recipe names no data; add --data FILES"),
        (["smoke"], "--out"),
        ([str(recipe), *out, "--set", "run.sede=1"], "Did you mean seed?"),
        ([str(recipe), *out, "--stop-after", "end"], "no phase 'end'"),
    ):
        assert main(["train", "pretrain", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err


def test_the_smoke_recipe_trains_all_phases_on_markdown_and_its_model_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "phases.0.tokens": 4096,  # the recipe's proportions, a hundredth of its length
        "phases.0.batch_warmup_tokens": 1024,
        "phases.0.warmup_tokens": 1024,
        "phases.1.tokens": 4096,
        "phases.1.decay_tokens": 4096,
        "phases.2.tokens": 4096,
        "phases.2.decay_tokens": 4096,
    }
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    arguments = ["--data", str(ROOT / "docs" / "*.md"), "--out", str(tmp_path / "run"), *options]
    assert main(["train", "pretrain", "smoke", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(tmp_path / "run" / "model")
    assert report["tokens"] == 3 * 4096
    assert {path.name for path in (tmp_path / "run" / "phases").iterdir()} == {"1-pretrain", "2-extend"}
    assert main(["generate", "--model", report["model"], "--max-tokens", "8", "--json", "A run is"]) == 0
    assert json.loads(capsys.readouterr().out)
