"""The texts that are classified: short, medium and long ones, from the data folder (MBD_SHARED).

Only files are read here; nothing is measured.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

_LONG_TOKENS = 2_000
# Ids of [CLS] and [SEP] come on top.
_LONG_CONTENT_TOKENS = _LONG_TOKENS - 2


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


def _passages(shared: Path) -> Iterator[str]:
    tokenizer = Tokenizer.from_file(str(shared / "data" / "ettin-tokenizer" / "tokenizer.json"))
    for book in sorted((shared / "corpus").glob("*.txt")):
        text = book.read_text(encoding="utf-8")[:200_000]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(encoding.ids) - _LONG_CONTENT_TOKENS, _LONG_CONTENT_TOKENS):
            first, last = encoding.offsets[start], encoding.offsets[start + _LONG_CONTENT_TOKENS - 1]
            yield text[first[0] : last[1]]


CORPORA = (
    Corpus("short", "Banking77 questions", {"17m": 2048, "150m": 384}, _banking),
    Corpus("medium", "sentence polarity", {"17m": 1024, "150m": 192}, _polarity),
    Corpus("long", "passages of 2,000 tokens from books", {"17m": 24, "150m": 4}, _passages),
)
