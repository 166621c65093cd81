"""Fine-tuning: labels of every kind, weights, early stopping, adapters, killed runs, results that load."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from checkpoints import CLS, SEP, random_tensors, tiny_architecture, write_checkpoint
from modernbert_decoder.architecture import Head
from modernbert_decoder.cli import main
from modernbert_decoder.engine.llm import LLM
from modernbert_decoder.engine.sampling_params import SamplingParams
from modernbert_decoder.engine.weights import quantize_checkpoint
from modernbert_decoder.errors import CheckpointError, InputError
from modernbert_decoder.quantization import QuantizationScheme
from modernbert_decoder.tokenizer import Tokenizer
from modernbert_decoder.training.adapters import LoraSettings
from modernbert_decoder.training.classification_data import (
    LabelledFiles,
    LabelSet,
    balanced_weights,
    problem_of,
    read_labelled,
    split,
    stated_weights,
)
from modernbert_decoder.training.classification_metrics import confusion, metrics, most_confused
from modernbert_decoder.training.errors import TrainingError
from modernbert_decoder.training.finetune import finetune_classifier, finetune_text
from modernbert_decoder.training.finetune_run import FinetuneSettings, Outcome
from modernbert_decoder.training.finetune_tasks import training_flops_per_token
from modernbert_decoder.training.finetune_trainer import LengthSampler, TokenCount, weighted_loss
from modernbert_decoder.training.text_data import IGNORED, TextFiles, read_texts

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ARCHITECTURE = tiny_architecture(num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=320)
QUICK = FinetuneSettings(epochs=3, batch_size=8, learning_rate=3e-3, max_length=32, precision="float32")
LONG = replace(QUICK, epochs=8)
SATURATED = replace(QUICK, epochs=5, metric="accuracy")
ANIMALS = ("fox", "hen", "owl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = random_tensors(ARCHITECTURE)
    # Large enough for a frozen vocabulary projection to be sure of a token.
    tensors["model.embeddings.tok_embeddings.weight"] *= 8
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", ARCHITECTURE, tensors=tensors)


def write_csv(path: Path, rows: list[Mapping[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def animal_rows(count: int = 60, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences about an animal, which is their label."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        animal = ANIMALS[random.integers(len(ANIMALS))]
        rows.append({"text": f"{'so ' * random.integers(1, 5)}the {animal}", "label": animal})
    return rows


@pytest.fixture
def animals(tmp_path: Path) -> str:
    return write_csv(tmp_path / "animals.csv", animal_rows())


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A classifier of animals, trained with `QUICK` in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = LabelledFiles(files=(write_csv(folder / "animals.csv", animal_rows()),))
    return finetune_classifier(base, data, folder / "out", settings=QUICK)


@pytest.fixture(scope="module")
def saturated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A classifier of animals whose metric no longer improves in its last epochs."""
    folder = tmp_path_factory.mktemp("saturated")
    data = LabelledFiles(files=(write_csv(folder / "animals.csv", animal_rows()),))
    return finetune_classifier(base, data, folder / "out", settings=SATURATED)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def rows_of(tmp_path: Path, rows: list[Mapping[str, Any]], **options: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_labelled(LabelledFiles(files=(str(path),), **options))


# Labels


@pytest.mark.parametrize(
    ("values", "problem", "names"),
    [
        (["spam", "ham", "spam"], "single_label_classification", ("ham", "spam")),
        (["10", "9", "9"], "single_label_classification", ("9", "10")),
        ([1, 0, 1.0], "single_label_classification", ("0", "1")),
        ([True, False], "single_label_classification", ("false", "true")),
        ([0.5, 1, 2], "regression", ("value",)),
        (["0.5", "1e3"], "regression", ("value",)),
        ([["a"], ["a", "b"], []], "multi_label_classification", ("a", "b")),
        (['["a", "b"]', '["c"]'], "multi_label_classification", ("a", "b", "c")),
    ],
)
def test_values_say_what_kind_of_labels_they_are(
    tmp_path: Path, values: list[Any], problem: Any, names: tuple[str, ...]
) -> None:
    rows = rows_of(tmp_path, [{"text": "x", "label": value} for value in values])
    assert problem_of(rows) == problem
    labels = LabelSet.of(rows, problem)
    assert labels.names == names
    assert len(labels.targets(rows)) == len(values)


def test_columns_of_zero_and_one_are_several_labels(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "tags.csv", [{"text": "x", "wet": 1, "cold": 0}, {"text": "y", "wet": 1, "cold": 1}]
    )
    rows = read_labelled(LabelledFiles(files=(path,), labels=("wet", "cold")))
    labels = LabelSet.of(rows, problem_of(rows))
    assert labels.names == ("cold", "wet")
    assert labels.targets(rows) == [(0.0, 1.0), (1.0, 1.0)]


def test_separated_labels_are_several(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"text": "x", "label": "a | b"}, {"text": "y", "label": "b"}], separator="|")
    assert problem_of(rows) == "multi_label_classification"
    assert LabelSet.of(rows, "multi_label_classification").targets(rows) == [(1.0, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x", "label": None}], "row 1: there is nothing in 'label'"),
        ([{"text": "x"}], "row 1: there is nothing in 'label'"),
        ([{"label": "a"}], "row 1: "),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], "a classifier needs two"),
    ],
)
def test_rows_without_labels_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelSet.of(rows_of(tmp_path, rows), "single_label_classification")


