"""Results of a benchmark that has a page of its own: stored as JSON, read back, published when complete.

Knows neither what was measured nor how the page is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks.machine import slug
from benchmarks.peers import CACHE
from benchmarks.protocol import REPOSITORY
from benchmarks.results import Setting, load, save
from benchmarks.session import report

R = TypeVar("R", bound=Setting)


@dataclass(frozen=True)
class Publication(Generic[R]):
    """How one benchmark's results become files.

    Attributes:
        kind: of the results.
        format: version of their layout, which is their field of this name.
        suffix: of the JSON's name.
        page_name: of the page in docs/.
        page: the page's text.
        is_complete: whether results may be published.
        draw: draws the page's pictures into the folder it is given, docs/.
    """

    kind: type[R]
    format: int
    suffix: str
    page_name: str
    page: Callable[[R], str]
    is_complete: Callable[[R], bool]
    draw: Callable[[R, Path], None] | None = None

    def read(self, path: Path) -> R:
        """Results that a run wrote.

        Raises:
            ValueError: another format, or fields missing or unknown.
        """
        return load(self.kind, path, format=self.format)

    def render(self, path: Path) -> int:
        """Write the page from stored results; returns the command's exit code."""
        results = self.read(path)
        if not self.is_complete(results):
            report("not published: this run is not complete")
            return 2
        self._publish(results)
        return 0

    def store(self, results: R) -> int:
        """Write what a run measured, and the page if all of it is there, else print it; the exit code."""
        is_complete = self.is_complete(results)
        folder = REPOSITORY / "benchmarks" / "results" if is_complete else CACHE / "results"
        path = folder / f"{results.date}-{slug(results.machine['cpu'])}-{self.suffix}.json"
        save(results, path)
        report(f"wrote {path.name}")
        if is_complete:
            self._publish(results)
        else:
            print(self.page(results))
        return 0

    def _publish(self, results: R) -> None:
        docs = REPOSITORY / "docs"
        (docs / self.page_name).write_text(self.page(results), encoding="utf-8")
        if self.draw is not None:
            self.draw(results, docs)
        report(f"wrote docs/{self.page_name}")
