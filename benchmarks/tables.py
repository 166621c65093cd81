"""What Markdown tables of results are made of: cells, spreads, names, the paragraph on machine and versions.

Pure functions from numbers to text, and one that replaces what stands between two markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Setting
from benchmarks.summary import Spread

BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers.

    >>> print(table(["size", "tok/s"], [["17m", "900"]]))
    | size | tok/s |
    |---|--:|
    | 17m | 900 |
    """
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def replace_between(text: str, replacement: str) -> str:
    """The text with what stands between the two markers replaced.

    Raises:
        ValueError: a marker is missing, or they are the wrong way round.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"the README lacks {BEGIN} followed by {END}; put both where the table belongs")
    return f"{text[: begin + len(BEGIN)]}\n{replacement.strip()}\n{text[end:]}"


def number(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> [number(x) for x in (1234.5, 98.76, 1.234, 0.1234)]
    ['1,234', '98.8', '1.23', '0.123']
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def spread_text(spread: Spread, *, scale: float = 1.0) -> str:
    """`median (least to greatest)`, each multiplied by `scale`."""
    low, high = number(spread.low * scale), number(spread.high * scale)
    return f"{number(spread.median * scale)} ({low} to {high})"


def setting(results: Setting, *, bandwidth: Spread | None = None) -> str:
    """Machine, threads, versions and the bytes per second that memory reads, in one paragraph."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    flags = f" ({', '.join(machine['flags'])})" if machine["flags"] else ""
    read = f"; memory reads {bandwidth.median / 1e9:.0f} GB/s" if bandwidth else ""
    return (
        f"{results.date}, {machine['cpu']}{flags}, {machine['logical_processors']} logical processors, "
        f"{machine['memory_gib']} GiB, {machine['system']}, {results.threads} threads each{read}. {versions}."
    )