def test_labels_that_training_has_not_seen_are_named(tmp_path: Path) -> None:
    seen = rows_of(tmp_path, [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    labels = LabelSet.of(seen, "single_label_classification")
    with pytest.raises(InputError, match="row 1: the label 'c' is not among those of training: a, b"):
        labels.targets(rows_of(tmp_path, [{"text": "x", "label": "c"}]))


def test_a_split_takes_its_share_of_every_label() -> None:
    targets = [0] * 50 + [1] * 10 + [2]
    train, held_out = split(targets, share=0.2, seed=3, is_stratified=True)
    assert sorted([*train, *held_out]) == list(range(61))
    assert [targets[i] for i in held_out].count(0) == 10
    assert [targets[i] for i in held_out].count(1) == 2
    assert 60 in train
    assert split(targets, share=0.2, seed=3, is_stratified=True) == (train, held_out)
    assert split(targets, share=0.2, seed=4, is_stratified=True) != (train, held_out)
    with pytest.raises(InputError, match="nothing to validate with"):
        split([0, 1], share=0.1, seed=0, is_stratified=True)


def test_class_weights_have_a_mean_of_one_over_the_rows() -> None:
    labels, targets = LabelSet("single_label_classification", ("a", "b", "c")), [0, 0, 0, 1, 1, 2]
    balanced = balanced_weights(targets, labels)
    np.testing.assert_allclose(balanced, [6 / 9, 1, 2], rtol=1e-6)
    assert np.mean([balanced[target] for target in targets]) == pytest.approx(1)
    stated = stated_weights({"c": 4.0}, targets, labels)
    assert stated[2] / stated[0] == pytest.approx(4)
    assert np.mean([stated[target] for target in targets]) == pytest.approx(1)
    several = LabelSet("multi_label_classification", ("a", "b"))
    np.testing.assert_allclose(
        balanced_weights([(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)], several), [1 / 3, 3]
    )
    for bad, message in (({"d": 1.0}, "'d', which is not"), ({"a": 0.0}, "must be positive")):
        with pytest.raises(InputError, match=message):
            stated_weights(bad, targets, labels)


@pytest.mark.parametrize("num_items", [None, 10])
def test_weighted_losses_equal_their_definition(num_items: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator)
    weight = torch.tensor([0.5, 1.0, 2.0])
    classes = torch.tensor([0, 2, 1, 1, 2])
    found = weighted_loss(
        logits, classes, problem_type="single_label_classification", num_items=num_items, weights=weight
    )
    logs = logits.log_softmax(1)
    expected = sum(-weight[c] * logs[i, c] for i, c in enumerate(classes)) / (num_items or 5)
    torch.testing.assert_close(found, expected)
    labels = (torch.rand(5, 3, generator=generator) > 0.5).float()
    found = weighted_loss(
        logits, labels, problem_type="multi_label_classification", num_items=num_items, weights=weight
    )
    p = logits.sigmoid()
    terms = weight * labels * p.log() + (1 - labels) * (1 - p).log()
    torch.testing.assert_close(found, -terms.sum() / (num_items or 15))


def test_metrics_equal_a_hand_count() -> None:
    logits = np.array([[2.0, 1, 0], [0, 2, 1], [0, 1, 2], [3, 0, 1]], np.float32)
    targets = [0, 1, 1, 2]
    found = metrics(logits, targets, "single_label_classification")
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    labels = LabelSet("single_label_classification", ("a", "b", "c"))
    counts = confusion(logits, targets, labels)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert most_confused(counts, labels) == [
        {"label": "b", "taken_for": "c", "rows": 1},
        {"label": "c", "taken_for": "a", "rows": 1},
    ]
    several = metrics(
        np.array([[1.0, -1], [1, 1]], np.float32), [(1.0, 0.0), (0.0, 1.0)], "multi_label_classification"
    )
    assert several["accuracy"] == 0.5
    assert several["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics(np.array([[1.0], [3]], np.float32), [1.0, 1.0], "regression") == {"mse": 2.0}


def test_tokens_are_those_of_the_rows_in_their_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 50, 37)]
    count = TokenCount(lengths, rows_per_step=8, seed=3)
    sampler = LengthSampler(lengths, batch_size=8, seed=3)
    seen, step = 0, 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for begin in range(0, 37, 8):
            assert count.after(step) == seen
            seen += sum(lengths[row] for row in order[begin : begin + 8])
            step += 1
    assert count.after(step) == seen == 3 * sum(lengths)


@pytest.mark.parametrize(("has_adapter", "passes"), [(False, 3), (True, 2)])
def test_operations_of_training_are_those_of_every_position(has_adapter: bool, passes: int) -> None:
    lengths = [3, 9, 9, 31]
    per_token = training_flops_per_token(ARCHITECTURE, lengths, head_share=0.25, has_adapter=has_adapter)
    exact = 0.0
    for length in lengths:
        for position in range(1, length + 1):
            body = ARCHITECTURE.flops_per_token(position, with_head=False)
            exact += body + 0.25 * (ARCHITECTURE.flops_per_token(position) - body)
    assert per_token * sum(lengths) == pytest.approx(passes * exact, rel=1e-3)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 50, 200)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthSampler(lengths, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(200))
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    batches = [[lengths[i] for i in order(0, 0)[k : k + 8]] for k in range(0, 200, 8)]
    assert np.mean([max(batch) - min(batch) for batch in batches]) < 5  # of 49


