"""`mbd score`: how likely texts are."""

from __future__ import annotations

from typing import Any, Final

import click

from modernbert_decoder.cli.interrupts import interrupts_deferred
from modernbert_decoder.cli.job_options import JobOptions, job_options

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    'mbd score "Once upon a time there was a king."\n'
    "mbd score -i 'books/*.txt' --whole-files --stride 512 -o scores.csv\n"
)


@click.command("score", short_help="Log-probability and perplexity of texts.", epilog=_EXAMPLES)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Score texts longer than the context in windows that advance by so many tokens.",
)
@click.option("--tokens", is_flag=True, help="The log-probability of every token as well.")
@job_options(model="storyteller")
def command(*, stride: int | None, tokens: bool, **options: Any) -> None:
    """Score TEXTS by a language model; without TEXTS and --input, the lines of standard input.

    Results have the natural logarithm of a text's probability, the perplexity of its tokens, and bits per
    byte, which compares models of different tokenizers. Rows that cannot be used are reported, have an
    `error` in the results, and make the exit code 3.
    """
    chosen = JobOptions(**options)
    chosen.check()
    with interrupts_deferred():
        from modernbert_decoder.cli.job_command import run_job
        from modernbert_decoder.jobs.tasks import ScoreTexts

    task = ScoreTexts(stride=stride, tokens=tokens)
    run_job(task, chosen.inputs(task), chosen)
