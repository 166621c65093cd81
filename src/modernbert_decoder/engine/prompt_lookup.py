"""Drafts from the text itself: what followed the last tokens where they stood before.

Costs no model, and is right where a text repeats itself: names, quotations, lists, code, edits of the prompt.
This module knows requests and their tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from modernbert_decoder.engine.request import Request

# Earlier places that are compared, the latest first.
_MOST_PLACES: Final = 16


class PromptLookup:
    """Looks for the longest match, among equals for the latest.

    Args:
        min_match: fewest last tokens that must agree.
        max_match: most that are compared.
    """

    def __init__(self, *, min_match: int, max_match: int) -> None:
        self._min_match = min_match
        self._max_match = max_match
        self._texts: dict[Request, _IndexedText] = {}

    def draft(self, request: Request, count: int) -> list[int]:
        """At most `count` tokens that may follow; none without a match."""
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = _IndexedText(request.prompt_ids, self._min_match)
        text.extend(request.token_ids[len(text.ids) - len(request.prompt_ids) :])
        place = text.find(self._max_match)
        if place is None:
            return []
        ids = text.ids
        # Behind the end of the text its drafts follow: a loop of three tokens is drafted as often as it fits.
        drafts: list[int] = []
        for at in range(place, place + count):
            drafts.append(ids[at] if at < len(ids) else drafts[at - len(ids)])
        return drafts

    def forget(self, request: Request) -> None:
        """Drops what is kept of a request, if anything is."""
        self._texts.pop(request, None)

    def reset(self) -> None:
        """Drops everything."""
        self._texts.clear()

    def close(self) -> None:
        """Drops everything."""
        self._texts.clear()


class _IndexedText:
    """A growing text, with the places behind each run of `length` tokens."""

    def __init__(self, ids: Sequence[int], length: int) -> None:
        self.ids: list[int] = []
        self._length = length
        # Run -> the last place behind it; place -> the one before it with the same run, 0 for none.
        self._last: dict[tuple[int, ...], int] = {}
        self._previous: list[int] = [0] * length
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Appends tokens. The run at the very end is indexed with the token behind it."""
        self.ids.extend(ids)
        length = self._length
        for place in range(len(self._previous), len(self.ids)):
            run = tuple(self.ids[place - length : place])
            self._previous.append(self._last.get(run, 0))
            self._last[run] = place

    def find(self, max_match: int) -> int | None:
        """The place behind the earlier run that agrees with the end of the text over most tokens."""
        ids, length = self.ids, self._length
        place = self._last.get(tuple(ids[-length:]), 0) if len(ids) > length else 0
        best, best_match = None, 0
        for _ in range(_MOST_PLACES):
            if not place or best_match == max_match:
                break
            match = length
            while match < min(max_match, place) and ids[place - match - 1] == ids[-match - 1]:
                match += 1
            if match > best_match:
                best, best_match = place, match
            place = self._previous[place]
        return best