# Classifiers


def test_a_classifier_learns_and_loads_in_the_engine(uninterrupted: Outcome) -> None:
    report, folder = uninterrupted.report, uninterrupted.folder
    assert report["labels"] == list(ANIMALS)
    assert report["metrics"]["accuracy"] == 1.0
    assert (report["rows"], report["validation_rows"]) == (54, 6)
    assert np.array(report["confusion"]).sum() == 6
    assert report["problem"] == "single_label_classification"
    with LLM(folder, dtype="float32") as llm:
        outputs = llm.classify([f"so the {animal}" for animal in ANIMALS])
        assert llm.classify("so the owl")[0].num_tokens == len("so the owl") + 2
    assert [output.label for output in outputs] == list(ANIMALS)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "fox", "1": "hen", "2": "owl"}


def test_the_folder_of_a_classifier_tells_where_it_comes_from(uninterrupted: Outcome, base: Path) -> None:
    folder = uninterrupted.folder
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "report.json", "confusion.csv", "finetune.json", "tokenizer.json"} <= names
    assert names.isdisjoint({"checkpoints", ".staged"})
    card = (folder / "README.md").read_text()
    data = folder.parent / "animals.csv"
    for said in (f"`{data}`.", f"fine-tuned from `{base}`", "54 rows to train on, 6 to validate with"):
        assert said in card
    assert "| accuracy | 1.0000 |" in card
    options = json.loads((folder / "finetune.json").read_text())
    assert options["settings"]["epochs"] == QUICK.epochs
    assert options["data"][0]["files"] == [str(data)]


