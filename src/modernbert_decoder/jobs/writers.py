"""Results into JSON Lines, CSV and Parquet, row by row.

A result is a mapping of column names to JSON values. It knows neither tasks nor models.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

JSONL: Final = "jsonl"
CSV: Final = "csv"
PARQUET: Final = "parquet"
FORMATS: Final = (CSV, JSONL, PARQUET)
SUFFIX_FORMATS: Final = {".csv": CSV, ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}

Row = Mapping[str, Any]


def json_line(row: Row) -> bytes:
    """One object on one line, in ASCII: JSON can then name even what UTF-8 cannot."""
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def write_rows(file: BinaryIO, rows: Iterable[Row], *, format: str, columns: Mapping[str, str]) -> None:
    """Writes all rows in a format.

    Args:
        file: where to.
        rows: the results.
        format: one of `FORMATS`.
        columns: name -> kind of value, for formats that fix them; a row may lack some.
    """
    if format == JSONL:
        for row in rows:
            file.write(json_line(row))
    elif format == CSV:
        _write_csv(file, rows, columns)
    else:
        assert format == PARQUET, format
        from modernbert_decoder.jobs.parquet_files import write_parquet

        write_parquet(file, iter(rows), columns)


def kinds_of_columns(rows: Iterable[Row], *, but: Iterable[str]) -> dict[str, str]:
    """The columns that occur in these rows, in the order in which they appear, and the kind of their values.

    Integers among numbers are numbers. A column of lists or objects, or of several kinds, is "json".

    >>> kinds_of_columns([{"a": 1, "b": "x"}, {"a": 0.5, "c": None}, {"b": 3}], but=())
    {'a': 'number', 'b': 'json', 'c': 'text'}
    """
    left_out = frozenset(but)
    kinds: dict[str, str | None] = {}
    for row in rows:
        for name, value in row.items():
            if name not in left_out:
                kinds[name] = _common(kinds.get(name), value)
    return {name: kind or "text" for name, kind in kinds.items()}


def _common(kind: str | None, value: Any) -> str | None:
    if value is None:
        return kind
    own = _kind(value)
    if kind is None or kind == own:
        return own
    return "number" if {kind, own} == {"integer", "number"} else "json"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "integer" if -(1 << 63) <= value < 1 << 63 else "json"
    if isinstance(value, float):
        return "number"
    return "text" if isinstance(value, str) else "json"


class _Encoding:
    """A text file for `csv.writer`, which wants one; each row is one write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Lone surrogates become question marks."""
        return self._file.write(text.encode("utf-8", "replace"))


def _write_csv(file: BinaryIO, rows: Iterable[Row], columns: Mapping[str, str]) -> None:
    writer = csv.writer(_Encoding(file), lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(_cells(row, columns))


def _cells(row: Row, columns: Mapping[str, str]) -> Iterator[str]:
    for name in columns:
        value = row.get(name)
        if value is None:
            yield ""
        else:
            yield value if isinstance(value, str) else json.dumps(value)
