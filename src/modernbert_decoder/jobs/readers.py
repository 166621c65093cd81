"""Rows out of text, CSV and JSON Lines, one at a time, from any row on, in bounded memory.

A reader is given a stream of bytes and yields `RawRow`s; whatever is wrong with one row (bytes that are not
UTF-8, invalid JSON, an open quote) is said in that row and does not hide the next. Readers know nothing of
what the columns are for.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.rows import Position, RawRow

TEXT_COLUMN: Final = "text"  # what a line of a text file is called
MAX_ROW_BYTES: Final = 4 << 20
_PIECE_BYTES: Final = 1 << 20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


class ByteStream(Protocol):
    """What is used of a binary file."""

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, or its first `size` bytes."""

    def seek(self, offset: int, /) -> int:
        """Goes to an offset."""


def read_text(stream: ByteStream, start: Position, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """One text per line, called `text`; blank lines are not texts, but are counted as rows."""
    row = start.row
    for line, end in _lines(stream, start, max_bytes):
        row += 1
        if line is None:
            yield RawRow(row, end, error=_too_long(max_bytes))
        elif line.strip():
            yield _decoded(row, end, line)


def read_whole_text(
    stream: ByteStream, start: Position, *, max_bytes: int = MAX_ROW_BYTES
) -> Iterator[RawRow]:
    """The whole stream as one text."""
    if start.row:
        return
    pieces: list[bytes] = []
    num_bytes = 0
    while piece := stream.readline(_PIECE_BYTES):
        num_bytes += len(piece)
        if num_bytes <= max_bytes:
            pieces.append(piece)
    if num_bytes > max_bytes:
        yield RawRow(1, num_bytes, error=_too_long(max_bytes))
    else:
        yield _decoded(1, num_bytes, b"".join(pieces).removeprefix(_BYTE_ORDER_MARK), keep_break=True)


def read_jsonl(stream: ByteStream, start: Position, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """One JSON object per line; blank lines are counted as rows, but are none."""
    row = start.row
    for line, end in _lines(stream, start, max_bytes):
        row += 1
        if line is None:
            yield RawRow(row, end, error=_too_long(max_bytes))
        elif line.strip():
            try:
                text = line.rstrip(b"\r\n").decode("utf-8")
                values = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number)
            except UnicodeDecodeError as error:
                yield RawRow(row, end, error=_not_utf8(line, error))
            except json.JSONDecodeError as error:
                yield RawRow(row, end, error=f"not valid JSON: {error.msg} at character {error.pos + 1}")
            except (ValueError, RecursionError) as error:
                yield RawRow(row, end, error=f"not usable JSON: {str(error).partition(';')[0]}")
            else:
                if isinstance(values, dict):
                    yield RawRow(row, end, values)
                else:
                    yield RawRow(row, end, error=f"not a JSON object but {kind_of(values)}")


def read_csv(
    stream: ByteStream, start: Position, *, delimiter: str = ",", max_bytes: int = MAX_ROW_BYTES
) -> Iterator[RawRow]:
    """A header, then one record per row, which may span lines; blank lines are skipped.

    Where a record is malformed, reading goes on with the line after its first one: a quote that nobody closes
    costs one row, not the rest of the file.
    """
    lines = _CsvLines(stream, max_bytes)
    reader = _csv_reader(lines, delimiter)
    header = _next_record(reader, lines)
    if isinstance(header, str):
        raise InputError(f"the header of the CSV file is malformed: {header}")
    if header is None:
        return
    if start.offset > lines.offset:
        lines.go_to(start.offset)
    row = start.row
    while True:
        lines.begin_record()
        fields = _next_record(reader, lines)
        if fields is None:
            return
        if not fields:
            continue
        row += 1
        if isinstance(fields, str):
            lines.return_to_second_line()
            reader = _csv_reader(lines, delimiter)
            yield RawRow(row, lines.offset, error=fields)
        elif len(fields) != len(header):
            message = f"{len(fields)} fields where the header has {len(header)}"
            yield RawRow(row, lines.offset, error=message)
        elif not _is_unicode("".join(fields)):
            yield RawRow(row, lines.offset, error="bytes that are not valid UTF-8")
        else:
            yield RawRow(row, lines.offset, dict(zip(header, fields, strict=True)))


def csv_header(stream: ByteStream, *, delimiter: str = ",") -> list[str]:
    """The column names; empty for an empty file.

    Raises:
        InputError: the header is malformed, is not UTF-8 or names a column twice.
    """
    lines = _CsvLines(stream, MAX_ROW_BYTES)
    header = _next_record(_csv_reader(lines, delimiter), lines)
    if isinstance(header, str):
        raise InputError(f"its header is malformed: {header}; the first line must name the columns")
    names = header or []
    if not _is_unicode("".join(names)):
        raise InputError("its header is not valid UTF-8; convert the file, for instance with iconv")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"its header names {', '.join(map(repr, repeated))} more than once; rename them")
    return names