def test_the_curve_of_a_fine_tuning_run_is_a_table_and_a_picture(uninterrupted: Outcome) -> None:
    pytest.importorskip("matplotlib")
    folder = uninterrupted.folder
    assert "![Loss and validation metric](curve.png)" in (folder / "README.md").read_text()
    picture = (folder / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    with (folder / "curve.csv").open(newline="") as file:
        entries = list(csv.DictReader(file))
    judged = [entry for entry in entries if entry["eval_accuracy"]]
    lost = [entry for entry in entries if entry["loss"]]
    assert [int(entry["step"]) for entry in judged] == [7, 14, 21]
    assert [int(entry["step"]) for entry in lost] == [7, 14, 21]
    logged = [entry["loss"] for entry in uninterrupted.report["history"] if "loss" in entry]
    assert [float(entry["loss"]) for entry in lost] == logged
    # [CLS] and [SEP] around a byte a token.
    kept = split_of_animals()
    tokens = sum(len(row["text"]) + 2 for row in kept)
    assert [int(entry["tokens"]) for entry in lost] == [tokens, 2 * tokens, 3 * tokens]
    assert all(float(entry["tokens_per_second"]) > 0 for entry in lost)


def split_of_animals() -> list[dict[str, Any]]:
    """The rows that `QUICK` trains on."""
    rows = animal_rows()
    targets = [ANIMALS.index(row["label"]) for row in rows]
    train, _ = split(targets, share=0.1, seed=QUICK.seed, is_stratified=True)
    return [rows[i] for i in train]


def test_the_report_is_what_the_saved_model_gives(base: Path, animals: str, tmp_path: Path) -> None:
    validation = write_csv(tmp_path / "more.csv", animal_rows(20, seed=9))
    settings = FinetuneSettings(epochs=1, batch_size=8, learning_rate=1e-3, max_length=32)
    outcome = finetune_classifier(
        base,
        LabelledFiles(files=(animals,)),
        tmp_path / "out",
        validation=LabelledFiles(files=(validation,)),
        settings=settings,
    )
    rows = animal_rows(20, seed=9)
    with LLM(tmp_path / "out", dtype="float32") as llm:
        outputs = llm.classify([row["text"] for row in rows])
    right = np.mean([output.label == row["label"] for output, row in zip(outputs, rows, strict=True)])
    assert outcome.report["metrics"]["accuracy"] == pytest.approx(right)
    nats = [-math.log(o.probabilities[ANIMALS.index(r["label"])]) for o, r in zip(outputs, rows, strict=True)]
    assert outcome.report["metrics"]["loss"] == pytest.approx(np.mean(nats), abs=1e-4)


def test_the_language_models_head_is_reused_unless_told_otherwise(
    base: Path, animals: str, tmp_path: Path
) -> None:
    settings = FinetuneSettings(epochs=1, batch_size=60, learning_rate=1e-9, max_length=32, weight_decay=0.0)
    data = LabelledFiles(files=(animals,))
    finetune_classifier(base, data, tmp_path / "reused", settings=settings)
    finetune_classifier(base, data, tmp_path / "new", settings=settings, reuse_head=False)
    head = load_file(base / "model.safetensors")["lm_head.dense.weight"]
    torch.testing.assert_close(weights(tmp_path / "reused")["head.dense.weight"], head, atol=1e-6, rtol=0)
    assert (weights(tmp_path / "new")["head.dense.weight"] - head).abs().max() > 0.01


@pytest.mark.parametrize("class_weights", ["balanced", {"fox": 3.0}])
def test_class_weights_change_what_is_learned(
    base: Path, animals: str, tmp_path: Path, class_weights: Any
) -> None:
    settings = FinetuneSettings(epochs=1, batch_size=8, learning_rate=1e-3, max_length=32)
    data = LabelledFiles(files=(animals,))
    finetune_classifier(base, data, tmp_path / "plain", settings=settings)
    finetune_classifier(base, data, tmp_path / "weighted", settings=settings, class_weights=class_weights)
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "plain")[name], weights(tmp_path / "weighted")[name])


def test_several_labels_and_numbers_are_learned(base: Path, tmp_path: Path) -> None:
    rows = animal_rows(60)
    tags = [
        {"text": r["text"], "label": [r["label"], *(["long"] if len(r["text"]) > 15 else [])]} for r in rows
    ]
    path = tmp_path / "tags.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tags))
    outcome = finetune_classifier(base, LabelledFiles(files=(str(path),)), tmp_path / "tags", settings=LONG)
    assert outcome.report["problem"] == "multi_label_classification"
    assert outcome.report["metrics"]["macro_f1"] > 0.8
    with LLM(tmp_path / "tags", dtype="float32") as llm:
        (output,) = llm.classify("so so so so the hen")
    assert dict(zip(outcome.report["labels"], output.probabilities, strict=True))["hen"] > 0.5
    numbers = write_csv(tmp_path / "n.csv", [{"text": r["text"], "label": len(r["text"]) / 10} for r in rows])
    outcome = finetune_classifier(base, LabelledFiles(files=(numbers,)), tmp_path / "n", settings=LONG)
    assert outcome.report["problem"] == "regression"
    assert outcome.report["metrics"]["mse"] < np.var([len(r["text"]) / 10 for r in rows])
    with LLM(tmp_path / "n", dtype="float32") as llm:
        (short,), (long,) = (llm.classify(text) for text in ("so the hen", "so so so so the hen"))
    assert short.logits[0] < long.logits[0]


