"""`mbd train`: the commands that train models, each of them one step from raw text to a shipped checkpoint.

Needs the extra `train`; without it every command says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from modernbert_decoder.cli import train_cross, train_finetune
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import write, write_json
from modernbert_decoder.cli.train_processes import is_first_process, progress_writer, require_extra


@click.group("train", short_help="Train a model: pretrain, finetune, cross.")
def command() -> None:
    """Train ModernBERT decoders with Hugging Face Trainer, on one machine or, under `accelerate launch` or
    `torchrun`, on many.
    """


@command.command("pretrain")
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run, new or to be resumed.")
@click.option("--data", multiple=True, metavar="FILES", help="Files to train on, a pattern each (data.files)")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key: optimizer.learning_rate=1e-3."
)
@click.option("--stop-after", metavar="PHASE", help="Stop behind this phase; the same command goes on later.")
@click.option("--show", is_flag=True, help="Print the recipe with all its keys, and train nothing.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def pretrain_command(
    recipe: str,
    *,
    out: Path | None,
    data: tuple[str, ...],
    changes: tuple[str, ...],
    stop_after: str | None,
    show: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a language model from text.

    RECIPE is a YAML file or one of the ready recipes: ettin-17m to ettin-1b, storyteller, smoke. A run that
    was interrupted, by whatever, goes on when the same command is given again. The model is in OUT/model.
    """
    require_extra()
    from modernbert_decoder.errors import InputError
    from modernbert_decoder.training.recipe_files import read_recipe, recipe_text

    if quiet and as_json:
        raise InputError("--quiet and --json contradict each other; choose one")
    files = [f"data.files={list(data)!r}"] if data else []
    read = read_recipe(recipe, changes=[*files, *changes])
    if show:
        write(recipe_text(read))
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    with interrupts_deferred():
        from modernbert_decoder.training.pretraining import pretrain

    result = pretrain(
        read,
        out,
        stop_after=stop_after,
        write=progress_writer(quiet=quiet),
        shows_bar=not quiet and sys.stderr.isatty(),
    )
    if not is_first_process():
        return
    report = {
        "model": str(result.folder),
        "steps": result.steps,
        "tokens": result.tokens,
        "bits_per_byte": {entry.dtype: entry.bits_per_byte for entry in result.evaluations},
    }
    if as_json:
        write_json(report)
    elif not quiet:
        write(f"{result.folder}\n")


command.add_command(train_finetune.command)
command.add_command(train_cross.command)