def refuse_utf16(first_bytes: bytes) -> None:
    """Raises `InputError` for a file that begins with the mark of UTF-16."""
    if first_bytes.startswith(_UTF16_MARKS):
        raise InputError("it is UTF-16; convert it first, for instance with `iconv -f utf-16 -t utf-8`")


def kind_of(value: Any) -> str:
    """A JSON value's kind, for a message."""
    kinds: Sequence[tuple[type | tuple[type, ...], str]] = (
        (type(None), "null"),
        (bool, "a truth value"),
        ((int, float), "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


class _CsvLines:
    """The lines of a stream for `csv.reader`, which does not tell where in the file it is.

    Attributes:
        offset: bytes read so far.
    """

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self.offset = 0
        self.begin_record()

    def begin_record(self) -> None:
        """The next line is the first of a record."""
        self._record_start = self.offset
        self._second_line: int | None = None

    def go_to(self, offset: int) -> None:
        """Continues at this offset."""
        self._stream.seek(offset)
        self.offset = offset

    def return_to_second_line(self) -> None:
        """Continues behind the first line of the current record."""
        if self._second_line is not None and self._second_line < self.offset:
            self.go_to(self._second_line)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._max_bytes + 1)
        if not line:
            raise StopIteration
        is_first = self.offset == 0
        self.offset += len(line)
        if len(line) > self._max_bytes:
            self._skip_rest_of_line(line)
        if self._second_line is None:
            self._second_line = self.offset
        if self.offset - self._record_start > self._max_bytes:
            raise csv.Error(_too_long(self._max_bytes))
        if is_first:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        return line.decode("utf-8", "surrogateescape")

    def _skip_rest_of_line(self, line: bytes) -> None:
        while not line.endswith(b"\n") and (line := self._stream.readline(_PIECE_BYTES)):
            self.offset += len(line)


def _csv_reader(lines: _CsvLines, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB; rows have a limit here
    return csv.reader(lines, strict=True, delimiter=delimiter)


def _next_record(reader: Iterator[list[str]], lines: _CsvLines) -> list[str] | str | None:
    """The next record, what is wrong with it, or None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return "a quote is opened and never closed"
        return f"not valid CSV: {error}"


def _lines(stream: ByteStream, start: Position, max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Lines with the offset behind each; None in place of one that is too long to be held."""
    offset = start.offset
    stream.seek(offset)
    while line := stream.readline(max_bytes + 1):
        is_first = offset == 0
        offset += len(line)
        if len(line) > max_bytes:
            while not line.endswith(b"\n") and (line := stream.readline(_PIECE_BYTES)):
                offset += len(line)
            yield None, offset
        else:
            yield line.removeprefix(_BYTE_ORDER_MARK) if is_first else line, offset


def _decoded(row: int, end: int, line: bytes, *, keep_break: bool = False) -> RawRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RawRow(row, end, error=_not_utf8(line, error))
    if not keep_break and text.endswith("\n"):
        text = text.removesuffix("\n").removesuffix("\r")
    return RawRow(row, end, {TEXT_COLUMN: text})


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte {error.start + 1} of the row is 0x{line[error.start]:02x}"


def _too_long(max_bytes: int) -> str:
    return f"the row is longer than {max_bytes:,} bytes"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite_number(text: str) -> float:
    """The number, which results could not hold if Python made it infinite."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.20} is beyond what a float can hold")
    return value


def _is_unicode(text: str) -> bool:
    """Whether no undecodable byte is marked in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
