"""`mbd merge`: a model and a LoRA adapter become one model."""

from __future__ import annotations

from pathlib import Path

import click

from modernbert_decoder.cli.completion_options import revision_option
from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.output import bytes_text, write


@click.command("merge", short_help="Merge a LoRA adapter into a model.")
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@revision_option
@click.option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
def command(
    model: str, adapter: Path, out: Path, *, revision: str | None, overwrite: bool, quiet: bool
) -> None:
    """Write MODEL with the LoRA ADAPTER merged into its weights as the folder OUT, in float32.

    OUT needs neither of the two any more; transformers loads it too. To run a model with an adapter without
    writing it, give `--adapter` to the command that runs it.
    """
    with interrupts_deferred():
        from modernbert_decoder.checkpoint import Checkpoint, find_checkpoint
        from modernbert_decoder.engine.adapters import merge_adapter

    checkpoint = Checkpoint.open(find_checkpoint(model, revision=revision))
    num_bytes = merge_adapter(checkpoint, adapter, out, overwrite=overwrite)
    if not quiet:
        write(f"{out}: {bytes_text(num_bytes)} of float32 weights\n")
