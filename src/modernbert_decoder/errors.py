"""The errors a user can cause, each with a message that says what was wrong and what to do next.

The command line prints a `UserError` on one screen and exits with code 2. An engine that serves many callers
has four more errors, which are nobody's fault: it is full, too slow, closed, or a step of it failed. Every
other exception is a defect of this package. This module knows nothing of the rest of the package.
"""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Something the user can put right: a wrong argument, a damaged file, a missing model."""

    def on_command_line(self) -> str:
        """The message in the words of the command line."""
        return str(self)


class ConfigurationError(UserError, ValueError):
    """A `config.json` that cannot be honoured exactly."""


class CheckpointError(UserError, ValueError):
    """Weights that are missing, misshapen, corrupt or not finite."""


class ModelNotFoundError(UserError, FileNotFoundError):
    """A model name, folder or Hub id under which nothing was found."""


class InputError(UserError, ValueError):
    """A prompt, token id or sampling parameter that cannot be used."""


class ArgumentError(InputError):
    """A message that names an argument, which the command line calls otherwise: `--max-length`.

    The arguments are the message's beginning, the argument, as in `max_length` or `stride=512`, and the
    message's end.
    """

    def __init__(self, before: str, argument: str, after: str = "") -> None:
        super().__init__(before, argument, after)  # what a copy in another process is made of

    def __str__(self) -> str:
        return "".join(self.args)

    def on_command_line(self) -> str:
        """The message with the command line's name of the argument.

        >>> ArgumentError("cut it with ", "truncate=True").on_command_line()
        'cut it with --truncate'
        """
        before, argument, after = self.args
        name, _, value = argument.partition("=")
        option = f"--{name.replace('_', '-')}"
        return f"{before}{option if value in ('', 'True') else f'{option} {value}'}{after}"


class QueueFullError(RuntimeError):
    """So many requests wait for the engine already that this one was not taken.

    Attributes:
        retry_after: seconds after which there is likely to be room.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"too many requests are waiting already; try again in {self.retry_after:.0f} seconds"


class RequestTimeoutError(TimeoutError):
    """A request was not finished in the time it was given.

    Attributes:
        output: what `AsyncLLM.generate` had of it, a `RequestOutput`; None if there was nothing yet.
    """

    def __init__(self, message: str, *, output: Any = None) -> None:
        super().__init__(message)
        self.output = output


class EngineClosedError(RuntimeError):
    """The engine is closed, or closing: it takes no requests, and ended this one."""


class EngineFailedError(RuntimeError):
    """A step of the engine failed and ended every request; the engine itself goes on with new ones."""
