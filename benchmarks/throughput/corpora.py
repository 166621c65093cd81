"""The texts that are classified: short, medium and long ones, from the data folder (MBD_SHARED).

Only files are read here; nothing is measured.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

_LONG_TOKENS = 2_000
# Ids of [CLS] and [SEP] come on top.
_LONG_CONTENT_TOKENS = _LONG_TOKENS - 2
# About a thousand tokens.
_LEAST_CHARACTERS = 4_000
_LEAST_CHAPTERS = 8
# Far more than 2,000 tokens of any prose.
_MOST_CHARACTERS = 40_000
# A line between blank ones that does not begin with a quotation mark.
_HEADING = re.compile(r"(?:\A|(?<=\n\n))(?![\"'])[^\n]{4,70}(?=\n\n)")


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind, and how many of them a size gets: enough for a second or more."""

    name: str
    description: str
    num_texts: dict[str, int]
    read: Callable[[Path], Iterator[str]]

    def texts(self, shared: Path, size: str) -> list[str]:
        """The first texts, as many as this size gets."""
        wanted = self.num_texts[size]
        texts = [text for text, _ in zip(self.read(shared), range(wanted), strict=False)]
        if len(texts) < wanted:
            raise ValueError(f"{self.name} holds {len(texts)} texts, {wanted} are wanted")
        return texts


def _banking(shared: Path) -> Iterator[str]:
    with (shared / "data" / "banking77" / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    # The file is sorted by intent; every 7th of it in turn gives all intents and lengths.
    for start in range(7):
        yield from texts[start::7]


def _polarity(shared: Path) -> Iterator[str]:
    folder = shared / "data" / "sentence-polarity"
    files = [
        (folder / name).read_text(encoding="latin-1").splitlines()
        for name in ("rt-polarity.pos", "rt-polarity.neg")
    ]
    for pair in zip(*files, strict=True):
        yield from pair


def _chapters(shared: Path) -> Iterator[str]:
    """Beginnings of chapters: the first of every book, then the second of every book, and so on."""
    tokenizer = Tokenizer.from_file(str(shared / "data" / "ettin-tokenizer" / "tokenizer.json"))
    books: list[list[str]] = []
    for path in sorted((shared / "corpus").glob("*.txt")):
        if chapters := chapters_of(path.read_text(encoding="utf-8")):
            yield _beginning(chapters[0], tokenizer)
            books.append(chapters)
    for number in range(1, max(map(len, books), default=0)):
        for book in books:
            if number < len(book):
                yield _beginning(book[number], tokenizer)


def chapters_of(text: str) -> list[str]:
    """The chapters of a book, each with its heading: a paragraph that is one short line in capitals, or that
    begins with "Chapter". What stands before the first one, and short ones such as fables, are left out.

    A book with few of them has none that can be told: its lines in capitals are something else.
    """
    starts = [match.start() for match in _HEADING.finditer(text) if _is_heading(match[0])]
    chapters = [text[start:end].strip() for start, end in pairwise([*starts, len(text)])]
    long_ones = [chapter for chapter in chapters if len(chapter) >= _LEAST_CHARACTERS]
    return long_ones if len(long_ones) >= _LEAST_CHAPTERS else []


def _is_heading(line: str) -> bool:
    return line.lower().startswith("chapter") or (line.isupper() and sum(map(str.isalpha, line)) >= 4)


def _beginning(chapter: str, tokenizer: Tokenizer) -> str:
    """Of a longer chapter its first 2,000 tokens."""
    text = chapter[:_MOST_CHARACTERS]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= _LONG_CONTENT_TOKENS:
        return text
    return text[: encoding.offsets[_LONG_CONTENT_TOKENS - 1][1]]


CORPORA = (
    Corpus("short", "Banking77 questions", {"17m": 2048, "150m": 384}, _banking),
    Corpus("medium", "sentence polarity", {"17m": 1024, "150m": 192}, _polarity),
    Corpus("long", "chapters of books, cut at 2,000 tokens", {"17m": 24, "150m": 4}, _chapters),
)
