"""Results of a benchmark that has a page of its own: stored as JSON, read back, published when complete.

Knows neither what was measured nor how the page is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from benchmarks.machine import slug
from benchmarks.peers import CACHE
from benchmarks.protocol import REPOSITORY
from benchmarks.results import from_json
from benchmarks.session import report


class PublishedResults(Protocol):
    """A dataclass with the fields by which its file is named."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def date(self) -> str:
        """Of the run, ISO."""

    @property
    def machine(self) -> dict[str, Any]:
        """From `describe_machine`."""


R = TypeVar("R", bound=PublishedResults)


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
    """

    kind: type[R]
    format: int
    suffix: str
    page_name: str
    page: Callable[[R], str]
    is_complete: Callable[[R], bool]

    def read(self, path: Path) -> R:
        """Results that a run wrote.

        Raises:
            ValueError: another format, or fields missing or unknown.
        """
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("format") != self.format:
            raise ValueError(
                f"{path.name} has format {stored.get('format')!r}, this version reads {self.format}"
            )
        return from_json(self.kind, stored)

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
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{results.date}-{slug(results.machine['cpu'])}-{self.suffix}.json"
        path.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")
        report(f"wrote {path.name}")
        if is_complete:
            self._publish(results)
        else:
            print(self.page(results))
        return 0

    def _publish(self, results: R) -> None:
        (REPOSITORY / "docs" / self.page_name).write_text(self.page(results), encoding="utf-8")
        report(f"wrote docs/{self.page_name}")
