"""Fine-tuning a decoder: as a classifier of labelled texts, or as a language model on further texts.

Responsible for what is learned and how it is judged; the run itself is `finetune_run.py`. Knows no command
line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from modernbert_decoder.architecture import DecoderArchitecture, Head
from modernbert_decoder.checkpoint import find_checkpoint
from modernbert_decoder.errors import InputError
from modernbert_decoder.pytorch import (
    ModernBertDecoderForCausalLM,
    ModernBertDecoderForSequenceClassification,
)
from modernbert_decoder.tokenizer import Tokenizer
from modernbert_decoder.training import classification_metrics as metrics_of
from modernbert_decoder.training.adapters import LoraSettings, add_adapter
from modernbert_decoder.training.classification_data import (
    SINGLE,
    LabelledFiles,
    LabelledRow,
    LabelSet,
    Problem,
    Target,
    balanced_weights,
    problem_of,
    read_labelled,
    split,
    stated_weights,
)
from modernbert_decoder.training.finetune_card import classifier_card, text_card
from modernbert_decoder.training.finetune_run import (
    FinetunePlan,
    FinetuneSettings,
    Outcome,
    checked_base,
    run,
)
from modernbert_decoder.training.finetune_tasks import (
    ClassificationTask,
    Encoded,
    TextTask,
    training_flops_per_token,
)
from modernbert_decoder.training.finetune_trainer import Learning
from modernbert_decoder.training.text_data import Example, TextFiles, read_texts

ClassWeights = Literal["none", "balanced"] | Mapping[str, float]


def finetune_classifier(
    model: str | Path,
    data: LabelledFiles,
    out: Path,
    *,
    validation: LabelledFiles | None = None,
    validation_share: float = 0.1,
    problem: Problem | None = None,
    class_weights: ClassWeights = "none",
    settings: FinetuneSettings | None = None,
    lora: LoraSettings | None = None,
    reuse_head: bool = True,
    revision: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Trains a classifier and leaves it in `out`, where the engine and transformers load it.

    Args:
        model: a decoder: bundled name, folder or Hub id.
        data: to learn from.
        out: a new folder, or one with an unfinished run of the same options.
        validation: to judge by; None: a share of the data.
        validation_share: which share; 0: nothing is held out, and the last epoch's model is kept.
        problem: what the labels are; None: as their values say.
        class_weights: "balanced", or a weight by name (of others: 1).
        settings: of the run.
        lora: train an adapter and the head only.
        reuse_head: start from the head of the language model instead of a random one.
        revision: on the Hub.
        callbacks: the library's, for progress.

    Raises:
        InputError: data, options or folder cannot be used.
        TrainingError: the loss is no number, or the disk is full.
    """
    settings = settings or FinetuneSettings()
    folder = find_checkpoint(model, revision=revision)
    architecture = DecoderArchitecture.from_config(checked_base(folder), source=str(folder / "config.json"))
    tokenizer = Tokenizer.from_folder(folder, architecture)
    rows = read_labelled(data)
    held_out = [] if validation is None else read_labelled(validation)
    kind = problem or problem_of(rows)
    labels = LabelSet.of(rows, kind)
    targets = labels.targets(rows)
    weights = _weights(class_weights, targets, labels)
    train = _encoded(rows, targets, tokenizer, settings.max_length)
    judge = _encoded(held_out, labels.targets(held_out), tokenizer, settings.max_length)
    if validation is None and validation_share > 0:
        chosen = split(targets, share=validation_share, seed=settings.seed, is_stratified=kind == SINGLE)
        train, judge = [train[i] for i in chosen[0]], [train[i] for i in chosen[1]]
    metric = _metric(settings, metrics_of.METRICS[kind], has_validation=bool(judge))
    task = ClassificationTask(labels, weights, judge, architecture, settings)
    build = partial(_classifier, folder, architecture, labels, lora, reuse_head=reuse_head, settings=settings)
    lengths = [len(row.ids) for row in train]
    facts = {
        "model": str(model),
        "data": list(data.files),
        "validation_data": [] if validation is None else list(validation.files),
        "rows": len(train),
        "validation_rows": len(judge),
        "problem": kind,
    }
    plan = FinetunePlan(
        base=folder,
        identity={
            "model": str(folder),
            "data": [asdict(data), _digest(rows)],
            "validation": [None if validation is None else asdict(validation), _digest(held_out)],
            "validation share": validation_share,
            "problem": kind,
            "class weights": dict(class_weights) if isinstance(class_weights, Mapping) else class_weights,
            "adapter": None if lora is None else asdict(lora),
            "reused head": reuse_head,
        },
        settings=settings,
        lora=lora,
        is_classifier=True,
        metric=metric,
        is_greater_better=metrics_of.is_greater_better(metric),
        build=build,
        learning=Learning(
            rows=train,
            lengths=lengths,
            collate=task.collate,
            objective=task.loss,
            evaluate=task.metrics if judge else None,
            flops_per_token=training_flops_per_token(
                architecture, lengths, head_share=0.0, has_adapter=lora is not None
            ),
        ),
        report=lambda trainer: {**facts, **task.report(trainer)},
        card=partial(classifier_card, architecture=architecture, settings=settings, lora=lora),
        extras=_confusion_file,
    )
    return run(plan, out, callbacks=callbacks)


