"""The examples run: in little time and on few texts, but from their first line to their last."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def intents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "intents"))
    monkeypatch.delitem(sys.modules, "intents", raising=False)
    import intents

    return intents


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])
    return path


def test_intents_are_learned_and_served_by_the_engine(
    intents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    pytest.importorskip("matplotlib", reason="it draws the confusion")
    animals = [f"the {word} in the {place}" for word in ("cat", "dog", "cow") for place in ("barn", "field")]
    money = [f"{word} my {thing}" for word in ("pay", "send", "lose") for thing in ("gold", "coins")]
    rows = [(text, "animals") for text in animals] + [(text, "money") for text in money]
    train, test = write_csv(tmp_path / "train.csv", rows * 4), write_csv(tmp_path / "test.csv", rows)
    output = tmp_path / "out"
    command = ["--train", str(train), "--test", str(test), "--output", str(output)]
    intents.main([*command, "--epochs", "6", "--batch-size", "8"])
    said = capsys.readouterr().out
    assert "accuracy 100.0% on 12 texts" in said
    assert (output / "confusion.png").stat().st_size > 10_000
    # A second run finds the classifier and only evaluates.
    before = (output / "model.safetensors").stat().st_mtime_ns
    intents.main([*command, "--dtype", "float32", "w8a8"])
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert re.findall(r"(\w+): accuracy", said) == ["float32", "w8a8"]


def test_confusion_counts_by_actual_and_predicted_label(intents) -> None:
    counts = intents.confusion(["a", "a", "b"], ["a", "b", "b"], ["a", "b"])
    np.testing.assert_array_equal(counts, [[1, 1], [0, 1]])


def test_rows_are_mixed_and_limited(intents, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", [(f"text {i}", "early" if i < 50 else "late") for i in range(100)])
    texts, categories = intents.read(path, 20)
    assert len(texts) == len(set(texts)) == 20
    assert set(categories) == {"early", "late"}


def test_the_rows_of_banking77_are_read(intents, shared: Path) -> None:
    folder = shared / "data" / "banking77"
    texts, categories = intents.read(folder / "train.csv", None)
    tested, tested_categories = intents.read(folder / "test.csv", None)
    assert (len(texts), len(categories), len(tested)) == (10_003, 10_003, 3_080)
    assert len(set(categories)) == 77
    assert set(tested_categories) == set(categories)
    assert all(text.strip() for text in (*texts, *tested))


def test_a_few_rows_of_banking77_are_learned_by_the_documented_command(
    intents, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    pytest.importorskip("matplotlib", reason="it draws the confusion")
    output = tmp_path / "out"
    names = {"$MBD_SHARED": str(shared), "--output intents": f"--output {output}"}
    command = intents.__doc__.rpartition("intents.py ")[2].replace("\\\n", " ")
    for given, meant in names.items():
        assert given in command
        command = command.replace(given, meant)
    arguments = command.replace('"', "").split()
    intents.main([*arguments, "--limit", "96", "--epochs", "1"])
    assert "accuracy" in capsys.readouterr().out
    assert (output / "confusion.png").is_file()


@dataclass
class OldArguments:
    """As in transformers 4."""

    group_by_length: bool = False


@dataclass
class NewArguments:
    """As in transformers 5."""

    train_sampling_strategy: str = "random"


@pytest.mark.parametrize("arguments", [OldArguments, NewArguments])
def test_texts_of_like_length_are_batched_in_every_release_of_transformers(
    intents, arguments: type[Any]
) -> None:
    assert arguments(**intents._by_length(arguments)) != arguments()
    with_releases_own = pytest.importorskip("transformers").TrainingArguments
    (name,) = intents._by_length(with_releases_own)
    assert name in with_releases_own.__dataclass_fields__
