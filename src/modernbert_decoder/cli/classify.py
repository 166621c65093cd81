"""`mbd classify`: labels for texts."""

from __future__ import annotations

from typing import Any, Final

import click

from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.job_options import JobOptions, job_options, length_options

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    'mbd classify --model ./my-classifier "I lost my card"\n'
    "mbd classify --model ./my-classifier -i 'mail/*.jsonl' --column body --keep id -o labels.csv\n"
)


@click.command("classify", short_help="Label texts.", epilog=_EXAMPLES)
@click.option("--pair-column", help="Column that holds the second text of each row.")
@click.option("--all-labels", is_flag=True, help="The probability of every label, not only of the best.")
@length_options
@job_options(model=None)
def command(
    *, pair_column: str | None, all_labels: bool, truncate: bool, max_length: int | None, **options: Any
) -> None:
    """Label TEXTS by a classifier; without TEXTS and --input, the lines of standard input.

    Rows that cannot be used are reported, have an `error` in the results, and make the exit code 3.
    """
    chosen = JobOptions(**options)
    chosen.check()
    with interrupts_deferred():
        from modernbert_decoder.cli.job_command import run_job
        from modernbert_decoder.jobs.tasks import Classify

    task = Classify(truncate=truncate, max_length=max_length, all_labels=all_labels)
    run_job(task, chosen.inputs(task, pair_column=pair_column), chosen)
