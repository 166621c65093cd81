"""Standard input as a file that can be read on in the middle, if it begins as it did before.

It has neither a name nor a time of change: a digest tells it from others. This module knows no rows.
"""

from __future__ import annotations

import hashlib
import sys
from typing import BinaryIO, Final

from modernbert_decoder.errors import InputError

_PIECE_BYTES: Final = 1 << 20


class StreamDigest:
    """SHA-256 of what has been read from standard input, which has neither name nor time of change.

    Where reading goes on in the middle, what is skipped must have the expected digest.
    """

    def __init__(self, expected: str | None = None) -> None:
        """`expected` is the digest of what will be skipped; None where nothing is known of it."""
        self._hash = hashlib.sha256()
        self._marked = self._hash.copy()
        self._expected = expected

    def update(self, data: bytes) -> None:
        """Adds what was read."""
        self._hash.update(data)

    def mark(self) -> None:
        """A record ends here; what is read beyond it may be blank lines, which belong to none."""
        self._marked = self._hash.copy()

    def marked(self) -> str:
        """The digest up to the last mark."""
        return self._marked.hexdigest()

    def hexdigest(self) -> str:
        """The digest of all that was read so far."""
        return self._hash.hexdigest()

    def compare(self) -> None:
        """Raises `InputError` if it is not the expected one."""
        if self._expected is not None and self.hexdigest() != self._expected:
            raise InputError(
                "standard input does not begin with the texts that were computed before; pass the same "
                "texts again, or start over with --overwrite"
            )


class StandardInput:
    """Standard input as a stream that can be sought forward, by reading."""

    def __init__(self, digest: StreamDigest) -> None:
        """`digest` follows what is read."""
        self._digest = digest

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, or its first `size` bytes."""
        line = self._stream.readline(size)
        self._digest.update(line)
        return line

    def seek(self, offset: int, /) -> int:
        """Reads on to this offset, from the beginning."""
        left = offset
        while left and (piece := self._stream.read(min(left, _PIECE_BYTES))):
            left -= len(piece)
            self._digest.update(piece)
        self._digest.compare()
        return offset

    def read_to_end(self) -> None:
        """Reads whatever is left."""
        while piece := self._stream.read(_PIECE_BYTES):
            self._digest.update(piece)

    @property
    def _stream(self) -> BinaryIO:
        if sys.stdin is None:
            raise InputError("standard input is closed, and neither texts nor files are given")
        return sys.stdin.buffer
