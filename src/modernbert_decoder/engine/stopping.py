"""Stop strings in streamed text: what may be shown already, and where the text has to be cut.

Knows text only: not tokens, not sampling. A match is the one that is completed first, so that generation
can end at once; of those completed by the same character, the longest. What is shown never depends on how
the text was divided into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string found in the text, and the number of characters before it."""

    stop: str
    position: int


class StopChecker:
    """Passes text through until a stop string is complete, withholding what could be the start of one.

    >>> checker = StopChecker(["END"])
    >>> checker.put("the E"), checker.put("lk EN"), checker.put("D of"), checker.match
    ('the ', 'Elk ', '', StopMatch(stop='END', position=8))

    Args:
        stops: The stop strings, none empty.
        include_stop: Whether the emitted text ends with the stop string instead of before it.
    """

    __slots__ = ("_held", "_include_stop", "_num_released", "_stops", "match")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string"
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self._num_released = 0
        self.match: StopMatch | None = None

    def put(self, piece: str) -> str:
        """Takes new text and returns what is safe to show; nothing more once there is a match."""
        if self.match is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = self._first_match(text)
        if found is not None:
            end, start, stop = found
            self.match = StopMatch(stop, self._num_released + start)
            return self._release(text[: end if self._include_stop else start], held="")
        num_held = self._num_held(text)
        return self._release(text[: len(text) - num_held], held=text[len(text) - num_held :])

    def skip(self, piece: str) -> str:
        """Returns everything withheld and `piece`, none of which can be part of a later match.

        For text that belongs to the first `min_tokens` tokens.
        """
        return self._release(self._held + piece, held="") if self.match is None else ""

    def flush(self) -> str:
        """Returns what is still withheld: the text ended without completing a stop string."""
        return self._release(self._held, held="")

    def _release(self, text: str, *, held: str) -> str:
        self._held = held
        self._num_released += len(text)
        return text

    def _first_match(self, text: str) -> tuple[int, int, str] | None:
        """The (end, start, stop string) of the match that ends first; among equals, of the longest."""
        starts = ((text.find(stop), stop) for stop in self._stops)
        return min(((start + len(stop), start, stop) for start, stop in starts if start >= 0), default=None)

    def _num_held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