def test_pairs_are_read_in_the_template(base: Path, tmp_path: Path) -> None:
    rows = [{"a": f"{x}", "b": f"{y}", "label": x == y} for x in "pqrs" for y in "pqrs"] * 2
    path = write_csv(tmp_path / "pairs.csv", rows)
    data = LabelledFiles(files=(path,), text="a", pair="b")
    finetune_classifier(base, data, tmp_path / "out", settings=QUICK, validation_share=0)
    with LLM(tmp_path / "out") as llm:
        assert llm.classify(("p", "p"))[0].num_tokens == 5


def test_training_stops_when_the_metric_no_longer_improves(base: Path, animals: str, tmp_path: Path) -> None:
    settings = FinetuneSettings(
        epochs=12, batch_size=8, learning_rate=3e-3, max_length=32, patience=2, metric="accuracy"
    )
    outcome = finetune_classifier(base, LabelledFiles(files=(animals,)), tmp_path / "out", settings=settings)
    judged = [entry["eval_accuracy"] for entry in outcome.report["history"] if "eval_accuracy" in entry]
    assert len(judged) < 12
    best = judged.index(max(judged))
    assert len(judged) == best + 1 + 2
    assert outcome.report["metrics"]["accuracy"] == max(judged)


def test_the_best_epoch_is_kept_not_the_last(saturated: Outcome) -> None:
    judged = [entry for entry in saturated.report["history"] if "eval_loss" in entry]
    accuracies = [entry["eval_accuracy"] for entry in judged]
    best, last = judged[accuracies.index(max(accuracies))], judged[-1]
    # Later epochs are as accurate, and surer.
    assert best["eval_loss"] > 1.01 * last["eval_loss"]
    assert saturated.report["metrics"]["loss"] == pytest.approx(best["eval_loss"], rel=1e-5)


def test_the_same_seed_gives_the_same_bits(
    base: Path, animals: str, uninterrupted: Outcome, tmp_path: Path
) -> None:
    data = LabelledFiles(files=(animals,))
    finetune_classifier(base, data, tmp_path / "same", settings=QUICK)
    finetune_classifier(base, data, tmp_path / "other", settings=replace(QUICK, seed=1))
    # The two files of rows differ in name only.
    assert_same_weights(tmp_path / "same", uninterrupted.folder)
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "same")[name], weights(tmp_path / "other")[name])


class Kill(TrainerCallback):
    """Ends the process, as far as a test can, at a step."""

    class Killed(BaseException):
        """Nothing that anybody catches."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise self.Killed


@pytest.mark.parametrize(
    ("step", "lora"),
    [(3, None), (7, None), (15, None), (8, LoraSettings(rank=2, dropout=0.1))],  # of 3 epochs of 7 steps
    ids=["before a checkpoint", "at one", "in the third epoch", "an adapter with dropout"],
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    base: Path, animals: str, uninterrupted: Outcome, tmp_path: Path, step: int, lora: LoraSettings | None
) -> None:
    data = LabelledFiles(files=(animals,))
    whole = uninterrupted
    if lora is not None:
        whole = finetune_classifier(base, data, tmp_path / "whole", settings=QUICK, lora=lora)
    out = tmp_path / "killed"
    with pytest.raises(Kill.Killed):
        finetune_classifier(base, data, out, settings=QUICK, lora=lora, callbacks=[Kill(step)])
    again = finetune_classifier(base, data, out, settings=QUICK, lora=lora)
    assert_same_weights(whole.folder, out)
    assert whole.report["metrics"] == again.report["metrics"]


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    base: Path, animals: str, uninterrupted: Outcome, tmp_path: Path
) -> None:
    data = LabelledFiles(files=(animals,))
    with pytest.raises(Kill.Killed):
        finetune_classifier(base, data, tmp_path / "out", settings=QUICK, callbacks=[Kill(15)])
    newest = max((tmp_path / "out" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (newest / "whole.json").unlink()
    (newest / "model.safetensors").write_bytes(b"")  # as if it had never reached the disk
    finetune_classifier(base, data, tmp_path / "out", settings=QUICK)
    assert_same_weights(uninterrupted.folder, tmp_path / "out")


class KillAtTheEnd(TrainerCallback):
    """Ends the process, as far as a test can, when all steps have been taken."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise Kill.Killed


