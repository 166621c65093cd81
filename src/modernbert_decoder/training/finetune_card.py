"""The README.md of a fine-tuned model: what it is for, what it learned from, how well it does.

Knows reports and settings; how they came about is the business of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from modernbert_decoder.architecture import DecoderArchitecture
from modernbert_decoder.training.adapters import ADAPTER_FOLDER, LoraSettings
from modernbert_decoder.training.finetune_run import FinetuneSettings

_NAMES: Final = {
    "single_label_classification": "one label for each text",
    "multi_label_classification": "several labels for each text",
    "regression": "a number for each text",
}
_MAX_LABELS_SHOWN: Final = 100
_MAX_FILES_SHOWN: Final = 20


def classifier_card(
    report: Mapping[str, Any],
    *,
    architecture: DecoderArchitecture,
    settings: FinetuneSettings,
    lora: LoraSettings | None,
    has_curve: bool,
) -> str:
    """The card of a classifier in Markdown."""
    labels = report["labels"]
    listed = ", ".join(f"`{name}`" for name in labels[:_MAX_LABELS_SHOWN])
    more = f" and {len(labels) - _MAX_LABELS_SHOWN} more" if len(labels) > _MAX_LABELS_SHOWN else ""
    sections = [
        _front("text-classification"),
        f"# Classifier\n\n{_NAMES[report['problem']].capitalize()}, by a ModernBERT decoder of "
        f"{architecture.num_hidden_layers} layers of width {architecture.hidden_size}, fine-tuned from "
        f"`{report['model']}`.\n\nLabels: {listed}{more}.",
        _use('mbd classify --model . "a text"', lora, command="classify", model=report["model"]),
        f"## Data\n\n{_files(report)}\n\n{report['rows']:,} rows to train on, "
        f"{report['validation_rows']:,} to validate with. Texts in the tokenizer's template, at most "
        f"{settings.max_length:,} tokens.",
        _training(settings, lora, has_curve=has_curve),
        _metrics(report),
    ]
    if report.get("per_label") and len(labels) <= _MAX_LABELS_SHOWN:
        rows = [
            f"| {entry['label']} | {entry['rows']:,} | {entry['precision']:.3f} | {entry['recall']:.3f} | "
            f"{entry['f1']:.3f} |"
            for entry in report["per_label"]
        ]
        sections.append(_table("| label | rows | precision | recall | F1 |", rows))
    if report.get("most_confused"):
        rows = [
            f"| {entry['label']} | {entry['taken_for']} | {entry['rows']:,} |"
            for entry in report["most_confused"]
        ]
        table = _table("| label | taken for | rows |", rows)
        sections.append(f"Most often confused (all of it is in `confusion.csv`):\n\n{table}")
    return "\n\n".join(section for section in sections if section) + "\n"


def text_card(
    report: Mapping[str, Any],
    *,
    architecture: DecoderArchitecture,
    settings: FinetuneSettings,
    lora: LoraSettings | None,
    has_curve: bool,
) -> str:
    """The card of a language model in Markdown."""
    cut = f" {report['cut']:,} of them were shortened." if report["cut"] else ""
    sections = [
        _front("text-generation"),
        f"# Language model\n\nA ModernBERT decoder of {architecture.num_hidden_layers} layers of width "
        f"{architecture.hidden_size}, fine-tuned from `{report['model']}`.",
        _use('mbd generate --model . "a prompt"', lora, command="generate", model=report["model"]),
        f"## Data\n\n{_files(report)}\n\n{report['examples']:,} examples with "
        f"{report['learned_tokens']:,} learned tokens, "
        f"{report['validation_examples']:,} examples to validate with; at most {settings.max_length:,} "
        f"tokens each.{cut}",
        _training(settings, lora, has_curve=has_curve),
        _metrics(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(task: str) -> str:
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- modernbert-decoder\n---"


def _use(command_line: str, lora: LoraSettings | None, *, command: str, model: str) -> str:
    beside = ""
    if lora is not None:
        beside = (
            f"\n\nThe weights here have the adapter merged in. It also stands in `{ADAPTER_FOLDER}/`, in "
            f"PEFT's format, for use with its base: `mbd {command} --model {model} --adapter "
            f'{ADAPTER_FOLDER} "..."`.'
        )
    return f"## Use\n\n```bash\n{command_line}\n```{beside}"


def _files(report: Mapping[str, Any]) -> str:
    """What was learned from, and judged by, as it was named."""
    train, judge = (_listed(report[key]) for key in ("data", "validation_data"))
    return f"{train}; validation: {judge}." if judge else f"{train}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_FILES_SHOWN:,} more" if len(names) > _MAX_FILES_SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:_MAX_FILES_SHOWN]) + more


def _training(settings: FinetuneSettings, lora: LoraSettings | None, *, has_curve: bool) -> str:
    patience = "" if settings.patience is None else f", stopping after {settings.patience} without gain"
    adapter = ""
    if lora is not None:
        targets = ", ".join(f"`{target}`" for target in lora.targets)
        adapter = f" LoRA of rank {lora.rank} and alpha {lora.alpha:g} on {targets}."
    curve = "\n\n![Loss and validation metric](curve.png)" if has_curve else ""
    return (
        f"## Training\n\nAdamW, betas 0.9 and 0.98, eps 1e-6, learning rate {settings.rate(lora):g} with a "
        f"warm-up over {settings.warmup:.0%} of the steps and a linear decay, weight decay "
        f"{settings.weight_decay:g}, at most {settings.epochs} epochs{patience}, "
        f"{settings.batch_size * settings.accumulation} rows a step, seed {settings.seed}.{adapter} All "
        f"options are in `finetune.json`.{curve}"
    )


def _metrics(report: Mapping[str, Any]) -> str:
    if "metrics" not in report:
        return ""
    rows = [f"| {name} | {value:.4f} |" for name, value in report["metrics"].items()]
    return "## Evaluation\n\nOf the validation rows:\n\n" + _table("| metric | value |", rows)


def _table(header: str, rows: Sequence[str]) -> str:
    rule = "|" + "---|" * (header.count("|") - 1)
    return "\n".join([header, rule, *rows])
