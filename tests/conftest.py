"""Fixtures shared by all tests: where external data lies, and small random checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of external data (environment variable MBD_SHARED, default `../shared`); skips when absent."""
    folder = Path(os.environ.get("MBD_SHARED", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"external data not found at {folder}; set MBD_SHARED to use it")
    return folder
