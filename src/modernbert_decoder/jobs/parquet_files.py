"""Parquet, by pyarrow: rows out of a file, and results into one. Needs the extra `data`.

Values pass as JSON values: dates and times as ISO 8601 text, decimals as text, bytes as Base64. It knows
nothing of what the columns are for.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Final

from modernbert_decoder.errors import InputError, UserError
from modernbert_decoder.jobs.rows import Position, RawRow

_READ_ROWS: Final = 1024
# Rows of a row group that is written: fewer where each holds a list, such as a vector.
_GROUP_ROWS: Final = 16_384
_LIST_GROUP_ROWS: Final = 1024
_FLAT_KINDS: Final = frozenset({"text", "integer", "number", "truth", "json"})


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed."""


def require_pyarrow() -> tuple[ModuleType, ModuleType]:
    """`pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingExtraError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Parquet needs pyarrow, which is not installed; install it with "
            "`pip install 'modernbert-decoder[data]'`, or use CSV or JSONL"
        ) from error
    return pyarrow, pyarrow.parquet


def parquet_schema(path: Path) -> Mapping[str, Any]:
    """Column name -> Arrow type.

    Raises:
        InputError: the file is not Parquet.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, parquet = require_pyarrow()
    try:
        schema = parquet.read_schema(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"it is not a Parquet file: {error}") from error
    return {field.name: field.type for field in schema}


def is_text(arrow_type: Any) -> bool:
    """Whether a column of this type holds text."""
    pyarrow, _ = require_pyarrow()
    types = pyarrow.types
    if types.is_dictionary(arrow_type):
        return is_text(arrow_type.value_type)
    return bool(
        types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type)
    )


def is_text_list(arrow_type: Any) -> bool:
    """Whether a column of this type holds lists of texts."""
    pyarrow, _ = require_pyarrow()
    types = pyarrow.types
    is_list = (
        types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type)
    )
    return bool(is_list) and is_text(arrow_type.value_type)


def read_parquet(path: Path, start: Position, *, columns: Sequence[str] | None) -> Iterator[RawRow]:
    """The rows from `start` on with these columns, by default all; memory is that of a row group at most.

    Raises:
        InputError: the file is damaged.
    """
    pyarrow, parquet = require_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for group in range(file.metadata.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= start.row:
                    row += num_rows
                    continue
                for batch in file.iter_batches(_READ_ROWS, row_groups=[group], columns=columns):
                    skipped = min(max(start.row - row, 0), batch.num_rows)
                    row += skipped
                    for values in batch.slice(skipped).to_pylist():
                        row += 1
                        yield RawRow(row, row, {name: _json_value(value) for name, value in values.items()})
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise InputError(f"it cannot be read as Parquet: {error}; it may be damaged") from error


def write_parquet(file: BinaryIO, rows: Iterator[Mapping[str, Any]], kinds: Mapping[str, str]) -> None:
    """Writes results in row groups of a fixed size.

    Args:
        file: where to.
        rows: column name -> JSON value; a missing column is null.
        kinds: column name -> kind of its values: "text", "integer", "number", "truth", "numbers", "integers",
            "probabilities" (label -> number), "ranking" or "json", which is stored as JSON text.
    """
    pyarrow, parquet = require_pyarrow()
    schema = pyarrow.schema(
        [
            (name, _arrow_type(pyarrow, kind))
            for name, kind in zip(_storable_names(kinds), kinds.values(), strict=True)
        ]
    )
    group_rows = _GROUP_ROWS if _FLAT_KINDS.issuperset(kinds.values()) else _LIST_GROUP_ROWS
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        pending: list[Mapping[str, Any]] = []
        for row in rows:
            pending.append(row)
            if len(pending) == group_rows:
                writer.write_table(_table(pyarrow, pending, kinds, schema), group_rows)
                pending = []
        if pending:
            writer.write_table(_table(pyarrow, pending, kinds, schema), group_rows)


def _table(
    pyarrow: ModuleType, rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str], schema: Any
) -> Any:
    columns = [
        pyarrow.array([_arrow_value(row.get(name), kind) for row in rows], schema.field(index).type)
        for index, (name, kind) in enumerate(kinds.items())
    ]
    return pyarrow.Table.from_arrays(columns, schema=schema)


def _arrow_type(pyarrow: ModuleType, kind: str) -> Any:
    text, number = pyarrow.string(), pyarrow.float64()
    return {
        "text": text,
        "json": text,
        "integer": pyarrow.int64(),
        "number": number,
        "truth": pyarrow.bool_(),
        "numbers": pyarrow.list_(pyarrow.float32()),
        "integers": pyarrow.list_(pyarrow.int32()),
        "probabilities": pyarrow.map_(text, number),
        "ranking": pyarrow.list_(
            pyarrow.struct(
                [
                    ("index", pyarrow.int32()),
                    ("candidate", text),
                    ("score", number),
                    ("logprob", number),
                    ("num_tokens", pyarrow.int32()),
                ]
            )
        ),
    }[kind]


def _arrow_value(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value)
    if kind == "number":
        return float(value)
    if kind == "probabilities":
        return [(_storable(label), number) for label, number in value.items()]
    if kind == "ranking":
        return [{**entry, "candidate": _storable(entry["candidate"])} for entry in value]
    return _storable(value) if kind == "text" else value


def _storable(text: str) -> str:
    """Lone surrogates, which JSON can name and UTF-8 cannot, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _storable_names(names: Iterable[str]) -> list[str]:
    r"""Names of columns, all different even where only what UTF-8 cannot name told them apart.

    >>> _storable_names(["a", "\ud800", "?", "\ud801"])
    ['a', '??', '?', '???']
    """
    listed = list(names)
    taken = set(listed)
    for index, name in enumerate(listed):
        stored = _storable(name)
        if stored != name:
            while stored in taken:
                stored += "?"
            taken.add(stored)
            listed[index] = stored
    return listed


def _json_value(value: Any) -> Any:
    """A value of a Parquet column as JSON can hold it; a number that is none becomes null."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    return str(value)  # decimals, durations, UUIDs