def test_a_run_whose_folder_was_moved_keeps_its_best_epoch(
    base: Path, animals: str, saturated: Outcome, tmp_path: Path
) -> None:
    data = LabelledFiles(files=(animals,))
    with pytest.raises(Kill.Killed):
        finetune_classifier(base, data, tmp_path / "here", settings=SATURATED, callbacks=[KillAtTheEnd()])
    (tmp_path / "here").rename(tmp_path / "there")
    again = finetune_classifier(base, data, tmp_path / "there", settings=SATURATED)
    assert again.report["metrics"] == saturated.report["metrics"]
    assert_same_weights(saturated.folder, tmp_path / "there")


def test_a_finished_run_is_not_repeated_and_another_is_refused(
    base: Path, animals: str, tmp_path: Path
) -> None:
    data = LabelledFiles(files=(animals,))
    settings = FinetuneSettings(epochs=1, batch_size=8, max_length=32)
    assert finetune_classifier(base, data, tmp_path / "out", settings=settings).is_new
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    again = finetune_classifier(base, data, tmp_path / "out", settings=settings)
    assert not again.is_new
    assert again.report["labels"] == list(ANIMALS)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="differs in settings"):
        finetune_classifier(base, data, tmp_path / "out", settings=FinetuneSettings(epochs=2))
    write_csv(Path(animals), animal_rows(61))
    with pytest.raises(InputError, match="differs in data"):
        finetune_classifier(base, data, tmp_path / "out", settings=settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        finetune_classifier(base, data, tmp_path / "other", settings=settings)


def test_a_loss_that_is_no_number_stops_the_run(base: Path, animals: str, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    broken = write_checkpoint(
        tmp_path / "broken", ARCHITECTURE, tensors={k: v.numpy() for k, v in tensors.items()}
    )
    settings = FinetuneSettings(epochs=2, batch_size=8, learning_rate=1e30, max_length=32, warmup=0.0)
    with pytest.raises(TrainingError, match=r"the loss is .* at step \d+; the step was not taken"):
        finetune_classifier(broken, LabelledFiles(files=(animals,)), tmp_path / "out", settings=settings)


def test_weights_that_the_last_step_spoilt_are_not_left(base: Path, animals: str, tmp_path: Path) -> None:
    settings = FinetuneSettings(epochs=1, batch_size=60, learning_rate=1e38, max_length=32, warmup=0.0)
    data = LabelledFiles(files=(animals,))
    with pytest.raises(TrainingError, match="no longer finite after the last step"):
        finetune_classifier(base, data, tmp_path / "out", settings=settings, validation_share=0)
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_cannot_be_fine_tuned_is_refused(base: Path, animals: str, tmp_path: Path) -> None:
    from modernbert_decoder.checkpoint import Checkpoint

    data = LabelledFiles(files=(animals,))
    quantize_checkpoint(
        Checkpoint.open(base), QuantizationScheme.named("int8"), tmp_path / "packed", threads=1
    )
    with pytest.raises(CheckpointError, match="quantized weights, which cannot be trained"):
        finetune_classifier(tmp_path / "packed", data, tmp_path / "out", settings=QUICK)
    patient = FinetuneSettings(patience=2)
    with pytest.raises(InputError, match="need validation rows"):
        finetune_classifier(base, data, tmp_path / "out", settings=patient, validation_share=0)
    with pytest.raises(InputError, match="for this problem choose accuracy, macro_f1, loss"):
        finetune_classifier(base, data, tmp_path / "out", settings=FinetuneSettings(metric="mse"))
    with pytest.raises(InputError, match="no layer is called 'c_attn'"):
        finetune_classifier(
            base, data, tmp_path / "out", settings=QUICK, lora=LoraSettings(targets=("c_attn",))
        )


def test_a_classifier_goes_on_as_a_classifier(animals: str, uninterrupted: Outcome, tmp_path: Path) -> None:
    data = LabelledFiles(files=(animals,))
    first = uninterrupted.folder
    settings = FinetuneSettings(epochs=1, batch_size=60, learning_rate=1e-9, max_length=32, weight_decay=0.0)
    outcome = finetune_classifier(first, data, tmp_path / "second", settings=settings)
    assert outcome.report["metrics"]["accuracy"] == 1.0
    two = write_csv(tmp_path / "two.csv", [row for row in animal_rows() if row["label"] != "owl"])
    outcome = finetune_classifier(first, LabelledFiles(files=(two,)), tmp_path / "third", settings=QUICK)
    assert outcome.report["labels"] == ["fox", "hen"]


# Adapters


def test_an_adapter_trained_here_loads_merged_and_beside_its_base(
    base: Path, animals: str, tmp_path: Path
) -> None:
    outcome = finetune_classifier(
        base, LabelledFiles(files=(animals,)), tmp_path / "out", settings=LONG, lora=LoraSettings(rank=4)
    )
    assert outcome.report["metrics"]["accuracy"] == 1.0
    texts = [f"so so the {animal}" for animal in ANIMALS]
    with LLM(tmp_path / "out", dtype="float32") as llm:
        merged = llm.classify(texts)
    with LLM(base, adapter=tmp_path / "out" / "adapter", dtype="float32") as llm:
        beside = llm.classify(texts)
    assert [output.label for output in merged] == list(ANIMALS)
    for one, other in zip(merged, beside, strict=True):
        assert one.label == other.label
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    frozen = load_file(base / "model.safetensors")["model.embeddings.tok_embeddings.weight"]
    assert torch.equal(weights(tmp_path / "out")["model.embeddings.tok_embeddings.weight"], frozen)
    assert "LoRA of rank 4" in (tmp_path / "out" / "README.md").read_text()


def test_peft_loads_the_adapter_trained_here(base: Path, animals: str, tmp_path: Path) -> None:
    import peft

    from modernbert_decoder.pytorch import ModernBertDecoderForSequenceClassification

    finetune_classifier(
        base, LabelledFiles(files=(animals,)), tmp_path / "out", settings=QUICK, lora=LoraSettings(rank=4)
    )
    model = ModernBertDecoderForSequenceClassification.from_pretrained(base, num_labels=3, reuse_lm_head=True)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    whole = ModernBertDecoderForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[CLS, *b"so the owl", SEP]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


# Texts


def tokenizer_of(base: Path) -> Tokenizer:
    return Tokenizer.from_folder(base, ARCHITECTURE)


def test_documents_are_framed_and_long_ones_go_on(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("xy")
    source = TextFiles(files=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")))
    read = read_texts(source, tokenizer_of(base), max_length=5)
    assert [example.ids for example in read.examples] == [
        (CLS, *b"abcd"),
        (CLS, *b"efgh"),
        (CLS, SEP),
        (CLS, *b"xy", SEP),
    ]
    for example in read.examples:
        assert example.labels == (IGNORED, *example.ids[1:])


def test_only_completions_are_learned(base: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "pairs.csv", [{"p": "ask: ", "c": "yes"}, {"p": "abcdefg", "c": " no"}])
    source = TextFiles(files=(path,), text="p", completion="c")
    read = read_texts(source, tokenizer_of(base), max_length=10)
    first, second = read.examples
    assert first.ids == (CLS, *b"ask:", *b" yes", SEP)
    assert first.labels == (*[IGNORED] * 5, *b" yes", SEP)
    assert second.ids == (CLS, *b"cdefg", *b" no", SEP)  # cut behind [CLS]
    assert read.num_cut == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "is_cut"),
    [
        ("", "abcdefgh", b"abcdefgh", False),  # with [CLS] and [SEP] ten tokens
        ("", "abcdefghi", b"abcdefghi", True),
        ("xy", "abcdefghi", b"abcdefghi", True),
        ("xy", "abcdefghij", b"abcdefghi", True),
        ("xy", "abcdef", b"xyabcdef", False),
        ("xyz", "abcdef", b"yzabcdef", True),
    ],
)
def test_every_pair_that_loses_a_token_is_counted(
    base: Path, tmp_path: Path, prompt: str, completion: str, ids: bytes, is_cut: bool
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"p": prompt, "c": completion}) + "\n")
    source = TextFiles(files=(str(path),), text="p", completion="c")
    read = read_texts(source, tokenizer_of(base), max_length=10)
    (example,) = read.examples
    assert (*example.ids, SEP)[: len(ids) + 2] == (CLS, *ids, SEP)
    assert len(example.ids) <= 10
    assert read.num_cut == is_cut


