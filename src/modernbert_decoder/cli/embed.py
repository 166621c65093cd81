"""`mbd embed`: vectors for texts."""

from __future__ import annotations

from typing import Any, Final

import click

from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.job_options import JobOptions, job_options, length_options
from modernbert_decoder.engine.choices import POOLINGS

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\nmbd embed -m jhu-clsp/ettin-decoder-17m --pooling mean -i texts.csv -o vectors.parquet\n"
)


@click.command("embed", short_help="Vectors for texts.", epilog=_EXAMPLES)
@click.option(
    "--pooling",
    type=click.Choice(POOLINGS),
    default="last",
    show_default=True,
    help="The state of the last token, or the mean of all.",
)
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Scale to length 1.")
@length_options
@job_options(model="storyteller")
def command(*, pooling: str, normalize: bool, truncate: bool, max_length: int | None, **options: Any) -> None:
    """Turn TEXTS into vectors; without TEXTS and --input, the lines of standard input.

    Rows that cannot be used are reported, have an `error` in the results, and make the exit code 3.
    """
    chosen = JobOptions(**options)
    chosen.check()
    with interrupts_deferred():
        from modernbert_decoder.cli.job_command import run_job
        from modernbert_decoder.jobs.tasks import Embed

    task = Embed(pooling=pooling, normalize=normalize, truncate=truncate, max_length=max_length)
    run_job(task, chosen.inputs(task), chosen)
