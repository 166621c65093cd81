"""How commands speak: text at once, tables and JSON on standard output, sizes in units people read.

It knows nothing of models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from modernbert_decoder.errors import UserError


class OutputError(UserError):
    """Standard output cannot be written, for another reason than a reader that is gone."""


def write(text: str) -> None:
    """Puts text on standard output without delay.

    Raises:
        BrokenPipeError: nobody reads any more.
        OutputError: the disk is full, for instance.
    """
    if sys.stdout is None:  # closed by the caller: `mbd ... >&-`
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def write_bytes(data: bytes) -> None:
    """Puts data on standard output without delay, whatever the encoding of text there.

    Raises:
        BrokenPipeError, OutputError: as `write`.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def write_json(value: Mapping[str, Any]) -> None:
    """Puts one JSON object on one line, in ASCII, so that every encoding carries it."""
    write(json.dumps(value, allow_nan=False) + "\n")


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> None:
    """Puts an aligned table; the first `num_left` columns to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        write("  ".join(cells).rstrip() + "\n")


def bytes_text(num_bytes: float) -> str:
    """A size in decimal units with three digits.

    >>> bytes_text(980), bytes_text(6_827_936), bytes_text(1.5e9)
    ('980 B', '6.83 MB', '1.5 GB')
    """
    for limit, unit in ((1e3, "B"), (1e6, "kB"), (1e9, "MB")):
        if num_bytes < limit:
            return f"{num_bytes / limit * 1e3:.3g} {unit}"
    return f"{num_bytes / 1e9:.4g} GB"


def count_text(count: float) -> str:
    """A number of parameters or operations.

    >>> count_text(3_410_944), count_text(950)
    ('3.41 M', '950')
    """
    for limit, unit in ((1e3, ""), (1e6, " k"), (1e9, " M")):
        if count < limit:
            return f"{count / limit * 1e3:.3g}{unit}"
    return f"{count / 1e9:.4g} G"


def rate_text(per_second: float) -> str:
    """Tokens per second: whole ones from 100 on.

    >>> rate_text(1234.5), rate_text(8.53)
    ('1,234', '8.5')
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