@pytest.mark.parametrize(
    "lora",
    [None, LoraSettings(rank=8, alpha=32)],
    ids=["whole", "adapter"],
)
def test_completions_are_learned_by_heart_and_generated_by_the_engine(
    base: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    pairs = [{"p": "the fox says", "c": " ring"}, {"p": "the hen says", "c": " cluck"}] * 8
    path = write_csv(tmp_path / "pairs.csv", pairs)
    settings = FinetuneSettings(epochs=40, batch_size=8, learning_rate=1e-2, max_length=40)
    outcome = finetune_text(
        base,
        TextFiles(files=(path,), text="p", completion="c"),
        tmp_path / "out",
        settings=settings,
        lora=lora,
        validation_share=0.25,
    )
    assert outcome.report["metrics"]["loss"] < 0.1
    folders = [(tmp_path / "out", None)] + ([(base, tmp_path / "out" / "adapter")] if lora else [])
    for folder, adapter in folders:
        with LLM(folder, adapter=adapter, dtype="float32") as llm:
            outputs = llm.generate(
                ["the fox says", "the hen says"], SamplingParams(temperature=0, max_tokens=10)
            )
        assert [output.outputs[0].text for output in outputs] == [" ring", " cluck"]
        assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "stop"]
    assert "learned tokens" in (tmp_path / "out" / "README.md").read_text()


