"""`mbd train cross`: an encoder goes on as a decoder, or a decoder as an encoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from modernbert_decoder.cli.completion_options import revision_option
from modernbert_decoder.cli.output import write, write_json
from modernbert_decoder.cli.train_processes import is_first_process, progress_writer, require_extra
from modernbert_decoder.errors import InputError

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    "mbd train cross jhu-clsp/ettin-encoder-17m --to decoder --data 'text/*.jsonl' --out decoder\n"
    "mbd train cross jhu-clsp/ettin-decoder-17m --to encoder --data 'text/*.jsonl' --out encoder "
    "--set phases.0.tokens=1e9\n"
)


@click.command("cross", short_help="Go on with an encoder as a decoder, or back.", epilog=_EXAMPLES)
@click.argument("model")
@click.option("--to", type=click.Choice(["decoder", "encoder"]), required=True, help="What it shall become.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; it is resumed."
)
@click.option("--data", multiple=True, metavar="FILES", help="Files to train on, a pattern each (data.files)")
@click.option("--recipe", default="cross", show_default=True, help="A YAML file or a ready recipe.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe.")
@click.option(
    "--mask-share",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="To encoder: share of hidden tokens.  [default: 0.15]",
)
@revision_option
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    model: str,
    *,
    to: str,
    out: Path,
    data: tuple[str, ...],
    recipe: str,
    changes: tuple[str, ...],
    mask_share: float | None,
    revision: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Convert MODEL, bit for bit, and go on training it with the other objective.

    A decoder learns the next token; an encoder the hidden tokens of a text, each from the position before it,
    and is saved as transformers' ModernBertForMaskedLM. With the recipe `cross` that is 50 billion tokens at
    half the peak rate of the released model of these sizes. The model is in OUT/model.
    """
    if quiet and as_json:
        raise InputError("--quiet and --json contradict each other; choose one")
    if mask_share is not None and to == "decoder":
        raise InputError("--mask-share goes with --to encoder; leave it out")
    require_extra()
    from modernbert_decoder.training.cross import MASK_SHARE, cross

    files = [f"data.files={list(data)!r}"] if data else []
    result = cross(
        model,
        out,
        to="decoder" if to == "decoder" else "encoder",
        recipe=recipe,
        changes=[*files, *changes],
        mask_share=mask_share or MASK_SHARE,
        revision=revision,
        write=progress_writer(quiet=quiet),
        shows_bar=not quiet and sys.stderr is not None and sys.stderr.isatty(),
    )
    if not is_first_process():
        return
    report = {"model": str(result.folder), "to": to, "steps": result.steps, "tokens": result.tokens}
    if as_json:
        write_json(report)
    elif not quiet:
        write(f"{result.folder}\n")
