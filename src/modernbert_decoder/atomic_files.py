"""Files and folders that appear under their final name whole or not at all.

Everything is written beside its destination under a hidden temporary name, flushed to the disk, and renamed
at the end; whatever interrupts the writing (a full disk, Ctrl-C, an error of the caller) leaves the final
name as it was. This module knows nothing of models.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from modernbert_decoder.errors import CheckpointError, InputError, UserError


class WritingError(CheckpointError):
    """A file or folder that the operating system did not let us write, and its reason."""

    def __init__(self, path: Path, reason: OSError) -> None:
        super().__init__(_writing_problem(path, reason))
        self.reason = reason


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an error, and vanishes
    otherwise.

    Raises:
        WritingError: the file cannot be written; says why, names it, and tells the free space when the disk
            is full.
    """
    temporary = _temporary_name(path)
    try:
        with _writing(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):  # not there, or in a folder that may not be searched: the first error counts
            temporary.unlink()
        raise


def write_folder(destination: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Build a model folder by calling `write` with a temporary sibling folder, then rename that to
    `destination`.

    Args:
        destination: where the folder shall appear; missing parents are created.
        write: fills the folder it is given; whatever it raises passes through after the temporary folder is
            removed.
        overwrite: replace a model folder (one that holds a `config.json`) that already stands at
            `destination`.

    Raises:
        InputError: the destination is a file, or a folder that is not empty and may not be replaced, or that
            holds folders, which would be lost.
        WritingError: the folder cannot be written; says why, names it, and tells the free space when the disk
            is full.
    """
    destination = Path(os.path.abspath(os.path.expanduser(destination)))
    with _writing(destination):
        if destination.is_symlink():
            destination = destination.resolve()
        _check_destination(destination, overwrite=overwrite)
    temporary = _temporary_name(destination)
    try:
        with _writing(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            make_readable(temporary)
            sync_folder(temporary)
            _rename_folder(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def make_readable(folder: Path) -> None:
    """Lets everybody read the files in a folder who may read the folder, as far as the umask went.

    Libraries that write through temporary files of their own leave them to the owner alone.
    """
    readable = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | readable)


def sync_folder(folder: Path) -> None:
    """Flushes a folder and everything in it to the disk."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination whose content would be lost or mixed with the new one."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"{destination} is a file; give the name of a folder that does not exist yet")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{destination} exists and is not empty; choose another name or ask to overwrite it")
    if not (destination / "config.json").is_file():
        raise InputError(
            f"{destination} exists and is not a model folder (it has no config.json), so it is not "
            "overwritten; choose another name or empty it first"
        )
    # The model being read may be one of them.
    folders = sorted(path.name for path in destination.iterdir() if path.is_dir())
    if folders:
        raise InputError(
            f"{destination} is not overwritten, since the folders in it ({', '.join(folders[:5])}) would be "
            "lost; choose another name or move them away first"
        )


def _rename_folder(temporary: Path, destination: Path) -> None:
    """Move `temporary` to `destination`; a folder standing there is put aside first and put back if that
    fails.
    """
    if not destination.exists():
        temporary.rename(destination)
    else:
        previous = _temporary_name(destination)
        destination.rename(previous)
        try:
            temporary.rename(destination)
        except BaseException:
            previous.rename(destination)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    _sync(destination.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed had begun to write with this file or folder as destination.

    Nobody may be writing it meanwhile.
    """
    for unfinished in path.parent.glob(_temporary(glob.escape(path.name), "*")):
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink()


def _temporary_name(path: Path) -> Path:
    """A hidden sibling name that no other process will choose."""
    return path.with_name(_temporary(path.name, secrets.token_hex(4)))


def _temporary(name: str, token: str) -> str:
    return f".{name}.{token}.partial"


def _sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk; systems that cannot open folders (Windows) skip
    those.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the destination and says what to do."""
    try:
        yield
    except WritingError as error:  # of a file within the folder that is being built: name the folder instead
        raise WritingError(path, error.reason) from error.reason
    except UserError:  # some of our own errors are OSErrors as well
        raise
    except OSError as error:
        raise WritingError(path, error) from error


def _writing_problem(path: Path, error: OSError) -> str:
    """The sentence a user reads when `path` could not be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next((folder for folder in path.parents if folder.exists()), Path(path.anchor))
        free_megabytes = shutil.disk_usage(existing).free / 1e6
        return (
            f"cannot write {path}: the disk is full ({reason}; {free_megabytes:,.0f} MB free at {existing}). "
            "Nothing was left behind; free some space or choose another place"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {path}: {reason}. Choose a folder that you may write to"
    return f"cannot write {path}: {reason}. Nothing was left behind"
