"""Fixtures shared by all tests, a cache folder of the tests' own, and a report on parity."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Of every comparison with transformers: steps, near-ties among them, relative logit error.
_PARITY = pytest.StashKey[list[tuple[int, int, float]]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """External data (environment variable MBD_SHARED, default `../shared`); skips when absent."""
    folder = Path(os.environ.get("MBD_SHARED", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"external data not found at {folder}; set MBD_SHARED to use it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs and packed weights of the tests go to a temporary folder, not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_as_in_a_terminal() -> None:
    """Shells make background jobs ignore it, and the programs that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def report_parity(request: pytest.FixtureRequest) -> Callable[[int, int, float], None]:
    """Takes the steps, near-ties and error of one comparison for the summary at the end of the run."""

    def report(num_steps: int, num_ties: int, error: float) -> None:
        request.config.stash.setdefault(_PARITY, []).append((num_steps, num_ties, error))

    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its comparisons to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = session.config.stash.get(_PARITY, [])


class _FromWorkers:
    """What workers hand over."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """One of them has ended; one that was killed has handed over nothing."""
        found = getattr(node, "workeroutput", {}).get("parity", [])
        self._config.stash.setdefault(_PARITY, []).extend(tuple(each) for each in found)


def pytest_configure(config: pytest.Config) -> None:
    """Listens to workers, if there are any."""
    config.pluginmanager.register(_FromWorkers(config))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Says how often either of two tokens was right, and how large the logit error was."""
    entries = config.stash.get(_PARITY, [])
    if entries:
        steps, ties, errors = zip(*entries, strict=True)
        terminalreporter.write_line(
            f"parity with transformers: {sum(ties)} near-ties in {sum(steps):,} greedy steps, "
            f"relative logit error at most {max(errors):.1e}"
        )
