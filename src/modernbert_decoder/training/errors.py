"""What stops a training run and is the user's to put right; other errors are on the floor.

This module knows nothing of training.
"""

from __future__ import annotations

from modernbert_decoder.errors import ConfigurationError, UserError


class RecipeError(ConfigurationError):
    """A recipe that cannot be followed: the message names the file, the key and what to write instead."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on: a loss that is not a number, a full disk, data that has run out."""
