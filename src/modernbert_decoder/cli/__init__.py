"""The command `mbd`, one file per command; `main` is its entry point."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `mbd` with these arguments, by default those of the process, and returns its exit code."""
    try:
        from modernbert_decoder.cli import application
    except KeyboardInterrupt:  # earlier than the application can handle it
        return 130
    return application.main(arguments)
