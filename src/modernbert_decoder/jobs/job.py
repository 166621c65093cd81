"""A job: a task over inputs with an engine, streamed to a reader or into a file that survives being killed.

Work is done block by block, and a block's results do not depend on where a run began: a job that was killed
and continued, in this process or by Ray's workers, writes what an uninterrupted one writes. It knows no
command line.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from modernbert_decoder import __version__
from modernbert_decoder.errors import InputError
from modernbert_decoder.jobs.inputs import STANDARD_INPUT, Inputs
from modernbert_decoder.jobs.parquet_files import require_pyarrow
from modernbert_decoder.jobs.resumable import ResumableOutput
from modernbert_decoder.jobs.rows import Block, Position
from modernbert_decoder.jobs.standard_input import StreamDigest
from modernbert_decoder.jobs.tasks import ERROR, RANK, SORT_BY, Task, result_columns, rows_of
from modernbert_decoder.jobs.writers import JSONL, PARQUET, json_line, kinds_of_columns, write_rows

if TYPE_CHECKING:
    from modernbert_decoder.engine.llm import LLM

# What texts become depends on them; the model's fingerprint is of the other files.
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The arguments of `LLM` that a job passes on."""

    model: str
    revision: str | None = None
    dtype: str | None = None
    vocabulary_dtype: str | None = None
    adapter: str | None = None
    threads: int | None = None
    max_context: int | None = None

    def open(self) -> LLM:
        """The engine.

        Raises:
            UserError: the model cannot be used.
        """
        from modernbert_decoder.engine.llm import LLM

        return LLM(**asdict(self))

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, without reading its weights.

        Raises:
            UserError: there is no such model.
        """
        from modernbert_decoder.checkpoint import find_checkpoint
        from modernbert_decoder.engine.loading import open_checkpoint

        folder = find_checkpoint(self.model, revision=self.revision)
        tokenizer = hashlib.sha256()
        for path in (folder / name for name in _TOKENIZER_FILES):
            tokenizer.update(path.read_bytes() if path.is_file() else b"")
            tokenizer.update(b"\0")
        return {
            "fingerprint": open_checkpoint(folder, self.adapter).fingerprint(),
            "tokenizer": tokenizer.hexdigest(),
            "dtype": self.dtype,
            "vocabulary_dtype": self.vocabulary_dtype,
            "max_context": self.max_context,
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compute, from what, with what.

    Attributes:
        task: what to compute for each row.
        inputs: the rows.
        engine: the model.
        top: of results that are sorted, only so many; None: all.
        on_command_line: rows that cannot be used are told the names of options, not of arguments.
    """

    task: Task
    inputs: Inputs
    engine: EngineOptions
    top: int | None = None
    on_command_line: bool = False

    @property
    def has_files(self) -> bool:
        """Whether results name a file."""
        return any(name != STANDARD_INPUT for name in self.inputs.files)

    def columns(self, kept: Mapping[str, str]) -> dict[str, str]:
        """The columns of the results, those carried along among them: name -> kind."""
        return result_columns(self.task, kept, has_files=self.has_files)

    def identity(self, *, format: str) -> dict[str, Any]:
        """What tells this job from others, under the names that a message uses."""
        return {
            "version of modernbert-decoder": __version__,
            "inputs": self.inputs.identity(),
            "model": self.engine.identity(),
            "options": [self.task.name, asdict(self.task), self.top, format],
        }


@dataclass(frozen=True, slots=True)
class ComputedBlock:
    """The results of a block, as they are written.

    Attributes:
        lines: one JSON object for each row.
        num_rows: how many.
        reports: where, and what was wrong, for rows without a result.
        end: where the next block begins.
    """

    lines: bytes
    num_rows: int
    reports: Sequence[tuple[str, str]]
    end: Position


