"""`mbd train finetune`: a classifier, or a language model for texts of one's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from modernbert_decoder.cli.completion_options import revision_option
from modernbert_decoder.cli.output import write, write_json
from modernbert_decoder.cli.train_processes import is_first_process, require_extra
from modernbert_decoder.errors import InputError

if TYPE_CHECKING:
    from modernbert_decoder.training.finetune_run import FinetuneSettings, Outcome

_CLASSIFICATION: Final = "classification"
_TEXT: Final = "text"
_MAX_LENGTHS: Final = {_CLASSIFICATION: 256, _TEXT: 1024}
_ONLY_FOR: Final = {
    _CLASSIFICATION: ("pair_column", "labels", "label_separator", "problem", "class_weights", "new_head"),
    _TEXT: ("completion_column",),
}
# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    "mbd train finetune storyteller train.csv --label category --out intents\n"
    "mbd train finetune storyteller pairs.jsonl --task text --column prompt "
    "--completion-column answer --out chat\n"
)


@click.command("finetune", short_help="Train a classifier, or go on with a language model.", epilog=_EXAMPLES)
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the result; a run is resumed."
)
@click.option(
    "--task", type=click.Choice([_CLASSIFICATION, _TEXT]), default=_CLASSIFICATION, show_default=True
)
@click.option("--column", default="text", show_default=True, help="Column of the texts (or prompts).")
@click.option("--pair-column", help="Column of the second text of each row.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="COLUMN",
    help="Column of the labels; several: one column of 0 and 1 for each label.  [default: label]",
)
@click.option("--label-separator", metavar="TEXT", help="What stands between several labels in one field.")
@click.option(
    "--problem",
    type=click.Choice(["single", "multi", "regression"]),
    help="One label a text, several, or a number.  [default: as the values say]",
)
@click.option("--completion-column", help="Column of what each prompt is to be continued with.")
@click.option("--validation", multiple=True, metavar="FILE", help="Rows to judge by.")
@click.option(
    "--validation-share",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.1,
    show_default=True,
    help="Without --validation: the share of DATA to judge by. 0: none.",
)
@click.option(
    "--class-weight",
    "class_weights",
    multiple=True,
    metavar="balanced|LABEL=WEIGHT",
    help="Count rare labels more: `balanced`, or the weight of a label, several times.",
)
@click.option("--new-head", is_flag=True, help="Do not start from the language model's head.")
@click.option("--epochs", type=int, default=3, show_default=True, help="Passes over the data.")
@click.option("--batch-size", type=int, default=48, show_default=True, help="Rows at a time.")
@click.option("--accumulation", type=int, default=1, show_default=True, help="Batches of one step.")
@click.option("--learning-rate", type=float, help="Peak.  [default: 5e-5, with --lora 5e-4]")
@click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Of matrices.")
@click.option("--warmup", type=float, default=0.06, show_default=True, help="Share of the steps.")
@click.option("--max-length", type=int, help="Most tokens of a text.  [default: 256; of --task text 1024]")
@click.option("--metric", help="What decides: accuracy, macro_f1, mse or loss.  [default: the problem's]")
@click.option("--patience", type=int, help="Stop after so many epochs without a better metric.")
@click.option("--lora", is_flag=True, help="Train a LoRA adapter (and a classifier's head) only.")
@click.option("--lora-rank", type=int, default=16, show_default=True, help="Rank of the adapter.")
@click.option("--lora-alpha", type=float, default=32.0, show_default=True, help="Its scale, times the rank.")
@click.option("--lora-dropout", type=float, default=0.0, show_default=True, help="On its inputs.")
@click.option("--lora-target", multiple=True, metavar="LAYER", help="Layers to adapt.  [default: all linear]")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same model.")
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute twice to hold less.")
@click.option("--report-to", multiple=True, metavar="NAME", help="tensorboard, trackio, wandb.")
@revision_option
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_context
def command(context: click.Context, /, model: str, data: tuple[str, ...], **options: Any) -> None:
    """Train MODEL on DATA: files .csv, .tsv, .jsonl, .parquet, of texts also .txt.

    A classifier learns the labels of texts; the language model learns documents, or with --completion-column
    to complete prompts. The result in OUT loads in `mbd classify` or `mbd generate` and in transformers, and
    has a model card and a report. A run that was interrupted goes on when the same command is given again.
    """
    _check(context, options)
    require_extra()
    from modernbert_decoder.training.finetune_progress import FinetuneProgress, silence_libraries

    silence_libraries()
    is_quiet = options["quiet"]
    progress = FinetuneProgress(
        write=(lambda line: None) if is_quiet else (lambda line: click.echo(line, err=True)),
        shows_bar=not is_quiet and sys.stderr is not None and sys.stderr.isatty(),
    )
    train = _train_classifier if options["task"] == _CLASSIFICATION else _train_text
    outcome = train(model, data, options, progress)
    if not is_first_process():
        return
    if options["as_json"]:
        write_json({"folder": str(outcome.folder), "is_new": outcome.is_new, **outcome.report})
    elif not is_quiet:
        _print(outcome)


def _check(context: click.Context, options: Mapping[str, Any]) -> None:
    if options["quiet"] and options["as_json"]:
        raise InputError("--quiet and --json contradict each other; choose one")
    task, given = options["task"], click.core.ParameterSource.COMMANDLINE
    for option in context.command.params:
        name = option.name or ""
        is_given = context.get_parameter_source(name) is given
        other = next((each for each in _ONLY_FOR if each != task and name in _ONLY_FOR[each]), None)
        if is_given and other is not None:
            raise InputError(f"{option.opts[0]} goes with --task {other}; leave it out")
        if is_given and name.startswith("lora_") and not options["lora"]:
            raise InputError(f"{option.opts[0]} goes with --lora; add that, or leave it out")


def _train_classifier(
    model: str, data: tuple[str, ...], options: Mapping[str, Any], progress: Any
) -> Outcome:
    from modernbert_decoder.training.classification_data import PROBLEMS, LabelledFiles
    from modernbert_decoder.training.finetune import finetune_classifier

    def files(names: tuple[str, ...]) -> LabelledFiles:
        return LabelledFiles(
            files=names,
            text=options["column"],
            pair=options["pair_column"],
            labels=options["labels"] or ("label",),
            separator=options["label_separator"],
        )

    problem = options["problem"]
    return finetune_classifier(
        model,
        files(data),
        options["out"],
        validation=files(options["validation"]) if options["validation"] else None,
        validation_share=options["validation_share"],
        problem=None if problem is None else PROBLEMS[problem],
        class_weights=_class_weights(options["class_weights"]),
        settings=_settings(options),
        lora=_lora(options),
        reuse_head=not options["new_head"],
        revision=options["revision"],
        callbacks=[progress],
    )


def _train_text(model: str, data: tuple[str, ...], options: Mapping[str, Any], progress: Any) -> Outcome:
    from modernbert_decoder.training.finetune import finetune_text
    from modernbert_decoder.training.text_data import TextFiles

    def files(names: tuple[str, ...]) -> TextFiles:
        return TextFiles(files=names, text=options["column"], completion=options["completion_column"])

    return finetune_text(
        model,
        files(data),
        options["out"],
        validation=files(options["validation"]) if options["validation"] else None,
        validation_share=options["validation_share"],
        settings=_settings(options),
        lora=_lora(options),
        revision=options["revision"],
        callbacks=[progress],
    )


def _settings(options: Mapping[str, Any]) -> FinetuneSettings:
    from modernbert_decoder.training.finetune_run import FinetuneSettings

    same = (
        *("epochs", "batch_size", "accumulation", "learning_rate", "weight_decay", "warmup", "metric"),
        *("patience", "seed", "precision", "gradient_checkpointing", "report_to"),
    )
    max_length = options["max_length"] or _MAX_LENGTHS[options["task"]]
    return FinetuneSettings(max_length=max_length, **{name: options[name] for name in same})


def _lora(options: Mapping[str, Any]) -> Any:
    from modernbert_decoder.training.adapters import LoraSettings

    if not options["lora"]:
        return None
    sizes = {name: options[f"lora_{name}"] for name in ("rank", "alpha", "dropout")}
    targets = options["lora_target"]
    return LoraSettings(**sizes, targets=targets) if targets else LoraSettings(**sizes)


def _class_weights(entries: tuple[str, ...]) -> Any:
    if not entries:
        return "none"
    if "balanced" in entries:
        if len(entries) > 1:
            raise InputError("--class-weight balanced stands alone; leave it or the stated weights out")
        return "balanced"
    weights: dict[str, float] = {}
    for entry in entries:
        name, separator, text = entry.rpartition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise InputError(f"--class-weight {entry} is neither balanced nor LABEL=WEIGHT")
    return weights


def _print(outcome: Outcome) -> None:
    report = outcome.report
    for name, value in report.get("metrics", {}).items():
        write(f"{name:<11} {value:.4f}\n")
    for entry in report.get("most_confused", [])[:5]:
        write(f"{entry['rows']:>5}  {entry['label']}  taken for  {entry['taken_for']}\n")
    already = "" if outcome.is_new else " (it was there already)"
    write(f"{outcome.folder}{already}\n")
