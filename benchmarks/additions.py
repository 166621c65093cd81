"""Cases measured later, put into the results of an earlier run: the longest ones take as long as all others.

Pure functions on results; nothing here measures or writes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from benchmarks.results import Results
from benchmarks.shapes import SHAPES
from benchmarks.summary import Comparison, Row, case_label

Placed = TypeVar("Placed", Row, Comparison)


def check_same_setting(earlier: Results, *, machine: Mapping[str, Any], threads: int) -> None:
    """Refuses to add to what was measured elsewhere.

    Raises:
        ValueError: the machine or the number of threads is another one.
    """
    if machine != earlier.machine:
        changed = sorted(
            key for key in {*machine, *earlier.machine} if machine.get(key) != earlier.machine.get(key)
        )
        raise ValueError(f"the earlier run was made on another machine: {', '.join(changed)} differ")
    if threads != earlier.threads:
        raise ValueError(f"the earlier run had {earlier.threads} threads, this one has {threads}")


def with_cases(
    earlier: Results,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    *,
    notes: Sequence[str],
    date: str,
    versions: Mapping[str, str],
) -> Results:
    """The earlier results with these cases, in place of what they say of them, and a note on each.

    Args:
        earlier: what is added to.
        rows: of the later run.
        comparisons: likewise.
        notes: of the later run, on cases that it left out.
        date: of the later run.
        versions: package -> version in the later run.
    """
    labels = {case_label(row): row.rounds for row in rows}
    replaced = (*labels, *(note.partition(", was ")[0] for note in notes))
    kept_notes = [note for note in earlier.notes if not note.startswith(replaced)]
    others = {name: version for name, version in versions.items() if earlier.versions.get(name) != version}
    suffix = f", with {', '.join(f'{name} {version}' for name, version in others.items())}" if others else ""
    added = [
        f"{label}, was measured by itself on {date}{suffix}: {_times(rounds)}."
        for label, rounds in labels.items()
    ]
    return replace(
        earlier,
        rows=_in_order([*(row for row in earlier.rows if case_label(row) not in labels), *rows]),
        comparisons=_in_order(
            [*(each for each in earlier.comparisons if case_label(each) not in labels), *comparisons]
        ),
        notes=[*kept_notes, *notes, *added],
    )


def _times(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def _in_order(found: Iterable[Placed]) -> list[Placed]:
    """By size, prompt and number of sequences, as a whole run measures them; else as they came."""
    sizes = list(SHAPES)
    return sorted(found, key=lambda each: (sizes.index(each.size), each.prompt_tokens, each.sequences))
