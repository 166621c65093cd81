"""The names that callers choose from, in a module that the command line can load at once."""

from __future__ import annotations

from typing import Final

POOLINGS: Final = ("last", "mean")
NORMALIZATIONS: Final = ("sum", "token", "byte", "unconditional")
