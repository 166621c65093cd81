"""The units in which inputs are read: a row, where the next one begins, and a block of consecutive rows.

A row that cannot be used is a row too: it carries what was wrong with it, so that rows are never lost without
a word. This module knows no file format and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Position:
    """Where reading goes on.

    Attributes:
        file: index of the input.
        offset: bytes of it that are read; of Parquet, rows.
        row: number of its last row that is read; 0 at the beginning.
    """

    file: int = 0
    offset: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as a reader of its format finds it.

    Attributes:
        row: its number in the file, from 1.
        end: the offset behind it.
        values: column name -> JSON value; empty where `error` is set.
        error: why it cannot be read.
    """

    row: int
    end: int
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A row with the roles of its columns settled.

    Attributes:
        file: name of its file as it was given; None for texts that are not from a file.
        row: its number there, from 1.
        end: where reading goes on behind it.
        text: what the model is fed.
        pair: the second text, for a classifier of pairs.
        candidates: what is ranked for `text`, where every row brings its own.
        kept: columns that are carried along into the results.
        error: why the row cannot be used; `text` means nothing then.
    """

    file: str | None
    row: int
    end: Position
    text: str = ""
    pair: str | None = None
    candidates: tuple[str, ...] | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def where(self) -> str:
        """File and row, for a message."""
        return f"row {self.row}" if self.file is None else f"{self.file}, row {self.row}"

    @property
    def num_characters(self) -> int:
        """How much there is to do, roughly."""
        return len(self.text) + len(self.pair or "") + sum(map(len, self.candidates or ()))

    @property
    def num_kept_characters(self) -> int:
        """How much is carried along, roughly: every value that is not text counts as one."""
        total = 0
        waiting = list(self.kept.values())
        while waiting:  # JSON may be nested more deeply than Python's calls
            value = waiting.pop()
            if isinstance(value, str):
                total += len(value)
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, dict):
                waiting += [*value, *value.values()]
            else:
                total += 1
        return total


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows that are computed together; where blocks begin and end, the inputs alone decide.

    Attributes:
        start: where its rows begin.
        records: its rows.
    """

    start: Position
    records: Sequence[Record]

    @property
    def end(self) -> Position:
        """Where the next block begins."""
        return self.records[-1].end
