"""How much of the processors other programs took while something was measured (Linux; elsewhere unknown).

Threads that wait for each other at barriers, as every runtime's do, lose far more than the share that is
taken away, and not all runtimes lose alike: a comparison on a busy machine is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_STAT = Path("/proc/stat")
# Fields of the first line of /proc/stat, in ticks: user nice system idle iowait irq softirq steal.
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
_NUM_FIELDS = 8
# A round in which other programs took more than this is measured again, while there are repeats left.
_QUIET_SHARE = 0.03
# Rounds measured at most, as a multiple of those wanted.
MOST_REPEATS = 2


def machine_ticks(text: str) -> tuple[int, int]:
    """Busy and total ticks of all processors, from the text of /proc/stat.

    >>> machine_ticks("cpu  10 0 5 80 1 2 1 1 0 0")
    (19, 100)
    """
    fields = [int(field) for field in text.split("\n", 1)[0].split()[1 : 1 + _NUM_FIELDS]]
    return sum(fields[i] for i in _BUSY_FIELDS), sum(fields)


def process_ticks(text: str) -> int:
    """User and system ticks of a process, from the text of its /proc/<id>/stat.

    >>> process_ticks("7 (a b) S 1 7 7 0 -1 4194560 1 2 3 4 100 20 5 6 20 0")
    120
    """
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold spaces
    return int(fields[11]) + int(fields[12])


def share_of_others(*, busy: int, total: int, ours: int) -> float:
    """The share of all processor time that went to neither idleness nor us.

    >>> share_of_others(busy=60, total=200, ours=50)
    0.05
    """
    return max(0.0, (busy - ours) / total) if total else 0.0


def is_quiet(others_share: float | None) -> bool:
    """Whether the machine was ours; taken for granted where the system does not tell."""
    return others_share is None or others_share <= _QUIET_SHARE


class ContentionMeter:
    """Measures from its creation on; `process_ids` are ours, besides this process."""

    def __init__(self, process_ids: Iterable[int]) -> None:
        self._process_ids = (os.getpid(), *process_ids)
        self._begin = self._ticks()

    def share(self) -> float | None:
        """The share of the processors that others took since; None where the system does not tell."""
        if self._begin is None:
            return None
        end = self._ticks()
        assert end is not None
        busy, total, ours = (after - before for after, before in zip(end, self._begin, strict=True))
        return share_of_others(busy=busy, total=total, ours=ours)

    def _ticks(self) -> tuple[int, int, int] | None:
        if not _STAT.exists():
            return None
        ours = sum(process_ticks(Path(f"/proc/{each}/stat").read_text()) for each in self._process_ids)
        return (*machine_ticks(_STAT.read_text()), ours)
