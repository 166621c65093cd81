r"""Fine-tunes a decoder to tell what a customer wants, then serves it with the engine.

    python examples/intents/intents.py --train train.csv --test test.csv --output intents

The files are CSV with the columns `text` and `category`, as those of Banking77 are. Training is a plain
Hugging Face `Trainer` and needs `pip install "modernbert-decoder[train]" matplotlib`; what it writes is an
ordinary checkpoint folder, and everything from there on needs neither PyTorch nor transformers.

Run again, it finds the classifier and evaluates it only: `--dtype float32 int8 w8a8` tells what fewer bits
cost. The accuracy in the README is that of

    python examples/intents/intents.py --output intents \
        --train "$MBD_SHARED/data/banking77/train.csv" --test "$MBD_SHARED/data/banking77/test.csv"
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_decoder import LLM
from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.tokenizer import Tokenizer

_MAX_LENGTH = 256
_IGNORED = -100


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="CSV with the columns text and category")
    parser.add_argument("--test", type=Path, required=True, help="likewise, never trained on")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the classifier and its figures"
    )
    parser.add_argument("--model", default="storyteller", help="bundled name, folder or Hub id to start from")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, help="train and test on so many rows only")
    parser.add_argument(
        "--dtype", nargs="+", default=["int8"], help="the engine's precision; of several, each is evaluated"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def read(path: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """The texts and their categories, in an order that does not follow the categories."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    return [rows[i]["text"] for i in order], [rows[i]["category"] for i in order]


def train(options: argparse.Namespace, texts: list[str], categories: list[str]) -> None:
    """Fine-tunes `options.model` and writes the classifier to `options.output`."""
    import torch
    import transformers

    from modernbert_decoder.pytorch import ModernBertDecoderForSequenceClassification

    folder = find_checkpoint(options.model)
    labels = sorted(set(categories))
    model = ModernBertDecoderForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="single_label_classification",
        reuse_lm_head=True,
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_folder(folder, DecoderArchitecture.from_config(config))
    examples = [
        {
            "input_ids": tokenizer.encode_template(text, max_length=_MAX_LENGTH),
            "labels": labels.index(category),
        }
        for text, category in zip(texts, categories, strict=True)
    ]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.output / "checkpoints"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=100,
            weight_decay=0.01,
            **_by_length(transformers.TrainingArguments),
            logging_steps=50,
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=examples,
        data_collator=_pad,
    )
    trainer.train(
        resume_from_checkpoint=transformers.trainer_utils.get_last_checkpoint(trainer.args.output_dir)
    )
    model.save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (options.output / name).write_bytes((folder / name).read_bytes())


def _by_length(arguments: type[Any]) -> dict[str, Any]:
    """Batches of texts of like length, as this release of transformers calls them."""
    if "train_sampling_strategy" in {field.name for field in dataclasses.fields(arguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _pad(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: ids padded on the right, with their mask."""
    import torch

    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def evaluate(options: argparse.Namespace, texts: list[str], categories: list[str]) -> None:
    """Classifies the test texts in each precision and prints how well; draws the first one's confusion."""
    for i, dtype in enumerate(options.dtype):
        predicted = classify(options.output, dtype, texts)
        accuracy = float(np.mean([a == b for a, b in zip(predicted, categories, strict=True)]))
        print(f"{dtype}: accuracy {accuracy:.1%} on {len(texts):,} texts")
        if i == 0:
            print_confused(categories, predicted)
            draw(categories, predicted, options.output / "confusion.png", accuracy)


def classify(folder: Path, dtype: str, texts: list[str]) -> list[str]:
    """The labels that the engine gives."""
    with LLM(folder, dtype=dtype) as llm:
        start = time.perf_counter()
        predicted = [output.label for output in llm.classify(texts, truncate=True, max_length=_MAX_LENGTH)]
        seconds = time.perf_counter() - start
    print(f"{dtype}: {len(texts) / seconds:,.0f} texts per second")
    return predicted


def print_confused(actual: list[str], predicted: list[str]) -> None:
    """The pairs of labels that are most often taken for each other."""
    wrong = Counter((a, b) for a, b in zip(actual, predicted, strict=True) if a != b)
    print("most often confused:")
    for (label, answer), count in wrong.most_common(5):
        print(f"  {count:3d}  {label}  taken for  {answer}")


def confusion(actual: list[str], predicted: list[str], labels: list[str]) -> np.ndarray:
    """counts[i, j]: texts of label i that were given label j."""
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for a, b in zip(actual, predicted, strict=True):
        counts[place[a], place[b]] += 1
    return counts


def draw(actual: list[str], predicted: list[str], path: Path, accuracy: float) -> None:
    """The confusion matrix as a picture, each row as shares of its label."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    labels = sorted({*actual, *predicted})
    counts = confusion(actual, predicted, labels)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure, axes = plt.subplots(figsize=(14, 13), dpi=110, layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlabel("the classifier's answer")
    axes.set_ylabel("what the text is about")
    axes.set_title(f"{len(actual):,} texts, accuracy {accuracy:.1%}")
    figure.colorbar(image, shrink=0.6, label="share of the row")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Trains unless the classifier is there already, and evaluates it."""
    options = parse(arguments)
    if not (options.output / "model.safetensors").exists():
        train(options, *read(options.train, options.limit))
    evaluate(options, *read(options.test, options.limit))


if __name__ == "__main__":
    main()
