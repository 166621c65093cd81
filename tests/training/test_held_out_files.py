"""Held-out texts that cannot be read end a run with one message, not with a traceback."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from modernbert_decoder.errors import InputError
from modernbert_decoder.training.held_out import HeldOutTexts
from modernbert_decoder.training.sequences import Ids


def as_bytes(texts: list[str]) -> list[Ids]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt.gz",
            gzip.compress(b"a fox", mtime=0),
            r"a\.txt\.gz is no text in UTF-8 \(invalid start byte at byte 1\)",
        ),
        ("a.txt", "caf\u00e9".encode("latin-1"), r"is no text in UTF-8 .* at byte 3\).*unpack or convert it"),
        ("a.txt", b"", r"the held-out texts are empty \(.*a\.txt\)"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        HeldOutTexts.read([tmp_path / name], as_bytes, window=8)  # type: ignore[arg-type]


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*gone\.txt: No such file"):
        HeldOutTexts.read([tmp_path / "gone.txt"], as_bytes, window=8)  # type: ignore[arg-type]


def test_texts_are_counted_in_bytes_and_windows_overlap_by_one(tmp_path: Path) -> None:
    for name, text in (("a.txt", "caf\u00e9"), ("b.txt", "fox")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    texts = HeldOutTexts.read([tmp_path / "a.txt", tmp_path / "b.txt"], as_bytes, window=4)  # type: ignore[arg-type]
    assert (texts.num_bytes, texts.num_windows) == (8, 3)
