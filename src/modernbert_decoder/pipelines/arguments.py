"""What every pipeline does with its arguments: unknown names are refused, with what to use instead.

It knows names and values; it knows no task and no model.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import InputError

OTHER_WAY = 'engine="torch" (the extra `torch`) runs transformers\' own pipeline, with all of its arguments'


_FOLDER: Final = str(Path(__file__).parent)


def without_unset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None: as in transformers, None leaves an argument at its default."""
    return {name: value for name, value in values.items() if value is not None}


def refuse_unknown(
    names: Collection[str], known: Collection[str], *, task: str, advice: Mapping[str, str]
) -> None:
    """Every name must be known.

    Args:
        names: what was passed.
        known: what the task understands.
        task: for the message.
        advice: name -> what to use instead, for names people are likely to pass.

    Raises:
        InputError: names the first that is not known, and the way out.
    """
    for name in names:
        if name in known:
            continue
        if name in advice:
            raise InputError(f"{task}: {name} is not available in the engine; {advice[name]}")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known))}."
        raise InputError(f"{task} does not know the argument {name}; {hint} {OTHER_WAY}")


def as_count(name: str, value: Any, *, at_least: int = 1) -> int:
    """An integer from `at_least` on.

    Raises:
        InputError: anything else.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < at_least:
        raise InputError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return int(value)


def as_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return value


def warn_caller(message: str) -> None:
    """A UserWarning at the line outside this folder that called us, so that each such line says it once."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_FOLDER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
