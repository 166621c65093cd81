"""`mbd generate`: complete a prompt."""

from __future__ import annotations

from typing import Any, Final

import click

from modernbert_decoder.cli.completion_options import CompletionOptions, completion_options
from modernbert_decoder.cli.interrupts import interrupts_deferred

# \b keeps click from joining the lines.
_EXAMPLES: Final = (
    "\b\n"
    'mbd generate "Once upon a time"\n'
    'mbd generate --model jhu-clsp/ettin-decoder-17m --temperature 0 "The capital of France is"\n'
    "mbd generate --n 3 --seed 1 --json < prompt.txt\n"
)


@click.command("generate", short_help="Continue a prompt.", epilog=_EXAMPLES)
@completion_options
def command(**options: Any) -> None:
    """Continue PROMPT; the text appears as it is written.

    Without PROMPT, or with `-`, the prompt is read from standard input: UTF-8, less one line break at its
    end.

    The text begins with the prompt, as a reader wants it; --no-echo leaves it out. A last line break is
    added if there is none. Use --json for the exact text and everything else about it.
    """
    with interrupts_deferred():
        from modernbert_decoder.cli.completion import complete

    complete(CompletionOptions(**options))
