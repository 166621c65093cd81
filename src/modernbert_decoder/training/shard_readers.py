"""One local file as a stream of documents: text, JSON lines or Parquet, from any position on.

Positions are bytes, or a row group and a row. Knows nothing of the order of files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.recipe import DataRecipe

TEXT_SUFFIXES: Final = (".txt", ".text", ".md")
JSON_SUFFIXES: Final = (".jsonl", ".json", ".ndjson")


def open_file(file: Path, recipe: DataRecipe, position: Any) -> TextReader | JsonLinesReader | ParquetReader:
    """The reader of a file by its suffix.

    Raises:
        InputError: a suffix of no known format, or a file that cannot be opened.
    """
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    key = recipe.text_key if recipe.ids_key is None else recipe.ids_key
    try:
        if suffix in TEXT_SUFFIXES:
            return TextReader(file, recipe, int(position or 0))
        if suffix in JSON_SUFFIXES:
            return JsonLinesReader(file, key, int(position or 0))
        if file.suffix == ".parquet":
            return ParquetReader(file, key, tuple(position or (0, 0)))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet"))
    raise InputError(f"{file} is in no known format ({known}); rename it, or leave it out with data.exclude")


class TextReader:
    """Documents of a text file: all of it, its lines, or parts of whole lines."""

    def __init__(self, file: Path, recipe: DataRecipe, position: int) -> None:
        self._name = file
        self._recipe = recipe
        self._file = _opened(file, position)

    def read(self) -> str | None:
        """See `ShardReader`."""
        while True:
            data = self._next_bytes()
            if not data:
                return None
            text = _decoded(data, self._name).strip("\r\n")
            if text.strip():
                return text

    def position(self) -> int:
        """See `ShardReader`."""
        return self._file.tell()

    def close(self) -> None:
        """See `ShardReader`."""
        self._file.close()

    def _next_bytes(self) -> bytes:
        if self._recipe.text_documents == "file":
            return self._file.read()
        if self._recipe.text_documents == "line":
            return self._file.readline()
        lines: list[bytes] = []
        size = 0
        while size < self._recipe.part_bytes and (line := self._file.readline()):
            lines.append(line)
            size += len(line)
        return b"".join(lines)


class JsonLinesReader:
    """Documents under one key of JSON objects, one a line."""

    def __init__(self, file: Path, key: str, position: int) -> None:
        self._name = file
        self._key = key
        self._file = _opened(file, position)

    def read(self) -> str | list[int] | None:
        """See `ShardReader`."""
        from modernbert_decoder.training.documents import checked_document

        while line := self._file.readline():
            if not line.strip():
                continue
            where = f"{self._name}, the line before byte {self._file.tell()}"
            try:
                row = json.loads(_decoded(line, self._name))
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__} instead of an object")
            document = checked_document(row, self._key, where=where)
            if document is not None:
                return document
        return None

    def position(self) -> int:
        """See `ShardReader`."""
        return self._file.tell()

    def close(self) -> None:
        """See `ShardReader`."""
        self._file.close()


class ParquetReader:
    """Documents in one column of a Parquet file; a position is a row group and a row in it."""

    def __init__(self, file: Path, key: str, position: tuple[int, int]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise InputError('Parquet needs pyarrow: `pip install "modernbert-decoder[train]"`') from error
        self._name = file
        self._key = key
        try:
            self._parquet = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file}: {error}") from error
        self._group, self._row = position
        names = self._parquet.schema_arrow.names
        if key not in names:
            raise InputError(f"{file} has no column {key!r}, but {', '.join(names)}; set data.text_key")
        self._values: Any = None

    def read(self) -> str | list[int] | None:
        """See `ShardReader`."""
        from modernbert_decoder.training.documents import checked_document

        while self._group < self._parquet.num_row_groups:
            if self._values is None:
                self._values = self._parquet.read_row_group(self._group, columns=[self._key]).column(0)
            if self._row == len(self._values):
                self._group, self._row, self._values = self._group + 1, 0, None
                continue
            row = {self._key: self._values[self._row].as_py()}
            self._row += 1
            document = checked_document(row, self._key, where=str(self._name))
            if document is not None:
                return document
        return None

    def position(self) -> list[int]:
        """See `ShardReader`."""
        return [self._group, self._row]

    def close(self) -> None:
        """See `ShardReader`."""
        self._parquet.close()


def _opened(file: Path, position: int) -> IO[bytes]:
    opened: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    stream: IO[bytes] = opened(file, "rb")
    stream.seek(position)
    return stream


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 ({error.reason}); convert it, or leave it out") from error
