"""The errors a user can cause, each with a message that says what was wrong and what to do next.

The command line prints a `UserError` on one screen and exits with code 2; every other exception is a defect
of this package and keeps its traceback. This module knows nothing of the rest of the package.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: a wrong argument, a damaged file, a missing model."""


class ConfigurationError(UserError, ValueError):
    """A `config.json` that cannot be honoured exactly."""


class CheckpointError(UserError, ValueError):
    """Weights that are missing, misshapen, corrupt or not finite."""


class ModelNotFoundError(UserError, FileNotFoundError):
    """A model name, folder or Hub id under which nothing was found."""


class InputError(UserError, ValueError):
    """A prompt, token id or sampling parameter that cannot be used."""
