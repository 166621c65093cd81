"""The tests of training are collected only where the extra `train` is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

NEEDED = ("torch", "transformers", "accelerate", "optimi", "yaml")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["*"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that threads only cost time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
