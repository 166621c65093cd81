"""What writing a checkpoint can raise, as one message that names the last whole one.

Knows which libraries write, and nothing of what they write.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from safetensors import SafetensorError

from modernbert_decoder.atomic_files import WritingError
from modernbert_decoder.errors import UserError
from modernbert_decoder.training.checkpoints import all_checkpoints
from modernbert_decoder.training.errors import TrainingError

# How torch, which says whatever went wrong with a RuntimeError, speaks of a file it writes.
_WRITERS_WORDS: Final = (
    "inline_container",
    "PytorchStreamWriter",
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "iostream error",
)
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Writer(Protocol):
    """What writes checkpoints."""

    @property
    def saving_step(self) -> int | None:
        """The step whose checkpoint is being written; None in between."""


@contextmanager
def disk_errors_explained(
    writer: Writer, out: Path, *, checkpoints: Callable[[Path], Sequence[Path]] = all_checkpoints
) -> Iterator[None]:
    """Turns what writing raises into one message that names the last good checkpoint.

    Args:
        writer: tells whether a checkpoint is being written.
        out: the folder of the run.
        checkpoints: the whole ones of a run, the newest last.
    """
    try:
        yield
    except WritingError as error:
        raise TrainingError(_disk_message(writer, error.reason, out, checkpoints(out))) from error
    except UserError:
        raise
    except SafetensorError as error:  # of writing: nothing else in the loop uses that library
        raise TrainingError(_disk_message(writer, error, out, checkpoints(out))) from error
    except (OSError, RuntimeError) as error:
        if not _is_of_writing(error, is_saving=writer.saving_step is not None):
            raise
        raise TrainingError(_disk_message(writer, error, out, checkpoints(out))) from error


def _is_of_writing(error: OSError | RuntimeError, *, is_saving: bool) -> bool:
    """Whether a file could not be written; processes that save together may also lose each other."""
    if isinstance(error, RuntimeError):
        return is_saving and any(words in str(error) for words in _WRITERS_WORDS)
    return error.errno in _DISK_ERRORS or (is_saving and not isinstance(error, ConnectionError))


def _disk_message(writer: Writer, error: Exception, out: Path, found: Sequence[Path]) -> str:
    step = writer.saving_step
    what = "a file of the run" if step is None else f"the checkpoint of step {step:,}"
    last = f"the last whole checkpoint is {found[-1]}" if found else "there is no earlier checkpoint"
    free = os.statvfs(out)
    reason = str(error).splitlines()[0]
    return (
        f"cannot write {what} in {out}: {reason} ({free.f_bavail * free.f_frsize / 1e6:,.0f} MB free). Free "
        f"some space and start the same command again; {last}"
    )
