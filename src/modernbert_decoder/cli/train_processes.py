"""What the commands that train have in common: the packages they need, and the process that speaks.

Knows nothing of models or data.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Final

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