@dataclass(frozen=True, slots=True)
class Summary:
    """How a job ended.

    Attributes:
        num_rows: results in the file, those of earlier runs included.
        num_errors: those among them that say what was wrong.
        num_computed: results of this run.
        seconds: of this run.
    """

    num_rows: int
    num_errors: int
    num_computed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told what happens, and whether a bad row ends the job.

    Attributes:
        on_rows: the number of rows that were computed, or were there already, and the share of the inputs
            that is read (None where that is unknown).
        on_error: where and what was wrong with a row.
        strict: the first row without a result is an `InputError`.
    """

    on_rows: Callable[[int, float | None], None] = lambda num_rows, share: None
    on_error: Callable[[str, str], None] = lambda where, message: None
    strict: bool = False

    def report(self, where: str, message: str) -> None:
        """Passes on what was wrong with a row.

        Raises:
            InputError: in strict jobs.
        """
        if self.strict:
            raise InputError(f"{where}: {message}")
        self.on_error(where, message)


Compute = Callable[[Position, StreamDigest], Generator[ComputedBlock, None, None]]


def run_to_file(
    job: Job,
    output: Path,
    *,
    format: str,
    overwrite: bool = False,
    listeners: Listeners | None = None,
    compute: Compute | None = None,
) -> Summary:
    """Writes the results of a job into a file, continuing what an earlier run of the same job left.

    Args:
        job: what to do.
        output: the file; beside it stand FILE.partial while the job runs, and FILE.job.json.
        format: one of `writers.FORMATS`.
        overwrite: replace what is there of other jobs; an unfinished run of this one is continued all the
            same, unless it reads standard input.
        listeners: who is told what happens.
        compute: how blocks are computed from a position on; by default in this process.

    Raises:
        UserError: whatever is wrong with inputs, model or output.
    """
    listeners = listeners or Listeners()
    if format == PARQUET:
        require_pyarrow()
    job.inputs.check()
    if any(Path(name).resolve() == output.resolve() for name in job.inputs.files):
        raise InputError(f"{output} is one of the inputs; give another name for the results")
    started = time.perf_counter()
    has_stream = STANDARD_INPUT in job.inputs.files
    with ResumableOutput(
        output, job.identity(format=format), overwrite=overwrite, keeps_unfinished=not has_stream
    ) as results:
        num_before = results.progress.num_rows
        if results.has_all:
            digest = _same_stream_digest(job, results)
        else:
            digest = _fill(job, results, listeners, compute or partial(compute_blocks, job))
        if not results.is_complete:
            is_file_already = format == JSONL and not job.task.is_sorted
            results.finish(None if is_file_already else partial(_convert, job, format), digest=digest)
        progress = results.progress
    seconds = time.perf_counter() - started
    return Summary(progress.num_rows, progress.num_errors, progress.num_rows - num_before, seconds)


def compute_blocks(job: Job, start: Position, digest: StreamDigest) -> Generator[ComputedBlock, None, None]:
    """The results from a position on, computed in this process; the model is loaded for the first block."""
    llm: LLM | None = None
    try:
        for block in job.inputs.blocks(start, digest=digest):
            llm = llm or job.engine.open()
            yield compute_block(job, llm, block)
    finally:
        if llm is not None:
            llm.close()


def compute_block(job: Job, llm: LLM, block: Block) -> ComputedBlock:
    """The results of one block."""
    lines: list[bytes] = []
    reports: list[tuple[str, str]] = []
    rows = rows_of(job.task, llm, block.records, on_command_line=job.on_command_line)
    for record, row in zip(block.records, rows, strict=True):
        lines.append(json_line(row))
        if row[ERROR] is not None:
            reports.append((record.where, row[ERROR]))
    return ComputedBlock(b"".join(lines), len(lines), reports, block.end)


def stream_blocks(job: Job, listeners: Listeners) -> Generator[Iterator[dict[str, Any]], None, None]:
    """The results of a job, in the order of the rows, or sorted where the task says so.

    They come in parts, each of which has to be read before the next. One ends where standard input has
    nothing more to give at the moment.

    Raises:
        UserError: whatever is wrong with inputs or model.
    """
    job.inputs.check()
    blocks = _blocks_in_order(job, listeners)
    return _sorted_block(blocks, job.top) if job.task.is_sorted else blocks


def stream_rows(job: Job, listeners: Listeners) -> Generator[dict[str, Any], None, None]:
    """`stream_blocks`, row by row."""
    with closing(stream_blocks(job, listeners)) as blocks:
        for rows in blocks:
            yield from rows


def _same_stream_digest(job: Job, results: ResumableOutput) -> str | None:
    """The digest of standard input, where all results are there already.

    Raises:
        InputError: they are those of other texts.
    """
    digest = job.inputs.stream_digest()
    if digest != results.progress.digest:
        raise InputError(
            f"{results.path} holds the results of other texts than standard input has now; give another "
            "name, or start over with --overwrite"
        )
    return digest


def _fill(job: Job, results: ResumableOutput, listeners: Listeners, compute: Compute) -> str | None:
    """Computes what is missing and adds it, block by block; returns the digest of standard input, if read."""
    progress = results.progress
    has_stream = STANDARD_INPUT in job.inputs.files
    digest = StreamDigest(progress.digest)
    listeners.on_rows(progress.num_rows, job.inputs.share_read(progress.position))
    with closing(compute(progress.position, digest)) as blocks:
        for block in blocks:
            for where, message in block.reports:
                listeners.report(where, message)
            results.append(
                block.lines,
                num_rows=block.num_rows,
                num_errors=len(block.reports),
                position=block.end,
                digest=digest.marked() if has_stream else None,
            )
            listeners.on_rows(block.num_rows, job.inputs.share_read(block.end))
    return digest.hexdigest() if has_stream else None


def _convert(job: Job, format: str, lines: Path, file: BinaryIO) -> None:
    """Writes the results, which are there as JSON lines, in their format and order."""
    kept: dict[str, str] = {}
    if job.inputs.columns.keep:
        own = job.columns({})
        kept = dict.fromkeys(job.inputs.kept_columns() or (), "text")
        kept |= kinds_of_columns(_read_lines(lines), but=own)
    rows = sorted_rows(lines, job.top) if job.task.is_sorted else _read_lines(lines)
    write_rows(file, rows, format=format, columns=job.columns(kept))


def _read_lines(lines: Path) -> Iterator[dict[str, Any]]:
    with open(lines, "rb") as file:
        for line in file:
            yield json.loads(line)


def sorted_rows(lines: Path, top: int | None) -> Iterator[dict[str, Any]]:
    """The results with the greatest score first, equal ones in their order; those without one come last.

    Some thirty bytes of memory for each of them.
    """
    import numpy as np

    scores, offsets, without = array("d"), array("q"), array("q")
    with open(lines, "rb") as file:
        offset = 0
        for line in file:
            score = json.loads(line)[SORT_BY]
            if score is None:
                without.append(offset)
            else:
                scores.append(-score)
                offsets.append(offset)
            offset += len(line)
        order = np.argsort(np.asarray(scores), kind="stable")
        for rank, index in enumerate(order[:top], 1):  # as a list, it would take several times the memory
            file.seek(offsets[index])
            yield {RANK: rank, **json.loads(file.readline())}
        for offset in without if top is None else ():
            file.seek(offset)
            yield {RANK: None, **json.loads(file.readline())}


def _sorted_block(
    blocks: Generator[Iterator[dict[str, Any]], None, None], top: int | None
) -> Generator[Iterator[dict[str, Any]], None, None]:
    """All results as one part, sorted; until all are there, they wait in a temporary file."""
    with closing(blocks), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with open(path, "wb") as file:
            file.writelines(json_line(row) for rows in blocks for row in rows)
        yield sorted_rows(path, top)


def _blocks_in_order(job: Job, listeners: Listeners) -> Generator[Iterator[dict[str, Any]], None, None]:
    llm: LLM | None = None
    try:
        with closing(job.inputs.blocks(is_live=True)) as blocks:
            for block in blocks:
                llm = llm or job.engine.open()
                yield _reported_rows(job, llm, block, listeners)
    finally:
        if llm is not None:
            llm.close()


def _reported_rows(job: Job, llm: LLM, block: Block, listeners: Listeners) -> Iterator[dict[str, Any]]:
    rows = rows_of(job.task, llm, block.records, on_command_line=job.on_command_line)
    for record, row in zip(block.records, rows, strict=True):
        if row[ERROR] is not None:
            listeners.report(record.where, row[ERROR])
        listeners.on_rows(1, None)
        yield row
