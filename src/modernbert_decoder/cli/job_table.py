"""Results as a table for people: aligned columns, short numbers, long texts cut. It knows no tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from modernbert_decoder.cli.output import write

_NUM_MEASURED: Final = 200  # rows that decide how wide columns are
_MAX_WIDTH: Final = 60
_MAX_ITEMS: Final = 4
_ERROR: Final = "error"
_NUMERIC: Final = ("integer", "number")


def write_result_table(blocks: Iterable[Iterator[Mapping[str, Any]]], columns: Mapping[str, str]) -> None:
    """Prints results as they come; the first ones of the first block decide the widths.

    Args:
        blocks: the results, in parts between which there may be long waits.
        columns: name -> kind; `error` is shown behind the rows that failed.
    """
    shown = {name: kind for name, kind in columns.items() if name != _ERROR}
    stream = iter(blocks)
    rest = next(stream, iter(()))
    first = list(islice(rest, _NUM_MEASURED))
    measured = [list(shown), *(_cells(row, shown) for row in first)]
    widths = [max(map(len, column)) for column in zip(*measured, strict=True)]
    _write_line(list(shown), shown, widths)
    for row in chain(first, rest, chain.from_iterable(stream)):
        _write_line(_cells(row, shown), shown, widths, error=row.get(_ERROR))


def _cells(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    return [_cell(row.get(name), kind) for name, kind in columns.items()]


def _write_line(
    cells: Sequence[str], columns: Mapping[str, str], widths: Sequence[int], *, error: str | None = None
) -> None:
    aligned = [
        cell.rjust(width) if kind in _NUMERIC else cell.ljust(width)
        for cell, kind, width in zip(cells, columns.values(), widths, strict=True)
    ]
    reason = [] if error is None else [f"error: {_cut(error)}"]
    write("  ".join(["  ".join(aligned).rstrip(), *reason]) + "\n")


def _cell(value: Any, kind: str = "json") -> str:
    r"""A value in few characters; what its kind does not tell, its own type does.

    >>> _cell(0.123456), _cell([0.5, 1, 2, 3, 4, 5]), _cell("two\nlines"), _cell({"a": 0.25, "b": 0.75})
    ('0.1235', '[0.5, 1, 2, 3, ... 2 more]', 'two lines', 'a 0.25, b 0.75')
    >>> _cell([]), _cell({}), _cell([{"candidate": " a", "score": -1.0}], "ranking")
    ('[]', '{}', 'a -1')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return _cut(value)
    if kind == "ranking":
        return _cut(", ".join(f"{item['candidate'].strip()} {item['score']:.4g}" for item in value))
    if isinstance(value, list):
        more = [f"... {len(value) - _MAX_ITEMS} more"] if len(value) > _MAX_ITEMS else []
        return "[" + ", ".join([*map(_cell, value[:_MAX_ITEMS]), *more]) + "]"
    if isinstance(value, dict) and value:
        return _cut(", ".join(f"{name} {_cell(item)}" for name, item in value.items()))
    return json.dumps(value)


def _cut(text: str) -> str:
    """On one line, without control characters, cut at its end."""
    line = " ".join(text[: 4 * _MAX_WIDTH].split())
    clean = "".join(character if character.isprintable() else "?" for character in line)
    return clean if len(clean) <= _MAX_WIDTH else clean[: _MAX_WIDTH - 1] + "…"
