"""Standard input as a file that can be read on in the middle, if it begins as it did before.

It has neither a name nor a time of change: a digest tells it from others. This module knows no rows.
"""

from __future__ import annotations

import hashlib
import select
import sys
from io import BufferedReader
from typing import Final, cast

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
    """Standard input as a stream that can be sought forward, by reading.

    It holds what it has read too much itself, to know whether reading on would wait.

    Attributes:
        digest: of what was handed on.
    """

    def __init__(self, digest: StreamDigest) -> None:
        """`digest` follows what is read."""
        self.digest = digest
        self._held = bytearray()

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, or its first `size` bytes."""
        limit = sys.maxsize if size < 0 else size
        num_searched = 0
        while not (end := self._held.find(b"\n", num_searched, limit) + 1) and len(self._held) < limit:
            num_searched = len(self._held)
            if not self._read_more():
                break
        line = bytes(self._held[: end or min(len(self._held), limit)])
        del self._held[: len(line)]
        self.digest.update(line)
        return line

    def is_waiting(self) -> bool:
        """Whether the next line is not there yet; never where the system cannot tell."""
        if b"\n" in self._held:
            return False
        try:
            readable, _, _ = select.select([self._stream], [], [], 0)
        except (OSError, ValueError):  # no file of the system, or a system that waits for sockets only
            return False
        return not readable

    def seek(self, offset: int, /) -> int:
        """Reads on to this offset, from the beginning."""
        left = offset
        while left and (self._held or self._read_more()):
            left -= self._take(left)
        self.digest.compare()
        return offset

    def read_to_end(self) -> None:
        """Reads whatever is left."""
        while self._held or self._read_more():
            self._take(len(self._held))

    def _take(self, size: int) -> int:
        """Hands what is held to the digest, at most `size` bytes."""
        taken = bytes(self._held[:size])
        del self._held[: len(taken)]
        self.digest.update(taken)
        return len(taken)

    def _read_more(self) -> bool:
        """Waits until there is more; False at the end."""
        piece = self._stream.read1(_PIECE_BYTES)
        self._held += piece
        return bool(piece)

    @property
    def _stream(self) -> BufferedReader:
        if sys.stdin is None:
            raise InputError("standard input is closed, and neither texts nor files are given")
        return cast(BufferedReader, sys.stdin.buffer)
