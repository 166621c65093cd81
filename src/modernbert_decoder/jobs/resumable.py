"""An output file that is built over several runs: killed at any moment, it is continued where it was.

Beside FILE stand FILE.partial, the results so far as JSON Lines, and FILE.job.json, which says whose they are
and up to where they count. Results go to the disk first, then the journal is replaced whole; on opening,
whatever the journal does not vouch for is cut off. At the end FILE appears whole. This module knows neither
tasks nor formats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from modernbert_decoder.errors import InputError, UserError
from modernbert_decoder.jobs.rows import Position

_VERSION: Final = 1  # raise it when the meaning of a journal's entries changes
_PARTIAL: Final = ".partial"
_JOURNAL: Final = ".job.json"
_UNFINISHED: Final = ".finishing"  # the file in its own format, while it is written
_NEW: Final = ".new"  # a journal, while it is written
_SUFFIXES: Final = (_PARTIAL, _JOURNAL, _JOURNAL + _NEW, _UNFINISHED)
_RUNNING: Final = "running"
_FINISHING: Final = "finishing"
_COMPLETE: Final = "complete"

Identity = Mapping[str, Any]


def files_of_job(output: Path) -> list[Path]:
    """What a job with this output writes into its folder; the output itself only once a job has begun it.

    Without a journal, a file of that name is somebody's own.

    Raises:
        InputError: the output has no name, as "." and "/" have none.
    """
    if not output.name:
        raise InputError(f"{str(output)!r} is a folder; give the name of a file to write")
    beside = [output.with_name(output.name + suffix) for suffix in _SUFFIXES]
    return [*beside, output] if os.path.exists(_journal_path(output)) else beside


def _journal_path(output: Path) -> Path:
    return output.with_name(output.name + _JOURNAL)


class OutputFileError(UserError):
    """The operating system did not let us write results."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Up to where the results of a job are on the disk.

    Attributes:
        num_rows: results that are written.
        num_errors: those among them that say what was wrong.
        num_bytes: length of the partial file.
        position: where the inputs are read on.
        digest: of what lies before `position` in standard input; once all results are there, of all of it.
    """

    num_rows: int = 0
    num_errors: int = 0
    num_bytes: int = 0
    position: Position = Position()  # noqa: RUF009 - immutable
    digest: str | None = None


class ResumableOutput:
    """The results of one job, old and new; a context manager that holds a lock on them.

    Attributes:
        path: the file to be.
        progress: what is on the disk.
        has_all: no result is missing.
        is_complete: nothing is left to do.
    """

    def __init__(
        self, path: Path, identity: Identity, *, overwrite: bool = False, keeps_unfinished: bool = True
    ) -> None:
        """Opens what there is, or begins.

        Args:
            path: the file to be; folders above it are created.
            identity: JSON values that say which job this is, under names that a user understands.
            overwrite: replace results of another job, of a completed one, and files of unknown origin.
            keeps_unfinished: with `overwrite`, an unfinished run of this job is continued all the same.

        Raises:
            InputError: results of another job are there, or a file of unknown origin.
            OutputFileError: files cannot be written.
        """
        self.path = path
        self._identity = json.loads(json.dumps(identity))
        self._partial_path = path.with_name(path.name + _PARTIAL)
        self._journal_path = _journal_path(path)
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder; give the name of a file to write")
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            was_there = self._partial_path.exists()
            self._partial = open(self._partial_path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            _lock(self._partial, path)
            try:
                with self._writing():
                    self._state, self.progress = self._restore(
                        overwrite=overwrite, keeps_unfinished=keeps_unfinished
                    )
                    self._partial.truncate(self.progress.num_bytes)
            except BaseException:
                if not was_there:
                    self._partial_path.unlink(missing_ok=True)
                raise
        except BaseException:
            self._partial.close()
            raise

    @property
    def has_all(self) -> bool:
        """Whether all results were there, if not in their file."""
        return self._state != _RUNNING

    @property
    def is_complete(self) -> bool:
        """Whether `path` holds all results."""
        return self._state == _COMPLETE

    def append(
        self, lines: bytes, *, num_rows: int, num_errors: int, position: Position, digest: str | None
    ) -> None:
        """Adds results, one line each, and makes them last.

        Raises:
            OutputFileError: the disk is full, for instance; what was there before still counts.
        """
        with self._writing():
            self._partial.write(lines)
            self._partial.flush()
            os.fsync(self._partial.fileno())
            before = self.progress
            self._record(
                _RUNNING,
                Progress(
                    num_rows=before.num_rows + num_rows,
                    num_errors=before.num_errors + num_errors,
                    num_bytes=before.num_bytes + len(lines),
                    position=position,
                    digest=digest,
                ),
            )

    def finish(self, convert: Callable[[Path, BinaryIO], None] | None, *, digest: str | None = None) -> None:
        """Makes `path` out of the results, which are all there.

        Args:
            convert: writes the file from the path of the results; None: the lines are the file.
            digest: of all of standard input.

        Raises:
            OutputFileError: the disk is full, for instance; the results so far are kept.
        """
        with self._writing():
            self._record(_FINISHING, replace(self.progress, digest=digest))
            if convert is None:
                os.replace(self._partial_path, self.path)
            else:
                unfinished = self.path.with_name(self.path.name + _UNFINISHED)
                with open(unfinished, "wb") as file:
                    convert(self._partial_path, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, self.path)
            self._record(_COMPLETE, self.progress)
            self._partial_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the files; what is written is kept for the next run."""
        if self.is_complete:
            self._partial_path.unlink(missing_ok=True)
        self._partial.close()

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restore(self, *, overwrite: bool, keeps_unfinished: bool) -> tuple[str, Progress]:
        """The state in which an earlier run left this job; a new journal where there was none."""
        try:
            journal = self._read_journal()
            if journal is None:
                self._refuse_unknown_files()
            else:
                state, progress = self._check(journal)
                if not overwrite or (keeps_unfinished and state != _COMPLETE):
                    return state, progress
        except InputError:
            if not overwrite:
                raise
        self._record(_RUNNING, Progress())
        return self._state, self.progress

    def _check(self, journal: Mapping[str, Any]) -> tuple[str, Progress]:
        identity, values = journal["job"], journal["progress"]
        if not values["num_rows"] and journal["state"] == _RUNNING and not self.path.exists():
            self._record(_RUNNING, Progress())  # whatever job it is of, nothing is lost
            return self._state, self.progress
        changed = sorted(
            name for name in {*identity, *self._identity} if identity.get(name) != self._identity.get(name)
        )
        if changed:
            raise InputError(
                f"{self.path} belongs to a job with other {' and '.join(changed)}; give another name, or "
                "start over with --overwrite"
            )
        state = str(journal["state"])
        progress = Progress(**{**values, "position": Position(**values["position"])})
        partial_bytes = self._partial_path.stat().st_size
        if state == _FINISHING and partial_bytes < progress.num_bytes and self.path.exists():
            self._record(_COMPLETE, progress)  # killed between renaming and saying so
            state = _COMPLETE
        if state == _COMPLETE:
            if not self.path.exists():
                raise InputError(f"{self.path} was completed and is gone; compute it again with --overwrite")
            return state, Progress(**{**asdict(progress), "position": progress.position, "num_bytes": 0})
        if partial_bytes < progress.num_bytes:
            raise InputError(
                f"{self._partial_path} is shorter than {self._journal_path.name} says, so results are lost; "
                "start over with --overwrite"
            )
        return state, progress

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            text = self._journal_path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            journal = json.loads(text)
        except ValueError:
            journal = None
        if not isinstance(journal, dict) or journal.get("version") != _VERSION:
            raise InputError(
                f"{self._journal_path} is not the journal of a job of this version; start over with "
                "--overwrite, or give another name"
            )
        return journal

    def _refuse_unknown_files(self) -> None:
        if self.path.exists():
            raise InputError(f"{self.path} exists; give another name, or replace it with --overwrite")
        if self._partial_path.stat().st_size:
            raise InputError(
                f"{self._partial_path} exists, and no {self._journal_path.name} says which job it is of; "
                "give another name, or replace it with --overwrite"
            )

    def _record(self, state: str, progress: Progress) -> None:
        journal = {"version": _VERSION, "job": self._identity, "state": state, "progress": asdict(progress)}
        unfinished = self._journal_path.with_name(self._journal_path.name + _NEW)
        with open(unfinished, "w", encoding="ascii") as file:
            file.write(json.dumps(journal, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self._journal_path)
        self._state, self.progress = state, progress

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise OutputFileError(
                f"cannot write {self.path}: {error.strerror or error}. What is written so far is kept; when "
                "that is put right, the same command continues"
            ) from error


def _lock(file: BinaryIO, path: Path) -> None:
    """Keeps other processes from the same output; the system lets go when the process ends, however it does.

    Raises:
        InputError: another process is writing it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing {path}; wait for it, or give another name") from None