def test_the_loss_of_texts_is_that_of_the_engine(base: Path, tmp_path: Path) -> None:
    texts = [row["text"] for row in animal_rows(12)]
    path = write_csv(tmp_path / "texts.csv", [{"text": text} for text in texts])
    settings = FinetuneSettings(epochs=1, batch_size=4, learning_rate=1e-3, max_length=64)
    data = TextFiles(files=(path,))
    outcome = finetune_text(base, data, tmp_path / "out", validation=data, settings=settings)
    with LLM(tmp_path / "out", dtype="float32") as llm:
        scores = llm.score([[CLS, *text.encode(), SEP] for text in texts])
    tokens = sum(score.num_tokens for score in scores)
    nats = -sum(score.total_logprob for score in scores) / tokens
    assert outcome.report["metrics"]["loss"] == pytest.approx(nats, rel=1e-4)
    assert outcome.report["metrics"]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-3)


def test_accumulated_batches_of_texts_are_one_large_batch(base: Path, tmp_path: Path) -> None:
    texts = [{"text": "x" * n} for n in (3, 30, 7, 20, 11, 5, 25, 14)]  # of unequal numbers of tokens
    path = write_csv(tmp_path / "texts.csv", texts)
    for name, batch_size, accumulation in (("large", 8, 1), ("small", 2, 4)):
        settings = FinetuneSettings(
            epochs=1,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=1e-3,
            warmup=0.0,
            max_length=64,
        )
        finetune_text(base, TextFiles(files=(path,)), tmp_path / name, settings=settings, validation_share=0)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    start = load_file(base / "model.safetensors")
    for name in ("model.layers.1.mlp.Wi.weight", "lm_head.dense.weight"):
        step = (large[name] - start[name]).abs().max()
        assert step > 0
        assert (large[name] - small[name]).abs().max() < 0.05 * step  # AdamW's first step is nearly a sign


def test_a_classifier_cannot_learn_texts(tmp_path: Path) -> None:
    architecture = tiny_architecture(head=Head.SEQUENCE_CLASSIFICATION)
    folder = write_checkpoint(tmp_path / "classifier", architecture)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="has no language-model head"):
        finetune_text(folder, TextFiles(files=(str(tmp_path / "a.txt"),)), tmp_path / "out")


# The command line


def test_finetune_from_the_command_line(
    base: Path, animals: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = ["train", "finetune", str(base), animals, "--out", out, "--max-length", "32", "--epochs", "3"]
    arguments += ["--batch-size", "8", "--learning-rate", "3e-3", "--class-weight", "balanced"]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert "accuracy" in captured.out
    assert "epoch 3.00" in captured.err
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["is_new"], report["labels"]) == (False, list(ANIMALS))
    assert main(["classify", "-m", out, "--format", "jsonl", "so the owl"]) == 0
    assert json.loads(capfd.readouterr().out)["label"] == "owl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank goes with --lora"),
        (["--completion-column", "c"], "--completion-column goes with --task text"),
        (["--task", "text", "--label", "c"], "--label goes with --task classification"),
        (["--class-weight", "balanced", "--class-weight", "a=2"], "stands alone"),
        (["--class-weight", "a"], "neither balanced nor LABEL=WEIGHT"),
        (["--quiet", "--json"], "contradict each other"),
        (["--epochs", "0"], "epochs is 0"),
    ],
)
def test_finetune_refuses_what_it_would_not_heed(
    base: Path,
    animals: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "finetune", str(base), animals, "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert message in capfd.readouterr().err
