"""The command `mbd`, one file per command; `main` is its entry point."""

from __future__ import annotations

from modernbert_decoder.cli.application import main

__all__ = ["main"]
