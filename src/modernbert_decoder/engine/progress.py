"""Progress bars, shown and not."""

from __future__ import annotations

from typing import Protocol


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, count: int) -> object:
        """Advances it."""

    def close(self) -> None:
        """Ends it."""


class _Hidden:
    """A progress bar that is not shown."""

    def update(self, count: int) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to close."""


def progress_bar(description: str | None, total: int) -> Bar:
    """A bar on standard error; without a description one that is not shown."""
    if description is None:
        return _Hidden()
    from tqdm import tqdm

    bar: Bar = tqdm(total=total, desc=description)
    return bar
