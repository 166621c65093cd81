"""The texts of a job: from the command line, standard input or files, as one sequence of records and blocks.

It settles which column plays which role, checks headers before anything is computed, and can say whether the
inputs are those of an earlier run. It knows no model.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.readers import (
    TEXT_COLUMN,
    csv_header,
    kind_of,
    read_csv,
    read_jsonl,
    read_text,
    read_whole_text,
    refuse_utf16,
)
from modernbert_decoder.jobs.rows import Block, Position, RawRow, Record
from modernbert_decoder.jobs.standard_input import StandardInput, StreamDigest

SUFFIXES: Final = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
STANDARD_INPUT: Final = "-"
ALL_COLUMNS: Final = "*"
BLOCK_ROWS: Final = 2048
BLOCK_CHARACTERS: Final = 128 << 10  # a few seconds' work, which is what a killed run may have to repeat
BLOCK_KEPT_CHARACTERS: Final = 4 << 20  # what is carried along is no work, but has to be held
_RENAMED: Final = "input_"
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column plays which role.

    Attributes:
        text: what the model is fed.
        pair: the second text of each row.
        candidates: a list of texts in each row; in CSV, a JSON list.
        keep: columns that are carried along; ("*",) is all of them.
    """

    text: str = TEXT_COLUMN
    pair: str | None = None
    candidates: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """Those without which a row is an error."""
        return tuple(name for name in (self.text, self.pair, self.candidates) if name is not None)

    @property
    def are_of_lines(self) -> bool:
        """Whether plain lines, which have one column, have all of these."""
        return self.needed == (TEXT_COLUMN,) and set(self.keep) <= {TEXT_COLUMN, ALL_COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a job reads.

    Attributes:
        files: file names in the order of reading; "-" is standard input, one text per line. Empty where
            `texts` are given.
        texts: the texts themselves.
        columns: which column plays which role.
        whole_files: each `.txt` file is one text, not one per line.
        reserved: names of result columns: a kept column of such a name becomes `input_` and the name.
        folder: where relative file names begin; by default the working folder.
    """

    files: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)
    whole_files: bool = False
    reserved: frozenset[str] = frozenset()
    folder: str = ""

    def check(self) -> None:
        """Looks at every file's header or schema, so that a wrong column stops a job before it begins.

        Raises:
            InputError: a file is missing, of an unknown kind, or lacks a column; names file and columns.
        """
        for name in self.files:
            if name != STANDARD_INPUT:
                with _about(name):
                    _check_columns(self._known_columns(self._path(name)), self.columns)
            elif not self.columns.are_of_lines:
                raise InputError("standard input has lines, not columns; give the file with --input")
        if self.texts and not self.columns.are_of_lines:
            raise InputError("texts on the command line have no columns; give a file with --input")
        if self.whole_files:
            self._check_whole_files()

    def _check_whole_files(self) -> None:
        if STANDARD_INPUT in self.files:
            raise InputError("--whole-files: standard input is read line by line; write it to a .txt file")
        if not any(Path(name).suffix.lower() == ".txt" for name in self.files):
            raise InputError("--whole-files is for .txt files, and there is none; leave it out")

    def kept_columns(self) -> list[str] | None:
        """The columns carried along as the results call them; None where only the rows can tell."""
        names = list(self.columns.keep)
        if ALL_COLUMNS in names:
            names = []
            for file in self.files:
                known = [TEXT_COLUMN] if file == STANDARD_INPUT else self._known_columns(self._path(file))
                if known is None:
                    return None
                names += [name for name in known if name not in names]
            if self.texts:
                names = [TEXT_COLUMN]
        return [self._result_name(name) for name in names]

    def identity(self) -> dict[str, Any]:
        """What tells these inputs from others: of files name, size and time of change."""
        stats = [None if name == STANDARD_INPUT else os.stat(self._path(name)) for name in self.files]
        texts = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        return {
            "files": [
                [name, stat.st_size, stat.st_mtime_ns] if stat else [name, 0, 0]
                for name, stat in zip(self.files, stats, strict=True)
            ],
            "texts": texts if self.texts else None,
            "columns": [*self.columns.needed, "keep", *self.columns.keep],
            "roles": [self.columns.pair is not None, self.columns.candidates is not None],
            "whole_files": self.whole_files,
        }

    def stream_digest(self) -> str | None:
        """The digest of all of standard input, which is read to its end; None where it is no input."""
        if STANDARD_INPUT not in self.files:
            return None
        digest = StreamDigest()
        StandardInput(digest).read_to_end()
        return digest.hexdigest()

    def share_read(self, position: Position) -> float | None:
        """How much of the inputs lies before a position, from 0 to 1; None where their size is unknown."""
        if self.texts:
            return position.row / len(self.texts)
        if STANDARD_INPUT in self.files:
            return None
        sizes = [os.path.getsize(self._path(name)) for name in self.files]
        done = sum(sizes[: position.file])
        if position.file < len(sizes) and Path(self.files[position.file]).suffix != ".parquet":
            done += position.offset
        return done / max(sum(sizes), 1)

    def blocks(
        self,
        start: Position | None = None,
        *,
        digest: StreamDigest | None = None,
        is_live: bool = False,
    ) -> Generator[Block, None, None]:
        """The records from `start` on, which must be the end of a block, in blocks.

        Args:
            start: where to begin.
            digest: follows what is read from standard input, and is marked at the end of each record.
            is_live: a block also ends where standard input has nothing more to give at the moment, so that
                borders do not follow from the inputs alone.
        """
        block_start = start or Position()
        records: list[Record] = []
        num_characters = num_kept = 0
        source = StandardInput(digest or StreamDigest())
        with closing(self._records(block_start, source)) as stream:
            for record in stream:
                records.append(record)
                num_characters += record.num_characters
                num_kept += record.num_kept_characters
                if digest is not None:
                    digest.mark()
                if (
                    len(records) == BLOCK_ROWS
                    or num_characters >= BLOCK_CHARACTERS
                    or num_kept >= BLOCK_KEPT_CHARACTERS
                    or (is_live and record.file is None and not self.texts and source.is_waiting())
                ):
                    yield Block(block_start, records)
                    block_start = record.end
                    records, num_characters, num_kept = [], 0, 0
        if records:
            yield Block(block_start, records)

    def records(
        self, start: Position | None = None, *, digest: StreamDigest | None = None
    ) -> Generator[Record, None, None]:
        """The records from `start` on; a row that cannot be used says so in its `error`.

        Raises:
            InputError: a file cannot be read at all, or standard input is not what it was.
        """
        return self._records(start or Position(), StandardInput(digest or StreamDigest()))

    def _records(self, start: Position, source: StandardInput) -> Generator[Record, None, None]:
        if STANDARD_INPUT in self.files[: start.file]:
            source.read_to_end()
            source.digest.compare()
        if self.texts:
            for row, text in enumerate(self.texts[start.row :], start.row + 1):
                yield self._record(0, None, RawRow(row, row, {TEXT_COLUMN: text}))
        for index in range(start.file, len(self.files)):
            name = self.files[index]
            label = None if name == STANDARD_INPUT else name
            begin = start if index == start.file else Position(index)
            with _about(name), closing(self._rows(name, begin, source)) as rows:
                for raw in rows:
                    yield self._record(index, label, raw)

    def _rows(self, name: str, start: Position, source: StandardInput) -> Generator[RawRow, None, None]:
        if name == STANDARD_INPUT:
            yield from read_text(source, start)
            return
        path = self._path(name)
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            from modernbert_decoder.jobs.parquet_files import read_parquet

            yield from read_parquet(path, start, columns=self._parquet_columns(path))
            return
        with open(path, "rb") as stream:
            refuse_utf16(stream.read(2))
            stream.seek(0)
            if suffix in _DELIMITERS:
                yield from read_csv(stream, start, delimiter=_DELIMITERS[suffix])
            elif suffix in (".jsonl", ".ndjson"):
                yield from read_jsonl(stream, start)
            elif self.whole_files:
                yield from read_whole_text(stream, start)
            else:
                yield from read_text(stream, start)

    def _path(self, name: str) -> Path:
        return Path(self.folder, name)

    def _known_columns(self, path: Path) -> list[str] | None:
        """The columns of a file by its header; None for JSONL, whose rows have each their own."""
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(f"files of this kind are not read; give one of {', '.join(SUFFIXES)}")
        if path.is_dir():
            raise InputError(f"it is a folder; give its files, for instance --input '{path}/*.csv'")
        with open(path, "rb") as stream:  # also where the header is not read: the file must be there
            if suffix in _DELIMITERS:
                refuse_utf16(stream.read(2))
                stream.seek(0)
                return csv_header(stream, delimiter=_DELIMITERS[suffix])
        if suffix == ".txt":
            return [TEXT_COLUMN]
        if suffix == ".parquet":
            return self._check_parquet(path)
        return None

    def _check_parquet(self, path: Path) -> list[str]:
        from modernbert_decoder.jobs.parquet_files import is_text, is_text_list, parquet_schema

        schema = parquet_schema(path)
        for name in self.columns.needed:
            is_right = is_text_list if name == self.columns.candidates else is_text
            if name in schema and not is_right(schema[name]):
                raise InputError(f"its column {name!r} holds {schema[name]}, not text")
        return list(schema)

    def _parquet_columns(self, path: Path) -> list[str] | None:
        if ALL_COLUMNS in self.columns.keep:
            return None
        from modernbert_decoder.jobs.parquet_files import parquet_schema

        schema = parquet_schema(path)
        wanted = dict.fromkeys((*self.columns.needed, *self.columns.keep))
        return [name for name in wanted if name in schema]

    def _record(self, index: int, label: str | None, raw: RawRow) -> Record:
        end = Position(index, raw.end, raw.row)
        if raw.error is not None:
            return Record(label, raw.row, end, kept=self._kept({}), error=raw.error)
        kept = self._kept(raw.values)
        columns = self.columns
        try:
            text = _text(raw.values, columns.text)
            pair = None if columns.pair is None else _text(raw.values, columns.pair)
            candidates = None if columns.candidates is None else _texts(raw.values, columns.candidates)
        except _RowError as error:
            return Record(label, raw.row, end, kept=kept, error=str(error))
        return Record(label, raw.row, end, text=text, pair=pair, candidates=candidates, kept=kept)

    def _kept(self, values: Mapping[str, Any]) -> dict[str, Any]:
        wanted = values if ALL_COLUMNS in self.columns.keep else self.columns.keep
        return {self._result_name(name): values.get(name) for name in wanted}

    def _result_name(self, name: str) -> str:
        """No two columns get one name: `label` becomes `input_label`, and that `input_input_label`."""
        own = name
        while own.startswith(_RENAMED):
            own = own.removeprefix(_RENAMED)
        return _RENAMED + name if own in self.reserved else name


def expand_files(
    patterns: Sequence[str | os.PathLike[str]], *, but: Collection[Path] = ()
) -> tuple[str, ...]:
    """File names as they are, and those that match a pattern such as `data/**/*.csv`, sorted.

    Args:
        patterns: names and patterns.
        but: files that no pattern means, such as the results that an earlier run left in the same folder.

    Raises:
        InputError: there is no such file, or nothing matches.
    """
    left_out = {path.resolve() for path in but}
    files: list[str] = []
    for given in patterns:
        pattern = os.fspath(given)
        if pattern == STANDARD_INPUT or os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = sorted(
                path
                for path in glob.glob(pattern, recursive=True)
                if os.path.isfile(path) and Path(path).resolve() not in left_out
            )
        if not matches:
            is_pattern = glob.has_magic(pattern)
            raise InputError(f"no file matches {pattern}" if is_pattern else f"there is no file {pattern}")
        files += [name for name in matches if name not in files]
    return tuple(files)


class _RowError(Exception):
    """What is wrong with one row."""


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Names the file in errors that occur within the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


def _check_columns(known: Sequence[str] | None, columns: Columns) -> None:
    if known is None:
        return
    wanted = [*columns.needed, *(name for name in columns.keep if name != ALL_COLUMNS)]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            f"there is no column {missing[0]!r}; its columns are {', '.join(known) or 'none: it is empty'}"
        )


def _text(values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise _RowError(f"there is no column {column!r}; its columns are {', '.join(values) or 'none'}")
    value = values[column]
    if not isinstance(value, str):
        raise _RowError(f"column {column!r} holds {kind_of(value)}, not text")
    return value


def _texts(values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _RowError(f"column {column!r} is not a JSON list of texts") from None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise _RowError(f"column {column!r} must hold a list of one or more texts")
    return tuple(value)