def finetune_text(
    model: str | Path,
    data: TextFiles,
    out: Path,
    *,
    validation: TextFiles | None = None,
    validation_share: float = 0.1,
    settings: FinetuneSettings | None = None,
    lora: LoraSettings | None = None,
    revision: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Goes on training a language model, on documents or on completions of prompts; leaves it in `out`.

    Arguments and errors as in `finetune_classifier`; the metric is the loss per learned token.
    """
    settings = settings or FinetuneSettings()
    folder = find_checkpoint(model, revision=revision)
    architecture = DecoderArchitecture.from_config(checked_base(folder), source=str(folder / "config.json"))
    if architecture.head is not Head.CAUSAL_LM:
        raise InputError(f"{model} has no language-model head; texts are learned by a language model")
    longest = min(settings.max_length, architecture.max_position_embeddings)
    tokenizer = Tokenizer.from_folder(folder, architecture)
    read = read_texts(data, tokenizer, max_length=longest)
    train, judge = read.examples, list[Example]()
    if validation is not None:
        judge = read_texts(validation, tokenizer, max_length=longest).examples
    elif validation_share > 0:
        kept, chosen = split(
            [0] * len(train), share=validation_share, seed=settings.seed, is_stratified=False
        )
        train, judge = [train[i] for i in kept], [train[i] for i in chosen]
    _metric(settings, ("loss",), has_validation=bool(judge))
    task = TextTask(judge, architecture, settings)
    lengths = [len(example.ids) for example in train]
    learned = sum(example.num_targets for example in train)
    facts = {
        "model": str(model),
        "data": list(data.files),
        "validation_data": [] if validation is None else list(validation.files),
        "examples": len(train),
        "learned_tokens": learned,
        "validation_examples": len(judge),
        "cut": read.num_cut,
    }
    plan = FinetunePlan(
        base=folder,
        identity={
            "model": str(folder),
            "data": [asdict(data), _digest(read.examples)],
            "validation": [None if validation is None else asdict(validation), _digest(judge)],
            "validation share": validation_share,
            "adapter": None if lora is None else asdict(lora),
        },
        settings=settings,
        lora=lora,
        is_classifier=False,
        metric="loss",
        is_greater_better=False,
        build=partial(_language_model, folder, lora),
        learning=Learning(
            rows=train,
            lengths=lengths,
            collate=task.collate,
            objective=task.loss,
            evaluate=task.metrics if judge else None,
            flops_per_token=training_flops_per_token(
                architecture, lengths, head_share=learned / sum(lengths), has_adapter=lora is not None
            ),
        ),
        report=lambda trainer: {**facts, **task.report(trainer)},
        card=partial(text_card, architecture=architecture, settings=settings, lora=lora),
        extras=lambda report: {},
    )
    return run(plan, out, callbacks=callbacks)


def _classifier(
    folder: Path,
    architecture: DecoderArchitecture,
    labels: LabelSet,
    lora: LoraSettings | None,
    *,
    reuse_head: bool,
    settings: FinetuneSettings,
) -> Any:
    """The classifier in float32, new parts drawn from the seed that was set."""
    if settings.max_length > architecture.max_position_embeddings:
        raise InputError(
            f"the longest text has {settings.max_length} tokens, but the model was made for "
            f"{architecture.max_position_embeddings}; lower it"
        )
    is_same = architecture.head is Head.SEQUENCE_CLASSIFICATION and architecture.num_labels == len(
        labels.names
    )
    model = ModernBertDecoderForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
        problem_type=labels.problem,
        reuse_lm_head=reuse_head and architecture.head is not Head.NONE,
        ignore_mismatched_sizes=not is_same,
    )
    return model if lora is None else add_adapter(model, lora, is_classifier=True)


def _language_model(folder: Path, lora: LoraSettings | None) -> Any:
    model = ModernBertDecoderForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model if lora is None else add_adapter(model, lora, is_classifier=False)


def _encoded(
    rows: Sequence[LabelledRow], targets: Sequence[Target], tokenizer: Tokenizer, max_length: int
) -> list[Encoded]:
    """Texts in the tokenizer's template, as the engine's classifier reads them."""
    return [
        Encoded(tuple(tokenizer.encode_template(row.text, row.pair, max_length=max_length)), target)
        for row, target in zip(rows, targets, strict=True)
    ]


def _weights(
    chosen: ClassWeights, targets: Sequence[Target], labels: LabelSet
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    if isinstance(chosen, Mapping):
        return stated_weights(chosen, targets, labels)
    return balanced_weights(targets, labels) if chosen == "balanced" else None


def _metric(settings: FinetuneSettings, known: Sequence[str], *, has_validation: bool) -> str:
    if settings.metric is not None and settings.metric not in known:
        raise InputError(f"the metric is {settings.metric!r}; for this problem choose {', '.join(known)}")
    if not has_validation and (settings.metric is not None or settings.patience is not None):
        raise InputError("a metric and early stopping need validation rows; hold some out, or name a file")
    return settings.metric or known[0]


def _digest(rows: Sequence[Any]) -> str:
    """Tells data from other data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), default=str).encode())
    return digest.hexdigest()[:16]


def _confusion_file(report: Mapping[str, Any]) -> dict[str, str]:
    if "confusion" not in report:
        return {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", *report["labels"]])
    for name, counts in zip(report["labels"], report["confusion"], strict=True):
        writer.writerow([name, *counts])
    return {"confusion.csv": text.getvalue()}
