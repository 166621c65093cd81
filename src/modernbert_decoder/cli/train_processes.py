"""What the commands that train have in common: the packages they need, and the process that speaks.

Knows nothing of models or data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final

import click

from modernbert_decoder.errors import InputError

# Import names of the extra `train` that every command needs.
_NEEDED: Final = ("torch", "transformers", "accelerate", "optimi", "yaml")


def require_extra() -> None:
    """Refuse to train without the packages for it.

    Raises:
        InputError: some are missing.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"training needs packages that are not installed ({', '.join(missing)}): "
            'pip install "modernbert-decoder[train]"'
        )


def is_first_process() -> bool:
    """Whether this is the process that speaks, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def progress_writer(*, quiet: bool) -> Callable[[str], None]:
    """Takes the lines of a run: to standard error, or nowhere if quiet and in processes that do not speak."""

    def say(line: str) -> None:
        click.echo(line, err=True)

    def say_nothing(line: str) -> None:
        pass

    return say_nothing if quiet or not is_first_process() else say
