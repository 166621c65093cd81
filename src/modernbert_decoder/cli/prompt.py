"""Where the prompt comes from: the command line or standard input. It knows nothing of tokens or models."""

from __future__ import annotations

import sys

import click

from modernbert_decoder.errors import InputError


def read_prompt(argument: str | None) -> str:
    """The argument, or standard input where there is none or it is `-`.

    Standard input is UTF-8 whatever the locale, and one line break at its end, which `echo` and editors put
    there, does not belong to the prompt.

    Raises:
        InputError: an empty prompt, or bytes that are not UTF-8.
    """
    prompt = _read_standard_input() if argument is None or argument == "-" else argument
    if not prompt:
        raise InputError('the prompt is empty; give some text: mbd generate "Once upon a time"')
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python marks bytes of the command line that it cannot read
        raise InputError("the prompt on the command line is not valid UTF-8") from None
    return prompt


def _read_standard_input() -> str:
    if sys.stdin is None:
        raise InputError("there is no prompt: none was given and standard input is closed")
    if sys.stdin.isatty():
        click.echo("Reading the prompt from the terminal; end it with Ctrl-D on a line of its own.", err=True)
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on standard input is not valid UTF-8 (byte {error.start} is "
            f"0x{data[error.start]:02x}); convert it first, for instance with `iconv -f latin1 -t utf-8`"
        ) from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
