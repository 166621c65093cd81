"""`mbd train finetune` and `mbd train cross` on the command line: what they need, show, write and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_rows import labelled, write_rows

from checkpoints import random_tensors, tiny_architecture, write_checkpoint
from modernbert_decoder.cli import main, train_processes
from modernbert_decoder.training import finetune_run, precision

pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURE = tiny_architecture(num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=320)
QUICK = ["--max-length", "32", "--epochs", "2", "--batch-size", "8", "--learning-rate", "3e-3"]
SPEED = re.compile(r"loss \d+\.\d{4}  tok/s [\d,]+  MFU \d+ %")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    tensors = random_tensors(ARCHITECTURE)
    # Large enough for a frozen vocabulary projection to be sure of a token.
    tensors["model.embeddings.tok_embeddings.weight"] *= 8
    return str(write_checkpoint(tmp_path_factory.mktemp("base") / "model", ARCHITECTURE, tensors=tensors))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", labelled(40, seed=0))


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "smoke", "--data", "nowhere", "--out", "x"],
        ["finetune", "nowhere", "nothing.csv", "--out", "x"],
        ["cross", "nowhere", "--to", "encoder", "--out", "x"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_says_what_to_install_where_the_extra_is_missing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        train_processes, "find_spec", lambda name: None if name in ("accelerate", "optimi") else object()
    )
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert "training needs packages that are not installed (accelerate, optimi)" in said
    assert 'pip install "modernbert-decoder[train]"' in said
    assert "Traceback" not in said


def test_destinations_that_are_not_installed_are_refused_before_anything_is_written(
    base: str, rows: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["train", "finetune", base, rows, "--out", str(out), "--report-to", "nonsense"]
    assert main(command) == 2
    said = capfd.readouterr().err
    assert "--report-to names nonsense, which is not installed; install it, or leave it out" in said
    assert "Traceback" not in said
    assert not out.exists()


def test_tensorboard_has_the_whole_log_after_the_end(
    base: str, rows: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    assert (
        main(["train", "finetune", base, rows, "--out", str(out), "--report-to", "tensorboard", *QUICK]) == 0
    )
    assert not (out / "checkpoints").exists()
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    history = json.loads((out / "report.json").read_text())["history"]
    for tag, name in (("train/loss", "loss"), ("eval/accuracy", "eval_accuracy")):
        expected = [(entry["step"], entry[name]) for entry in history if name in entry]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected] == [5, 10]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    for tag in ("train/tokens_per_second", "train/mfu"):
        assert all(event.value > 0 for event in events.Scalars(tag))


@pytest.mark.parametrize("share", ["0.1", "0"])
def test_progress_tells_loss_and_speed_of_every_epoch(
    base: str, rows: str, tmp_path: Path, share: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "finetune", base, rows, "--out", str(tmp_path / "out"), "--validation-share", share]
    assert main([*command, *QUICK]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1.00", "2.00"]
    assert all(SPEED.search(line) for line in lines)
    assert all(("accuracy" in line) == (share != "0") for line in lines)


def test_completions_are_learned_with_an_adapter_and_generated_beside_the_base(
    base: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    pairs = [{"p": "the fox says", "c": " ring"}, {"p": "the hen says", "c": " cluck"}] * 8
    file, out = write_rows(tmp_path / "pairs.jsonl", pairs), tmp_path / "out"
    command = ["train", "finetune", base, file, "--task", "text", "--column", "p", "--completion-column", "c"]
    command += ["--lora", "--lora-rank", "8", "--lora-target", "Wi", "--lora-target", "Wo"]
    command += ["--lora-target", "v_proj", "--validation-share", "0", "--out", str(out)]
    command += ["--epochs", "40", "--batch-size", "8", "--learning-rate", "1e-2", "--max-length", "40"]
    assert main(command) == 0
    assert capfd.readouterr().out.strip() == str(out)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (8, ["Wi", "Wo", "v_proj"])
    card = (out / "README.md").read_text()
    assert f"`{file}`." in card
    assert "LoRA of rank 8" in card
    for model in (["--model", base, "--adapter", str(out / "adapter")], ["--model", str(out)]):
        generate = ["generate", *model, "--dtype", "float32", "--temperature", "0", "--max-tokens", "10"]
        assert main([*generate, "the hen says"]) == 0
        assert "cluck" in capfd.readouterr().out


class SeenError(Exception):
    """Raised where a test has seen enough."""


@pytest.mark.parametrize(
    ("is_there", "has_bfloat16", "expected"),
    [(True, True, (False, True)), (True, False, (False, False)), (False, True, (True, False))],
    ids=["with bfloat16", "without", "none"],
)
def test_whatever_accelerator_is_there_is_trained_on(
    base: str,
    rows: str,
    tmp_path: Path,
    is_there: bool,
    has_bfloat16: bool,
    expected: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: has_bfloat16)
    for module in (precision, finetune_run):
        monkeypatch.setattr(module, "has_accelerator", lambda: is_there)

    def stop(**arguments: Any) -> None:
        assert (arguments["use_cpu"], arguments["bf16"]) == expected
        raise SeenError

    monkeypatch.setattr(finetune_run, "TrainingArguments", stop)
    with pytest.raises(SeenError):
        main(["train", "finetune", base, rows, "--out", str(tmp_path / "out")])
